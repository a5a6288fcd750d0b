//! `dropout_add`: y = residual + D(x + bias), the end of every residual branch.
//!
//! The gradient of the residual is `dy` itself. The bias gradient is a sum over rows in a fixed
//! order: see [`TILE_ROWS`].

use super::{Draw, Dropout, Shape, check_len};
use crate::error::Error;

/// The operator's name in errors.
pub(crate) const NAME: &str = "dropout_add";

/// Rows that one partial sum of the bias gradient covers.
///
/// `dbias[c] = scale * sum over r of (kept ? dy[r, c] : 0)`, in f32. The sum is a tree of this radix:
/// every 64 consecutive rows are added in order, starting from +0, then every 64 consecutive such
/// sums, until one is left. The order depends on the number of rows alone, so the result is the same
/// bits for every backend, number of threads and launch shape.
pub const TILE_ROWS: usize = 64;

/// f32 elements of scratch memory that the bias gradient of a `shape` needs on a device: the partial
/// sums of the tree's first level, and of its second behind them.
pub fn workspace_len(shape: Shape) -> usize {
    let tiles = shape.rows.div_ceil(TILE_ROWS);
    let above = tiles.div_ceil(TILE_ROWS);
    tiles.saturating_add(above).saturating_mul(shape.cols)
}

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
