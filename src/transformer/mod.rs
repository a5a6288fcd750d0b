//! Small GPT and BERT models on the operators of this crate, forward and backward written out.

pub mod backend;
mod bert;
mod block;
mod checkpoint;
mod config;
mod cpu;
mod gpt;
mod optim;
mod params;
mod stack;
pub mod streams;

pub use backend::Backend;
pub use bert::{Bert, BertBatch, BertInput, BertRun, BertTask};
pub use checkpoint::Checkpoint;
pub use config::{BertConfig, GptConfig};
pub use cpu::CpuBackend;
pub use gpt::{Gpt, GptBatch, GptInput, GptLoss, GptRun, IGNORED, shifted};
pub use optim::{AdamW, Optimizer, OptimizerState, Schedule};
pub use params::{Grads, Id, Init, Params, Part, Spec, Specs};
pub use streams::{Pass, Site};
