//! Small GPT and BERT models on the operators of this crate, forward and backward written out.

pub mod backend;
pub mod streams;

pub use backend::Backend;
pub use streams::{Pass, Site};
