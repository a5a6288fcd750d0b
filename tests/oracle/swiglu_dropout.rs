//! `swiglu_dropout` in f64, and how far an implementation in f32 may be from it.
//!
//! Errors beside those of silu and its slope (`bias_act_dropout`), to first order, u = 2^-24: a rounding for each product, and
//! half a last place of each product that is subnormal, times what it is multiplied by.

use super::bias_act_dropout::{activation, slope};
use super::*;
use fused_dropout::Activation::Silu;

/// y = D(silu(gate) up).
pub fn swiglu_dropout<T: Dtype>(
    dropout: &Dropout<'_>,
    shape: Shape,
    gate: &[T],
    up: &[T],
) -> Vec<Bounded> {
    let scale = f64::from(scale_and_threshold(dropout).0);
    let value = |(i, keep): (usize, bool)| {
        let silu = activation::<T>(Silu, f64::from(gate[i].to_f32()));
        let y = times(silu, &[f64::from(up[i].to_f32()), scale]);
        if keep { stored::<T>(y.value, y.error) } else { Bounded { value: 0.0, error: 0.0 } }
    };
    keep_mask(dropout, shape).into_iter().enumerate().map(value).collect()
}

/// dgate = D(dy) up silu'(gate), dup = D(dy) silu(gate).
pub fn swiglu_dropout_backward<T: Dtype>(
    dropout: &Dropout<'_>,
    shape: Shape,
    gate: &[T],
    up: &[T],
    dy: &[T],
) -> [Vec<Bounded>; 2] {
    let scale = scale_and_threshold(dropout).0;
    let keep = keep_mask(dropout, shape);
    let of = |function: fn(fused_dropout::Activation, f64) -> Bounded, with_up: bool| {
        let value = |i: usize| {
            if !keep[i] {
                return Bounded { value: 0.0, error: 0.0 };
            }
            let factor = function(Silu, f64::from(gate[i].to_f32()));
            // As it is computed: g may overflow where the whole product would not.
            let g = dy[i].to_f32() * scale;
            let g = if with_up { g * up[i].to_f32() } else { g };
            let product = times(factor, &[f64::from(g)]);
            // The roundings of g itself.
            let error =
                product.error + 2.0 * U * product.value.abs() + SUBNORMAL * factor.value.abs();
            stored::<T>(product.value, error)
        };
        (0..keep.len()).map(value).collect()
    };
    [of(slope::<T>, true), of(activation::<T>, false)]
}

/// A product in f32, one factor after the other: what leaves f32's range on the way does not come back.
fn times(first: Bounded, factors: &[f64]) -> Bounded {
    factors.iter().fold(first, |product, &factor| {
        let value = product.value * factor;
        let beyond = value.is_finite() && value.abs() > f64::from(f32::MAX);
        if beyond || factor.is_infinite() && product.value.abs() <= product.error {
            return Bounded::NOT_FINITE;
        }
        Bounded { value, error: product.error * factor.abs() + U * value.abs() + SUBNORMAL }
    })
}
