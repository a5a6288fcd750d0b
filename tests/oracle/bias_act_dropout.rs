//! `bias_act_dropout` in f64, and how far an implementation in f32 may be from it.
//!
//! Errors to first order, u = 2^-24; an exponential is within 2 ulp, 4u, of that of its rounded argument.
//!
//! - Φ(-z), z >= 0, as e^(-h) M(z) with h = z²/2: the exponent -h log2 e has two products and a constant, 2.5u h; the
//!   exponential 4u. M = A(z) / B(z) has positive terms, so a step of Horner's rule costs a rounding at most: 4u and 5u; its fit
//!   with rounded coefficients 0.7u, the quotient 4u; a product: (2.5 h + 19) u in all, relative, of which (2.5 h + 22) u is
//!   promised. For 16-bit storage M may be a polynomial in 1 / (1 + 0.3 z), within 36u: 40u more are promised.
//! - Φ(z) = 1 - Φ(-z): that error, absolute, and a rounding.
//! - The density has 2.5u h, the exponential's 4u, a constant and a product: (2.5 h + 6) u.
//! - σ(v) from e^(-|v|) or e^(-v), where v is off by dv: (1 - σ) (dv + 4u), a sum's rounding, a reciprocal within 2
//!   ulp and a product, 6u, relative; 1 - σ likewise with σ for 1 - σ. The exponent v log2 e has a product and a constant:
//!   dv = 1.5u |v|.
//! - 2u of the approximate GELU has five roundings and constants beside that: dv = 6.5u |v|; its derivative 5u, relative.
//! - tanh z from e = e^(-2z), z >= 0.625: 4u of e and 2.5u z of its exponent come into it 2e / (1 - e²)-fold, 3.5u; 1 - e,
//!   1 + e, the reciprocal and a product are 6u, relative: 10u. Below 0.625 z (1 + z² P): a tenth of what z² P has, 4u, a
//!   rounding, and 0.1u of the polynomial's fit.
//! - 1 - tanh² = 4e / (1 + e)²: at most e's (2.5 z + 4) u, twice the sum's and the reciprocal's 5u, two
//!   products, (2.5 z + 16) u, relative.
//!
//! An exponential below the normal numbers may be 0: it is off by 2^-126 instead, times what it is multiplied by.

use super::*;
use fused_dropout::Activation;

/// An exponential that may be 0.
const FLUSHED: f64 = f32::MIN_POSITIVE as f64;

/// What Φ(-z) may be off by beside its roundings, in units of u.
fn fit<T: Dtype>() -> f64 {
    if T::ID == DtypeId::F32 { 0.0 } else { 40.0 }
}

/// act(x); at -∞ its limit.
pub(super) fn activation<T: Dtype>(activation: Activation, x: f64) -> Bounded {
    let curve = matches!(activation, Activation::Gelu | Activation::GeluTanh | Activation::Silu);
    let x = if curve && x == f64::NEG_INFINITY { f64::from(f32::MIN) } else { x };
    let error = match activation {
        Activation::Gelu => {
            let n = Normal::new(x);
            x.abs() * U * (n.tail * (2.5 * n.h + 22.0 + fit::<T>()) + 2.0 * n.cdf)
        }
        Activation::GeluTanh => {
            let (v, _) = twice_u(x);
            x.abs() * sigma(v) * (sigma_error(v, 6.5 * U * v.abs()) + U)
        }
        Activation::Silu => x.abs() * sigma(x) * (sigma_error(x, 1.5 * U * x.abs()) + U),
        Activation::Tanh => 10.0 * U * x.tanh().abs(),
        Activation::Relu | Activation::Identity => 0.0,
        other => unreachable!("{other:?} has no bound here"),
    };
    let value = match activation {
        Activation::Gelu => x * Normal::new(x).cdf,
        Activation::GeluTanh => x * sigma(twice_u(x).0),
        Activation::Relu if x < 0.0 => 0.0,
        Activation::Relu | Activation::Identity => x,
        Activation::Silu => x * sigma(x),
        Activation::Tanh => x.tanh(),
        other => unreachable!("{other:?} has no value here"),
    };
    bounded(value, error, x)
}

/// act'(x); at ±∞ its limit.
pub(super) fn slope<T: Dtype>(activation: Activation, x: f64) -> Bounded {
    let x = x.clamp(f64::from(f32::MIN), f64::from(f32::MAX));
    // s + x s (1 - s) dv, and its errors.
    let logistic = |v: f64, dv: f64, slope: f64, slope_error: f64| {
        let (s, rest) = (sigma(v), sigma(-v));
        let (s_error, rest_error) = (sigma_error(v, dv), sigma_error(-v, dv));
        let product = x * s * rest * slope;
        let value = s + product;
        let relative = s_error + rest_error + slope_error + 2.0 * U;
        bounded(value, s * s_error + product.abs() * relative + U * value.abs(), x * slope)
    };
    match activation {
        Activation::Gelu => {
            let n = Normal::new(x);
            let value = n.cdf + x * n.density;
            let tail = n.tail * (2.5 * n.h + 22.0 + fit::<T>());
            let error = tail + n.cdf + (x * n.density).abs() * (2.5 * n.h + 6.0);
            bounded(value, U * (error + value.abs()), x)
        }
        Activation::GeluTanh => {
            let (v, slope) = twice_u(x);
            logistic(v, 6.5 * U * v.abs(), slope, 5.0 * U)
        }
        Activation::Silu => logistic(x, 1.5 * U * x.abs(), 1.0, 0.0),
        Activation::Tanh => {
            let e = (-2.0 * x.abs()).exp();
            let value = 4.0 * e / (1.0 + e).powi(2);
            bounded(value, (2.5 * x.abs() + 16.0) * U * value, 4.0)
        }
        Activation::Relu => bounded(if x <= 0.0 { 0.0 } else { 1.0 }, 0.0, 0.0),
        Activation::Identity => bounded(1.0, 0.0, 0.0),
        other => unreachable!("{other:?} has no slope here"),
    }
}

/// `factor`: what the exponential is multiplied by.
fn bounded(value: f64, error: f64, factor: f64) -> Bounded {
    // Beyond 2^100 the exponential is exactly 0.
    let flushed = if factor.abs() < 1e30 { factor.abs() + 1.0 } else { 0.0 } * FLUSHED;
    let exact = error == 0.0 || value.is_infinite();
    Bounded { value, error: if exact { 0.0 } else { 1.01 * error + flushed } }
}

/// The normal distribution at x.
struct Normal {
    h: f64,
    /// Φ(-|x|).
    tail: f64,
    /// Φ(x).
    cdf: f64,
    density: f64,
}

impl Normal {
    fn new(x: f64) -> Self {
        let h = x * x / 2.0;
        let root = std::f64::consts::SQRT_2;
        let density = (-h).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let tail = libm::erfc(x.abs() / root) / 2.0;
        Self { h: if h < 1e4 { h } else { 0.0 }, tail, cdf: libm::erfc(-x / root) / 2.0, density }
    }
}

/// √(8/π) (x + 0.044715 x³) and its derivative.
fn twice_u(x: f64) -> (f64, f64) {
    let root = (8.0 / std::f64::consts::PI).sqrt();
    (root * (x + 0.044715 * x * x * x), root * (1.0 + 3.0 * 0.044715 * x * x))
}

fn sigma(v: f64) -> f64 {
    if v < 0.0 { v.exp() / (1.0 + v.exp()) } else { 1.0 / (1.0 + (-v).exp()) }
}

/// Relative error of σ(v) where v is off by `dv`.
fn sigma_error(v: f64, dv: f64) -> f64 {
    let rest = sigma(-v);
    if rest == 0.0 { 6.0 * U } else { rest * (dv + 4.0 * U) + 6.0 * U }
}

/// x, or x + bias rounded to f32.
fn biased<T: Dtype>(shape: Shape, x: &[T], bias: Option<&[T]>, i: usize) -> f64 {
    let x = x[i].to_f32();
    f64::from(bias.map_or(x, |bias| x + bias[i % shape.cols].to_f32()))
}

/// y = D(act(x + bias)).
pub fn bias_act_dropout<T: Dtype>(
    dropout: &Dropout<'_>,
    shape: Shape,
    act: Activation,
    x: &[T],
    bias: Option<&[T]>,
) -> Vec<Bounded> {
    let (scale, _) = scale_and_threshold(dropout);
    let scale = f64::from(scale);
    let value = |(i, keep): (usize, bool)| {
        if !keep {
            return Bounded { value: 0.0, error: 0.0 };
        }
        let act = activation::<T>(act, biased(shape, x, bias, i));
        // The product with the scale is one more rounding.
        let value = act.value * scale;
        stored::<T>(value, act.error * scale + U * value.abs())
    };
    keep_mask(dropout, shape).into_iter().enumerate().map(value).collect()
}

/// dx = D(dy) act'(x + bias) as it is stored, and its sum over the rows.
pub fn bias_act_dropout_backward<T: Dtype>(
    dropout: &Dropout<'_>,
    shape: Shape,
    act: Activation,
    x: &[T],
    bias: Option<&[T]>,
    dy: &[T],
) -> (Vec<Bounded>, Vec<Bounded>) {
    let (scale, _) = scale_and_threshold(dropout);
    let keep = keep_mask(dropout, shape);
    let gradient = |i: usize| {
        if !keep[i] {
            return Bounded { value: 0.0, error: 0.0 };
        }
        let slope = slope::<T>(act, biased(shape, x, bias, i));
        let dy = f64::from(dy[i].to_f32()) * f64::from(scale);
        if dy.is_infinite() && slope.value.abs() <= slope.error {
            return Bounded::NOT_FINITE;
        }
        let value = dy * slope.value;
        // Two products, of which a subnormal one is off by half a last place.
        Bounded { value, error: dy.abs() * slope.error + 2.0 * U * value.abs() + SUBNORMAL }
    };
    let gradients: Vec<Bounded> = (0..keep.len()).map(gradient).collect();
    let dbias = (0..shape.cols)
        .map(|c| sum_rows(gradients.iter().skip(c).step_by(shape.cols).copied()))
        .collect();
    (gradients.into_iter().map(|g| stored::<T>(g.value, g.error)).collect(), dbias)
}
