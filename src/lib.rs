//! front page (to be written)
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub mod device;
mod dtype;
mod error;
mod mask;
pub mod ops;

pub use dtype::{Dtype, DtypeId};
pub use error::Error;
pub use mask::{CONTRACT_VERSION, Key, MAX_COLS, OCTET, Place, Probability, RowMap};
pub use ops::softmax_dropout::{AttentionMask, Scores};
pub use ops::{Dropout, Mode, Scaling, Shape};
