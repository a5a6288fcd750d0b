//! Normalisation of a row in f64, and how far an implementation in f32 may be from it.

use super::*;
use fused_dropout::{Norm, NormKind};

/// Every implementation keeps at least 16 running sums of a row: a term goes through so many additions.
pub fn levels(n: usize) -> f64 {
    n.div_ceil(16) as f64 + 8.0
}

/// A row's deviations from its mean, and the errors that f32 brings, with u = 2^-24 and L the levels of a sum. First
/// order, but for the variance of a row whose values are all near its mean.
///
/// - d = s - pivot is one rounding: u |d|. Forward the pivot is the row's first value, backward the saved
///   mean;
/// - delta = mean(d): each term's u, L u for the sum and u for the quotient: (L + 2) u mean|d|;
/// - c = d - delta is one more: `error` = u |d| + (L + 2) u mean|d| + u |c|;
/// - RMSNorm centres nothing: c = s, exactly.
pub struct Centred {
    pub c: Vec<f64>,
    pub error: Vec<f64>,
    pub mean: Bounded,
}

pub fn centred(kind: NormKind, row: &[f64], pivot: f64) -> Centred {
    if kind == NormKind::Rms {
        let mean = Bounded { value: 0.0, error: 0.0 };
        return Centred { c: row.to_vec(), error: vec![0.0; row.len()], mean };
    }
    let n = row.len().max(1) as f64;
    let mean = row.iter().sum::<f64>() / n;
    let distance = row.iter().map(|s| (s - pivot).abs()).sum::<f64>() / n;
    let delta_error = (levels(row.len()) + 2.0) * U * distance;
    let error = |s: &f64| U * (s - pivot).abs() + delta_error + U * (s - mean).abs();
    Centred {
        c: row.iter().map(|s| s - mean).collect(),
        error: row.iter().map(error).collect(),
        mean: Bounded { value: mean, error: (delta_error + U * mean.abs()) * 1.01 },
    }
}

/// 1 / sqrt(v + epsilon) and its relative error.
///
/// v = mean(c^2): a term is off by 2 |c| e + e^2 and one rounding, then the sum's and the quotient's:
/// mean(2 |c| e + e^2) + (L + 2) u v. One rounding more for the sum with epsilon; half of that in the root,
/// and two roundings for root and quotient.
pub fn deviation(norm: &Norm, row: &Centred) -> (f64, f64) {
    let n = row.c.len().max(1) as f64;
    let v = row.c.iter().map(|c| c * c).sum::<f64>() / n;
    let terms = row.c.iter().zip(&row.error).map(|(c, e)| 2.0 * c.abs() * e + e * e);
    let error = terms.sum::<f64>() / n + (levels(row.c.len()) + 2.0) * U * v;
    let total = v + f64::from(norm.epsilon);
    if total == 0.0 {
        return (0.0, 0.0);
    }
    (1.0 / total.sqrt(), (error / total + U) / 2.0 + 2.0 * U)
}

/// What a product that is subnormal in f32 may lack.
pub const SUBNORMAL: f64 = 2.802_596_928_649_634e-45;
