//! GPT and BERT on the operators of this crate: the worked example of how a trainer without automatic differentiation calls
//! them. It follows no semantic versioning: it changes with what it is an example of.
//!
//! Forward and backward passes are written out, once, over the trait [`Backend`]; every dropout of the two models is
//! part of a fused operator with a stream of its own, and no mask is stored.
//!
//! | file | what stands there |
//! | --- | --- |
//! | `gpt.rs`, `bert.rs` | the models: embeddings, blocks, heads, losses |
//! | `block.rs`, `stack.rs` | a block forward and backward, pre-norm and post-norm; blocks behind each other, kept or computed again |
//! | `streams.rs` | which stream each (step, layer, site) draws from |
//! | `config.rs`, `params.rs`, `load.rs` | Hugging Face's `config.json`, names and `safetensors`, written, and read as they are published |
//! | `optim.rs` | AdamW, clipping, the schedule of the rate |
//! | `backend.rs`, `matmul.rs` | what a model asks of a place to run |
//! | `cpu.rs`, `device/` | the places |
//!
//! ```
//! use fused_dropout::transformer::{
//!     AdamW, CpuBackend, Gpt, GptConfig, GptInput, Grads, Optimizer, Params, Pass, shifted,
//! };
//!
//! let config = GptConfig::from_json(
//!     r#"{"model_type": "gpt2", "vocab_size": 5, "n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2,
//!         "embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}"#,
//! )?;
//! let (backend, seed) = (CpuBackend::new(), 42);
//! let gpt = Gpt::new(config, false)?;
//! let mut params = Params::upload(&backend, &gpt.specs().init(seed))?;
//! let mut optimizer = Optimizer::new(&backend, gpt.specs(), AdamW::default())?;
//! let mut grads = Grads::zeros(&backend, gpt.specs())?;
//!
//! // Memory for steps with two sequences of four tokens, and such a batch.
//! let mut run = gpt.run(&backend, 2, 4, false)?;
//! let ids = [0, 1, 2, 3, 1, 2, 3, 4];
//! let batch = gpt.batch(&backend, &run, &GptInput { ids: &ids, labels: &shifted(&ids, 4), choice: None })?;
//!
//! for step in 0..3 {
//!     // Forward and backward draw the same masks from the same (seed, step).
//!     let pass = Pass::train(seed, step);
//!     gpt.forward(&backend, &params, &mut run, &batch, pass)?;
//!     gpt.loss(&backend, &mut run, &batch)?;
//!     gpt.backward(&backend, &params, &mut run, &batch, pass, &mut grads)?;
//!     optimizer.step(&backend, gpt.specs(), &mut params, &grads, 1e-3)?;
//! }
//! assert!(run.read_loss(&backend)?.total().is_finite());
//! # Ok::<(), fused_dropout::Error>(())
//! ```
//!
//! # Micro-batches
//! A step can be taken in parts: the first backward pass writes the gradients, the others add to them
//! ([`Grads::add`]). [`Pass::from_sequence`] gives each part the masks of its own sequences, and
//! [`GptBatch::part_of`] the step's number of labels, so that the parts' gradients are those of one pass over the step.
//!
//! # Schedules of dropout
//! [`Pass::scheduled`] lets the drop probabilities follow the step ([`DropoutSchedule`]): early dropout, late dropout. A step
//! that is captured as a graph follows it too.
//!
//! # What repeats
//! On the CPU the same seed gives the same weights and losses, bit for bit, with the same number of threads (`gemm` splits
//! its sums by it; the operators of this crate and their masks do not depend on it). A block that is computed again in
//! the backward pass ([`Gpt::run`] with `recompute`) gives the same bits as one whose activations were kept.

pub mod backend;
mod bert;
mod block;
mod check;
mod checkpoint;
mod config;
mod cpu;
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub mod device;
mod gpt;
mod load;
pub mod matmul;
mod optim;
mod params;
mod refuse;
mod stack;
pub mod streams;

pub use backend::Backend;
pub use bert::{Bert, BertBatch, BertInput, BertRun, BertTask};
pub use checkpoint::Checkpoint;
pub use config::{BertConfig, GptConfig};
pub use cpu::CpuBackend;
pub use gpt::{Gpt, GptBatch, GptInput, GptLoss, GptRun, IGNORED, shifted};
pub use load::Loaded;
pub use optim::{AdamW, Optimizer, OptimizerState, Schedule};
pub use params::{Grads, Id, Init, Params, Part, Spec, Specs};
pub use streams::{DropoutSchedule, Drops, Pass, Site};
