//! Kernels whose threads share a row: which form of a kernel, and how many blocks.

use super::{Device, Kernel, launch};
use crate::error::Error;
use crate::ops::Shape;

/// Columns up to which a warp holds a row, and a block: 4 octets a thread (`OCTETS_HELD` in
/// `kernels/team.cuh`).
const WARP_COLS: usize = 32 * 4 * 8;
const BLOCK_COLS: usize = 256 * 4 * 8;

/// Rows of one launch: blocks of a grid's first dimension.
const LAUNCH_ROWS: usize = 1 << 30;

/// The forms of a kernel: (warp, block, wide), and the same for any alignment.
pub(crate) type Forms = [Kernel; 6];

/// The forms of kernel `$name` for the storage type `$T`.
macro_rules! forms {
    ($operator:expr, $name:literal, $T:ty) => {
        [
            $crate::device::kernel!($operator, $name "_warp", $T),
            $crate::device::kernel!($operator, $name "_block", $T),
            $crate::device::kernel!($operator, $name "_wide", $T),
            $crate::device::kernel!($operator, $name "_warp_unaligned", $T),
            $crate::device::kernel!($operator, $name "_block_unaligned", $T),
            $crate::device::kernel!($operator, $name "_wide_unaligned", $T),
        ]
    };
}
pub(crate) use forms;

/// Refuses more rows than a local row number has values, less one; rows without columns have no elements to number.
pub(crate) fn check(operator: &'static str, shape: Shape) -> Result<(), Error> {
    if shape.rows <= u32::MAX as usize || shape.cols == 0 {
        return Ok(());
    }
    Err(Error::argument(operator, "rows", "fewer than 2^32 rows", shape.rows))
}

/// Launches the form for `shape`, for whole octets where `aligned`, a part of the rows at a time: `params(first, rows)`
/// are those of `rows` rows from `first` on.
///
/// # Safety
/// As [`launch`], for every part.
pub(crate) unsafe fn launch_rows<D: Device, P>(
    device: &D,
    forms: Forms,
    shape: Shape,
    aligned: bool,
    params: impl Fn(u32, u32) -> P,
) -> Result<(), Error> {
    let (form, rows_a_block) = match shape.cols {
        cols if cols <= WARP_COLS => (0, 8),
        cols if cols <= BLOCK_COLS => (1, 1),
        _ => (2, 1),
    };
    let kernel = forms[form + if aligned { 0 } else { 3 }];
    for first in (0..shape.rows).step_by(LAUNCH_ROWS) {
        let rows = LAUNCH_ROWS.min(shape.rows - first);
        let params = params(first as u32, rows as u32);
        // SAFETY: the caller's promise.
        unsafe { launch(device, kernel, rows.div_ceil(rows_a_block), &params)? };
    }
    Ok(())
}
