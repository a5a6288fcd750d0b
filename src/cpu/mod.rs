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

pub mod bias_act_dropout;
pub mod dropout;
pub mod dropout_add;
pub mod dropout_add_norm;
pub mod embedding_dropout;
pub mod keep_mask;
pub mod softmax_dropout;

pub use level::{Cpu, Level};
