//! Dropout for transformers, fused with what stands around it, that stores no mask.
//!
//! Which elements are dropped is a published function of (seed, stream, row, column): the *mask
//! contract*, `CONTRACT.md` in the repository. Forward pass, backward pass, recomputation, CPU, CUDA,
//! every storage type, every launch shape and every shard draw the same mask, so none is ever stored.
//!
//! | operator | forward | backward |
//! | --- | --- | --- |
//! | [`dropout`](cpu::dropout) | y = D(x) | dx = D(dy) |
//! | [`dropout_add`](cpu::dropout_add) | y = residual + D(x + bias) | dx, dbias; the residual's gradient is dy |
//! | [`bias_act_dropout`](cpu::bias_act_dropout) | y = D(act(x + bias)) | dx, dbias |
//! | [`dropout_add_norm`](cpu::dropout_add_norm) | s = residual + D(x + bias), y = LayerNorm or RMSNorm of s | dresidual, dx, dbias, dweight, dnorm_bias |
//! | [`embedding_dropout`](cpu::embedding_dropout) | y = D(token + position + segment) | the tables' gradients |
//! | [`softmax_dropout`](cpu::softmax_dropout) | y = D(softmax(scale · x + mask)) | dx from x and dy |
//! | [`keep_mask`](cpu::keep_mask) | the mask as bits or bytes | |
//!
//! ```
//! use fused_dropout::{Dropout, Key, Probability, Shape, cpu};
//!
//! // One application of dropout: seed 42, application number 7, one element in ten dropped.
//! let drop = Dropout::new(Key::new(42, 7), Probability::new(0.1)?);
//! let shape = Shape::new(2, 8);
//! let cpu = cpu::Cpu::new();
//!
//! let (x, residual) = ([1.0f32; 16], [0.5f32; 16]);
//! let mut y = [0.0f32; 16];
//! cpu::dropout_add::forward(&cpu, &drop, shape, &x, None, &residual, &mut y)?;
//!
//! // The backward pass draws the same mask from the same key.
//! let (dy, mut dx) = ([1.0f32; 16], [0.0f32; 16]);
//! cpu::dropout_add::backward(&cpu, &drop, shape, &dy, &mut dx, None)?;
//! assert!(y.iter().zip(&dx).all(|(&y, &dx)| (y == 0.5) == (dx == 0.0)));
//! # Ok::<(), fused_dropout::Error>(())
//! ```
//!
//! # Backends
//!
//! - [`cpu`]: SIMD chosen at run time, threads. Always there.
//! - `cuda` (feature `cuda`): hand-written kernels behind cudarc. Builds with nvcc; without a driver it
//!   returns an error.
//! - `emulator` (feature `emulator`): the same kernel sources compiled for the host, for tests.
//! - `device`: the operators as launches, written once for `cuda` and `emulator`.
//!
//! `transformer` (feature `transformer`) has GPT and BERT on them: the worked example of a trainer's calls.
//!
//! # Conventions
//!
//! - Tensors are row-major without gaps; every number of rows and columns works, 0 and 1 included, at
//!   any alignment.
//! - Arithmetic is in f32 with one rounding into the storage type.
//! - Outputs are given by the caller, and stay untouched when the arguments are refused.
//! - There is no global state: no seed, no counter.

#[cfg(not(target_endian = "little"))]
compile_error!("masks are exported and vectors are loaded as little-endian words");

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub mod device;
mod dtype;
#[cfg(feature = "emulator")]
pub mod emulator;
mod error;
mod mask;
pub mod ops;
#[cfg(feature = "transformer")]
pub mod transformer;

pub use dtype::{Dtype, DtypeId};
pub use error::Error;
pub use mask::{CONTRACT_VERSION, Groups, Key, MAX_COLS, OCTET, Place, Probability, RowMap};
pub use ops::bias_act_dropout::Activation;
pub use ops::norm::{Affine, Norm, NormKind};
pub use ops::softmax_dropout::{AttentionMask, Scores};
pub use ops::{Dropout, Mode, Scaling, Shape};
