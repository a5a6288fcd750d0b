//! A stream as a [`Device`], and cudarc's tensors as its tensors.

use super::context::driver;
use super::kernels::Kernels;
use crate::device::{Address, Device, Kernel};
use crate::error::Error;
use crate::ops::AsDropout;
use crate::pass::{Backend, Pass};
use crate::tensor::{Readable, Writable};
use cudarc::driver::sys::{CUstream, CUstreamCaptureStatus};
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut,
    DeviceSlice, SyncOnDrop, result,
};
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A stream of a GPU that the kernels are launched on. Cheap to clone; clones share their scratch memory.
#[derive(Clone, Debug)]
pub struct Gpu {
    kernels: Arc<Kernels>,
    stream: Arc<CudaStream>,
    /// The last one is in use. The others are smaller; a captured graph may have their addresses.
    workspaces: Arc<Mutex<Vec<CudaSlice<f32>>>>,
}

impl Gpu {
    /// Launches on `stream`.
    ///
    /// # Errors
    /// [`Error::Argument`] where the stream belongs to another context than the kernels.
    pub fn new(kernels: &Arc<Kernels>, stream: Arc<CudaStream>) -> Result<Self, Error> {
        same_context("stream", kernels.context(), stream.context())?;
        Ok(Self { kernels: kernels.clone(), stream, workspaces: Arc::default() })
    }

    /// Launches on a stream that another library made. Null is the context's default stream.
    ///
    /// Tensors of cudarc can be used, but their uses on this stream and on others are not ordered:
    /// cudarc does not count a borrowed stream. Tensors of other libraries are
    /// [`Pointer`](crate::device::Pointer)s.
    ///
    /// # Safety
    /// `stream` is a stream of the context that the kernels are loaded into, and lives until the last
    /// clone of the result is dropped. Whoever makes several streams work on the same memory orders
    /// them.
    pub unsafe fn from_raw(kernels: &Arc<Kernels>, stream: CUstream) -> Self {
        // SAFETY: the three conditions of `wrap_borrowed_stream` are the caller's promise above.
        let stream = unsafe { kernels.context().wrap_borrowed_stream(stream) };
        Self { kernels: kernels.clone(), stream, workspaces: Arc::default() }
    }

    /// Runs one pass of an operator: [`Backend::run`].
    ///
    /// # Errors
    /// As [`Backend::run`].
    pub fn run<'a, P: Pass<'a, Self>>(
        &self,
        dropout: &impl AsDropout<Self>,
        pass: P,
    ) -> Result<(), Error> {
        Backend::run(self, dropout, pass)
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
        Ok(Address { pointer, hold: Some(Hold::Tensor(hold)) })
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

/// What a launch holds.
pub enum Hold<'a> {
    /// A tensor of cudarc: its uses are recorded.
    Tensor(SyncOnDrop<'a>),
    /// The scratch memory of a [`Gpu`]: no other thread launches a kernel that uses it in between.
    Workspace(MutexGuard<'a, Vec<CudaSlice<f32>>>),
}

impl Device for Gpu {
    type Hold<'a> = Hold<'a>;

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

    /// The stream's, kept until the last clone is dropped. It grows when more is asked for than ever before.
    ///
    /// # Errors
    /// [`Error::Argument`] where it would have to grow while the stream is captured: run the pass once before. Otherwise
    /// what the driver says.
    fn workspace(&self, elements: usize) -> Result<Address<'_, Self>, Error> {
        let mut workspaces = self.workspaces.lock().unwrap_or_else(PoisonError::into_inner);
        if workspaces.last().is_none_or(|last| last.len() < elements) {
            workspaces.push(self.grow(elements)?);
        }
        let pointer = workspaces.last().map_or(0, |workspace| workspace.device_ptr(&self.stream).0);
        Ok(Address { pointer, hold: Some(Hold::Workspace(workspaces)) })
    }
}

impl Gpu {
    /// Scratch memory of at least `elements`.
    fn grow(&self, elements: usize) -> Result<CudaSlice<f32>, Error> {
        let capturing = self.stream.capture_status().map_err(driver("asking for a capture"))?;
        if capturing != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            let expected = "no pass that asks for more than those before the capture";
            return Err(Error::argument("workspace", "elements", expected, elements));
        }
        // A power of two, so that those that stay behind are together no longer than the last.
        let elements = elements.checked_next_power_of_two().unwrap_or(elements).max(1024);
        // SAFETY: no kernel reads what it has not written.
        unsafe { self.stream.alloc(elements) }.map_err(driver("allocating a workspace"))
    }
}

/// Implements [`Readable`], and after `mut` [`Writable`], for a tensor of cudarc.
macro_rules! cudarc_tensor {
    ($tensor:ty) => {
        // SAFETY: cudarc's tensors give their own length and the address of that many elements, and order uses on
        // several streams; `address` refuses those of another context.
        unsafe impl<T> Readable<T, Gpu> for $tensor {
            fn elements(&self) -> usize {
                self.len()
            }

            fn read<'a>(&'a self, device: &'a Gpu) -> Result<Address<'a, Gpu>, Error> {
                let context = DeviceSlice::<T>::stream(self).context();
                device.address(context, |stream| self.device_ptr(stream))
            }
        }
    };
    (mut $tensor:ty) => {
        cudarc_tensor!($tensor);
        // SAFETY: as above; the borrow is exclusive. The crate only writes the numbers that its operators name.
        unsafe impl<T> Writable<T, Gpu> for $tensor {
            fn write<'a>(&'a mut self, device: &'a Gpu) -> Result<Address<'a, Gpu>, Error> {
                let context = DeviceSlice::<T>::stream(self).context().clone();
                device.address(&context, |stream| self.device_ptr_mut(stream))
            }
        }
    };
}

cudarc_tensor!(mut CudaSlice<T>);
cudarc_tensor!(mut CudaViewMut<'_, T>);
cudarc_tensor!(CudaView<'_, T>);
