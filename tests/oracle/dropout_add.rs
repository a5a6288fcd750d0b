//! `dropout_add`, exactly.

use super::*;

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

/// The bias gradient: kept dy, summed over the rows.
pub fn dbias<T: Dtype>(dropout: &Dropout<'_>, shape: Shape, dy: &[T]) -> Vec<f32> {
    let (scale, _) = scale_and_threshold(dropout);
    let keep = keep_mask(dropout, shape);
    exact_sum_rows(shape, scale, |i| if keep[i] { dy[i].to_f32() } else { 0.0 })
}
