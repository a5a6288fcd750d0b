//! Sums over rows on a device: the tree of [`crate::ops::sum_rows`]. An operator's own kernel adds up every
//! 64 rows of each column; the kernel here adds up the levels above, two in a launch.

use super::abi::{Factor, IndexDivisor};
use super::{Device, Kernel, launch, launch_threads};
use crate::error::Error;
use crate::ops::Shape;
use crate::ops::sum_rows::TILE_ROWS;
use crate::tensor::Sum;

/// A tensor in tiles of 64 rows and 64 columns, and where their sums go: `Tiles` in
/// `kernels/sum_tile.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Tiles {
    sums: u64,
    rows: u64,
    cols: u64,
    factor: Factor,
    per_row: IndexDivisor,
    padding: u32,
}
const _: () = assert!(size_of::<Tiles>() == 56);

/// Columns of a tile: `TILE_COLS` in `kernels/sum_tile.cuh`.
const TILE_COLS: usize = 64;

/// Threads of a block that sums a tile: `TILE_THREADS` in `kernels/sum_tile.cuh`.
const TILE_THREADS: u32 = 32;

/// Where one sum goes, level by level.
pub(super) struct Tree {
    shape: Shape,
    /// Tiles of 64 rows.
    tiles: usize,
    workspace: u64,
    sum: u64,
    /// Whether the sum is added to what is there.
    add: bool,
    factor: Factor,
}

impl Tree {
    /// f32 elements of scratch memory that the sum over the rows of a `shape` needs: the partial sums of the tree's first
    /// level, and of its second behind them.
    pub fn workspace(shape: Shape) -> usize {
        let tiles = shape.rows.div_ceil(TILE_ROWS);
        let above = tiles.div_ceil(TILE_ROWS);
        tiles.saturating_add(above).saturating_mul(shape.cols)
    }

    /// The sum over the rows of a `shape`, times `factor`, into `sum` (`shape.cols` f32) by way of
    /// `workspace` ([`workspace`](Self::workspace) f32).
    pub fn new<D: Device>(shape: Shape, sum: &Sum<'_, D>, workspace: u64, factor: Factor) -> Self {
        let tiles = shape.rows.div_ceil(TILE_ROWS);
        Self { shape, tiles, workspace, sum: sum.to.pointer, add: sum.add, factor }
    }

    /// Whether the tile is the sum.
    fn is_one_tile(&self) -> bool {
        self.tiles == 1 && !self.add
    }

    /// Where the operator's kernel writes its sums, `[tiles of 64 rows, cols]`, and what it multiplies them
    /// by. Without rows it writes none.
    pub fn first(&self) -> (u64, Factor) {
        if self.is_one_tile() { (self.sum, self.factor) } else { (self.workspace, Factor::ONE) }
    }

    /// The whole sum: the tiles by `kernel`, which takes what `params` makes of them, and then the levels above.
    ///
    /// # Safety
    /// As [`launch_threads`] for `kernel`, and [`finish`](Self::finish).
    pub unsafe fn sum<D: Device, P>(
        self,
        device: &D,
        kernel: Kernel,
        params: impl FnOnce(Tiles) -> P,
    ) -> Result<(), Error> {
        let (sums, factor) = self.first();
        let per_row = self.shape.cols.div_ceil(TILE_COLS);
        let tiles = Tiles {
            sums,
            rows: self.shape.rows as u64,
            cols: self.shape.cols as u64,
            factor,
            per_row: IndexDivisor::new(per_row.max(1) as u32),
            padding: 0,
        };
        let blocks = self.tiles.saturating_mul(per_row);
        // SAFETY: the caller's promise.
        unsafe {
            if blocks > 0 {
                launch_threads(device, kernel, blocks, TILE_THREADS, &params(tiles))?;
            }
            Self::finish(device, &[self])
        }
    }

    /// The levels above the first, of up to [`SUMS`] sums of one shape.
    ///
    /// # Safety
    /// On `device`, the addresses that the trees were made of are valid for what [`new`](Self::new) says
    /// until the kernels have run, and no two overlap.
    pub unsafe fn finish<D: Device>(device: &D, trees: &[Self]) -> Result<(), Error> {
        let behind: Vec<&Self> = trees.iter().filter(|tree| !tree.is_one_tile()).collect();
        let Some(&&Self { shape, mut tiles, .. }) = behind.first() else { return Ok(()) };
        // The sums of each pair of levels lie in turn at the workspace's start and behind those of the tiles, which
        // are the most.
        let second = (tiles * shape.cols * size_of::<f32>()) as u64;
        let (mut from, mut to) = (0, second);
        loop {
            let spans = tiles.div_ceil(SPAN).max(1);
            let levels = behind.iter().map(|tree| match spans {
                1 => Level {
                    parts: tree.workspace + from,
                    sum: tree.sum,
                    factor: tree.factor,
                    add: tree.add,
                },
                _ => Level {
                    parts: tree.workspace + from,
                    sum: tree.workspace + to,
                    factor: Factor::ONE,
                    add: false,
                },
            });
            // SAFETY: the caller's promise.
            unsafe { levels_of(device, shape.cols, tiles, spans, levels)? };
            (from, to, tiles) = (to, from, spans);
            if tiles == 1 {
                return Ok(());
            }
        }
    }
}

/// Two levels of one sum: from partial sums to a row for each span of them.
struct Level {
    parts: u64,
    sum: u64,
    factor: Factor,
    add: bool,
}

/// Sums that a launch takes, at most: `SUMS` in `kernels/sum_rows.cu`.
const SUMS: usize = 3;

/// Parts of two levels: `SPAN` in `kernels/sum_rows.cu`.
const SPAN: usize = TILE_ROWS * TILE_ROWS;

/// Columns of a block.
const BLOCK_COLS: usize = 32;

/// Two levels of each sum in `levels`: a row for each of `spans` spans of `count` parts; of zeros where there are no
/// parts.
unsafe fn levels_of<D: Device>(
    device: &D,
    cols: usize,
    count: usize,
    spans: usize,
    levels: impl Iterator<Item = Level>,
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
        before: [0; SUMS],
        factors: [Factor::ONE; SUMS],
        count: count as u64,
        cols: cols as u64,
        blocks_a_row: IndexDivisor::new(blocks_a_row as u32),
        blocks_a_sum: IndexDivisor::new(blocks_a_sum as u32),
    };
    let mut sums = 0;
    for (i, level) in levels.take(SUMS).enumerate() {
        (params.parts[i], params.sums[i]) = (level.parts, level.sum);
        params.factors[i] = level.factor;
        params.before[i] = if level.add { level.sum } else { 0 };
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
    before: [u64; SUMS],
    factors: [Factor; SUMS],
    count: u64,
    cols: u64,
    blocks_a_row: IndexDivisor,
    blocks_a_sum: IndexDivisor,
}
const _: () = assert!(size_of::<Params>() == 160);

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::device::Address;
    use crate::emulator::Emulator;
    use crate::tensor::{Sum, Writable};

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
                    workspace.resize(Tree::workspace(shape), f32::NAN);
                    workspace
                })
                .collect();
            // The second sum is added to what is there.
            let mut totals = vec![vec![f32::NAN; cols]; sums];
            totals.iter_mut().skip(1).take(1).for_each(|total| total.fill(3.0));
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
                let to = Address { pointer: total.pointer, hold: None };
                let sum = Sum::<Emulator> { to, add: which == 1 };
                let factor = Factor { value: 1.5 + which as f32, ..Factor::ONE };
                Tree::new(shape, &sum, workspace.pointer, factor)
            };
            let trees: Vec<Tree> = held.iter().enumerate().map(tree).collect();
            // SAFETY: the workspaces and totals are as long as the trees say, and held.
            unsafe { Tree::finish(&device, &trees).unwrap() };
            drop(held);
            for (which, total) in totals.iter().enumerate() {
                for (col, total) in total.iter().enumerate() {
                    let parts = (0..tiles).map(|tile| of(which, tile, col)).collect();
                    let sum = levels(parts) * (1.5 + which as f32);
                    let expected = if which == 1 { 3.0 + sum } else { sum };
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
