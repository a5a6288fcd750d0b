//! Sums over rows on the CPU: the tree of [`crate::ops::sum_rows`].

use super::Cpu;
use super::octets::ELEMENTS;
use crate::ops::sum_rows::{RUN_ROWS, TILE_ROWS};
use crate::tensor::Sum;
use rayon::prelude::*;

impl Sum<'_, Cpu> {
    /// The tree above the tiles' `sums`, `[tiles, cols]`, times `factor`.
    pub(super) fn finish(self, sums: Vec<f32>, factor: f32) {
        let cols = self.to.len();
        let total = if sums.is_empty() { vec![0.0; cols] } else { tree(sums, cols) };
        let values = self.to.iter_mut().zip(total.into_iter().map(|total| total * factor));
        match self.add {
            true => values.for_each(|(to, value)| *to += value),
            false => values.for_each(|(to, value)| *to = value),
        }
    }
}

/// 64 sums in order, from +0, until one is left.
fn tree(mut sums: Vec<f32>, cols: usize) -> Vec<f32> {
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

/// Adds a run's sums to those of its tile, and makes zeros of them.
#[inline(always)]
pub(super) fn close_run(tile: &mut [f32], run: &mut [f32]) {
    for (tile, run) in tile.iter_mut().zip(run) {
        *tile += std::mem::take(run);
    }
}

/// Levels of the tree over 2^32 rows, as many as there can be.
const LEVELS: usize = 7;

/// The tree over rows of which most are +0, for at most a block of columns: only the others are added, in
/// ascending order. What is +0 changes no sum, since a sum that starts from +0 is never -0; for the same
/// reason a level with one sum in it is that sum.
pub(super) struct SparseTree {
    /// The sum that is being added up on each level, where there is one.
    sums: [[f32; ELEMENTS]; LEVELS],
    started: [bool; LEVELS],
    /// The run of the last row.
    run: usize,
}

impl SparseTree {
    pub fn new() -> Self {
        Self { sums: [[0.0; ELEMENTS]; LEVELS], started: [false; LEVELS], run: 0 }
    }

    /// Adds a row, beyond those before.
    #[inline(always)]
    pub fn add(&mut self, row: usize, values: &[f32]) {
        let (mut last, mut next, mut level) = (self.run, row / RUN_ROWS, 0);
        self.run = next;
        while last != next {
            self.close(level, values.len());
            let radix = if level == 0 { TILE_ROWS / RUN_ROWS } else { TILE_ROWS };
            (last, next, level) = (last / radix, next / radix, level + 1);
        }
        let sums = self.sums[0].iter_mut().zip(values);
        match std::mem::replace(&mut self.started[0], true) {
            true => sums.for_each(|(sum, value)| *sum += value),
            false => sums.for_each(|(sum, value)| *sum = 0.0 + value),
        }
    }

    /// Adds the sum over all rows to `total`, and starts anew.
    #[inline(always)]
    pub fn finish(&mut self, total: &mut [f32]) {
        let Some(top) = self.started.iter().rposition(|&started| started) else { return };
        (0..top).for_each(|level| self.close(level, total.len()));
        self.started[top] = false;
        total.iter_mut().zip(&self.sums[top]).for_each(|(total, sum)| *total += sum);
    }

    /// Adds a level's sum to the one above, where it was started.
    #[inline(always)]
    fn close(&mut self, level: usize, cols: usize) {
        if !std::mem::replace(&mut self.started[level], false) {
            return;
        }
        let (below, above) = self.sums.split_at_mut(level + 1);
        let (below, above) = (&below[level][..cols], &mut above[0][..cols]);
        match std::mem::replace(&mut self.started[level + 1], true) {
            true => above.iter_mut().zip(below).for_each(|(above, sum)| *above += sum),
            false => above.copy_from_slice(below),
        }
    }
}
