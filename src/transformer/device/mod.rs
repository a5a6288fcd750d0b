//! Models on anything that runs the crate's kernels: a GPU, or the emulator.
//!
//! ```no_run
//! # #[cfg(feature = "cuda")] {
//! use fused_dropout::transformer::device::{Accelerator, CudaDevice};
//!
//! // An error, no panic, where there is no driver, no GPU or no cuBLAS.
//! let backend = Accelerator::<_, half::bf16>::new(CudaDevice::open(0)?)?;
//! # let _ = backend;
//! # }
//! # Ok::<(), fused_dropout::Error>(())
//! ```
//!
//! # Scratch memory
//! What the operators need besides their tensors belongs to the device ([`Device::workspace`]), which keeps it: a
//! training step allocates nothing from its second time on.
//!
//! # Ids
//! A device cannot refuse a token that is in no table: such a row is zeros, and
//! [`Backend::read`](crate::transformer::Backend::read) and [`Accelerator::check`] return the error.
//!
//! # A training step as a graph
//! [`Backend::repeat`](crate::transformer::Backend::repeat) captures a step on a GPU and replays it: one launch in
//! place of hundreds. The parameters of a captured kernel are fixed, so stream numbers, and drop probabilities that follow a
//! [`DropoutSchedule`](super::DropoutSchedule), lie in device memory ([`Accelerator::resident`]), where every step finds its
//! own.

use super::backend::Element;
use super::matmul::MatMul;
use crate::device::Device;
use crate::dtype::Dtype;
use crate::error::Error;
use crate::tensor::Writable;
use std::ops::Range;

mod accelerator;
#[cfg(feature = "cuda")]
mod capture;
#[cfg(feature = "cuda")]
mod cublas;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "emulator")]
mod emulator;
mod kernels;
mod resident;

pub use accelerator::Accelerator;
#[cfg(feature = "cuda")]
pub use cuda::{CudaBuffer, CudaDevice, StepGraph};

/// A [`Device`] that allocates, copies, multiplies matrices and records graphs: what an [`Accelerator`] needs of it.
pub trait Runtime: Device + Sized {
    /// `E`s in the device's memory.
    type Buffer<E: Element>: Writable<E, Self>;
    /// Work that the device can do again as a whole.
    type Graph;

    /// Calls `work` and keeps what it submits, in place of doing it; `None`, and `work` was not called, on a device
    /// that has no graphs. The graph keeps the memory that it uses.
    ///
    /// # Errors
    /// What `work` says; [`Error::Argument`] where it cannot be kept; otherwise what the device says.
    fn record(
        &self,
        work: impl FnOnce() -> Result<(), Error>,
    ) -> Result<Option<Self::Graph>, Error>;

    /// Does the work of a graph.
    ///
    /// # Errors
    /// [`Error::Argument`] where it is another device's; otherwise what the device says.
    fn replay(&self, graph: &Self::Graph) -> Result<(), Error>;

    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// What the device says.
    fn zeros<E: Element>(&self, len: usize) -> Result<Self::Buffer<E>, Error>;

    /// Copies `values` to the start of a buffer that is at least as long.
    ///
    /// # Errors
    /// [`Error::Argument`] where it is shorter; otherwise what the device says.
    fn write<E: Element>(&self, buffer: &mut Self::Buffer<E>, values: &[E]) -> Result<(), Error>;

    /// The contents of a buffer, when all earlier work is done.
    ///
    /// # Errors
    /// What the device says, also about earlier work.
    fn read<E: Element>(&self, buffer: &Self::Buffer<E>) -> Result<Vec<E>, Error>;

    /// Copies part `part` of `from` to another buffer, from its element `at` on.
    ///
    /// # Errors
    /// [`Error::Argument`] where one of the two has no such part; otherwise what the device says.
    fn copy(
        &self,
        from: &Self::Buffer<f32>,
        part: Range<usize>,
        to: &mut Self::Buffer<f32>,
        at: usize,
    ) -> Result<(), Error>;

    /// Sets every value to zero.
    ///
    /// # Errors
    /// What the device says.
    fn clear<E: Element>(&self, buffer: &mut Self::Buffer<E>) -> Result<(), Error>;

    /// c = a · b or c += a · b, accumulated in f32 and rounded once into `C`.
    ///
    /// # Errors
    /// [`Error::Argument`] where a matrix is not in its buffer; otherwise what the device says.
    fn matmul<T: Dtype + Element, C: Dtype + Element>(
        &self,
        what: &MatMul,
        a: &Self::Buffer<T>,
        b: &Self::Buffer<T>,
        c: &mut Self::Buffer<C>,
    ) -> Result<(), Error>;
}
