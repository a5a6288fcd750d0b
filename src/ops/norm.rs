//! Normalisation of a row, LayerNorm and RMSNorm: what the operators that normalise share.
//!
//! With n columns, weight w and bias b:
//!
//! - layer: m = Σ s / n, v = Σ (s - m)² / n, xhat = (s - m) / √(v + epsilon);
//! - RMS: m = 0, v = Σ s² / n, xhat = s / √(v + epsilon);
//! - y = xhat · w + b.
//!
//! Where v + epsilon is 0, 1 / √(v + epsilon) counts as 0, so xhat is. Statistics are sums in f32 of
//! values less a first mean of their row, so a mean far above the deviation costs the deviation no digits, and it does
//! not matter which column an outlier is in.
//!
//! Rows of any finite magnitude are right: a row whose squares are beyond f32, or below it, is scaled by a power of two for
//! its statistics. Two limits stay, which f32 has itself: a value that lies further than 3.4e38 from its row's mean
//! becomes an infinity or NaN, and 1 / √(v + epsilon) is at most 3.4e38. A NaN, and with LayerNorm an infinity, makes its row NaN.

use crate::error::Error;

/// Which normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NormKind {
    /// LayerNorm: the row less its mean, over its standard deviation (biased).
    Layer,
    /// RMSNorm: the row over the root of its mean square.
    Rms,
}

/// A normalisation of each row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Which one.
    pub kind: NormKind,
    /// Added to the variance (or mean square) under the root. Finite, at least 0.
    pub epsilon: f32,
}

impl Norm {
    /// LayerNorm.
    pub fn layer(epsilon: f32) -> Self {
        Self { kind: NormKind::Layer, epsilon }
    }

    /// RMSNorm.
    pub fn rms(epsilon: f32) -> Self {
        Self { kind: NormKind::Rms, epsilon }
    }

    /// Refuses an epsilon that no variance could bear.
    pub(crate) fn check(&self, operator: &'static str) -> Result<(), Error> {
        if self.epsilon.is_finite() && self.epsilon >= 0.0 {
            return Ok(());
        }
        Err(Error::argument(operator, "epsilon", "a finite number, at least 0", self.epsilon))
    }
}

/// Elements of the statistics of `rows` rows: the mean (0 for RMS) and 1 / √(v + epsilon) of each, in
/// f32, next to each other.
pub fn stats_len(rows: usize) -> usize {
    rows.saturating_mul(2)
}
