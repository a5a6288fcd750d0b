//! The norm of `dropout_add_norm` and its gradients in f64, and how far an implementation in f32 may be from
//! them. Its s is that of `dropout_add`, exactly.

use super::norm::{Affine, RowGradient, centred, deviation, row_gradient};
use super::*;
use fused_dropout::Norm;

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
    affine: &Affine<'_, T>,
) -> Normalised {
    let (mut y, mut stats) = (Vec::with_capacity(s.len()), Vec::with_capacity(2 * shape.rows));
    for r in 0..shape.rows {
        let row: Vec<f64> = row(shape, s, r);
        let row = centred(norm.kind, &row, None);
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
/// Errors beside those of `row_gradient`, where g = dy w is one rounding:
/// - the sum with ds is one more, and the product of dx another;
/// - dy xhat: one rounding, and |dy| e_xhat; sums over rows: `sum_rows`.
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
    let weight: Vec<f64> = weight.iter().map(|w| f64::from(w.to_f32())).collect();
    let mut out = Backward {
        dresidual: Vec::with_capacity(s.len()),
        dx: Vec::with_capacity(s.len()),
        dbias: vec![],
        dweight: vec![],
        dnorm_bias: exact_sum_rows(shape, 1.0, |i| dy[i].to_f32()),
    };
    let [mut dbias, mut dweight] = [const { Vec::<Bounded>::new() }; 2];
    for r in 0..shape.rows {
        let dy = row(shape, dy, r);
        let ds = ds.map_or(vec![0.0; shape.cols], |ds| row(shape, ds, r));
        let g: Vec<f64> = dy.iter().zip(&weight).map(|(dy, w)| dy * w).collect();
        let RowGradient { xhat, ds: dnorm } =
            row_gradient(norm, &row(shape, s, r), stats[2 * r], &g, 1.0);
        for k in 0..shape.cols {
            let value = dnorm[k].value + ds[k];
            let error = dnorm[k].error + U * value.abs();
            out.dresidual.push(stored::<T>(value, error + SUBNORMAL));
            let dweight_error = dy[k].abs() * (xhat[k].error + U * xhat[k].value.abs());
            dweight.push(Bounded { value: dy[k] * xhat[k].value, error: dweight_error });
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
