//! `dropout`, exactly.

use super::*;

/// y = D(x).
pub fn dropout<T: Dtype>(dropout: &Dropout<'_>, shape: Shape, x: &[T]) -> Vec<T> {
    let (scale, _) = scale_and_threshold(dropout);
    let keep = keep_mask(dropout, shape);
    let value = |(&x, keep): (&T, bool)| T::from_f32(if keep { x.to_f32() * scale } else { 0.0 });
    x.iter().zip(keep).map(value).collect()
}
