//! Tensors of the case table on a GPU: views into allocations with canaries.

use crate::cases;
use fused_dropout::Error;
use fused_dropout::cuda::Gpu;
use fused_dropout::device::{Readable, Writable};

/// A stream to test, and what its trial holds.
pub struct Lab<H>(Gpu, H);

/// Bytes of canary on each side of a tensor.
const GUARD: usize = 64;
const CANARY: u8 = 0xa5;

impl<H> Lab<H> {
    pub fn on(gpu: Gpu, hold: H) -> Self {
        Self(gpu, hold)
    }

    /// `host` between canaries, `offset` elements behind an aligned address.
    fn padded<T: bytemuck::Pod>(host: &[T], offset: usize) -> (Vec<T>, usize) {
        let guard = GUARD / size_of::<T>();
        let canary = bytemuck::pod_read_unaligned(&vec![CANARY; size_of::<T>()]);
        let mut all = vec![canary; guard + offset];
        all.extend_from_slice(host);
        all.extend(std::iter::repeat_n(canary, guard));
        (all, guard + offset)
    }
}

// Everything but the operators is expected to work on the test's device: a failure there is no
// case's result.
impl<H> cases::lab::Lab for Lab<H> {
    type D = Gpu;
    fn name(&self) -> String {
        "cuda".to_owned()
    }
    fn device(&self) -> &Gpu {
        &self.0
    }
    fn with<T: bytemuck::Pod>(
        &self,
        host: &mut [T],
        offset: usize,
        work: &mut dyn FnMut(&mut dyn Writable<T, Gpu>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (all, first) = Self::padded(host, offset);
        let bytes: &[u8] = bytemuck::cast_slice(&all);
        let mut memory = self.0.stream().clone_htod(bytes).unwrap();
        let mut memory_view = memory.as_view_mut();
        // SAFETY: any bytes are a T: it is plain data.
        let mut typed = unsafe { memory_view.transmute_mut::<T>(all.len()) }.unwrap();
        let result = work(&mut typed.slice_mut(first..first + host.len()));
        let back: Vec<u8> = self.0.stream().clone_dtoh(&memory).unwrap();
        // The copy is asynchronous for the driver, and in order on the stream.
        self.0.stream().synchronize().unwrap();
        let size = size_of::<T>();
        let inside = first * size..(first + host.len()) * size;
        bytemuck::cast_slice_mut(host).copy_from_slice(&back[inside.clone()]);
        let outside = |i: &usize| !inside.contains(i);
        assert!((0..back.len()).filter(outside).all(|i| back[i] == CANARY), "wrote outside");
        result
    }
    fn reading<T: bytemuck::Pod>(
        &self,
        host: &[T],
        offset: usize,
        work: &mut dyn FnMut(&dyn Readable<T, Gpu>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (all, first) = Self::padded(host, offset);
        let bytes: &[u8] = bytemuck::cast_slice(&all);
        let memory = self.0.stream().clone_htod(bytes).unwrap();
        let memory = memory.as_view();
        // SAFETY: any bytes are a T: it is plain data.
        let typed = unsafe { memory.transmute::<T>(all.len()) }.unwrap();
        work(&typed.slice(first..first + host.len()))
    }
}
