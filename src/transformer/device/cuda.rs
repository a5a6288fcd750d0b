//! A GPU as a device with memory and cuBLAS, and a training step as a CUDA graph.

use super::Runtime;
use super::capture::{Capture, Used};
use super::cublas::{Blas, Gemm, addresses, listable, one_stride};
use crate::cuda::{Gpu, Kernels, driver};
use crate::device::{Address, Device, Kernel};
use crate::dtype::Dtype;
use crate::error::Error;
use crate::tensor::{Readable, Writable};
use crate::transformer::backend::Element;
use crate::transformer::matmul::MatMul;
use cudarc::driver::result::memset_d8_async;
use cudarc::driver::result::{memcpy_dtod_async, memcpy_dtoh_async, memcpy_htod_async};
use cudarc::driver::sys::CUstream;
use cudarc::driver::{CudaGraph, CudaSlice};
use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// A GPU: a stream of its own, the crate's kernels and cuBLAS.
pub struct CudaDevice {
    gpu: Gpu,
    blas: Blas,
    /// The addresses of the matrices of each batch of products that needs a list of them.
    lists: RefCell<HashMap<Batch, CudaBuffer<u64>>>,
    /// While a graph is captured: the memory that it uses.
    used: RefCell<Option<Used>>,
}

/// What a list of addresses follows from, so that one that was made once is right for good: the products, where their
/// buffers begin, and the bytes of an element.
type Batch = (MatMul, [u64; 3], [usize; 3]);

/// Memory of a [`CudaDevice`]. A [`StepGraph`] that uses it keeps it alive.
pub struct CudaBuffer<E> {
    /// At least one byte: the driver allocates no zero bytes.
    memory: Arc<CudaSlice<u8>>,
    len: usize,
    element: PhantomData<E>,
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
        // SAFETY: this context object and its stream are this device's own. The slices in its buffers are not
        // given away, and another device's stream is refused (`CudaBuffer::address`), so everything is ordered
        // by the one stream.
        unsafe { context.disable_event_tracking() };
        let kernels = Kernels::load(&context)?;
        let stream = context.new_stream().map_err(driver("making a stream"))?;
        let gpu = Gpu::new(&kernels, stream)?;
        let blas = Blas::new(gpu.stream())?;
        Ok(Self { gpu, blas, lists: RefCell::default(), used: RefCell::new(None) })
    }

    /// The device's name, as the driver has it.
    ///
    /// # Errors
    /// What the driver says.
    pub fn name(&self) -> Result<String, Error> {
        self.gpu.stream().context().name().map_err(driver("asking for the device's name"))
    }

    /// The stream, for the driver's own functions: its context is this thread's.
    fn stream(&self) -> Result<CUstream, Error> {
        let stream = self.gpu.stream();
        stream.context().bind_to_thread().map_err(driver("binding the context"))?;
        Ok(stream.cu_stream())
    }

    /// The list of addresses of a batch's matrices, `[3, products]`.
    fn list(&self, what: &MatMul, base: [u64; 3], size: [usize; 3]) -> Result<u64, Error> {
        let mut lists = self.lists.borrow_mut();
        let list = match lists.entry((*what, base, size)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                if self.used.borrow().is_some() {
                    let expected = "no batch of products that the step before did not have";
                    return Err(Error::argument("graph", "work", expected, format!("{what:?}")));
                }
                let list = addresses(what, base, size);
                let mut buffer = self.zeros(list.len())?;
                Runtime::write(self, &mut buffer, &list)?;
                place.insert(buffer)
            }
        };
        Ok(list.address(self)?.pointer)
    }
}

impl<E: Element> CudaBuffer<E> {
    /// Where it begins. A graph that is being captured keeps it from now on.
    fn address<'a>(&'a self, device: &'a CudaDevice) -> Result<Address<'a, CudaDevice>, Error> {
        if !Arc::ptr_eq(self.memory.stream(), device.gpu.stream()) {
            return Err(Error::argument("cuda", "tensor", "one of this device", "another's"));
        }
        let Address { pointer, hold } = Readable::<u8, Gpu>::read(&*self.memory, &device.gpu)?;
        if let Some(used) = &mut *device.used.borrow_mut() {
            used.entry(pointer).or_insert_with(|| self.memory.clone());
        }
        Ok(Address { pointer, hold })
    }

    /// Refuses a part that it has not.
    fn check_part(&self, operation: &'static str, part: &Range<usize>) -> Result<(), Error> {
        if part.start <= part.end && part.end <= self.len {
            return Ok(());
        }
        let expected = format!("a part of {} elements", self.len);
        Err(Error::argument(operation, "part", expected, format!("{part:?}")))
    }
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

    fn workspace(&self, elements: usize) -> Result<Address<'_, Self>, Error> {
        let Address { pointer, hold } = self.gpu.workspace(elements)?;
        Ok(Address { pointer, hold })
    }
}

// SAFETY: a buffer's memory has at least the `len` elements that it says, and the driver's allocations are aligned to
// 256 bytes; the rest is `Gpu`'s word.
unsafe impl<E: Element> Readable<E, CudaDevice> for CudaBuffer<E> {
    fn elements(&self) -> usize {
        self.len
    }

    fn read<'a>(&'a self, device: &'a CudaDevice) -> Result<Address<'a, CudaDevice>, Error> {
        self.address(device)
    }
}

// SAFETY: as above; the borrow is exclusive, a graph that shares the memory runs behind what was submitted before it,
// and any bits are an `Element`.
unsafe impl<E: Element> Writable<E, CudaDevice> for CudaBuffer<E> {
    fn write<'a>(&'a mut self, device: &'a CudaDevice) -> Result<Address<'a, CudaDevice>, Error> {
        self.address(device)
    }
}

impl Runtime for CudaDevice {
    type Buffer<E: Element> = CudaBuffer<E>;
    type Graph = StepGraph;

    fn zeros<E: Element>(&self, len: usize) -> Result<CudaBuffer<E>, Error> {
        let too_long = || Error::argument("zeros", "len", "a length that memory has", len);
        let bytes = len.checked_mul(size_of::<E>()).ok_or_else(too_long)?;
        let memory = self.gpu.stream().alloc_zeros(bytes.max(1));
        let memory = Arc::new(memory.map_err(driver("allocating memory"))?);
        Ok(CudaBuffer { memory, len, element: PhantomData })
    }

    fn write<E: Element>(&self, buffer: &mut CudaBuffer<E>, values: &[E]) -> Result<(), Error> {
        if values.len() > buffer.len {
            let expected = format!("at most {} elements", buffer.len);
            return Err(Error::argument("write", "values", expected, values.len()));
        }
        if values.is_empty() {
            return Ok(());
        }
        let to = buffer.address(self)?;
        // SAFETY: the buffer has room for the values. The driver has taken them from pageable memory when it returns.
        unsafe {
            memcpy_htod_async(to.pointer, bytemuck::cast_slice::<E, u8>(values), self.stream()?)
        }
        .map_err(driver("copying to the device"))
    }

    fn read<E: Element>(&self, buffer: &CudaBuffer<E>) -> Result<Vec<E>, Error> {
        let mut values = vec![E::default(); buffer.len];
        if values.is_empty() {
            return Ok(values);
        }
        let from = buffer.address(self)?;
        // SAFETY: both have `len` elements, any bits are an `Element`, and `values` lives until the stream is done.
        let copied = unsafe {
            memcpy_dtoh_async(
                bytemuck::cast_slice_mut::<E, u8>(&mut values),
                from.pointer,
                self.stream()?,
            )
        };
        // In any case: the copy may be under way.
        let done = self.gpu.stream().synchronize();
        copied.map_err(driver("copying from the device"))?;
        done.map_err(driver("waiting for the device"))?;
        Ok(values)
    }

    fn copy(
        &self,
        from: &CudaBuffer<f32>,
        part: Range<usize>,
        to: &mut CudaBuffer<f32>,
        at: usize,
    ) -> Result<(), Error> {
        from.check_part("copy", &part)?;
        to.check_part("copy", &(at..at.saturating_add(part.len())))?;
        if part.is_empty() {
            return Ok(());
        }
        let size = size_of::<f32>();
        let (from, to) = (from.address(self)?, to.address(self)?);
        let (from, to) =
            (from.pointer + (part.start * size) as u64, to.pointer + (at * size) as u64);
        // SAFETY: both parts lie in their buffers, which are two.
        unsafe { memcpy_dtod_async(to, from, part.len() * size, self.stream()?) }
            .map_err(driver("copying on the device"))
    }

    fn clear<E: Element>(&self, buffer: &mut CudaBuffer<E>) -> Result<(), Error> {
        if buffer.len == 0 {
            return Ok(());
        }
        let address = buffer.address(self)?.pointer;
        // SAFETY: the buffer has so many bytes, and zeros are an `Element`.
        unsafe { memset_d8_async(address, 0, buffer.len * size_of::<E>(), self.stream()?) }
            .map_err(driver("clearing memory"))
    }

    fn record(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<Option<StepGraph>, Error> {
        let stream = self.gpu.stream();
        stream.synchronize().map_err(driver("waiting for the device"))?;
        let capture = Capture::begin(stream, &self.used)?;
        let recorded = work();
        let captured = capture.end();
        recorded?;
        let (graph, used) = captured?;
        let nothing = || Error::argument("graph", "work", "a training step", "nothing");
        let graph = graph.ok_or_else(nothing)?;
        Ok(Some(StepGraph { graph, gpu: self.gpu.clone(), _used: used }))
    }

    fn replay(&self, graph: &StepGraph) -> Result<(), Error> {
        if !Arc::ptr_eq(graph.gpu.stream(), self.gpu.stream()) {
            return Err(Error::argument(
                "graph",
                "device",
                "the one it was captured on",
                "another",
            ));
        }
        // What the graph's kernels read and write is there: buffers in `_used`, lists and cuBLAS's workspace with
        // this device, whose stream it is. They run behind all that was submitted before.
        graph.graph.launch().map_err(driver("launching a graph"))
    }

    fn matmul<T: Dtype + Element, C: Dtype + Element>(
        &self,
        what: &MatMul,
        a: &CudaBuffer<T>,
        b: &CudaBuffer<T>,
        c: &mut CudaBuffer<C>,
    ) -> Result<(), Error> {
        let Some(what) = &what.check([a.len, b.len, c.len])? else { return Ok(()) };
        let gemm = Gemm::new(what)?;
        let (a, b, c) = (a.read(self)?, b.read(self)?, c.write(self)?);
        let base = [a.pointer, b.pointer, c.pointer];
        let size = [size_of::<T>(), size_of::<T>(), size_of::<C>()];
        let first = |outer: usize| {
            let matrices = [what.a, what.b, what.c];
            let element = |x: usize| matrices[x].offset + outer * matrices[x].batch[0];
            std::array::from_fn(|x| base[x] + (element(x) * size[x]) as u64)
        };
        if let Some(batch) = one_stride(what) {
            // SAFETY: `check` has found all matrices in their buffers, which are held until the end.
            return unsafe { self.blas.strided::<T, C>(&gemm, batch, first(0)) };
        }
        let [outer, inner] = what.batch;
        if listable(what, base, size) {
            let list = self.list(what, base, size)?;
            let lists =
                std::array::from_fn(|x| list + (x * outer * inner * size_of::<u64>()) as u64);
            // SAFETY: as above; the list was copied to the device before, and stays there.
            return unsafe { self.blas.listed::<T, C>(&gemm, outer * inner, lists) };
        }
        let batch = (inner, [what.a, what.b, what.c].map(|layout| layout.batch[1]));
        // SAFETY: as above.
        (0..outer)
            .try_for_each(|outer| unsafe { self.blas.strided::<T, C>(&gemm, batch, first(outer)) })
    }
}

/// A training step of an [`Accelerator`](super::Accelerator) on a GPU, captured once and replayed with other numbers.
///
/// It has the step's kernels, their parameters, and the memory that they use. What the host changes between replays
/// lies in buffers: ids, labels, the numbers of AdamW, and stream numbers.
///
/// While it is captured no thread may wait for the whole device or context (`CudaContext::synchronize`,
/// `cudaDeviceSynchronize`): the driver ends the capture with an error. Opening and dropping a [`CudaDevice`] in another
/// thread waits for the capture's end.
pub struct StepGraph {
    graph: CudaGraph,
    /// Whose scratch memory the graph uses.
    gpu: Gpu,
    _used: Used,
}

impl Drop for StepGraph {
    /// Waits for the last replay. An error will be back in the next call.
    fn drop(&mut self) {
        _ = self.gpu.stream().synchronize();
    }
}
