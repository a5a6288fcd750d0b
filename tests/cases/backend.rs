//! A backend to test, and the way of a host tensor to it and back. The calls themselves are the crate's.

use super::Call;
use fused_dropout::cpu::Cpu;
use fused_dropout::{
    Backend, Dropout, Error, Memory, Pass, Probability, Readable, RowMap, Shape, Shard, Writable,
};

/// A backend to test.
pub trait TestBackend {
    type Backend: Backend + 'static;
    /// A tensor within a larger allocation, whose other elements must stay as they are.
    type Tensor<T: bytemuck::Pod>: Writable<T, Self::Backend>;

    fn name(&self) -> String;
    fn runs_on(&self) -> &Self::Backend;
    /// A tensor that holds `content`, `offset` elements behind an aligned address.
    fn tensor<T: bytemuck::Pod>(&self, content: &[T], offset: usize) -> Self::Tensor<T>;
    /// What the tensor holds, or what was written beside it.
    fn contents<T: bytemuck::Pod>(&self, tensor: &Self::Tensor<T>) -> Result<Vec<T>, String>;

    /// A matrix of the call's shape. Each one of a pass has a `which` of its own, and so a gap between its rows.
    fn matrix<T: bytemuck::Pod>(
        &self,
        content: &[T],
        call: &Call,
        which: usize,
    ) -> Rows<Self::Tensor<T>> {
        let Shape { rows, cols } = call.shape;
        let stride = cols + call.gap * (1 + which % 3);
        let mut all = vec![canary(); rows * stride];
        for row in 0..rows {
            all[row * stride..][..cols].copy_from_slice(&content[row * cols..][..cols]);
        }
        if which.is_multiple_of(2) && rows > 0 {
            all.truncate((rows - 1) * stride + cols);
        }
        Rows { tensor: self.tensor(&all, call.offset), cols, stride }
    }

    /// What a matrix holds, or what was written beside its rows.
    fn rows<T: bytemuck::Pod>(&self, matrix: &Rows<Self::Tensor<T>>) -> Result<Vec<T>, String> {
        let mut content = self.contents(&matrix.tensor)?;
        if matrix.stride == matrix.cols {
            return Ok(content);
        }
        let rows: Vec<_> =
            content.chunks_mut(matrix.stride).map(|row| row.split_at(matrix.cols)).collect();
        if rows.iter().any(|(_, gap)| !is_canary(gap)) {
            return Err("wrote between the rows".to_owned());
        }
        Ok(rows.into_iter().flat_map(|(row, _)| row).copied().collect())
    }

    /// Runs a pass with the call's dropout: with an explicit row list, for odd offsets the stream number, and for some
    /// calls the probability in the backend's memory.
    fn run<'a, P: Pass<'a, Self::Backend>>(&self, call: &Call, pass: P) -> Result<(), String> {
        self.try_run(call, pass).map_err(|error| error.to_string())
    }

    fn try_run<'a, P: Pass<'a, Self::Backend>>(&self, call: &Call, pass: P) -> Result<(), Error> {
        let given = &call.dropout;
        let number = self.tensor(&[given.key.stream], 0);
        let list = match given.shard.rows {
            RowMap::Explicit(list) => Some(self.tensor(list, 0)),
            _ => None,
        };
        let packed = self.tensor(&[given.p.packed()], 0);
        // Nobody may look at the host's, where there is another.
        let p = if call.resident_p { other_than(given.p) } else { given.p };
        let resident = call.offset % 2 == 1;
        let dropout = match resident {
            true => Dropout::<Self::Backend>::resident(given.key.seed, &number, p),
            false => Dropout::new(given.key, p).into(),
        };
        let dropout = if call.resident_p { dropout.resident_p(&packed) } else { dropout };
        let dropout = dropout.mode(given.mode).scaling(given.scaling).groups(given.groups);
        let dropout = match &list {
            Some(list) => {
                dropout.shard(Shard { rows: RowMap::WHOLE, ..given.shard }).row_list(list)
            }
            None => dropout.shard(given.shard),
        };
        self.runs_on().run(&dropout, pass)
    }
}

/// A probability that draws another mask, or a mask where the other one draws none.
fn other_than(p: Probability) -> Probability {
    match p.threshold() {
        0 | 65536 => Probability::new(0.3).unwrap(),
        threshold if threshold % 2 == 0 => Probability::ZERO,
        _ => Probability::ONE,
    }
}

/// A tensor on the host between canaries.
pub struct Guarded<T: 'static> {
    before: &'static mut [T],
    tensor: &'static mut [T],
    behind: &'static mut [T],
    all: *mut [T],
}

/// A matrix whose rows begin `stride` elements apart; without a gap it is a contiguous tensor.
pub struct Rows<X> {
    tensor: X,
    cols: usize,
    stride: usize,
}

// SAFETY: the tensor is one.
unsafe impl<T, M: Memory, X: Readable<T, M>> Readable<T, M> for Rows<X> {
    fn elements(&self) -> usize {
        self.tensor.elements()
    }

    fn row_stride(&self) -> Option<usize> {
        (self.stride != self.cols).then_some(self.stride)
    }

    fn read<'a>(&'a self, memory: &'a M) -> Result<M::In<'a, T>, Error> {
        self.tensor.read(memory)
    }
}

// SAFETY: as above.
unsafe impl<T, M: Memory, X: Writable<T, M>> Writable<T, M> for Rows<X> {
    fn write<'a>(&'a mut self, memory: &'a M) -> Result<M::Out<'a, T>, Error> {
        self.tensor.write(memory)
    }
}

/// Elements on each side.
const GUARD: usize = 16;
const CANARY: u8 = 0xa5;

fn canary<T: bytemuck::Pod>() -> T {
    bytemuck::pod_read_unaligned(&vec![CANARY; size_of::<T>()])
}

fn is_canary<T: bytemuck::Pod>(elements: &[T]) -> bool {
    bytemuck::cast_slice(elements).iter().all(|&byte: &u8| byte == CANARY)
}

impl<T: bytemuck::Pod> Guarded<T> {
    pub fn new(content: &[T], offset: usize) -> Self {
        let mut all = vec![canary(); GUARD + offset];
        all.extend_from_slice(content);
        all.extend(std::iter::repeat_n(canary::<T>(), GUARD));
        let all = Box::into_raw(all.into_boxed_slice());
        // SAFETY: the allocation is this value's alone until it is dropped, and the three parts do not overlap.
        let (before, rest) = unsafe { &mut *all }.split_at_mut(GUARD + offset);
        let (tensor, behind) = rest.split_at_mut(content.len());
        Self { before, tensor, behind, all }
    }

    pub fn contents(&self) -> Result<Vec<T>, String> {
        match is_canary(self.before) && is_canary(self.behind) {
            true => Ok(self.tensor.to_vec()),
            false => Err("wrote beside the tensor".to_owned()),
        }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: `new` made it of a box, and its parts are not used any more.
        drop(unsafe { Box::from_raw(self.all) });
    }
}

// SAFETY: what the crate says of a slice.
unsafe impl<T: 'static, M: Memory> Readable<T, M> for Guarded<T>
where
    [T]: Writable<T, M>,
{
    fn elements(&self) -> usize {
        self.tensor.len()
    }

    fn read<'a>(&'a self, memory: &'a M) -> Result<M::In<'a, T>, Error> {
        Readable::<T, M>::read(&*self.tensor, memory)
    }
}

// SAFETY: as above.
unsafe impl<T: 'static, M: Memory> Writable<T, M> for Guarded<T>
where
    [T]: Writable<T, M>,
{
    fn write<'a>(&'a mut self, memory: &'a M) -> Result<M::Out<'a, T>, Error> {
        Writable::<T, M>::write(&mut *self.tensor, memory)
    }
}

/// The CPU at one SIMD level.
impl TestBackend for Cpu {
    type Backend = Cpu;
    type Tensor<T: bytemuck::Pod> = Guarded<T>;

    fn name(&self) -> String {
        format!("cpu {:?}", self.level())
    }

    fn runs_on(&self) -> &Cpu {
        self
    }

    fn tensor<T: bytemuck::Pod>(&self, content: &[T], offset: usize) -> Guarded<T> {
        Guarded::new(content, offset)
    }

    fn contents<T: bytemuck::Pod>(&self, tensor: &Guarded<T>) -> Result<Vec<T>, String> {
        tensor.contents()
    }
}

/// The kernels on the host. The emulator keeps a tensor's address modulo 128.
#[cfg(feature = "emulator")]
pub struct Emulated {
    pub emulator: fused_dropout::emulator::Emulator,
    pub name: String,
}

#[cfg(feature = "emulator")]
impl TestBackend for Emulated {
    type Backend = fused_dropout::emulator::Emulator;
    type Tensor<T: bytemuck::Pod> = Guarded<T>;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn runs_on(&self) -> &Self::Backend {
        &self.emulator
    }

    fn tensor<T: bytemuck::Pod>(&self, content: &[T], offset: usize) -> Guarded<T> {
        Guarded::new(content, offset)
    }

    fn contents<T: bytemuck::Pod>(&self, tensor: &Guarded<T>) -> Result<Vec<T>, String> {
        tensor.contents()
    }
}
