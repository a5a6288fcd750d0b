//! `embedding_dropout`, exactly; with a norm in f64, and how far an implementation in f32 may be from it.

use super::norm::{Affine, RowGradient, centred, deviation, row_gradient};
use super::*;
use fused_dropout::Norm;
use fused_dropout::ops::embedding_dropout::{Ids, Lookup, Lookups, Tables};

/// The entry of a table that row r takes.
fn entry(lookup: &Lookup<&[u32]>, r: usize) -> usize {
    match lookup.ids {
        Ids::Given(ids) => ids[r] as usize,
        Ids::Sequence(length) => r % length,
    }
}

/// The sum of what each row looks up, in f32.
fn embeddings<T: Dtype>(
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

/// The sums of each row, in f64.
fn rows<T: Dtype>(shape: Shape, lookups: &Lookups<&[u32]>, tables: &Tables<&[T]>) -> Vec<Vec<f64>> {
    let sums: Vec<f64> = embeddings(shape, lookups, tables).into_iter().map(f64::from).collect();
    (0..shape.rows).map(|r| sums[r * shape.cols..(r + 1) * shape.cols].to_vec()).collect()
}

/// y = D(norm(sum)), and the mean and rstd of each row.
///
/// y = (c r w + b) scale: the errors of c and r, a rounding for each of three products and the sum.
pub fn embedding_norm<T: Dtype>(
    dropout: &Dropout<'_>,
    norm: &Norm,
    shape: Shape,
    lookups: &Lookups<&[u32]>,
    tables: &Tables<&[T]>,
    affine: &Affine<'_, T>,
) -> (Vec<Bounded>, Vec<Bounded>) {
    let (scale, _) = scale_and_threshold(dropout);
    let (scale, keep) = (f64::from(scale), keep_mask(dropout, shape));
    let (relative, absolute) = rounding::<T>();
    let (mut y, mut stats) = (Vec::new(), Vec::new());
    for (r, row) in rows(shape, lookups, tables).into_iter().enumerate() {
        let row = centred(norm.kind, &row, None);
        let (rstd, rstd_error) = deviation(norm, &row);
        stats.push(row.mean);
        stats.push(Bounded { value: rstd, error: rstd * rstd_error * 1.01 });
        for (k, (c, c_error)) in row.c.iter().zip(&row.error).enumerate() {
            if !keep[r * shape.cols + k] {
                y.push(Bounded { value: 0.0, error: 0.0 });
                continue;
            }
            let w = f64::from(affine.weight[k].to_f32());
            let b = affine.bias.map_or(0.0, |bias| f64::from(bias[k].to_f32()));
            let (term, value) = (c * rstd * w, (c * rstd * w + b) * scale);
            let inner = (w * rstd).abs() * c_error + term.abs() * (rstd_error + 2.0 * U);
            let error = (inner * scale + 2.0 * U * value.abs()) * 1.01 + SUBNORMAL;
            let error = error + (value.abs() + error) * relative + absolute;
            y.push(Bounded { value, error });
        }
    }
    (y, stats)
}

/// The gradients of the normalised form.
pub struct NormBackward {
    /// Of each table that there is.
    pub tables: [Option<Vec<Bounded>>; 3],
    pub weight: Vec<Bounded>,
    /// A sum of what is exact.
    pub bias: Vec<f32>,
}

/// The gradients, each on top of `before(elements)`, where `stats` are the exact mean and rstd of each row,
/// rounded to f32.
///
/// Errors beside those of `row_gradient`, where g = D(dy) w is two roundings:
/// - h xhat: two roundings and |h| e_xhat;
/// - sums over n rows: their terms' errors, and 64 u for each level of the tree; u for the addition to
///   what was there.
#[allow(clippy::too_many_arguments)] // an operator's tensors
pub fn embedding_norm_backward<T: Dtype>(
    dropout: &Dropout<'_>,
    norm: &Norm,
    shape: Shape,
    lookups: &Lookups<&[u32]>,
    tables: &Tables<&[T]>,
    weight: &[T],
    stats: &[f32],
    dy: &[T],
    before: impl Fn(usize) -> Vec<f32>,
) -> NormBackward {
    let (scale, _) = scale_and_threshold(dropout);
    let keep = keep_mask(dropout, shape);
    let weight: Vec<f64> = weight.iter().map(|w| f64::from(w.to_f32())).collect();
    let all = [Some(&lookups.token), lookups.position.as_ref(), lookups.segment.as_ref()];
    let mut sums = all.map(|lookup| lookup.map(|lookup| Sums::new(lookup.entries * shape.cols)));
    let mut slopes = Sums::new(shape.cols);
    let h = |i: usize| if keep[i] { dy[i].to_f32() * scale } else { 0.0 };
    for (r, row) in rows(shape, lookups, tables).into_iter().enumerate() {
        let h: Vec<f64> = (0..shape.cols).map(|k| f64::from(h(r * shape.cols + k))).collect();
        let g: Vec<f64> = h.iter().zip(&weight).map(|(h, w)| h * w).collect();
        let RowGradient { xhat, ds } = row_gradient(norm, &row, stats[2 * r], &g, 2.0);
        for k in 0..shape.cols {
            for (lookup, sums) in all.iter().zip(&mut sums) {
                if let (Some(lookup), Some(sums)) = (lookup, sums) {
                    sums.add(
                        entry(lookup, r) * shape.cols + k,
                        ds[k].value,
                        ds[k].error + SUBNORMAL,
                    );
                }
            }
            let error = h[k].abs() * (xhat[k].error + U * xhat[k].value.abs()) + SUBNORMAL;
            slopes.add(k, h[k] * xhat[k].value, error);
        }
    }
    let column = |c: usize| tree((0..shape.rows).map(|r| h(r * shape.cols + c)).collect());
    let mut bias = before(shape.cols);
    // Without rows nobody takes it.
    if shape.rows > 0 {
        bias.iter_mut().enumerate().for_each(|(c, bias)| *bias += column(c));
    }
    NormBackward {
        bias,
        weight: slopes.bounded(shape, &before(shape.cols)),
        tables: sums.map(|sums| {
            sums.map(|sums| {
                let before = before(sums.0.len());
                sums.bounded(shape, &before)
            })
        }),
    }
}

/// Sums over rows: of values, of their magnitudes, and of their errors.
struct Sums(Vec<(f64, f64, f64)>);

impl Sums {
    fn new(len: usize) -> Self {
        Self(vec![(0.0, 0.0, 0.0); len])
    }

    fn add(&mut self, i: usize, value: f64, error: f64) {
        let (sum, magnitude, errors) = &mut self.0[i];
        *sum += value;
        *magnitude += value.abs();
        *errors += error;
    }

    /// On top of `before`. A term goes through at most 64 additions a level of the tree.
    fn bounded(self, shape: Shape, before: &[f32]) -> Vec<Bounded> {
        let tree = (shape.rows as f64).log(64.0).ceil().max(1.0);
        let levels = (64.0 * tree).min(shape.rows as f64);
        let bound = |((sum, magnitude, errors), before): ((f64, f64, f64), &f32)| {
            let value = sum + f64::from(*before);
            let error = errors + levels * U * magnitude + U * value.abs();
            Bounded { value, error: error * 1.01 + SUBNORMAL }
        };
        self.0.into_iter().zip(before).map(bound).collect()
    }
}
