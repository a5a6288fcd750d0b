//! `embedding_dropout`, exactly.

use super::*;
use fused_dropout::ops::embedding_dropout::{Ids, Lookup, Lookups, Tables};

/// The entry of a table that row r takes.
fn entry(lookup: &Lookup<&[u32]>, r: usize) -> usize {
    match lookup.ids {
        Ids::Given(ids) => ids[r] as usize,
        Ids::Sequence(length) => r % length,
    }
}

/// The sum of what each row looks up, in f32.
pub fn embeddings<T: Dtype>(
    shape: Shape,
    lookups: &Lookups<&[u32]>,
    tables: &Tables<&[T]>,
) -> Vec<f32> {
    let value = |i: usize| {
        let (r, c) = (i / shape.cols, i % shape.cols);
        let at = |lookup: &Lookup<&[u32]>, table: &[T]| {
            table[entry(lookup, r) * shape.cols + c].to_f32()
        };
        let mut sum = at(&lookups.token, tables.token);
        if let Some(position) = &lookups.position {
            sum += at(position, tables.position.unwrap());
        }
        if let Some(segment) = &lookups.segment {
            sum += at(segment, tables.segment.unwrap());
        }
        sum
    };
    (0..shape.rows * shape.cols).map(value).collect()
}

/// y = D(token + position + segment).
pub fn embedding_dropout<T: Dtype>(
    dropout: &Dropout<'_>,
    shape: Shape,
    lookups: &Lookups<&[u32]>,
    tables: &Tables<&[T]>,
) -> Vec<T> {
    let (scale, _) = scale_and_threshold(dropout);
    let sums = embeddings(shape, lookups, tables);
    let value = |(sum, keep)| T::from_f32(if keep { sum * scale } else { 0.0 });
    sums.into_iter().zip(keep_mask(dropout, shape)).map(value).collect()
}

/// What a table's gradients are after g = D(dy) was added to `before`: for each entry that a row took and
/// each column, the tree over all rows, as its definition reads.
pub fn embedding_gradient<T: Dtype>(
    dropout: &Dropout<'_>,
    shape: Shape,
    lookup: &Lookup<&[u32]>,
    dy: &[T],
    before: &[f32],
) -> Vec<f32> {
    let (scale, _) = scale_and_threshold(dropout);
    let keep = keep_mask(dropout, shape);
    let mut after = before.to_vec();
    let entries: Vec<usize> = (0..shape.rows).map(|r| entry(lookup, r)).collect();
    for (r, &e) in entries.iter().enumerate() {
        if entries[..r].contains(&e) {
            continue;
        }
        for c in 0..shape.cols {
            let term = |r: usize| {
                let i = r * shape.cols + c;
                if entries[r] == e && keep[i] { dy[i].to_f32() * scale } else { 0.0 }
            };
            after[e * shape.cols + c] += tree((0..shape.rows).map(term).collect());
        }
    }
    after
}
