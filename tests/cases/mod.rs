//! The one table of cases, and what a backend must offer to be run through it.
#![allow(dead_code)] // every test file uses a part
#![allow(clippy::type_complexity)] // closures over tensors that only live for a call

use fused_dropout::{
    Dropout, Dtype, Error, Key, Mode, Place, Probability, RowMap, Scaling, Scores, Shape,
};

use crate::oracle::AttentionMask;

/// A backend on host tensors. `x` and `dy` are `None` for a call in place, on what `y` or `dx` holds.
pub trait Backend {
    fn name(&self) -> String;
    fn dropout<T: Dtype>(&self, call: &Call, x: Option<&[T]>, y: &mut [T]) -> Result<(), Error>;
    fn dropout_add<T: Dtype>(
        &self,
        call: &Call,
        x: &[T],
        bias: Option<&[T]>,
        residual: Option<&[T]>,
        y: &mut [T],
    ) -> Result<(), Error>;
    fn dropout_add_backward<T: Dtype>(
        &self,
        call: &Call,
        dy: Option<&[T]>,
        dx: &mut [T],
        dbias: Option<&mut [f32]>,
    ) -> Result<(), Error>;
    fn keep_mask(&self, call: &Call, bits: bool, out: &mut [u8]) -> Result<(), Error>;
    fn softmax_dropout<T: Dtype>(
        &self,
        call: &Call,
        scores: &Scores,
        mask: &AttentionMask<'_, T>,
        x: Option<&[T]>,
        y: &mut [T],
        lse: Option<&mut [f32]>,
    ) -> Result<(), Error>;
    fn softmax_dropout_backward<T: Dtype>(
        &self,
        call: &Call,
        scores: &Scores,
        mask: &AttentionMask<'_, T>,
        x: &[T],
        lse: Option<&[f32]>,
        dy: Option<&[T]>,
        dx: &mut [T],
    ) -> Result<(), Error>;
}

/// A row of the table: which mask, of which shape.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub dropout: Dropout<'static>,
    pub shape: Shape,
    /// Elements that the tensors start behind an allocation's start.
    pub offset: usize,
}

const P: [f64; 6] = [0.1, 0.0, 0.5, 1.0 / 65536.0, 0.9, 1.0];

/// Odd sizes, tails on both sides of a vector, a block and a warp, tall and flat ones.
const SHAPES: [(usize, usize); 34] = [
    (0, 0),
    (0, 5),
    (5, 0),
    (1, 1),
    (1, 7),
    (2, 8),
    (3, 9),
    (1, 15),
    (5, 16),
    (2, 17),
    (64, 1),
    (65, 2),
    (63, 8),
    (130, 3),
    (7, 31),
    (6, 33),
    (3, 63),
    (9, 64),
    (2, 65),
    (33, 127),
    (12, 128),
    (11, 129),
    (5, 255),
    (4, 512),
    (130, 520),
    (3, 1000),
    (8, 1024),
    (3, 1025),
    (2, 2049),
    (1, 4099),
    (3, 4104),
    (1, 20_000),
    (4097, 5),
    (4200, 8),
];

fn row_map(index: usize, rows: usize) -> RowMap<'static> {
    match index % 6 {
        0 => RowMap::WHOLE,
        1 => RowMap::Contiguous { first: (u32::MAX - rows as u32).wrapping_add(1).max(1) },
        2 => RowMap::Blocks { first: 5, block: 3, stride: 70_000 },
        3 => RowMap::Attention {
            first: 9,
            heads: 2,
            queries: 3,
            head_stride: 50,
            batch_stride: 400_001,
        },
        4 => {
            let list: Vec<u32> =
                (0..rows as u32).map(|r| r.wrapping_mul(0x9E37_79B9) ^ 77).collect();
            RowMap::Explicit(list.leak())
        }
        _ => RowMap::Blocks { first: 1 << 31, block: 64, stride: 64 },
    }
}

/// The table: every shape with every p; the rest of a row goes round with strides that are coprime,
/// so that neighbours differ in everything.
pub fn table() -> Vec<Call> {
    let mut table = Vec::new();
    for (s, (rows, cols)) in SHAPES.into_iter().enumerate() {
        let shape = Shape::new(rows, cols);
        for (i, p) in P.into_iter().enumerate() {
            let n = s * 7 + i * 5 + 1;
            let limit = (fused_dropout::MAX_COLS - cols as u64) / 8 * 8;
            let place =
                Place { first_col: [0, 8, 1 << 23, limit, 0][n % 5], rows: row_map(n, rows) };
            let stream = [7, 0, u64::MAX, 1 << 32, (1 << 40) + 3][n / 2 % 5];
            let seed = [42, u64::MAX, 0, 1][n / 3 % 4];
            // Mostly the usual training call.
            let mode = if n % 11 == 3 { Mode::Inference } else { Mode::Training };
            let scaling = if n % 4 == 1 { Scaling::Classic } else { Scaling::Inverted };
            let p = Probability::new(p).unwrap();
            let dropout = Dropout::new(Key::new(seed, stream), p).at(place);
            let offset = [0, 0, 1, 3, 0, 8, 5][n % 7];
            table.push(Call { dropout: dropout.mode(mode).scaling(scaling), shape, offset });
        }
    }
    table
}

/// Values that depend on their index: ordinary ones, and among them NaN, infinities, zeros of both
/// signs, subnormals and the largest numbers.
pub fn values<T: Dtype>(len: usize, salt: u64, specials: bool) -> Vec<T> {
    let value = |i: usize| {
        let mixed =
            rand_philox::splitmix64((i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ salt);
        let ordinary = (mixed >> 40) as f32 / (1 << 22) as f32 - 2.0;
        let special = match mixed % 97 {
            0 => f32::NAN,
            1 => f32::INFINITY,
            2 => f32::NEG_INFINITY,
            3 => -0.0,
            4 => 1e-42,
            5 => -6e-8,
            6 => 3e38,
            7 => 65504.0,
            _ => ordinary,
        };
        T::from_f32(if specials { special } else { ordinary })
    };
    (0..len).map(value).collect()
}

/// Bits, all NaNs alike.
pub fn bits<T: Dtype>(value: T) -> u32 {
    let value = value.to_f32();
    if value.is_nan() { u32::MAX } else { value.to_bits() }
}

/// A tensor within a larger allocation whose other elements must stay as they are.
pub struct Guarded<T> {
    all: Vec<T>,
    first: usize,
    len: usize,
}

/// Elements on each side.
const GUARD: usize = 16;

impl<T: Dtype> Guarded<T> {
    /// A tensor that holds `content`, `offset` elements behind a multiple of 16.
    pub fn new(content: &[T], offset: usize) -> Self {
        let canary = T::from_f32(-77.0);
        let first = GUARD + offset;
        let mut all = vec![canary; first + content.len() + GUARD];
        all[first..first + content.len()].copy_from_slice(content);
        Self { all, first, len: content.len() }
    }

    pub fn tensor(&mut self) -> &mut [T] {
        &mut self.all[self.first..self.first + self.len]
    }

    /// The tensor, or what was written beside it.
    pub fn finish(self) -> Result<Vec<T>, String> {
        let canary = bits(T::from_f32(-77.0));
        let outside = |&i: &usize| !(self.first..self.first + self.len).contains(&i);
        match (0..self.all.len()).filter(outside).find(|&i| bits(self.all[i]) != canary) {
            Some(i) => {
                Err(format!("wrote element {} beside the tensor", i as i64 - self.first as i64))
            }
            None => Ok(self.all[self.first..self.first + self.len].to_vec()),
        }
    }
}

/// The CPU at one SIMD level.
impl Backend for fused_dropout::cpu::Cpu {
    fn name(&self) -> String {
        format!("cpu {:?}", self.level())
    }
    fn dropout<T: Dtype>(&self, c: &Call, x: Option<&[T]>, y: &mut [T]) -> Result<(), Error> {
        use fused_dropout::cpu::dropout;
        match x {
            Some(x) if c.offset.is_multiple_of(2) => {
                dropout::forward(self, &c.dropout, c.shape, x, y)
            }
            Some(x) => dropout::backward(self, &c.dropout, c.shape, x, y),
            None if c.offset.is_multiple_of(2) => {
                dropout::forward_in_place(self, &c.dropout, c.shape, y)
            }
            None => dropout::backward_in_place(self, &c.dropout, c.shape, y),
        }
    }
    fn dropout_add<T: Dtype>(
        &self,
        c: &Call,
        x: &[T],
        bias: Option<&[T]>,
        residual: Option<&[T]>,
        y: &mut [T],
    ) -> Result<(), Error> {
        use fused_dropout::cpu::dropout_add;
        match residual {
            Some(r) => dropout_add::forward(self, &c.dropout, c.shape, x, bias, r, y),
            None => dropout_add::forward_in_place(self, &c.dropout, c.shape, x, bias, y),
        }
    }
    fn dropout_add_backward<T: Dtype>(
        &self,
        c: &Call,
        dy: Option<&[T]>,
        dx: &mut [T],
        dbias: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        use fused_dropout::cpu::dropout_add;
        match dy {
            Some(dy) => dropout_add::backward(self, &c.dropout, c.shape, dy, dx, dbias),
            None => dropout_add::backward_in_place(self, &c.dropout, c.shape, dx, dbias),
        }
    }
    fn keep_mask(&self, c: &Call, bits: bool, out: &mut [u8]) -> Result<(), Error> {
        use fused_dropout::cpu::keep_mask;
        match bits {
            true => keep_mask::bits(self, &c.dropout, c.shape, out),
            false => keep_mask::bytes(self, &c.dropout, c.shape, out),
        }
    }
    fn softmax_dropout<T: Dtype>(
        &self,
        c: &Call,
        scores: &Scores,
        mask: &AttentionMask<'_, T>,
        x: Option<&[T]>,
        y: &mut [T],
        lse: Option<&mut [f32]>,
    ) -> Result<(), Error> {
        use fused_dropout::cpu::softmax_dropout as op;
        match x {
            Some(x) => op::forward(self, &c.dropout, scores, &slices(mask), x, y, lse),
            None => op::forward_in_place(self, &c.dropout, scores, &slices(mask), y, lse),
        }
    }
    fn softmax_dropout_backward<T: Dtype>(
        &self,
        c: &Call,
        scores: &Scores,
        mask: &AttentionMask<'_, T>,
        x: &[T],
        lse: Option<&[f32]>,
        dy: Option<&[T]>,
        dx: &mut [T],
    ) -> Result<(), Error> {
        use fused_dropout::cpu::softmax_dropout as op;
        match dy {
            Some(dy) => op::backward(self, &c.dropout, scores, &slices(mask), x, lse, dy, dx),
            None => op::backward_in_place(self, &c.dropout, scores, &slices(mask), x, lse, dx),
        }
    }
}

fn slices<'a, T>(mask: &AttentionMask<'a, T>) -> fused_dropout::AttentionMask<&'a [u32], &'a [T]> {
    let AttentionMask { causal, lengths, additive } = *mask;
    fused_dropout::AttentionMask { causal, lengths, additive }
}

/// The kernels: how tensors get to a device and back; the calls are written once.
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub mod kernels {
    use super::*;
    use fused_dropout::device::{self, Device, Readable, Writable};
    use fused_dropout::ops::dropout_add::workspace_len;

    /// A device to test, and the way of a host tensor to it. `Tensor` starts `offset` elements into
    /// its allocation, whose other elements are canaries.
    pub trait Lab: Sized {
        type D: Device;
        fn name(&self) -> String;
        fn device(&self) -> &Self::D;
        /// Runs `work` on `host` as a tensor of the device, and brings it back into `host`.
        fn with<T: bytemuck::Pod>(
            &self,
            host: &mut [T],
            offset: usize,
            work: &mut dyn FnMut(&mut dyn Writable<T, Self::D>) -> Result<(), Error>,
        ) -> Result<(), Error>;
        /// Runs `work` on a copy of `host` that is only read.
        fn reading<T: bytemuck::Pod>(
            &self,
            host: &[T],
            offset: usize,
            work: &mut dyn FnMut(&dyn Readable<T, Self::D>) -> Result<(), Error>,
        ) -> Result<(), Error>;
        /// The same with a tensor that need not be there.
        fn optional<T: bytemuck::Pod>(
            &self,
            host: Option<&[T]>,
            offset: usize,
            work: &mut dyn FnMut(Option<&dyn Readable<T, Self::D>>) -> Result<(), Error>,
        ) -> Result<(), Error> {
            match host {
                Some(host) => self.reading(host, offset, &mut |tensor| work(Some(tensor))),
                None => work(None),
            }
        }
        fn optional_out<T: bytemuck::Pod>(
            &self,
            host: Option<&mut [T]>,
            work: &mut dyn FnMut(Option<&mut dyn Writable<T, Self::D>>) -> Result<(), Error>,
        ) -> Result<(), Error> {
            match host {
                Some(host) => self.with(host, 0, &mut |tensor| work(Some(tensor))),
                None => work(None),
            }
        }
    }

    /// A laboratory as a backend.
    pub struct Kernels<L>(pub L);

    impl<L: Lab> Kernels<L> {
        /// Runs `work` with the call's key: an explicit row list and, for odd offsets, the stream
        /// number in device memory.
        fn call(
            &self,
            c: &Call,
            work: &mut dyn FnMut(&device::Call<'_, L::D>, &Dropout<'_>) -> Result<(), Error>,
        ) -> Result<(), Error> {
            let list = match c.dropout.place.rows {
                RowMap::Explicit(list) => Some(list),
                _ => None,
            };
            let mut dropout = c.dropout;
            if list.is_some() {
                dropout.place.rows = RowMap::WHOLE;
            }
            let number = [dropout.key.stream];
            let number = (c.offset % 2 == 1).then_some(&number[..]);
            if number.is_some() {
                dropout.key.stream = 999; // must not be looked at
            }
            self.0.optional(list, 0, &mut |list| {
                self.0.optional(number, 0, &mut |number| {
                    let mut call = device::Call::on(self.0.device());
                    if let Some(list) = list {
                        call = call.row_list(list);
                    }
                    if let Some(number) = number {
                        call = call.stream_number(number);
                    }
                    work(&call, &dropout)
                })
            })
        }
    }

    impl<L: Lab> Backend for Kernels<L> {
        fn name(&self) -> String {
            self.0.name()
        }
        fn dropout<T: Dtype>(&self, c: &Call, x: Option<&[T]>, y: &mut [T]) -> Result<(), Error> {
            use device::dropout as op;
            self.call(c, &mut |call, d| {
                self.0.optional(x, c.offset, &mut |x| {
                    self.0.with(y, c.offset, &mut |y| match x {
                        Some(x) if c.offset.is_multiple_of(2) => {
                            op::forward(call, d, c.shape, x, y)
                        }
                        Some(x) => op::backward(call, d, c.shape, x, y),
                        None if c.offset.is_multiple_of(2) => {
                            op::forward_in_place(call, d, c.shape, y)
                        }
                        None => op::backward_in_place(call, d, c.shape, y),
                    })
                })
            })
        }
        fn dropout_add<T: Dtype>(
            &self,
            c: &Call,
            x: &[T],
            bias: Option<&[T]>,
            residual: Option<&[T]>,
            y: &mut [T],
        ) -> Result<(), Error> {
            use device::dropout_add as op;
            self.call(c, &mut |call, d| {
                self.0.reading(x, c.offset, &mut |x| {
                    self.0.optional(bias, c.offset / 2, &mut |bias| {
                        self.0.optional(residual, c.offset, &mut |residual| {
                            self.0.with(y, c.offset, &mut |y| match residual {
                                Some(r) => op::forward(call, d, c.shape, x, bias, r, y),
                                None => op::forward_in_place(call, d, c.shape, x, bias, y),
                            })
                        })
                    })
                })
            })
        }
        fn dropout_add_backward<T: Dtype>(
            &self,
            c: &Call,
            dy: Option<&[T]>,
            dx: &mut [T],
            dbias: Option<&mut [f32]>,
        ) -> Result<(), Error> {
            use device::dropout_add as op;
            let mut dbias = dbias;
            // What lies in a workspace before a call must not matter.
            let mut workspace = vec![f32::NAN; workspace_len(c.shape)];
            self.call(c, &mut |call, d| {
                self.0.optional(dy, c.offset, &mut |dy| {
                    self.0.with(dx, c.offset, &mut |dx| {
                        self.0.optional_out(dbias.as_deref_mut(), &mut |dbias| {
                            let mut run = |grad: Option<op::BiasGrad<'_, L::D>>| match dy {
                                Some(dy) => op::backward(call, d, c.shape, dy, dx, grad),
                                None => op::backward_in_place(call, d, c.shape, dx, grad),
                            };
                            let Some(dbias) = dbias else {
                                return run(None);
                            };
                            self.0.with(&mut workspace, 0, &mut |workspace| {
                                run(Some(op::BiasGrad { dbias: &mut *dbias, workspace }))
                            })
                        })
                    })
                })
            })
        }
        fn keep_mask(&self, c: &Call, bits: bool, out: &mut [u8]) -> Result<(), Error> {
            use device::keep_mask as op;
            self.call(c, &mut |call, d| {
                self.0.with(out, c.offset, &mut |out| match bits {
                    true => op::bits(call, d, c.shape, out),
                    false => op::bytes(call, d, c.shape, out),
                })
            })
        }
        fn softmax_dropout<T: Dtype>(
            &self,
            c: &Call,
            scores: &Scores,
            mask: &AttentionMask<'_, T>,
            x: Option<&[T]>,
            y: &mut [T],
            lse: Option<&mut [f32]>,
        ) -> Result<(), Error> {
            use device::softmax_dropout as op;
            let mut lse = lse;
            self.call(c, &mut |call, d| {
                self.0.optional(mask.lengths, 0, &mut |lengths| {
                    self.0.optional(mask.additive, c.offset, &mut |additive| {
                        let mask =
                            fused_dropout::AttentionMask { causal: mask.causal, lengths, additive };
                        self.0.optional(x, c.offset, &mut |x| {
                            self.0.with(y, c.offset, &mut |y| {
                                self.0.optional_out(lse.as_deref_mut(), &mut |lse| match x {
                                    Some(x) => op::forward(call, d, scores, &mask, x, y, lse),
                                    None => op::forward_in_place(call, d, scores, &mask, y, lse),
                                })
                            })
                        })
                    })
                })
            })
        }
        fn softmax_dropout_backward<T: Dtype>(
            &self,
            c: &Call,
            scores: &Scores,
            mask: &AttentionMask<'_, T>,
            x: &[T],
            lse: Option<&[f32]>,
            dy: Option<&[T]>,
            dx: &mut [T],
        ) -> Result<(), Error> {
            use device::softmax_dropout as op;
            self.call(c, &mut |call, d| {
                self.0.optional(mask.lengths, 0, &mut |lengths| {
                    self.0.optional(mask.additive, c.offset, &mut |additive| {
                        let mask =
                            fused_dropout::AttentionMask { causal: mask.causal, lengths, additive };
                        self.0.reading(x, c.offset, &mut |x| {
                            self.0.optional(lse, 0, &mut |lse| {
                                self.0.optional(dy, c.offset, &mut |dy| {
                                    self.0.with(dx, c.offset, &mut |dx| match dy {
                                        Some(dy) => {
                                            op::backward(call, d, scores, &mask, x, lse, dy, dx)
                                        }
                                        None => op::backward_in_place(
                                            call, d, scores, &mask, x, lse, dx,
                                        ),
                                    })
                                })
                            })
                        })
                    })
                })
            })
        }
    }

    /// The emulator: host tensors as they are; it copies them between guard zones itself.
    #[cfg(feature = "emulator")]
    pub struct Emulated {
        pub emulator: fused_dropout::emulator::Emulator,
        pub name: String,
    }

    #[cfg(feature = "emulator")]
    impl Lab for Emulated {
        type D = fused_dropout::emulator::Emulator;
        fn name(&self) -> String {
            self.name.clone()
        }
        fn device(&self) -> &Self::D {
            &self.emulator
        }
        fn with<T: bytemuck::Pod>(
            &self,
            mut host: &mut [T],
            _: usize,
            work: &mut dyn FnMut(&mut dyn Writable<T, Self::D>) -> Result<(), Error>,
        ) -> Result<(), Error> {
            work(&mut host)
        }
        fn reading<T: bytemuck::Pod>(
            &self,
            host: &[T],
            _: usize,
            work: &mut dyn FnMut(&dyn Readable<T, Self::D>) -> Result<(), Error>,
        ) -> Result<(), Error> {
            work(&host)
        }
    }
}
