//! Normalisation of a row in f64, and how far an implementation in f32 may be from it.

use super::*;
use fused_dropout::{Norm, NormKind};

/// A norm's parameters, a value a column.
pub struct Affine<'a, T> {
    pub weight: &'a [T],
    pub bias: Option<&'a [T]>,
}

/// Every implementation keeps at least 16 running sums of a row: a term goes through so many additions.
pub fn levels(n: usize) -> f64 {
    n.div_ceil(16) as f64 + 8.0
}

/// A row's deviations from its mean, and the errors that f32 brings, with u = 2^-24 and L the levels of a sum. First
/// order, but for the variance of a row whose values are all near its mean.
///
/// - d = s - pivot is one rounding: u |d|. Backward the pivot is the saved mean. Forward it is off by no more than the
///   `slack`, and |d| is at most that more than the distance from the mean. It is the first value plus the mean distance
///   from it, which is off by (L + 3) u mean|s - first| + u |mean|; or the mean of at least a quarter of the row, which is
///   within sqrt(3) deviations;
/// - delta = mean(d): each term's u, L u for the sum, 2u for the share: (L + 3) u mean|d|, and L times half of the
///   smallest subnormal where shares are;
/// - c = d - delta is one more, and delta itself may be rounded once more: `error` = u |d| + (L + 3) u mean|d| + u |c| +
///   u slack;
/// - RMSNorm centres nothing: c = s, exactly.
pub struct Centred {
    pub c: Vec<f64>,
    pub error: Vec<f64>,
    pub mean: Bounded,
    /// How far the pivot may be from the mean, and the error of what delta makes up for.
    slack: f64,
    delta_error: f64,
}

/// `pivot`: the saved mean of a backward pass.
pub fn centred(kind: NormKind, row: &[f64], pivot: Option<f64>) -> Centred {
    if kind == NormKind::Rms {
        let mean = Bounded { value: 0.0, error: 0.0 };
        let error = vec![0.0; row.len()];
        return Centred { c: row.to_vec(), error, mean, slack: 0.0, delta_error: 0.0 };
    }
    let n = row.len().max(1) as f64;
    let mean = row.iter().sum::<f64>() / n;
    // An infinity less another.
    let mean = if mean.is_finite() { mean } else { f64::NAN };
    let sum_error = (levels(row.len()) + 3.0) * U;
    let slack = match pivot {
        Some(_) => 0.0,
        None => {
            let variance = row.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / n;
            let lost = row.iter().map(|s| (s - row[0]).abs()).sum::<f64>() / n;
            (3.0 * variance).sqrt() + sum_error * lost + U * mean.abs()
        }
    };
    let distance = |s: &f64| (s - pivot.unwrap_or(mean)).abs() + slack;
    let delta_error = sum_error * row.iter().map(distance).sum::<f64>() / n;
    let delta_error = delta_error + levels(row.len()) * SUBNORMAL;
    let error = |s: &f64| U * (distance(s) + (s - mean).abs() + slack) + delta_error;
    Centred {
        c: row.iter().map(|s| s - mean).collect(),
        error: row.iter().map(error).collect(),
        mean: Bounded { value: mean, error: (delta_error + U * mean.abs()) * 1.01 },
        slack,
        delta_error,
    }
}

/// 1 / sqrt(v + epsilon) and its relative error.
///
/// v = mean(d^2) - delta^2, with |delta| at most the slack, so mean(d^2) at most q = v + slack^2: a term is off by 2u for d
/// and one rounding, then the sum's and the share's: (L + 6) u q; delta^2 by 2 slack e + e^2 for delta's error e, and the
/// difference is one rounding, u q. One rounding more for the sum with epsilon; half of that in the root, and 2.5u for the
/// reciprocal root of a GPU, or for root and quotient; the quotient may be subnormal, and is at most the largest f32. That squares may be out
/// of f32's range costs nothing: such a row is computed from itself times a power of two.
pub fn deviation(norm: &Norm, row: &Centred) -> (f64, f64) {
    let n = row.c.len().max(1) as f64;
    let v = row.c.iter().map(|c| c * c).sum::<f64>() / n;
    let (slack, delta_error) = (row.slack, row.delta_error);
    let error = (levels(row.c.len()) + 7.0) * U * (v + slack * slack)
        + delta_error * (2.0 * slack + delta_error);
    let total = v + f64::from(norm.epsilon);
    // Of nothing but zeros, and of an infinity without a mean.
    if total == 0.0 || total.is_infinite() {
        return (0.0, 0.0);
    }
    let rstd = 1.0 / total.sqrt();
    // Not f64::min, which would lose a NaN.
    let rstd = if rstd > f64::from(f32::MAX) { f64::from(f32::MAX) } else { rstd };
    (rstd, (error / total + U) / 2.0 + 2.5 * U + SUBNORMAL / rstd)
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
/// - mean(g): (L + roundings + 3) u mean|g|;
/// - mean(g xhat): mean(|g| e_xhat) + (L + roundings + 3) u mean|g xhat|, for a product and the share;
/// - (g - mean(g)) - xhat mean(g xhat), in whatever order: the parts' errors and a rounding for each operation;
/// - rstd times that: 2u.
pub fn row_gradient(norm: &Norm, row: &[f64], mean: f32, g: &[f64], roundings: f64) -> RowGradient {
    let row = centred(norm.kind, row, Some(f64::from(mean)));
    let (rstd, _) = deviation(norm, &row);
    let xhat_of = |(c, error): (&f64, &f64)| {
        let value = c * rstd;
        Bounded { value, error: rstd * error + 2.0 * U * value.abs() }
    };
    let xhat: Vec<Bounded> = row.c.iter().zip(&row.error).map(xhat_of).collect();
    let levels = levels(g.len()) + roundings + 3.0;
    let mean = |term: &dyn Fn(usize) -> f64| (0..g.len()).map(term).sum::<f64>() / g.len() as f64;
    let (centre, centre_error) = match norm.kind {
        NormKind::Layer => (mean(&|k| g[k]), levels * U * mean(&|k| g[k].abs())),
        NormKind::Rms => (0.0, 0.0),
        other => unreachable!("{other:?} has no gradient here"),
    };
    let slope = mean(&|k| g[k] * xhat[k].value);
    let slope_error = mean(&|k| g[k].abs() * (xhat[k].error + levels * U * xhat[k].value.abs()));
    let ds_of = |(g, xhat): (&f64, &Bounded)| {
        let inner = g - centre - xhat.value * slope;
        let magnitude = roundings * g.abs()
            + (g - centre).abs()
            + (xhat.value * slope).abs()
            + 2.0 * centre.abs();
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
