//! `softmax_dropout` in f64, and how far an implementation in f32 may be from it.

use super::*;
use fused_dropout::Scores;

/// The mask of a softmax in host memory.
#[derive(Clone, Copy, Default)]
pub struct AttentionMask<'a, T> {
    pub causal: Option<i64>,
    pub lengths: Option<&'a [u32]>,
    pub additive: Option<&'a [T]>,
}

/// The exact softmax of one row with the relative error that an f32 implementation of each
/// probability may have.
///
/// With u = 2^-24, to first order:
/// - z = scale * x + a is three roundings at most (two in a base-2 formulation's premultiplied scale,
///   one for the sum), each of at most |scale x| + |a|: 3u (|scale x| + |a|), absolute;
/// - z - max is one more, doubled for the base-2 formulation: 2u |z - max|. The shift itself cancels;
/// - an absolute error of an exponential's argument is a relative one of its value, and the
///   exponential adds 2 ulp, 4u: e = 3u (|scale x| + |a|) + 2u |z - max| + 4u;
/// - the sum's relative error is the mean of the e under P, plus a rounding a level of the summation:
///   every implementation keeps at least 16 running sums, so ceil(n / 16) + 8 levels;
/// - the reciprocal or quotient, and the product with it: 3u.
///
/// An exponential below the normal numbers has an absolute error instead, 2^-148, which counts as much
/// in P, since the sum is at least 1.
pub struct Row {
    pub p: Vec<f64>,
    /// Relative error of each probability; see [`SUBNORMAL`] for the absolute one.
    pub error: Vec<f64>,
    /// Relative error of the terms before the normalisation.
    term: Vec<f64>,
    /// log-sum-exp and its absolute error.
    pub lse: Bounded,
    pub seen: Vec<bool>,
}

/// Absolute error of a probability whose exponential is subnormal.
const SUBNORMAL: f64 = 2.802_596_928_649_634e-45;

pub fn softmax_row<T: Dtype>(
    scores: &Scores,
    mask: &AttentionMask<'_, T>,
    row: usize,
    x: &[T],
) -> Row {
    let n = scores.keys;
    let (batch, query) = (row / (scores.queries * scores.heads), row % scores.queries);
    let additive = |k: usize| {
        let at = (batch * scores.queries + query) * n + k;
        mask.additive.map_or(0.0, |a| f64::from(a[at].to_f32()))
    };
    let seen: Vec<bool> = (0..n)
        .map(|k| {
            mask.causal.is_none_or(|offset| (k as i128) <= query as i128 + i128::from(offset))
                && mask.lengths.is_none_or(|lengths| (k as u64) < u64::from(lengths[row]))
        })
        .collect();
    let sx = |k: usize| f64::from(scores.scale) * f64::from(x[row * n + k].to_f32());
    let z: Vec<f64> =
        (0..n).map(|k| if seen[k] { sx(k) + additive(k) } else { f64::NEG_INFINITY }).collect();
    let nan = (0..n).any(|k| seen[k] && z[k].is_nan());
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY && !nan {
        let lse = Bounded { value: max, error: 0.0 };
        return Row { p: vec![0.0; n], error: vec![0.0; n], term: vec![0.0; n], lse, seen };
    }
    let e: Vec<f64> = (0..n).map(|k| if seen[k] { (z[k] - max).exp() } else { 0.0 }).collect();
    let sum: f64 = e.iter().sum();
    let p: Vec<f64> = e.iter().map(|e| e / sum).collect();
    let term: Vec<f64> = (0..n)
        .map(|k| {
            if p[k] == 0.0 {
                return 0.0;
            }
            U * (3.0 * (sx(k).abs() + additive(k).abs()) + 2.0 * (z[k] - max).abs() + 4.0)
        })
        .collect();
    let levels = n.div_ceil(16) as f64 + 8.0;
    let mean: f64 = p.iter().zip(&term).map(|(p, e)| p * e).sum();
    let sum_error = mean + levels * U;
    let error = term.iter().map(|e| e + sum_error + 3.0 * U).collect();
    let value = max + sum.ln();
    // The logarithm is within 2 ulp, the addition of the maximum is one rounding, twice for base 2.
    let lse_error = sum_error + U * (4.0 * sum.ln().abs() + 3.0 * value.abs() + 2.0 * max.abs());
    Row { p, error, term, lse: Bounded { value, error: lse_error }, seen }
}

/// y = D(softmax(...)) with its bounds, and the log-sum-exp of each row.
pub fn softmax_dropout<T: Dtype>(
    dropout: &Dropout<'_>,
    scores: &Scores,
    mask: &AttentionMask<'_, T>,
    x: &[T],
) -> (Vec<Bounded>, Vec<Bounded>) {
    let shape = Shape::new(scores.batch * scores.heads * scores.queries, scores.keys);
    let (scale, _) = scale_and_threshold(dropout);
    let keep = keep_mask(dropout, shape);
    let (relative, absolute) = rounding::<T>();
    let (mut y, mut lse) = (Vec::with_capacity(x.len()), Vec::with_capacity(shape.rows));
    for r in 0..shape.rows {
        let row = softmax_row(scores, mask, r, x);
        for k in 0..shape.cols {
            if !keep[r * shape.cols + k] || !row.seen[k] {
                y.push(Bounded { value: 0.0, error: 0.0 });
                continue;
            }
            let value = row.p[k] * f64::from(scale);
            // One more rounding for the product with dropout's scale, then the storage type's.
            let error = value * (row.error[k] + U) + SUBNORMAL * f64::from(scale);
            let error = error * 1.01 + (value + error) * relative + absolute;
            y.push(Bounded { value, error });
        }
        lse.push(row.lse);
    }
    (y, lse)
}

/// dx = scale * P * (g - sum P g), g = D(dy), with its bounds; `saved`: P from a saved log-sum-exp that
/// is the exact one rounded to f32.
///
/// Errors, to first order: P as above, or the term's own and u |lse| where the lse is given; g one
/// rounding; the dot product the mean of both under P |g|, plus its levels and a product; then one
/// rounding each for the difference and two products.
pub fn softmax_dropout_backward<T: Dtype>(
    dropout: &Dropout<'_>,
    scores: &Scores,
    mask: &AttentionMask<'_, T>,
    x: &[T],
    dy: &[T],
    saved: bool,
) -> Vec<Bounded> {
    let shape = Shape::new(scores.batch * scores.heads * scores.queries, scores.keys);
    let (scale, _) = scale_and_threshold(dropout);
    let keep = keep_mask(dropout, shape);
    let (relative, absolute) = rounding::<T>();
    let factor = f64::from(scores.scale);
    let levels = shape.cols.div_ceil(16) as f64 + 8.0;
    let mut dx = Vec::with_capacity(x.len());
    for r in 0..shape.rows {
        let row = softmax_row(scores, mask, r, x);
        let p_error = |k: usize| match saved {
            true => row.term[k] + U * 2.0 * row.lse.value.abs() + 4.0 * U,
            false => row.error[k],
        };
        let g = |k: usize| {
            let i = r * shape.cols + k;
            if keep[i] { f64::from(dy[i].to_f32()) * f64::from(scale) } else { 0.0 }
        };
        let seen = |k: &usize| row.seen[*k];
        let dot: f64 = (0..shape.cols).filter(seen).map(|k| row.p[k] * g(k)).sum();
        let dot_error: f64 = (0..shape.cols)
            .filter(seen)
            .map(|k| {
                let relative = p_error(k) + (levels + 3.0) * U;
                g(k).abs() * (row.p[k] * relative + SUBNORMAL)
            })
            .sum();
        for k in 0..shape.cols {
            if !row.seen[k] {
                dx.push(Bounded { value: 0.0, error: 0.0 });
                continue;
            }
            let value = factor * row.p[k] * (g(k) - dot);
            let inner = U * g(k).abs() + dot_error + U * (g(k) - dot).abs();
            let error = value.abs() * (p_error(k) + 3.0 * U)
                + (factor * row.p[k]).abs() * inner
                + (factor * (g(k) - dot)).abs() * SUBNORMAL
                + SUBNORMAL;
            let error = error * 1.01 + (value.abs() + error) * relative + absolute;
            dx.push(Bounded { value, error });
        }
    }
    dx
}
