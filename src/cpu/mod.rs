//! The CPU backend: SIMD chosen at run time, threads by rayon.
//!
//! The algorithms are written once, as loops over small blocks that the compiler turns into the
//! vector instructions of the level they are instantiated for ([`Cpu`]). Every level and every number
//! of threads gives the same bits: no reduction depends on the vector width, and a fused
//! multiply-add is one everywhere.

mod convert;
mod level;
mod math;
mod norm;
mod octets;
mod reduce;
mod split;
mod stream;
mod sum_rows;
mod tensor;

pub(crate) mod bias_act_dropout;
pub(crate) mod dropout;
pub(crate) mod dropout_add;
pub(crate) mod dropout_add_norm;
pub(crate) mod embedding_dropout;
pub(crate) mod keep_mask;
pub(crate) mod softmax_dropout;
pub(crate) mod swiglu_dropout;

pub use level::{Cpu, Level};
