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

/// The exact softmax of one row's z, which are scale * x + a rounded once to f32, with the relative error that an f32
/// implementation of each probability may have.
///
/// With u = 2^-24, to first order:
/// - z - max is one rounding, doubled for a base-2 formulation, whose exponent is z log2 e less that of the maximum in one
///   rounding, and whose log2 e is within 0.23u: 2u |z - max|. The shift itself cancels;
/// - an absolute error of an exponential's argument is a relative one of its value, and the
///   exponential adds 2 ulp, 4u: e = 2u |z - max| + 4u;
/// - the sum's relative error is the mean of the e under P, plus a rounding a level of the summation:
///   every implementation keeps at least 16 running sums, so ceil(n / 16) + 8 levels;
/// - the reciprocal or quotient, 2u, and two products with it: 4u. That of the maximum's own exponential, by which a
///   base-2 formulation multiplies the saved reciprocal and divides it again: 4u.
///
/// An exponential below the normal numbers may be 0, an absolute error of 2^-126, which counts as much
/// in P, since the sum is at least 1.
pub struct Row {
    pub p: Vec<f64>,
    /// Relative error of each probability; see [`FLUSHED`] for the absolute one.
    pub error: Vec<f64>,
    /// The largest z, NaNs left out.
    pub max: f32,
    /// 1 over the sum of exp(z - max).
    pub reciprocal: Bounded,
    /// Keys whose exponential is not 0 in f32, or is a NaN. The others take no part: y and dx are +0 there. Those whose
    /// exponential is below the normal numbers may.
    pub present: Vec<bool>,
}

/// Below it exp is 0 in f32, 2^-150 rounded. No case comes near it.
const VANISHES: f64 = -104.0;

/// Absolute error of a probability whose exponential is below the normal numbers: 2^-126.
const FLUSHED: f64 = f32::MIN_POSITIVE as f64;

pub fn softmax_row<T: Dtype>(
    scores: &Scores,
    mask: &AttentionMask<'_, T>,
    row: usize,
    x: &[T],
) -> Row {
    let n = scores.keys;
    let (batch, query) = (row / (scores.queries * scores.heads), row % scores.queries);
    let seen: Vec<bool> = (0..n)
        .map(|k| {
            mask.causal.is_none_or(|offset| (k as i128) <= query as i128 + i128::from(offset))
                && mask.lengths.is_none_or(|lengths| (k as u64) < u64::from(lengths[row]))
        })
        .collect();
    let z_of = |k: usize| match mask.additive {
        _ if !seen[k] => f32::NEG_INFINITY,
        None => x[row * n + k].to_f32() * scores.scale,
        Some(a) => {
            let additive = a[(batch * scores.queries + query) * n + k].to_f32();
            x[row * n + k].to_f32().mul_add(scores.scale, additive)
        }
    };
    let z: Vec<f32> = (0..n).map(z_of).collect();
    let max = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY && !z.iter().any(|z| z.is_nan()) {
        let (p, error, present) = (vec![0.0; n], vec![0.0; n], vec![false; n]);
        return Row { p, error, max, reciprocal: Bounded { value: 0.0, error: 0.0 }, present };
    }
    let below: Vec<f64> = z.iter().map(|&z| f64::from(z) - f64::from(max)).collect();
    let e: Vec<f64> = (0..n).map(|k| if seen[k] { below[k].exp() } else { 0.0 }).collect();
    let sum: f64 = e.iter().sum();
    let p: Vec<f64> = e.iter().map(|e| e / sum).collect();
    let term: Vec<f64> =
        below.iter().map(|b| if *b < VANISHES { 0.0 } else { U * (2.0 * b.abs() + 4.0) }).collect();
    let levels = n.div_ceil(16) as f64 + 8.0;
    let mean: f64 = p.iter().zip(&term).filter(|(p, _)| **p != 0.0).map(|(p, e)| p * e).sum();
    let sum_error = mean + levels * U;
    let error = term.iter().map(|e| e + sum_error + 8.0 * U).collect();
    let reciprocal = Bounded { value: 1.0 / sum, error: 1.01 * (sum_error + 7.0 * U) / sum };
    // Where the sum is a NaN, so is each product with it.
    let present = (0..n).map(|k| seen[k] && (sum.is_nan() || below[k] >= VANISHES)).collect();
    Row { p, error, max, reciprocal, present }
}

/// y = D(softmax(...)) with its bounds, and the statistics of each row.
pub fn softmax_dropout<T: Dtype>(
    dropout: &Dropout<'_>,
    scores: &Scores,
    mask: &AttentionMask<'_, T>,
    x: &[T],
) -> (Vec<Bounded>, Vec<(f32, Bounded)>) {
    let shape = Shape::new(scores.batch * scores.heads * scores.queries, scores.keys);
    let (scale, _) = scale_and_threshold(dropout);
    let keep = keep_mask(dropout, shape);
    let (relative, absolute) = rounding::<T>();
    let (mut y, mut statistics) = (Vec::with_capacity(x.len()), Vec::with_capacity(shape.rows));
    for r in 0..shape.rows {
        let row = softmax_row(scores, mask, r, x);
        for k in 0..shape.cols {
            if !keep[r * shape.cols + k] || !row.present[k] {
                y.push(Bounded { value: 0.0, error: 0.0 });
                continue;
            }
            let value = row.p[k] * f64::from(scale);
            // One more rounding for the product with dropout's scale, then the storage type's.
            let error = value * (row.error[k] + U) + FLUSHED * f64::from(scale);
            let error = error * 1.01 + (value + error) * relative + absolute;
            y.push(Bounded { value, error });
        }
        statistics.push((row.max, row.reciprocal));
    }
    (y, statistics)
}

/// dx = scale * P * (g - sum P g), g = D(dy), with its bounds.
///
/// Errors, to first order: P as above; the dot product the mean of them under P |g|, plus its levels and two products;
/// then P g - P dot, where both are rounded before, and two products. A row with a g beyond f32 may be lost, or not:
/// dropout's scale may come last.
pub fn softmax_dropout_backward<T: Dtype>(
    dropout: &Dropout<'_>,
    scores: &Scores,
    mask: &AttentionMask<'_, T>,
    x: &[T],
    dy: &[T],
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
        let g = |k: usize| {
            let i = r * shape.cols + k;
            if keep[i] { f64::from(dy[i].to_f32()) * f64::from(scale) } else { 0.0 }
        };
        let overflows = |k: usize| g(k).is_finite() && !(g(k) as f32).is_finite();
        if (0..shape.cols).any(|k| row.present[k] && overflows(k)) {
            dx.extend(row.present.iter().map(|present| match present {
                true => Bounded::UNSPECIFIED,
                false => Bounded { value: 0.0, error: 0.0 },
            }));
            continue;
        }
        let present = |k: &usize| row.present[*k];
        let dot: f64 = (0..shape.cols).filter(present).map(|k| row.p[k] * g(k)).sum();
        let dot_error: f64 = (0..shape.cols)
            .filter(present)
            .map(|k| {
                let relative = row.error[k] + (levels + 4.0) * U;
                g(k).abs() * (row.p[k] * relative + FLUSHED)
            })
            .sum();
        for k in 0..shape.cols {
            if !row.present[k] {
                dx.push(Bounded { value: 0.0, error: 0.0 });
                continue;
            }
            let value = factor * row.p[k] * (g(k) - dot);
            let inner = dot_error + U * ((g(k) - dot).abs() + 2.0 * g(k).abs() + dot.abs());
            let error = value.abs() * (row.error[k] + 3.0 * U)
                + (factor * row.p[k]).abs() * inner
                + (factor * (g(k) - dot)).abs() * FLUSHED
                + SUBNORMAL;
            let error = error * 1.01 + (value.abs() + error) * relative + absolute;
            dx.push(Bounded { value, error });
        }
    }
    dx
}
