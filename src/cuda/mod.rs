//! CUDA: the kernels on a GPU, through [`cudarc`].
//!
//! ```no_run
//! use fused_dropout::cuda::{self, Gpu, Kernels};
//!
//! let context = cuda::context(0)?; // an error, no panic, where there is no driver
//! let kernels = Kernels::load(&context)?; // once a context
//! let gpu = Gpu::new(&kernels, context.default_stream())?; // as many as there are streams
//! # let _ = gpu;
//! # Ok::<(), fused_dropout::Error>(())
//! ```
//!
//! The operators stand in [`device`](crate::device); a [`Gpu`] is the device, and `CudaSlice`,
//! `CudaView` and `CudaViewMut` of cudarc are its tensors. Launches are asynchronous: a function
//! returns when its kernels are submitted to the stream, and what goes wrong while they run is
//! reported by a later call. A call allocates nothing and waits for nothing.
//!
//! # Streams
//! cudarc records, in events, the last uses of every tensor of a context that has several streams, and
//! makes each stream wait for the others' uses. The operators take part in that.
//!
//! # Graphs
//! Capture a stream of your own: the driver captures no default stream. A stream's capture refuses to
//! wait for an event from outside of it, which is what the tracking just described does. Switch it off
//! while capturing (`CudaContext::disable_event_tracking`, whose safety section says what then is up to
//! you), and run each operator once before: the first run looks its kernel up and may load it.
//! Parameters are captured by value; a stream number in device memory
//! ([`Call::stream_number`](crate::device::Call::stream_number)) is read anew by each replay.
//!
//! No thread may wait for a whole context while one of its streams is captured. `CudaContext::synchronize`
//! does, and so do `CudaContext::new_stream` for the first stream of a `CudaContext` that tracks uses,
//! and dropping a handle of cuBLAS.
//!
//! # Without cudarc
//! [`Gpu::from_raw`] borrows a `CUstream` of another library, and the modules `raw` of
//! [`device`](crate::device) take bare addresses.

mod context;
mod gpu;
mod kernels;

pub use context::context;
#[cfg(feature = "transformer")]
pub(crate) use context::driver;
pub use cudarc;
pub use gpu::Gpu;
pub use kernels::Kernels;
