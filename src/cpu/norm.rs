//! Normalisation of a row that lies in f32 in the caches; see [`crate::ops::norm`].

use super::reduce::sum;
use crate::ops::norm::{Norm, NormKind};

/// How a row is standardised: xhat = ((s - pivot) - delta) · rstd.
///
/// The mean is pivot + delta. One f32 has no room for the digits of a mean of 1e4 that a deviation of 1e-2
/// asks for; two have, and s - pivot is exact where s and the pivot are near each other.
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
        let pivot = match norm.kind {
            NormKind::Layer => row.first().copied().unwrap_or(0.0),
            NormKind::Rms => 0.0,
        };
        let delta = delta(norm.kind, row, pivot);
        let square = |s: f32, _| {
            let centred = (s - pivot) - delta;
            centred * centred
        };
        let variance = mean(row, row, square) + norm.epsilon;
        let rstd = if variance == 0.0 { 0.0 } else { 1.0 / variance.sqrt() };
        Self { pivot, delta, rstd }
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

/// What the pivot lacks of the mean.
#[inline(always)]
fn delta(kind: NormKind, row: &[f32], pivot: f32) -> f32 {
    match kind {
        NormKind::Layer => mean(row, row, |s, _| s - pivot),
        NormKind::Rms => 0.0,
    }
}

/// The mean of `term`, 0 of nothing.
#[inline(always)]
fn mean(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f32 {
    sum(a, b, term) / a.len().max(1) as f32
}
