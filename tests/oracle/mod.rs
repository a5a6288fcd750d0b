//! The oracle: one element at a time, written from CONTRACT.md on top of `rand_philox`, sharing no code
//! with the crate but its argument types. Exact where the contract is exact, f64 with a bound where
//! it is not.
#![allow(dead_code)] // every test file uses a part

use fused_dropout::{Dropout, Dtype, DtypeId, Mode, RowMap, Scaling, Scores, Shape};
use rand_philox::Philox;

/// The logical row of a local row.
pub fn logical(map: &RowMap<'_>, r: u64) -> u64 {
    match *map {
        RowMap::Contiguous { first } => u64::from(first) + r,
        RowMap::Blocks { first, block, stride } => {
            let block = u64::from(block);
            u64::from(first) + r / block * u64::from(stride) + r % block
        }
        RowMap::Attention { first, heads, queries, head_stride, batch_stride } => {
            let (heads, queries) = (u64::from(heads), u64::from(queries));
            let (b, h, q) = (r / (heads * queries), r / queries % heads, r % queries);
            u64::from(first) + b * u64::from(batch_stride) + h * u64::from(head_stride) + q
        }
        RowMap::Explicit(list) => u64::from(list[r as usize]),
    }
}

/// round_half_even(p * 65536) of the probability that was realised, from what the crate gives back.
fn threshold(dropout: &Dropout<'_>) -> u32 {
    (dropout.p.effective() * 65536.0) as u32
}

/// What a kept value is multiplied by, and the threshold that really acts.
pub fn scale_and_threshold(dropout: &Dropout<'_>) -> (f32, u32) {
    let t = threshold(dropout);
    let keep = f64::from(65536 - t) / 65536.0;
    match (dropout.mode, dropout.scaling) {
        (Mode::Training, Scaling::Inverted) if t == 65536 => (0.0, t),
        (Mode::Training, Scaling::Inverted) => ((1.0 / keep) as f32, t),
        (Mode::Training, Scaling::Classic) => (1.0, t),
        (Mode::Inference, Scaling::Inverted) => (1.0, 0),
        (Mode::Inference, Scaling::Classic) if t == 65536 => (0.0, t),
        (Mode::Inference, Scaling::Classic) => (keep as f32, 0),
    }
}

/// The mask: true for kept, row by row.
pub fn keep_mask(dropout: &Dropout<'_>, shape: Shape) -> Vec<bool> {
    let (_, threshold) = scale_and_threshold(dropout);
    let mut keep = Vec::with_capacity(shape.rows * shape.cols);
    let mut philox = Philox::from_u64_seed_stream(dropout.key.seed, dropout.key.stream);
    for r in 0..shape.rows {
        let row = logical(&dropout.place.rows, r as u64);
        let mut drawn = (u64::MAX, [0u32; 4]);
        for c in 0..shape.cols {
            let col = dropout.place.first_col + c as u64;
            if drawn.0 != col / 8 {
                let counter = (u128::from(dropout.key.stream) << 64)
                    | (u128::from(row) << 32)
                    | u128::from(col / 8);
                philox.seek(counter);
                drawn = (col / 8, std::array::from_fn(|_| philox.next_u32()));
            }
            let j = (col % 8) as usize;
            let lane = (drawn.1[j / 2] >> (16 * (j % 2))) & 0xffff;
            keep.push(lane >= threshold);
        }
    }
    keep
}

/// y = D(x).
pub fn dropout<T: Dtype>(dropout: &Dropout<'_>, shape: Shape, x: &[T]) -> Vec<T> {
    let (scale, _) = scale_and_threshold(dropout);
    let keep = keep_mask(dropout, shape);
    let value = |(&x, keep): (&T, bool)| T::from_f32(if keep { x.to_f32() * scale } else { 0.0 });
    x.iter().zip(keep).map(value).collect()
}

/// y = residual + D(x + bias).
pub fn dropout_add<T: Dtype>(
    dropout: &Dropout<'_>,
    shape: Shape,
    x: &[T],
    bias: Option<&[T]>,
    residual: &[T],
) -> Vec<T> {
    let (scale, _) = scale_and_threshold(dropout);
    let value = |(i, keep): (usize, bool)| {
        if !keep {
            return residual[i];
        }
        let x = bias.map_or(x[i].to_f32(), |bias| x[i].to_f32() + bias[i % shape.cols].to_f32());
        T::from_f32(x.mul_add(scale, residual[i].to_f32()))
    };
    keep_mask(dropout, shape).into_iter().enumerate().map(value).collect()
}

/// The bias gradient: the tree of radix 64 over the rows, a column at a time, as its definition reads.
pub fn dbias<T: Dtype>(dropout: &Dropout<'_>, shape: Shape, dy: &[T]) -> Vec<f32> {
    let (scale, _) = scale_and_threshold(dropout);
    let keep = keep_mask(dropout, shape);
    let column = |c: usize| {
        let kept = |r: usize| {
            let i = r * shape.cols + c;
            if keep[i] { dy[i].to_f32() } else { 0.0 }
        };
        let mut sums: Vec<f32> = (0..shape.rows).map(kept).collect();
        // At least one level: 64 terms from +0.
        loop {
            let add = |group: &[f32]| group.iter().fold(0.0f32, |sum, term| sum + term);
            sums = sums.chunks(64).map(add).collect();
            if sums.len() <= 1 {
                return sums.first().copied().unwrap_or(0.0) * scale;
            }
        }
    };
    (0..shape.cols).map(column).collect()
}

/// A value and how far an implementation may be from it.
#[derive(Clone, Copy, Debug)]
pub struct Bounded {
    pub value: f64,
    pub error: f64,
}

impl Bounded {
    /// Whether `given` is the value within its bound; NaN and infinities must be themselves.
    pub fn admits(self, given: f64) -> bool {
        if self.value.is_nan() {
            return given.is_nan();
        }
        given == self.value || (given - self.value).abs() <= self.error
    }
}

/// The mask of a softmax in host memory.
#[derive(Clone, Copy, Default)]
pub struct AttentionMask<'a, T> {
    pub causal: Option<i64>,
    pub lengths: Option<&'a [u32]>,
    pub additive: Option<&'a [T]>,
}

/// Unit roundoff of f32.
const U: f64 = 1.0 / 16_777_216.0;

/// Half a unit in the last place of T, relative, and absolute for subnormal results.
fn rounding<T: Dtype>() -> (f64, f64) {
    match T::ID {
        DtypeId::F32 => (U, 2f64.powi(-150)),
        DtypeId::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        DtypeId::Bf16 => (2f64.powi(-8), 2f64.powi(-134)),
    }
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
