//! Tensors of the case table on a GPU: parts of allocations with canaries.

use crate::cases;
use fused_dropout::cuda::Gpu;
use fused_dropout::cuda::cudarc::driver::CudaSlice;
use fused_dropout::device::Address;
use fused_dropout::{Error, Readable, Writable};
use std::marker::PhantomData;

/// A stream to test, and what its trial holds.
pub struct GpuBackend<H>(Gpu, H);

impl<H> GpuBackend<H> {
    pub fn on(gpu: Gpu, hold: H) -> Self {
        Self(gpu, hold)
    }
}

/// Bytes of canary on each side of a tensor.
const GUARD: usize = 64;
const CANARY: u8 = 0xa5;

/// A tensor between canaries.
pub struct Guarded<T> {
    memory: CudaSlice<u8>,
    /// Bytes before the tensor, and of it.
    before: usize,
    bytes: usize,
    of: PhantomData<T>,
}

impl<T> Guarded<T> {
    fn part<'a>(&self, whole: Address<'a, Gpu>) -> Address<'a, Gpu> {
        Address { pointer: whole.pointer + self.before as u64, hold: whole.hold }
    }
}

// SAFETY: the part lies in the memory, at a multiple of the size of T behind its start, which is aligned.
unsafe impl<T> Readable<T, Gpu> for Guarded<T> {
    fn elements(&self) -> usize {
        self.bytes / size_of::<T>()
    }

    fn read<'a>(&'a self, gpu: &'a Gpu) -> Result<Address<'a, Gpu>, Error> {
        Ok(self.part(Readable::<u8, Gpu>::read(&self.memory, gpu)?))
    }
}

// SAFETY: as above; any bits are a T: it is plain data.
unsafe impl<T> Writable<T, Gpu> for Guarded<T> {
    fn write<'a>(&'a mut self, gpu: &'a Gpu) -> Result<Address<'a, Gpu>, Error> {
        let before = self.before as u64;
        let Address { pointer, hold } = Writable::<u8, Gpu>::write(&mut self.memory, gpu)?;
        Ok(Address { pointer: pointer + before, hold })
    }
}

// Everything but the operators is expected to work on the test's device: a failure there is no
// case's result.
impl<H> cases::backend::TestBackend for GpuBackend<H> {
    type Backend = Gpu;
    type Tensor<T: bytemuck::Pod> = Guarded<T>;

    fn name(&self) -> String {
        "cuda".to_owned()
    }

    fn runs_on(&self) -> &Gpu {
        &self.0
    }

    fn tensor<T: bytemuck::Pod>(&self, content: &[T], offset: usize) -> Guarded<T> {
        let content: &[u8] = bytemuck::cast_slice(content);
        let before = GUARD + offset * size_of::<T>();
        let mut all = vec![CANARY; before];
        all.extend_from_slice(content);
        all.extend([CANARY; GUARD]);
        let memory = self.0.stream().clone_htod(&all).unwrap();
        Guarded { memory, before, bytes: content.len(), of: PhantomData }
    }

    fn contents<T: bytemuck::Pod>(&self, tensor: &Guarded<T>) -> Result<Vec<T>, String> {
        let all: Vec<u8> = self.0.stream().clone_dtoh(&tensor.memory).unwrap();
        // The copy is asynchronous for the driver, and in order on the stream.
        self.0.stream().synchronize().unwrap();
        let inside = tensor.before..tensor.before + tensor.bytes;
        match (0..all.len()).find(|i| !inside.contains(i) && all[*i] != CANARY) {
            Some(i) => {
                Err(format!("wrote byte {} beside the tensor", i as i64 - inside.start as i64))
            }
            None => Ok(all[inside]
                .chunks_exact(size_of::<T>())
                .map(bytemuck::pod_read_unaligned)
                .collect()),
        }
    }
}
