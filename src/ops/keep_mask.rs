//! `keep_mask`: the mask itself, for whoever must store one. 1 means kept.
//!
//! - **bits**: each row takes `ceil(cols / 8)` bytes; column c is bit `c % 8` of byte `c / 8`, lowest
//!   bit first; the unused high bits of a row's last byte are 0.
//! - **bytes**: one byte an element, 0 or 1.

use super::{Draw, Dropout, Shape, check_len};
use crate::error::Error;
use crate::mask::OCTET;

/// The operator's name in errors.
pub(crate) const NAME: &str = "keep_mask";

/// Bytes that the mask of a `shape` takes as bits.
pub fn bits_len(shape: Shape) -> usize {
    shape.rows.saturating_mul(shape.cols.div_ceil(OCTET))
}

/// Checks an export as bits into `out` bytes.
pub(crate) fn check_bits<'a>(
    dropout: &Dropout<'a>,
    shape: Shape,
    out: usize,
) -> Result<Draw<'a>, Error> {
    shape.elements(NAME)?;
    check_len(NAME, "out", bits_len(shape), out)?;
    dropout.draw(NAME, shape)
}

/// Checks an export as bytes into `out` bytes.
pub(crate) fn check_bytes<'a>(
    dropout: &Dropout<'a>,
    shape: Shape,
    out: usize,
) -> Result<Draw<'a>, Error> {
    check_len(NAME, "out", shape.elements(NAME)?, out)?;
    dropout.draw(NAME, shape)
}
