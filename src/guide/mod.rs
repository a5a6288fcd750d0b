//! Pages beside the reference: the contract, and how a trainer numbers its streams.

#[doc = include_str!("../../CONTRACT.md")]
pub mod contract {}

pub mod streams;
