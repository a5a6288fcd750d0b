//! Normalisation of a row that lies in f32 in the caches; see [`crate::ops::norm`].

use super::convert;
use super::reduce::{sum, sums};
use crate::dtype::Dtype;
use crate::ops::norm::{Norm, NormKind};

/// A norm's weight and bias in f32, a value a column.
pub(super) struct Affine {
    pub weight: Vec<f32>,
    pub bias: Option<Vec<f32>>,
}

impl Affine {
    pub fn new<T: Dtype>(weight: &[T], bias: Option<&[T]>) -> Self {
        Self { weight: convert::widened(weight), bias: bias.map(convert::widened) }
    }
}

/// How a row is standardised: xhat = ((s - pivot) - delta) · rstd.
///
/// The mean is pivot + delta. One f32 has no room for the digits of a mean of 1e4 that a deviation of 1e-2
/// asks for; two have, and s - pivot is exact where s and the pivot are near each other. The pivot is the mean as a first
/// sum gives it, of distances from the row's first value: what that sum lost where this value is far from the others,
/// delta has again; and a row of one value has a deviation of exactly 0.
#[derive(Clone, Copy)]
pub(super) struct Standard {
    pivot: f32,
    delta: f32,
    rstd: f32,
}

impl Standard {
    /// Of a row.
    #[inline(always)]
    pub fn of(norm: &Norm, row: &[f32]) -> Self {
        let Moments { pivot, delta, variance } = Moments::of(norm.kind, row, |s| s);
        match variance + norm.epsilon {
            variance @ LEAST_VARIANCE..=f32::MAX => {
                Self { pivot, delta, rstd: 1.0 / variance.sqrt() }
            }
            _ => Self::scaled(norm, row),
        }
    }

    /// Of a row of any magnitude: from the row times a power of two that brings it, or the root of epsilon, near 1. rstd
    /// is at most the largest f32.
    #[cold]
    fn scaled(norm: &Norm, row: &[f32]) -> Self {
        let largest = row.iter().fold(norm.epsilon.sqrt(), |largest, s| largest.max(s.abs()));
        // The ends of the range, where a power or its reciprocal is no normal number, take their neighbour's.
        let exponent = (largest.to_bits() >> 23).clamp(1, 253);
        let power = f32::from_bits((254 - exponent) << 23); // 2^(127 - exponent)
        let back = f32::from_bits(exponent << 23);
        let Moments { pivot, delta, variance } = Moments::of(norm.kind, row, |s| s * power);
        let variance = variance + norm.epsilon * power * power;
        let rstd = if variance == 0.0 { 0.0 } else { power / variance.sqrt() };
        let rstd = if rstd > f32::MAX { f32::MAX } else { rstd };
        Self { pivot: pivot * back, delta: delta * back, rstd }
    }

    /// Of the same row, from what [`stats`](Self::stats) gave. The mean is a rounded one: what it lacks
    /// is computed again.
    #[inline(always)]
    pub fn saved(kind: NormKind, row: &[f32], [mean, rstd]: [f32; 2]) -> Self {
        Self { pivot: mean, delta: delta(kind, row, mean), rstd }
    }

    /// The mean and the reciprocal deviation.
    #[inline(always)]
    pub fn stats(&self) -> [f32; 2] {
        [self.pivot + self.delta, self.rstd]
    }

    /// xhat of one value.
    #[inline(always)]
    pub fn apply(&self, s: f32) -> f32 {
        ((s - self.pivot) - self.delta) * self.rstd
    }

    /// Replaces a row by xhat · weight + bias.
    #[inline(always)]
    pub fn normalise(&self, row: &mut [f32], weight: &[f32], bias: Option<&[f32]>) {
        let row = row.iter_mut().zip(weight);
        match bias {
            None => row.for_each(|(s, w)| *s = self.apply(*s) * w),
            Some(bias) => row.zip(bias).for_each(|((s, w), b)| *s = self.apply(*s) * w + b),
        }
    }

    /// Replaces g = dy · weight by the gradient of the row: rstd · (g - mean(g) - xhat · mean(g · xhat)),
    /// without mean(g) for RMS.
    #[inline(always)]
    pub fn gradient(&self, kind: NormKind, row: &[f32], g: &mut [f32]) {
        let centre = match kind {
            NormKind::Layer => mean(g, g, |g, _| g),
            NormKind::Rms => 0.0,
        };
        let slope = mean(row, g, |s, g| self.apply(s) * g);
        for (g, &s) in g.iter_mut().zip(row) {
            *g = self.rstd * ((*g - centre) - self.apply(s) * slope);
        }
    }
}

/// A variance from here to the largest f32 lost nothing to squares out of f32's range: 2^-90.
const LEAST_VARIANCE: f32 = 8.077_936e-28;

/// Mean and variance of a row: the mean is pivot + delta.
struct Moments {
    pivot: f32,
    delta: f32,
    variance: f32,
}

impl Moments {
    /// Of the `value`s of a row.
    #[inline(always)]
    fn of(kind: NormKind, row: &[f32], value: impl Fn(f32) -> f32) -> Self {
        let pivot = match (kind, row.first()) {
            (NormKind::Layer, Some(&first)) => {
                let first = value(first);
                first + mean(row, row, |s, _| value(s) - first)
            }
            _ => 0.0,
        };
        // Of d = s - pivot: delta is its mean, and the variance is what its mean square has beyond delta's.
        let [sum, square] = sums(row, row, |s, _| {
            let d = value(s) - pivot;
            [d, d * d]
        });
        let share = share(row);
        let delta = match kind {
            NormKind::Layer => sum * share,
            NormKind::Rms => 0.0,
        };
        let variance = square * share - delta * delta;
        Self { pivot, delta, variance: if variance < 0.0 { 0.0 } else { variance } }
    }
}

/// What the pivot lacks of the mean.
#[inline(always)]
fn delta(kind: NormKind, row: &[f32], pivot: f32) -> f32 {
    match kind {
        NormKind::Layer => mean(row, row, |s, _| s - pivot),
        NormKind::Rms => 0.0,
    }
}

/// 1 / n of a row of n values.
#[inline(always)]
fn share(row: &[f32]) -> f32 {
    1.0 / row.len().max(1) as f32
}

/// The mean of `term`, 0 of nothing.
#[inline(always)]
fn mean(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    let share = share(a);
    let mean = sum(a, b, &term) * share;
    if mean.is_finite() {
        return mean;
    }
    // A sum that overflows; the terms' shares do not, unless one of them is no finite number itself.
    sum(a, b, |a, b| term(a, b) * share)
}
