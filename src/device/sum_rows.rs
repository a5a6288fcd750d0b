//! Sums over rows on a device: the tree of [`crate::ops::sum_rows`]. An operator's own kernel adds up the
//! first 64 rows of each column; the kernel here adds up the levels above, two in a launch.

use super::abi::IndexDivisor;
use super::{Address, Device, Kernel, Writable, launch};
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

    /// The levels above the first, of up to [`SUMS`] sums of one shape.
    ///
    /// # Safety
    /// On `device`, the addresses that the trees were made of are valid for what [`new`](Self::new) says
    /// until the kernels have run, and no two overlap.
    pub unsafe fn finish<D: Device>(device: &D, trees: &[Self]) -> Result<(), Error> {
        let Some(&Self { shape, mut tiles, .. }) = trees.first() else { return Ok(()) };
        // The sums of each pair of levels lie in turn at the workspace's start and behind the first level's, which
        // are the most.
        let behind = (tiles * shape.cols * size_of::<f32>()) as u64;
        let (mut from, mut to) = (0, behind);
        // One row of tiles has written the sum; none has not.
        while tiles != 1 {
            let spans = tiles.div_ceil(SPAN).max(1);
            let levels = trees.iter().map(|tree| match spans {
                1 => (tree.workspace + from, tree.sum, tree.scale),
                _ => (tree.workspace + from, tree.workspace + to, 1.0),
            });
            // SAFETY: the caller's promise.
            unsafe { levels_of(device, shape.cols, tiles, spans, levels)? };
            (from, to, tiles) = (to, from, spans);
        }
        Ok(())
    }
}

/// Sums that a launch takes, at most: `SUMS` in `kernels/sum_rows.cu`.
const SUMS: usize = 3;

/// Parts of two levels: `SPAN` in `kernels/sum_rows.cu`.
const SPAN: usize = TILE_ROWS * TILE_ROWS;

/// Columns of a block.
const BLOCK_COLS: usize = 32;

/// Two levels of each sum in `levels` (parts, sums, factor): a row for each of `spans` spans of `count` parts; of
/// zeros where there are no parts.
unsafe fn levels_of<D: Device>(
    device: &D,
    cols: usize,
    count: usize,
    spans: usize,
    levels: impl Iterator<Item = (u64, u64, f32)>,
) -> Result<(), Error> {
    let blocks_a_row = cols.div_ceil(BLOCK_COLS);
    let blocks_a_sum = blocks_a_row * spans;
    if blocks_a_sum == 0 {
        return Ok(());
    }
    if blocks_a_sum > MAX_BLOCKS {
        let expected = format!("at most {} columns", MAX_BLOCKS * BLOCK_COLS);
        return Err(Error::argument("sum_rows", "shape", expected, cols));
    }
    let mut params = Params {
        parts: [0; SUMS],
        sums: [0; SUMS],
        count: count as u64,
        cols: cols as u64,
        blocks_a_row: IndexDivisor::new(blocks_a_row as u32),
        blocks_a_sum: IndexDivisor::new(blocks_a_sum as u32),
        factors: [0.0; SUMS],
        padding: 0,
    };
    let mut sums = 0;
    for (i, (parts, sum, factor)) in levels.take(SUMS).enumerate() {
        (params.parts[i], params.sums[i], params.factors[i]) = (parts, sum, factor);
        sums += 1;
    }
    let kernel = Kernel { operator: "sum_rows", name: "sum_rows_f32" };
    // SAFETY: the caller's promise.
    unsafe { launch(device, kernel, sums * blocks_a_sum, &params) }
}

/// Blocks of one sum that can be numbered for all.
const MAX_BLOCKS: usize = i32::MAX as usize / SUMS;

/// `SumRowsParams` in `kernels/sum_rows.cu`.
#[repr(C)]
struct Params {
    parts: [u64; SUMS],
    sums: [u64; SUMS],
    count: u64,
    cols: u64,
    blocks_a_row: IndexDivisor,
    blocks_a_sum: IndexDivisor,
    factors: [f32; SUMS],
    padding: u32,
}
const _: () = assert!(size_of::<Params>() == 104);

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::emulator::Emulator;

    /// The levels above the first, one after the other.
    fn levels(mut parts: Vec<f32>) -> f32 {
        while parts.len() != 1 {
            let groups = parts.chunks(TILE_ROWS).map(|group| group.iter().fold(0.0, |a, b| a + b));
            parts = if parts.is_empty() { vec![0.0] } else { groups.collect() };
        }
        parts[0]
    }

    #[test]
    fn every_number_of_tiles_and_sums_gives_the_bits_of_the_tree() {
        for (tiles, cols, sums) in [
            (0, 3, 1),
            (2, 40, 3),
            (64, 1, 2),
            (65, 33, 3),
            (300, 7, 1),
            (4096, 2, 1),
            (4100, 1, 3),
        ] {
            let shape = Shape::new(tiles * TILE_ROWS, cols);
            let of = |which: usize, tile: usize, col: usize| {
                ((which + 3 * tile + 7 * col) as f32 * 0.37).sin() * 1e3
            };
            let mut workspaces: Vec<Vec<f32>> = (0..sums)
                .map(|which| {
                    let first = (0..tiles * cols).map(|i| of(which, i / cols, i % cols));
                    let mut workspace: Vec<f32> = first.collect();
                    workspace.resize(workspace_len(shape), f32::NAN);
                    workspace
                })
                .collect();
            let mut totals = vec![vec![f32::NAN; cols]; sums];
            let device = Emulator::new().order(2);
            let held: Vec<_> = workspaces
                .iter_mut()
                .zip(&mut totals)
                .map(|(workspace, total)| {
                    (Writable::write(workspace, &device), Writable::write(total, &device))
                })
                .map(|(workspace, total)| (workspace.unwrap(), total.unwrap()))
                .collect();
            let tree = |(which, (workspace, total)): (usize, &(Address<'_, _>, Address<'_, _>))| {
                Tree::new(shape, total.pointer, workspace.pointer, 1.5 + which as f32)
            };
            let trees: Vec<Tree> = held.iter().enumerate().map(tree).collect();
            // SAFETY: the workspaces and totals are as long as the trees say, and held.
            unsafe { Tree::finish(&device, &trees).unwrap() };
            drop(held);
            for (which, total) in totals.iter().enumerate() {
                for (col, total) in total.iter().enumerate() {
                    let parts = (0..tiles).map(|tile| of(which, tile, col)).collect();
                    let expected = levels(parts) * (1.5 + which as f32);
                    assert_eq!(
                        total.to_bits(),
                        expected.to_bits(),
                        "{tiles} tiles, {which}, {col}"
                    );
                }
            }
        }
    }
}
