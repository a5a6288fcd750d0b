//! What the two trainers share: the loop over a model's steps, where it runs, what it shows and what it writes.
//!
//! `trainer.rs` has the calls that a trainer makes; the rest is comfort.

pub mod device;
pub mod draws;
pub mod encoding;
pub mod epochs;
pub mod files;
pub mod interrupt;
pub mod output;
pub mod plot;
pub mod probability;
pub mod say;
pub mod session;
pub mod settings;
pub mod trainer;
