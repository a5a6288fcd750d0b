//! Sums over rows on a device: the tree of [`crate::ops::sum_rows`]. An operator's own kernel adds up the
//! first 64 rows of each column; the kernel here adds up the levels above.

use super::abi::IndexDivisor;
use super::{Device, Kernel, THREADS, launch};
use crate::error::Error;
use crate::ops::Shape;
use crate::ops::sum_rows::TILE_ROWS;

/// Where one sum goes, level by level.
pub(crate) struct Tree {
    /// Where the operator's kernel writes its sums, `[tiles of 64 rows, cols]`. Without rows it writes
    /// none.
    pub first: u64,
    /// What it multiplies them by.
    pub factor: f32,
    cols: usize,
    tiles: usize,
    workspace: u64,
    sum: u64,
    scale: f32,
}

impl Tree {
    /// The sum over the rows of a `shape`, times `scale`, into `sum` (`shape.cols` f32) by way of
    /// `workspace` ([`workspace_len`](crate::ops::sum_rows::workspace_len) f32).
    pub fn new(shape: Shape, sum: u64, workspace: u64, scale: f32) -> Self {
        let tiles = shape.rows.div_ceil(TILE_ROWS);
        let (first, factor) = if tiles == 1 { (sum, scale) } else { (workspace, 1.0) };
        Self { first, factor, cols: shape.cols, tiles, workspace, sum, scale }
    }

    /// The levels above the first.
    ///
    /// # Safety
    /// On `device`, the addresses that the tree was made of are valid for what [`new`](Self::new) says
    /// until the kernels have run, and no two overlap.
    pub unsafe fn finish<D: Device>(&self, device: &D) -> Result<(), Error> {
        // The odd levels' sums lie from the workspace's start, the even ones' behind the first level's,
        // which is the largest.
        let mut sums = self.workspace;
        let mut above = self.workspace + (self.tiles * self.cols * 4) as u64;
        let mut parts = self.tiles;
        // One row of tiles has written the sum; none has not.
        while parts != 1 {
            let groups = parts.div_ceil(TILE_ROWS).max(1);
            let (target, factor) = if groups == 1 { (self.sum, self.scale) } else { (above, 1.0) };
            // SAFETY: the caller's promise.
            unsafe { self.level(device, sums, parts, target, factor)? };
            (sums, above, parts) = (above, sums, groups);
        }
        Ok(())
    }

    /// The sums of each 64 rows of `parts`, times `factor`; a row of zeros where there are no parts.
    unsafe fn level<D: Device>(
        &self,
        device: &D,
        parts: u64,
        count: usize,
        sums: u64,
        factor: f32,
    ) -> Result<(), Error> {
        let blocks_a_row = self.cols.div_ceil(THREADS as usize);
        let blocks = count.div_ceil(TILE_ROWS).max(1) * blocks_a_row;
        if blocks == 0 {
            return Ok(());
        }
        let params = Params {
            parts,
            sums,
            count: count as u64,
            cols: self.cols as u64,
            blocks_a_row: IndexDivisor::new(blocks_a_row as u32),
            factor,
        };
        let kernel = Kernel { operator: "sum_rows", name: "sum_rows_f32" };
        // SAFETY: the caller's promise.
        unsafe { launch(device, kernel, blocks, &params) }
    }
}

/// `SumRowsParams` in `kernels/sum_rows.cu`.
#[repr(C)]
struct Params {
    parts: u64,
    sums: u64,
    count: u64,
    cols: u64,
    blocks_a_row: IndexDivisor,
    factor: f32,
}
const _: () = assert!(size_of::<Params>() == 48);
