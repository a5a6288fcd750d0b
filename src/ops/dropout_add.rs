//! `dropout_add`: y = residual + D(x + bias), the end of every residual branch.
//!
//! The gradient of the residual is `dy` itself. The bias gradient is a sum over rows in the fixed
//! order of [`sum_rows`](super::sum_rows).

use super::{Draw, Dropout, Shape, check_len};
use crate::error::Error;

/// The operator's name in errors.
pub(crate) const NAME: &str = "dropout_add";

/// Checks a forward call; lengths in elements.
pub(crate) fn check_forward<'a>(
    dropout: &Dropout<'a>,
    shape: Shape,
    x: usize,
    bias: Option<usize>,
    residual: usize,
    y: usize,
) -> Result<Draw<'a>, Error> {
    let elements = shape.elements(NAME)?;
    check_len(NAME, "x", elements, x)?;
    if let Some(bias) = bias {
        check_len(NAME, "bias", shape.cols, bias)?;
    }
    check_len(NAME, "residual", elements, residual)?;
    check_len(NAME, "y", elements, y)?;
    dropout.draw(NAME, shape)
}

/// Checks a backward call; lengths in elements.
pub(crate) fn check_backward<'a>(
    dropout: &Dropout<'a>,
    shape: Shape,
    dy: usize,
    dx: usize,
    dbias: Option<usize>,
) -> Result<Draw<'a>, Error> {
    let elements = shape.elements(NAME)?;
    check_len(NAME, "dy", elements, dy)?;
    check_len(NAME, "dx", elements, dx)?;
    if let Some(dbias) = dbias {
        check_len(NAME, "dbias", shape.cols, dbias)?;
    }
    dropout.draw(NAME, shape)
}
