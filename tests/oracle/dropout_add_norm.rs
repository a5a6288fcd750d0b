//! The norm of `dropout_add_norm` and its gradients in f64, and how far an implementation in f32 may be from
//! them. Its s is that of `dropout_add`, exactly.

use super::norm::{SUBNORMAL, centred, deviation, levels};
use super::*;
use fused_dropout::{Affine, Norm, NormKind};

/// The norm of each row.
pub struct Normalised {
    pub y: Vec<Bounded>,
    /// Mean and rstd of each row.
    pub stats: Vec<Bounded>,
}

/// y = norm(s).
///
/// y = c r w + b: the errors of c and r, a rounding each for two products and the sum.
pub fn normalised<T: Dtype>(
    norm: &Norm,
    shape: Shape,
    s: &[T],
    affine: &Affine<&[T]>,
) -> Normalised {
    let (mut y, mut stats) = (Vec::with_capacity(s.len()), Vec::with_capacity(2 * shape.rows));
    for r in 0..shape.rows {
        let row: Vec<f64> = row(shape, s, r);
        let row = centred(norm.kind, &row, row.first().copied().unwrap_or(0.0));
        let (rstd, rstd_error) = deviation(norm, &row);
        stats.push(row.mean);
        stats.push(Bounded { value: rstd, error: rstd * rstd_error * 1.01 });
        for (k, (c, c_error)) in row.c.iter().zip(&row.error).enumerate() {
            let w = f64::from(affine.weight[k].to_f32());
            let b = affine.bias.map_or(0.0, |bias| f64::from(bias[k].to_f32()));
            let value = c * rstd * w + b;
            let term = (c * rstd * w).abs();
            let error =
                (w * rstd).abs() * c_error + term * (rstd_error + 2.0 * U) + U * value.abs();
            y.push(stored::<T>(value, error + SUBNORMAL));
        }
    }
    Normalised { y, stats }
}

/// Every gradient.
pub struct Backward {
    pub dresidual: Vec<Bounded>,
    pub dx: Vec<Bounded>,
    pub dbias: Vec<Bounded>,
    pub dweight: Vec<Bounded>,
    /// A sum of inputs: exact.
    pub dnorm_bias: Vec<f32>,
}

/// The gradients at s, where `stats` are the exact mean and rstd of each row, rounded to f32.
///
/// Errors, to first order, with e_c that of c around the saved mean:
/// - xhat = c rstd: rstd e_c + 2u |xhat|;
/// - g = dy w: u |g|; mean(g): (L + 3) u mean|g|;
/// - mean(g xhat): mean(|g| e_xhat) + (L + 3) u mean|g xhat|, two roundings a term, one of the quotient;
/// - (g - mean(g)) - xhat mean(g xhat): the parts' errors and a rounding for each operation;
/// - rstd times that: 2u; the sum with ds: u; dx: one product more;
/// - sums over rows: `sum_rows`.
#[allow(clippy::too_many_arguments)]
pub fn dropout_add_norm_backward<T: Dtype>(
    dropout: &Dropout<'_>,
    norm: &Norm,
    shape: Shape,
    s: &[T],
    weight: &[T],
    stats: &[f32],
    dy: &[T],
    ds: Option<&[T]>,
) -> Backward {
    let (scale, _) = scale_and_threshold(dropout);
    let scale = f64::from(scale);
    let keep = keep_mask(dropout, shape);
    let n = shape.cols as f64;
    let levels = levels(shape.cols) + 3.0;
    let mut out = Backward {
        dresidual: Vec::with_capacity(s.len()),
        dx: Vec::with_capacity(s.len()),
        dbias: vec![],
        dweight: vec![],
        dnorm_bias: exact_sum_rows(shape, 1.0, |i| dy[i].to_f32()),
    };
    let [mut dbias, mut dweight] = [const { Vec::<Bounded>::new() }; 2];
    for r in 0..shape.rows {
        let values = row(shape, s, r);
        let row_c = centred(norm.kind, &values, f64::from(stats[2 * r]));
        let (rstd, _) = deviation(norm, &row_c);
        let dy = row(shape, dy, r);
        let ds = ds.map(|ds| row(shape, ds, r));
        let weight: Vec<f64> = weight.iter().map(|w| f64::from(w.to_f32())).collect();
        let g: Vec<f64> = dy.iter().zip(&weight).map(|(dy, w)| dy * w).collect();
        let xhat: Vec<f64> = row_c.c.iter().map(|c| c * rstd).collect();
        let xhat_error: Vec<f64> =
            xhat.iter().zip(&row_c.error).map(|(x, e)| rstd * e + 2.0 * U * x.abs()).collect();
        let mean = |term: &dyn Fn(usize) -> f64| (0..shape.cols).map(term).sum::<f64>() / n;
        let (centre, centre_error) = match norm.kind {
            NormKind::Layer => (mean(&|k| g[k]), levels * U * mean(&|k| g[k].abs())),
            NormKind::Rms => (0.0, 0.0),
        };
        let slope = mean(&|k| g[k] * xhat[k]);
        let slope_error = mean(&|k| g[k].abs() * (xhat_error[k] + levels * U * xhat[k].abs()));
        for k in 0..shape.cols {
            let inner = g[k] - centre - xhat[k] * slope;
            let inner_error = U
                * (g[k].abs() + (g[k] - centre).abs() + (xhat[k] * slope).abs() + inner.abs())
                + centre_error
                + xhat_error[k] * slope.abs()
                + xhat[k].abs() * slope_error;
            let value = rstd * inner + ds.as_ref().map_or(0.0, |ds| ds[k]);
            let error = rstd * inner_error + 2.0 * U * (rstd * inner).abs() + U * value.abs();
            out.dresidual.push(stored::<T>(value, error + SUBNORMAL));
            let dweight_error = dy[k].abs() * (xhat_error[k] + U * xhat[k].abs());
            dweight.push(Bounded { value: dy[k] * xhat[k], error: dweight_error });
            if !keep[r * shape.cols + k] {
                out.dx.push(Bounded { value: 0.0, error: 0.0 });
                dbias.push(Bounded { value: 0.0, error: 0.0 });
                continue;
            }
            let (value, error) = (scale * value, scale * error + SUBNORMAL);
            out.dx.push(stored::<T>(value, error + U * value.abs()));
            dbias.push(Bounded { value, error });
        }
    }
    let sums = |terms: &[Bounded]| {
        let column = |c| sum_rows(terms.iter().skip(c).step_by(shape.cols).copied());
        (0..shape.cols).map(column).collect()
    };
    (out.dbias, out.dweight) = (sums(&dbias), sums(&dweight));
    out
}

fn row<T: Dtype>(shape: Shape, tensor: &[T], r: usize) -> Vec<f64> {
    tensor[r * shape.cols..(r + 1) * shape.cols].iter().map(|v| f64::from(v.to_f32())).collect()
}
