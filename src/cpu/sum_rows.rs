//! Sums over rows on the CPU: the tree of [`crate::ops::sum_rows`] above its first level.

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
