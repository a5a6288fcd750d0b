//! Sums over rows on the CPU: the tree of [`crate::ops::sum_rows`] above its first level.

use super::octets::ELEMENTS;
use crate::ops::sum_rows::TILE_ROWS;
use rayon::prelude::*;

/// The tree above the tiles' `sums`, `[tiles, sum.len()]`, times `factor`, into `sum`.
pub(super) fn finish(sums: Vec<f32>, factor: f32, sum: &mut [f32]) {
    let total = tree(sums, sum.len());
    sum.iter_mut().zip(&total).for_each(|(sum, total)| *sum = total * factor);
}

/// 64 sums in order, from +0, until one is left.
fn tree(mut sums: Vec<f32>, cols: usize) -> Vec<f32> {
    if sums.is_empty() {
        return vec![0.0; cols];
    }
    while sums.len() > cols {
        let mut above = vec![0.0f32; sums.len().div_ceil(TILE_ROWS * cols) * cols];
        let groups = sums.par_chunks(TILE_ROWS * cols).zip(above.par_chunks_mut(cols));
        groups.for_each(|(group, above)| {
            for row in group.chunks(cols) {
                above.iter_mut().zip(row).for_each(|(sum, part)| *sum += part);
            }
        });
        sums = above;
    }
    sums
}

/// Levels of the tree over 2^32 rows, as many as there can be.
const LEVELS: usize = 6;

/// The tree over rows of which most are +0, for at most a block of columns: only the others are added, in
/// ascending order. What is +0 changes no sum, since a sum that starts from +0 is never -0; for the same
/// reason a level with one sum in it is that sum.
pub(super) struct SparseTree {
    /// The sum that is being added up on each level.
    sums: [[f32; ELEMENTS]; LEVELS],
    cols: usize,
    /// The highest level that has a sum.
    top: usize,
    /// The tile of the last row.
    tile: usize,
}

impl SparseTree {
    pub fn new() -> Self {
        Self { sums: [[0.0; ELEMENTS]; LEVELS], cols: 0, top: 0, tile: 0 }
    }

    /// Starts anew, with `cols` columns.
    #[inline(always)]
    pub fn clear(&mut self, cols: usize) {
        self.sums[0][..cols].fill(0.0);
        (self.cols, self.top, self.tile) = (cols, 0, 0);
    }

    /// Adds a row, beyond those before.
    #[inline(always)]
    pub fn add(&mut self, row: usize, values: &[f32]) {
        let (mut last, mut next, mut level) = (self.tile, row / TILE_ROWS, 0);
        self.tile = next;
        while last != next {
            self.close(level);
            (last, next, level) = (last / TILE_ROWS, next / TILE_ROWS, level + 1);
        }
        self.sums[0].iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }

    /// The sum over all rows.
    #[inline(always)]
    pub fn finish(&mut self) -> &[f32] {
        let top = self.top;
        (0..top).for_each(|level| self.close(level));
        &self.sums[top][..self.cols]
    }

    /// Adds a level's sum to the one above, and starts the next one.
    #[inline(always)]
    fn close(&mut self, level: usize) {
        let (below, above) = self.sums.split_at_mut(level + 1);
        let (below, above) = (&mut below[level][..self.cols], &mut above[0][..self.cols]);
        if level == self.top {
            self.top += 1;
            above.copy_from_slice(below);
        } else {
            above.iter_mut().zip(&*below).for_each(|(above, sum)| *above += sum);
        }
        below.fill(0.0);
    }
}
