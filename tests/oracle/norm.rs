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

/// A row's xhat and the gradient at the row, rstd ((g - mean(g)) - xhat mean(g xhat)).
pub struct RowGradient {
    pub xhat: Vec<Bounded>,
    pub ds: Vec<Bounded>,
}

/// From the gradient `g` of xhat, which took `roundings` roundings, and the mean and rstd that were saved: the
/// exact ones rounded to f32.
///
/// Errors, to first order, with e_c that of c around the saved mean:
/// - xhat = c rstd: rstd e_c + 2u |xhat|;
/// - mean(g): (L + roundings + 2) u mean|g|;
/// - mean(g xhat): mean(|g| e_xhat) + (L + roundings + 2) u mean|g xhat|, for a product and the quotient;
/// - (g - mean(g)) - xhat mean(g xhat): the parts' errors and a rounding for each operation;
/// - rstd times that: 2u.
pub fn row_gradient(norm: &Norm, row: &[f64], mean: f32, g: &[f64], roundings: f64) -> RowGradient {
    let row = centred(norm.kind, row, f64::from(mean));
    let (rstd, _) = deviation(norm, &row);
    let xhat_of = |(c, error): (&f64, &f64)| {
        let value = c * rstd;
        Bounded { value, error: rstd * error + 2.0 * U * value.abs() }
    };
    let xhat: Vec<Bounded> = row.c.iter().zip(&row.error).map(xhat_of).collect();
    let levels = levels(g.len()) + roundings + 2.0;
    let mean = |term: &dyn Fn(usize) -> f64| (0..g.len()).map(term).sum::<f64>() / g.len() as f64;
    let (centre, centre_error) = match norm.kind {
        NormKind::Layer => (mean(&|k| g[k]), levels * U * mean(&|k| g[k].abs())),
        NormKind::Rms => (0.0, 0.0),
    };
    let slope = mean(&|k| g[k] * xhat[k].value);
    let slope_error = mean(&|k| g[k].abs() * (xhat[k].error + levels * U * xhat[k].value.abs()));
    let ds_of = |(g, xhat): (&f64, &Bounded)| {
        let inner = g - centre - xhat.value * slope;
        let magnitude = roundings * g.abs() + (g - centre).abs() + (xhat.value * slope).abs();
        let error = U * (magnitude + inner.abs())
            + centre_error
            + xhat.error * slope.abs()
            + xhat.value.abs() * slope_error;
        // rstd is a rounded one, and the product is rounded.
        let value = rstd * inner;
        Bounded { value, error: rstd * error + 2.0 * U * value.abs() }
    };
    let ds = g.iter().zip(&xhat).map(ds_of).collect();
    RowGradient { xhat, ds }
}
