//! Sums over rows on a device: the tree of [`crate::ops::sum_rows`]. An operator's own kernel adds up the
//! first 64 rows of each column; the kernel here adds up the levels above.

use super::abi::IndexDivisor;
use super::{Address, Device, Kernel, THREADS, Writable, launch};
use crate::error::Error;
use crate::ops::sum_rows::{TILE_ROWS, workspace_len};
use crate::ops::{Shape, check_len};

/// Where a bias gradient goes.
pub struct BiasGrad<'a, D: Device> {
    /// The gradient, `shape.cols` elements.
    pub dbias: &'a mut dyn Writable<f32, D>,
    /// Scratch memory, [`workspace_len`] elements; its contents do not matter.
    pub workspace: &'a mut dyn Writable<f32, D>,
}

impl<D: Device> BiasGrad<'_, D> {
    /// Refuses a workspace of another length.
    pub(super) fn check(&self, operator: &'static str, shape: Shape) -> Result<(), Error> {
        check_len(operator, "workspace", workspace_len(shape), self.workspace.elements())
    }

    /// Takes the addresses.
    pub(super) fn write<'h>(&'h mut self, device: &'h D) -> Result<Held<'h, D>, Error> {
        Ok(Held { dbias: self.dbias.write(device)?, workspace: self.workspace.write(device)? })
    }
}

/// The addresses of a bias gradient, held for one launch.
pub(super) struct Held<'a, D: Device> {
    dbias: Address<'a, D>,
    workspace: Address<'a, D>,
}

impl<D: Device> Held<'_, D> {
    pub fn addresses(&self) -> BiasGradAddresses {
        BiasGradAddresses { dbias: self.dbias.pointer, workspace: self.workspace.pointer }
    }
}

/// Addresses of a bias gradient: [`BiasGrad`] for the functions on bare addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BiasGradAddresses {
    /// `shape.cols` f32, written.
    pub dbias: u64,
    /// [`workspace_len`] f32, written and read.
    pub workspace: u64,
}

/// A tensor in tiles of 64 rows and 64 columns, and where their sums go: `Tiles` in
/// `kernels/sum_tile.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Tiles {
    sums: u64,
    rows: u64,
    cols: u64,
    per_row: IndexDivisor,
    factor: f32,
}
const _: () = assert!(size_of::<Tiles>() == 40);

/// Columns of a tile: `TILE_COLS` in `kernels/sum_tile.cuh`.
const TILE_COLS: usize = 64;

/// Where one sum goes, level by level.
pub(super) struct Tree {
    shape: Shape,
    /// Tiles of 64 rows.
    tiles: usize,
    workspace: u64,
    sum: u64,
    scale: f32,
}

impl Tree {
    /// The sum over the rows of a `shape`, times `scale`, into `sum` (`shape.cols` f32) by way of
    /// `workspace` ([`workspace_len`](crate::ops::sum_rows::workspace_len) f32).
    pub fn new(shape: Shape, sum: u64, workspace: u64, scale: f32) -> Self {
        Self { shape, tiles: shape.rows.div_ceil(TILE_ROWS), workspace, sum, scale }
    }

    /// Where the operator's kernel writes its sums, `[tiles of 64 rows, cols]`, and what it multiplies them
    /// by. Without rows it writes none.
    pub fn first(&self) -> (u64, f32) {
        if self.tiles == 1 { (self.sum, self.scale) } else { (self.workspace, 1.0) }
    }

    /// What a kernel that sums by tiles takes, and its blocks.
    pub fn by_tiles(&self) -> (Tiles, usize) {
        let (sums, factor) = self.first();
        let per_row = self.shape.cols.div_ceil(TILE_COLS);
        let tiles = Tiles {
            sums,
            rows: self.shape.rows as u64,
            cols: self.shape.cols as u64,
            per_row: IndexDivisor::new(per_row.max(1) as u32),
            factor,
        };
        (tiles, self.tiles.saturating_mul(per_row))
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
        let mut above = self.workspace + (self.tiles * self.shape.cols * 4) as u64;
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
        let blocks_a_row = self.shape.cols.div_ceil(THREADS as usize);
        let blocks = count.div_ceil(TILE_ROWS).max(1) * blocks_a_row;
        if blocks == 0 {
            return Ok(());
        }
        let params = Params {
            parts,
            sums,
            count: count as u64,
            cols: self.shape.cols as u64,
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
