//! The sum of a gradient over the rows of a tensor, in an order that every backend keeps.
//!
//! `sum[c] = factor * sum over r of term[r, c]`, in f32, is a tree. Every [`RUN_ROWS`] consecutive rows are added in order,
//! starting from +0; then every four such sums, which makes one of [`TILE_ROWS`] rows; then every 64 such sums, until one is left, which is multiplied by the factor. The order depends on the number of rows alone, so
//! the result is the same bits for every backend, number of threads and launch shape.

/// Rows that are added one after the other.
pub const RUN_ROWS: usize = 16;

/// Rows of four runs, and the radix of the tree above them.
pub const TILE_ROWS: usize = 64;
