//! `keep_mask`: the mask itself, for programs that must store one. 1 means kept.
//!
//! - **bits**: each row takes `ceil(cols / 8)` bytes; column c is bit `c % 8` of byte `c / 8`, lowest
//!   bit first; the unused high bits of a row's last byte are 0.
//! - **bytes**: one byte an element, 0 or 1.
//!
//! The mask is not [`Strided`](crate::Strided): it is made to be stored.

use super::{Check, Shape};
use crate::error::Error;
use crate::mask::OCTET;
use crate::tensor::{Memory, Out};

/// The operator's name in errors.
pub(crate) const NAME: &str = "keep_mask";

/// Bytes that the mask of a `shape` takes as bits.
pub fn bits_len(shape: Shape) -> usize {
    shape.rows.saturating_mul(shape.cols.div_ceil(OCTET))
}

/// The mask as bits.
pub struct Bits<'a, M: Memory> {
    /// Rows and columns of the mask.
    pub shape: Shape,
    /// `[rows, ceil(cols / 8)]`.
    pub out: Out<'a, u8, M>,
}

/// The mask as bytes.
pub struct Bytes<'a, M: Memory> {
    /// Rows and columns of the mask.
    pub shape: Shape,
    /// `[rows, cols]`.
    pub out: Out<'a, u8, M>,
}

impl<M: Memory> Bits<'_, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        Check::new(NAME, self.shape)?.len("out", bits_len(self.shape), &*self.out)?;
        Ok(self.shape)
    }
}

impl<M: Memory> Bytes<'_, M> {
    pub(crate) fn check(&self) -> Result<Shape, Error> {
        Check::new(NAME, self.shape)?.contiguous("out", &*self.out)?;
        Ok(self.shape)
    }
}
