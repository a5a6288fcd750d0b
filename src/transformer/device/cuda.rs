//! A GPU as a device with memory and cuBLAS, and a training step as a CUDA graph.

use super::capture::Capture;
use super::cublas::{Blas, Gemm, one_stride};
use super::{Accelerator, Memory, kernels};
use crate::cuda::{Gpu, Kernels, driver};
use crate::device::{Address, Device, Kernel, Readable, Writable};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::transformer::backend::{Element, MatMul};
use cudarc::driver::{CudaGraph, CudaSlice, CudaStream, DevicePtr};
use std::cell::RefCell;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

/// Products of a batch that needs a list of addresses.
const MOST_LISTED: usize = 1 << 16;

/// A GPU: a stream of its own, the crate's kernels and cuBLAS.
pub struct CudaDevice {
    gpu: Gpu,
    blas: Blas,
    /// `[3, products]`, the addresses of the matrices of the batch that is being submitted.
    pointers: RefCell<CudaBuffer<u64>>,
}

/// Memory of a [`CudaDevice`].
pub struct CudaBuffer<E> {
    /// At least one element: the driver allocates no zero bytes.
    memory: CudaSlice<E>,
    len: usize,
}

impl CudaDevice {
    /// Opens GPU `ordinal`.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without a driver, without such a GPU or without cuBLAS; otherwise what the
    /// driver or cuBLAS says.
    pub fn open(ordinal: usize) -> Result<Self, Error> {
        let context = crate::cuda::context(ordinal)?;
        // A graph's capture does not get on with cudarc's events.
        // SAFETY: this context object and its stream are this device's own. Neither they nor the slices
        // in its buffers are given away, so everything is ordered by the one stream.
        unsafe { context.disable_event_tracking() };
        let kernels = Kernels::load(&context)?;
        let stream = context.new_stream().map_err(driver("making a stream"))?;
        let gpu = Gpu::new(&kernels, stream)?;
        let blas = Blas::new(gpu.stream())?;
        let pointers = RefCell::new(zeros(&gpu, 3 * MOST_LISTED)?);
        Ok(Self { gpu, blas, pointers })
    }

    pub(super) fn stream(&self) -> &Arc<CudaStream> {
        self.gpu.stream()
    }
}

impl<E> CudaBuffer<E> {
    /// Where it begins.
    pub(super) fn address(&self) -> u64 {
        let stream = self.memory.stream();
        self.memory.device_ptr(stream).0
    }
}

fn zeros<E: Element>(gpu: &Gpu, len: usize) -> Result<CudaBuffer<E>, Error> {
    let memory = gpu.stream().alloc_zeros(len.max(1)).map_err(driver("allocating memory"))?;
    Ok(CudaBuffer { memory, len })
}

impl Device for CudaDevice {
    type Hold<'a> = <Gpu as Device>::Hold<'a>;

    unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: u32,
        threads: u32,
        params: *const c_void,
    ) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch(kernel, blocks, threads, params) }
    }
}

// SAFETY: a buffer's memory has at least the `len` elements that it says; the rest is `Gpu`'s word.
unsafe impl<E: Element> Readable<E, CudaDevice> for CudaBuffer<E> {
    fn elements(&self) -> usize {
        self.len
    }

    fn read<'a>(&'a self, device: &'a CudaDevice) -> Result<Address<'a, CudaDevice>, Error> {
        let Address { pointer, hold } = Readable::<E, Gpu>::read(&self.memory, &device.gpu)?;
        Ok(Address { pointer, hold })
    }
}

// SAFETY: as above; any bits are an `Element`.
unsafe impl<E: Element> Writable<E, CudaDevice> for CudaBuffer<E> {
    fn write<'a>(&'a mut self, device: &'a CudaDevice) -> Result<Address<'a, CudaDevice>, Error> {
        let Address { pointer, hold } = Writable::<E, Gpu>::write(&mut self.memory, &device.gpu)?;
        Ok(Address { pointer, hold })
    }
}

impl Memory for CudaDevice {
    type Buffer<E: Element> = CudaBuffer<E>;

    fn zeros<E: Element>(&self, len: usize) -> Result<CudaBuffer<E>, Error> {
        zeros(&self.gpu, len)
    }

    fn write<E: Element>(&self, buffer: &mut CudaBuffer<E>, values: &[E]) -> Result<(), Error> {
        if values.len() > buffer.len {
            let expected = format!("at most {} elements", buffer.len);
            return Err(Error::argument("write", "values", expected, values.len()));
        }
        if values.is_empty() {
            return Ok(());
        }
        let copied = self.gpu.stream().memcpy_htod(values, &mut buffer.memory);
        copied.map_err(driver("copying to the device"))
    }

    fn read<E: Element>(&self, buffer: &CudaBuffer<E>) -> Result<Vec<E>, Error> {
        let mut values = vec![E::default(); buffer.len.max(1)];
        let stream = self.gpu.stream();
        stream
            .memcpy_dtoh(&buffer.memory, &mut values)
            .map_err(driver("copying from the device"))?;
        stream.synchronize().map_err(driver("waiting for the device"))?;
        values.truncate(buffer.len);
        Ok(values)
    }

    fn clear<E: Element>(&self, buffer: &mut CudaBuffer<E>) -> Result<(), Error> {
        self.gpu.stream().memset_zeros(&mut buffer.memory).map_err(driver("clearing memory"))
    }

    fn clear_part(&self, buffer: &mut CudaBuffer<f32>, part: Range<usize>) -> Result<(), Error> {
        if part.start > part.end || part.end > buffer.len {
            let expected = format!("a part of {} elements", buffer.len);
            return Err(Error::argument("clear_part", "part", expected, format!("{part:?}")));
        }
        if part.is_empty() {
            return Ok(());
        }
        let mut part = buffer.memory.slice_mut(part);
        self.gpu.stream().memset_zeros(&mut part).map_err(driver("clearing memory"))
    }

    fn matmul<T: Dtype + Element, C: Dtype + Element>(
        &self,
        what: &MatMul,
        a: &CudaBuffer<T>,
        b: &CudaBuffer<T>,
        c: &mut CudaBuffer<C>,
    ) -> Result<(), Error> {
        what.check([a.len, b.len, c.len])?;
        let gemm = Gemm::new(what)?;
        let (a, b, c) = (a.read(self)?, b.read(self)?, c.write(self)?);
        let base = [a.pointer, b.pointer, c.pointer];
        let size = [size_of::<T>(), size_of::<T>(), size_of::<C>()];
        let [m, n, _] = what.mnk;
        if m * n == 0 || what.batch.contains(&0) {
            return Ok(());
        }
        if let Some(batch) = one_stride(what) {
            let offsets = [what.a.offset, what.b.offset, what.c.offset];
            let first = std::array::from_fn(|x| base[x] + (offsets[x] * size[x]) as u64);
            // SAFETY: `check` has found all matrices in their buffers, which are held until the end.
            return unsafe { self.blas.strided::<T, C>(&gemm, batch, first) };
        }
        let mut pointers = self.pointers.borrow_mut();
        kernels::matmul_pointers(self, what, base, size, &mut *pointers)?;
        let count = what.batch[0] * what.batch[1];
        let lists = pointers.address();
        let lists = std::array::from_fn(|x| lists + (x * count * size_of::<u64>()) as u64);
        // SAFETY: as above; the kernel before it writes the lists.
        unsafe { self.blas.listed::<T, C>(&gemm, count, lists) }
    }
}

/// A training step, captured once and replayed with other numbers.
///
/// The graph keeps the step's kernels, their parameters and the addresses of its buffers. What the host may
/// change between replays lies in buffers: ids, labels, and the numbers of AdamW. Stream numbers are resident
/// ([`Accelerator::resident`]), so every replay draws fresh masks, those of the step it is told.
pub struct StepGraph {
    graph: CudaGraph,
}

impl StepGraph {
    /// Runs `work`, training step `step`, once as usual, which allocates the scratch memory and loads the
    /// kernels, and captures what it does then. `work` reads nothing, writes nothing from the host,
    /// allocates nothing and drops no buffer; its passes are of step `step`.
    ///
    /// Meanwhile no thread may wait for the whole device or context (`CudaContext::synchronize`,
    /// `cudaDeviceSynchronize`): the driver ends the capture with an error. Opening and dropping a
    /// [`CudaDevice`] in another thread waits for the capture's end.
    ///
    /// # Errors
    /// What `work` says; [`Error::Argument`] where it does what a graph cannot repeat; what the driver says.
    pub fn capture<T: Dtype + Element>(
        backend: &Accelerator<CudaDevice, T>,
        step: u64,
        mut work: impl FnMut() -> Result<(), Error>,
    ) -> Result<Self, Error> {
        backend.resident(step)?;
        work()?;
        let waited = backend.device.stream().synchronize();
        waited.map_err(driver("waiting for the device"))?;
        let capture = Capture::begin(backend)?;
        let captured = work();
        let graph = capture.end();
        captured?;
        let nothing = || Error::argument("graph", "work", "a training step", "nothing");
        Ok(Self { graph: graph?.ok_or_else(nothing)? })
    }

    /// Runs training step `step`.
    ///
    /// # Safety
    /// `backend` is the one that the graph was captured on, and every buffer that `work` used is still there.
    ///
    /// # Errors
    /// [`Error::Argument`] where there is no such step; otherwise what the driver says.
    pub unsafe fn replay<T: Dtype + Element>(
        &self,
        backend: &Accelerator<CudaDevice, T>,
        step: u64,
    ) -> Result<(), Error> {
        backend.advance(step)?;
        backend.reports.set(true);
        self.graph.launch().map_err(driver("launching a graph"))
    }
}
