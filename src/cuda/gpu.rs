//! A stream as a [`Device`], and cudarc's tensors as its tensors.

use super::context::driver;
use super::kernels::Kernels;
use crate::device::{Address, Device, Kernel, Readable, Writable};
use crate::error::Error;
use cudarc::driver::sys::CUstream;
use cudarc::driver::{CudaContext, CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop, result};
use std::ffi::c_void;
use std::sync::Arc;

/// A stream of a GPU that the kernels are launched on. Cheap to make and to clone.
#[derive(Clone, Debug)]
pub struct Gpu {
    kernels: Arc<Kernels>,
    stream: Arc<CudaStream>,
}

impl Gpu {
    /// Launches on `stream`.
    ///
    /// # Errors
    /// [`Error::Argument`] where the stream belongs to another context than the kernels.
    pub fn new(kernels: &Arc<Kernels>, stream: Arc<CudaStream>) -> Result<Self, Error> {
        same_context("stream", kernels.context(), stream.context())?;
        Ok(Self { kernels: kernels.clone(), stream })
    }

    /// Launches on a stream that another library made. Null is the context's default stream.
    ///
    /// Tensors of cudarc can be used, but their uses on this stream and on others are not ordered:
    /// cudarc does not count a borrowed stream. With the operators' `raw` functions nothing of cudarc
    /// is needed.
    ///
    /// # Safety
    /// `stream` is a stream of the context that the kernels are loaded into, and lives until the last
    /// clone of the result is dropped. Whoever makes several streams work on the same memory orders
    /// them.
    pub unsafe fn from_raw(kernels: &Arc<Kernels>, stream: CUstream) -> Self {
        // SAFETY: the three conditions of `wrap_borrowed_stream` are the caller's promise above.
        let stream = unsafe { kernels.context().wrap_borrowed_stream(stream) };
        Self { kernels: kernels.clone(), stream }
    }

    /// The stream that the kernels are launched on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The kernels that are launched.
    pub fn kernels(&self) -> &Arc<Kernels> {
        &self.kernels
    }

    /// Takes the address of a tensor of `context` by `take`, which makes the stream wait for what
    /// must come before. cudarc keeps an error of that wait in the stream's context.
    fn address<'a>(
        &'a self,
        context: &Arc<CudaContext>,
        take: impl FnOnce(&'a CudaStream) -> (u64, SyncOnDrop<'a>),
    ) -> Result<Address<'a, Self>, Error> {
        same_context("tensor", self.stream.context(), context)?;
        self.stream.context().check_err().map_err(driver("an earlier call"))?;
        let (pointer, hold) = take(&self.stream);
        self.stream.context().check_err().map_err(driver("waiting for a tensor's earlier uses"))?;
        Ok(Address { pointer, hold })
    }
}

fn same_context(
    argument: &'static str,
    expected: &Arc<CudaContext>,
    given: &Arc<CudaContext>,
) -> Result<(), Error> {
    if expected == given {
        return Ok(());
    }
    let words = |context: &CudaContext| {
        format!("context {:p} of device {}", context.cu_ctx(), context.ordinal())
    };
    Err(Error::argument("cuda", argument, words(expected), words(given)))
}

/// Blocks that a grid can have in its first dimension.
const MAX_BLOCKS: u32 = i32::MAX as u32;

impl Device for Gpu {
    type Hold<'a> = SyncOnDrop<'a>;

    unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: u32,
        threads: u32,
        params: *const c_void,
    ) -> Result<(), Error> {
        if blocks > MAX_BLOCKS {
            let expected = format!("at most {MAX_BLOCKS} blocks a launch");
            return Err(Error::argument(kernel.operator, "shape", expected, blocks));
        }
        let function = self.kernels.function(kernel)?;
        self.stream.context().bind_to_thread().map_err(driver("binding the context"))?;
        // SAFETY: the function comes from a module that `self.kernels` keeps loaded, and the stream is
        // one of that module's context (`Gpu::new` checked it, or `Gpu::from_raw`'s caller promised
        // it). A kernel has one parameter, and the driver copies it from `params` before it returns.
        // That it is the structure the kernel declares, with valid addresses in it, is this
        // function's caller's promise.
        let launched = unsafe {
            result::launch_kernel(
                function.cu_function(),
                (blocks, 1, 1),
                (threads, 1, 1),
                0,
                self.stream.cu_stream(),
                &mut [params.cast_mut()],
            )
        };
        launched.map_err(driver(kernel.name))
    }
}

// SAFETY: cudarc's tensors give their own length and the address of that many elements, and order uses on
// several streams; `address` refuses those of another context.
unsafe impl<T, S: DevicePtr<T>> Readable<T, Gpu> for S {
    fn elements(&self) -> usize {
        self.len()
    }

    fn read<'a>(&'a self, device: &'a Gpu) -> Result<Address<'a, Gpu>, Error> {
        device.address(self.stream().context(), |stream| self.device_ptr(stream))
    }
}

// SAFETY: as above; the borrow is exclusive. The crate only writes the numbers that its operators name.
unsafe impl<T, S: DevicePtr<T> + DevicePtrMut<T>> Writable<T, Gpu> for S {
    fn write<'a>(&'a mut self, device: &'a Gpu) -> Result<Address<'a, Gpu>, Error> {
        let context = self.stream().context().clone();
        device.address(&context, |stream| self.device_ptr_mut(stream))
    }
}
