//! Dropout for transformers as fused CUDA kernels and a SIMD CPU backend, without a mask in memory.
//!
//! Which elements are dropped is a published function of (seed, stream, row, column): the *mask
//! [contract](guide::contract)*. Forward pass, backward pass, recomputation, CPU, CUDA,
//! every storage type, every launch shape and every shard draw the same mask, so none is ever stored.
//!
//! | operator | forward | backward |
//! | --- | --- | --- |
//! | [`dropout`](ops::dropout) | y = D(x) | dx = D(dy) |
//! | [`dropout_add`](ops::dropout_add) | y = residual + D(x + bias) | dx, dbias; the residual's gradient is dy |
//! | [`bias_act_dropout`](ops::bias_act_dropout) | y = D(act(x + bias)) | dx, dbias |
//! | [`dropout_add_norm`](ops::dropout_add_norm) | s = residual + D(x + bias), y = LayerNorm or RMSNorm of s | dresidual, dx, dbias, dweight, dnorm_bias |
//! | [`embedding_dropout`](ops::embedding_dropout) | y = D(token + position + segment) | the tables' gradients |
//! | [`softmax_dropout`](ops::softmax_dropout) | y = D(softmax(scale · x + mask)) | dx from x and dy |
//! | [`swiglu_dropout`](ops::swiglu_dropout) | y = D(silu(gate) · up) | dgate, dup |
//! | [`keep_mask`](ops::keep_mask) | the mask as bits or bytes | |
//!
//! ```
//! use fused_dropout::ops::dropout_add;
//! use fused_dropout::{Dropout, Gradient, Key, Probability, Shape, Source, cpu::Cpu};
//!
//! // One application of dropout: seed 42, application number 7, one element in ten dropped.
//! let drop = Dropout::new(Key::new(42, 7), Probability::new(0.1)?);
//! let (cpu, shape) = (Cpu::new(), Shape::new(2, 8));
//!
//! let (x, bias, residual) = ([1.0f32; 16], [0.25f32; 8], [0.5f32; 16]);
//! let mut y = [0.0f32; 16];
//! cpu.run(&drop, dropout_add::Forward {
//!     shape,
//!     x: &x,
//!     bias: Some(&bias),
//!     residual: Source::Tensor(&residual),
//!     y: &mut y,
//! })?;
//!
//! // The backward pass draws the same mask from the same key.
//! let (dy, mut dx, mut dbias) = ([1.0f32; 16], [0.0f32; 16], [0.0f32; 8]);
//! cpu.run(&drop, dropout_add::Backward {
//!     shape,
//!     dy: Source::Tensor(&dy),
//!     dx: Some(&mut dx),
//!     dbias: Some(Gradient::Write(&mut dbias)),
//! })?;
//! assert!(y.iter().zip(&dx).all(|(&y, &dx)| (y == 0.5) == (dx == 0.0)));
//! # Ok::<(), fused_dropout::Error>(())
//! ```
//!
//! | what a call takes | |
//! | --- | --- |
//! | [`Dropout`] | one application of dropout: the [`Key`] (seed, stream), the [`Probability`] of dropping, and what follows |
//! | [`Mode`], [`Scaling`] | training or inference; inverted or classic scaling |
//! | [`Shard`], [`RowMap`], [`Groups`] | where a shard lies in the whole tensor; elements that share a decision |
//! | [`Shape`], [`Scores`] | rows and columns; batch, heads, queries and keys of attention scores |
//! | [`Activation`], [`Norm`] | GELU, ReLU, SiLU, tanh; LayerNorm, RMSNorm |
//! | [`Source`], [`Gradient`] | a tensor of its own or in place; a parameter's gradient, written or added |
//! | [`Readable`], [`Writable`] | what a backend takes as a tensor |
//!
//! How a trainer numbers its streams is [a page](guide::streams).
//!
//! # One description, every backend
//!
//! A pass is a structure of [`ops`] with its tensors by name, and `run` of a backend does it. The same description runs on
//!
//! - [`cpu::Cpu`]: SIMD chosen at run time, threads. Tensors are slices, arrays and vectors.
//! - `cuda::Gpu` (feature `cuda`): hand-written kernels behind cudarc, on its slices and views or on bare addresses
//!   ([`device::Pointer`]). Builds with nvcc; without a driver it returns an error.
//! - `emulator::Emulator` (feature `emulator`): the same kernel sources compiled for the host, for tests.
//!
//! In place is [`Source::InPlace`]; a parameter's gradient is written or added, as [`Gradient`] says. Code for any backend
//! is generic over [`Backend`]. `transformer` (feature `transformer`) has GPT and BERT on them: the worked example of a
//! trainer's calls.
//!
//! # Conventions
//!
//! - Tensors are row-major, without gaps or with a stride between rows ([`Strided`]); every number of rows and columns works,
//!   0 and 1 included, at any alignment.
//! - Arithmetic is in f32 with one rounding into the storage type.
//! - Outputs are given by the caller, and stay untouched when the arguments are refused.
//! - There is no global state: no seed, no counter.

#[cfg(not(target_endian = "little"))]
compile_error!("masks are exported and vectors are loaded as little-endian words");

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
mod dtype;
#[cfg(feature = "emulator")]
pub mod emulator;
mod error;
pub mod guide;
mod mask;
pub mod ops;
mod pass;
mod tensor;
#[cfg(feature = "transformer")]
pub mod transformer;

pub use dtype::{Dtype, DtypeId};
pub use error::Error;
pub use mask::{CONTRACT_VERSION, Groups, Key, MAX_COLS, OCTET, Probability, RowMap, Shard};
pub use ops::bias_act_dropout::Activation;
pub use ops::norm::{Norm, NormKind};
pub use ops::softmax_dropout::{AttentionMask, Scores};
pub use ops::{AsDropout, Dropout, Mode, Scaling, Shape};
pub use pass::{Backend, Pass};
pub use tensor::{Columns, Gradient, Host, In, Memory, Out, Readable, Source, Strided, Writable};

/// The examples of the README are tested.
#[doc = include_str!("../README.md")]
#[cfg(doctest)]
pub struct Readme;
