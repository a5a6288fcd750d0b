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
//! [`Gpu::run`] runs a pass of an operator ([`ops`](crate::ops)) on `CudaSlice`, `CudaView` and `CudaViewMut` of cudarc.
//! Launches are asynchronous: `run` returns when its kernels are submitted to the stream, and what goes wrong while they
//! run is reported by a later call. It waits for nothing, and allocates nothing but scratch memory, where a pass needs
//! more of it than any before.
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
//! Parameters are captured by value; a resident stream number ([`Dropout::resident`](crate::Dropout::resident)) and a
//! resident probability ([`Dropout::resident_p`](crate::Dropout::resident_p)) are read anew by each replay. A graph has the
//! addresses of the [`Gpu`]'s scratch memory: keep a clone of the [`Gpu`] as long as the graph.
//!
//! No thread may wait for a whole context while one of its streams is captured. `CudaContext::synchronize`
//! does, and so do `CudaContext::new_stream` for the first stream of a `CudaContext` that tracks uses,
//! and dropping a handle of cuBLAS.
//!
//! # Without cudarc
//! [`Gpu::from_raw`] borrows a `CUstream` of another library, and a [`Pointer`](crate::device::Pointer) is a tensor at a
//! bare address.

mod context;
mod gpu;
mod kernels;

pub use context::context;
#[cfg(feature = "transformer")]
pub(crate) use context::driver;
pub use cudarc;
pub use gpu::{Gpu, Hold};
pub use kernels::Kernels;
