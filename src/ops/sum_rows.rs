//! The sum of a gradient over the rows of a tensor, in an order that every backend keeps.
//!
//! `sum[c] = factor * sum over r of term[r, c]`, in f32, is a tree of radix [`TILE_ROWS`]: every 64
//! consecutive rows are added in order, starting from +0, then every 64 consecutive such sums, until
//! one is left, which is multiplied by the factor. The order depends on the number of rows alone, so the
//! result is the same bits for every backend, number of threads and launch shape.

/// Rows that one partial sum covers: the radix of the tree.
pub const TILE_ROWS: usize = 64;
