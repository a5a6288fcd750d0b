//! Functions of one f32, without branches, so that loops over them are vectorised. They do the same
//! operations at every level, so their results are the same bits.
//!
//! A factor that is 0 beyond some x meets a limited x: at an infinity a product is the limit, and not NaN.

use super::dropout::select_of;
use crate::ops::MaskParams;
use crate::ops::bias_act_dropout::Activation;

/// e^x for x <= 0 (and up to 44), within 1.5 ulp; a NaN stays one.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Below -104 the result is 0 all the same. Not f32::max, which would lose a NaN.
    scaled_exp(if x < -104.0 { -104.0 } else { x }) * (1.0 / SCALE)
}

/// What [`scaled_exp`] is multiplied by: no result for x >= -106 is subnormal, so what it is used in rounds
/// once where the scale is taken out again.
const SCALE: f32 = 18_446_744_073_709_551_616.0;

/// e^x times [`SCALE`] for -106 <= x <= 44.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; e^r = 1 + r + r² q(r) with q of degree 4, within 0.1 u of it relatively;
/// the power of two from bits: the sum below holds n + 64 and an exponent's offset in its last ones.
#[inline(always)]
fn scaled_exp(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to an integer.
    const ROUND: f32 = 12_582_912.0 + 127.0 + 64.0;
    // ln 2 in two parts; the first has few bits, so its products with n are exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const Q: [f32; 5] = [0.499_999_94, 0.166_665_21, 0.041_668_39, 0.008_368_745, 0.001_381_453_9];
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    // By pairs, which waits for fewer results than a sum from one end.
    let square = r * r;
    let low = r.mul_add(Q[1], Q[0]);
    let high = square.mul_add(Q[4], r.mul_add(Q[3], Q[2]));
    let p = square.mul_add(square.mul_add(high, low), 1.0 + r);
    p * f32::from_bits(shifted.to_bits() << 23)
}

/// Beyond these distances from 0 a tail of the normal and of the logistic function is 0 in f32.
const NORMAL: f32 = 14.5;
const LOGISTIC: f32 = 104.0;

/// x, at least -`limit`; a NaN stays one.
#[inline(always)]
fn at_least(x: f32, limit: f32) -> f32 {
    if x < -limit { -limit } else { x }
}

/// x, at most `limit` from 0; a NaN stays one.
#[inline(always)]
fn limited(x: f32, limit: f32) -> f32 {
    let x = at_least(x, limit);
    if x > limit { limit } else { x }
}

/// The polynomial with these coefficients, that of the constant first.
#[inline(always)]
fn polynomial<const N: usize>(coefficients: [f32; N], x: f32) -> f32 {
    coefficients.into_iter().rev().reduce(|p, c| p.mul_add(x, c)).unwrap_or(0.0)
}

/// The standard normal distribution: Φ(x), and the density φ(x).
///
/// With z = |x|: φ = e^(-z²/2) / √(2π), and Φ(-z) = e^(-z²/2) A(z) / B(z), where A / B is within 0.7 u of Mills'
/// ratio over √(2π), relatively, for z up to 14.5, beyond which both are 0 in f32. The coefficients are positive, so
/// nothing cancels, and Φ is right in relative terms on both sides.
///
/// Refuted on a Zen 2, bias + GELU + dropout on 2^17 elements in L2, against 240 µs: the quotient in a loop of its
/// own (257), values by sixteens (253), the bias added in this loop too (244).
#[inline(always)]
fn normal(x: f32) -> (f32, f32) {
    const A: [f32; 5] = [0.5, 0.438_294_65, 0.183_234_9, 0.040_633_146, 0.004_116_297];
    const B: [f32; 6] = [1.0, 1.674_474_2, 1.202_502_1, 0.469_47, 0.101_858_64, 0.010_317_907];
    let z = limited(x, NORMAL).abs();
    let e = scaled_exp(-0.5 * z * z);
    let tail = e * (polynomial(A, z) / polynomial(B.map(|b| b * SCALE), z));
    (if x < 0.0 { tail } else { 1.0 - tail }, e * (0.398_942_3 / SCALE))
}

/// The logistic function σ(x) = 1 / (1 + e^-x), and 1 - σ(x), each right in relative terms.
#[inline(always)]
fn logistic(x: f32) -> (f32, f32) {
    let e = scaled_exp(-limited(x, LOGISTIC).abs());
    let reciprocal = 1.0 / (SCALE + e);
    let (large, small) = (SCALE * reciprocal, e * reciprocal);
    if x < 0.0 { (small, large) } else { (large, small) }
}

/// tanh x within 10 units of 2^-24, in relative terms also where x is small.
///
/// With z = |x|, below 0.625: z + z³ P(z²), P the polynomial of degree 4 that is relatively closest there, to
/// 4e-9. Above: (1 - e) / (1 + e) with e = e^(-2z), where 1 - e is at least 0.71.
#[inline(always)]
fn tanh(x: f32) -> f32 {
    const P: [f32; 5] =
        [-0.333_332_8, 0.133_314_45, -0.053_739_914, 0.020_639_767, -0.005_705_778_7];
    let z = x.abs();
    let t = z * z;
    let small = z.mul_add(t * polynomial(P, t), z);
    let e = exp(-2.0 * z);
    let large = (1.0 - e) / (1.0 + e);
    (if z < 0.625 { small } else { large }).copysign(x)
}

/// 1 - tanh² x = 4e / (1 + e)², e = e^(-2|x|): nothing cancels.
#[inline(always)]
fn tanh_slope(x: f32) -> f32 {
    let e = exp(-2.0 * x.abs());
    let r = 1.0 / (1.0 + e);
    4.0 * e * r * r
}

/// Beyond 20 on either side σ(2u) of the approximate GELU is 0 or 1 in f32.
const CUBE: f32 = 20.0;

/// 2u of the approximate GELU, √(8/π) (x + 0.044715 x³), and its derivative, for an x within [`CUBE`].
#[inline(always)]
fn twice_u(x: f32) -> (f32, f32) {
    const LINEAR: f32 = 1.595_769_2;
    const CUBIC: f32 = 0.071_354_814;
    let square = x * x;
    (x * square.mul_add(CUBIC, LINEAR), square.mul_add(3.0 * CUBIC, LINEAR))
}

#[inline(always)]
fn gelu(x: f32) -> f32 {
    at_least(x, NORMAL) * normal(x).0
}

#[inline(always)]
fn gelu_slope(x: f32) -> f32 {
    let x = limited(x, NORMAL);
    let (cdf, density) = normal(x);
    x.mul_add(density, cdf)
}

#[inline(always)]
fn gelu_tanh(x: f32) -> f32 {
    at_least(x, CUBE) * logistic(twice_u(limited(x, CUBE)).0).0
}

#[inline(always)]
fn gelu_tanh_slope(x: f32) -> f32 {
    let x = limited(x, CUBE);
    let (u, du) = twice_u(x);
    let (s, rest) = logistic(u);
    (x * (s * rest)).mul_add(du, s)
}

/// A NaN stays one.
#[inline(always)]
fn relu(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

/// 0 at 0; 1 for a NaN.
#[inline(always)]
fn relu_slope(x: f32) -> f32 {
    if x <= 0.0 { 0.0 } else { 1.0 }
}

#[inline(always)]
fn silu(x: f32) -> f32 {
    at_least(x, LOGISTIC) * logistic(x).0
}

#[inline(always)]
fn silu_slope(x: f32) -> f32 {
    let x = limited(x, LOGISTIC);
    let (s, rest) = logistic(x);
    (x * s).mul_add(rest, s)
}

/// silu(x) and silu'(x) from one logistic function: the bits of [`silu`] and [`silu_slope`].
#[inline(always)]
pub(super) fn silu_and_slope(x: f32) -> (f32, f32) {
    let near = limited(x, LOGISTIC);
    let (s, rest) = logistic(near);
    (at_least(x, LOGISTIC) * s, (near * s).mul_add(rest, s))
}

/// Replaces each value by `function` of it.
#[inline(always)]
fn map(values: &mut [f32], function: impl Fn(f32) -> f32) {
    values.iter_mut().for_each(|value| *value = function(*value));
}

impl Activation {
    /// D(act(x)) in place of x.
    #[inline(always)]
    pub(super) fn select(self, params: &MaskParams<'_>, lanes: &[u16], x: &mut [f32]) {
        match self {
            Self::Gelu => select_of(params, lanes, x, gelu),
            Self::GeluTanh => select_of(params, lanes, x, gelu_tanh),
            Self::Relu => select_of(params, lanes, x, relu),
            Self::Silu => select_of(params, lanes, x, silu),
            Self::Tanh => select_of(params, lanes, x, tanh),
            Self::Identity => select_of(params, lanes, x, |x| x),
        }
    }

    /// The derivative act'(x) in place of x.
    #[inline(always)]
    pub(super) fn slope(self, x: &mut [f32]) {
        match self {
            Self::Gelu => map(x, gelu_slope),
            Self::GeluTanh => map(x, gelu_tanh_slope),
            Self::Relu => map(x, relu_slope),
            Self::Silu => map(x, silu_slope),
            Self::Tanh => map(x, tanh_slope),
            Self::Identity => x.fill(1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tanh_is_within_its_bound_and_odd() {
        // Every 1009th f32 up to 16, from the subnormal ones on.
        for bits in (0..=16f32.to_bits()).step_by(1009) {
            let x = f32::from_bits(bits);
            let (exact, given) = (f64::from(x).tanh(), f64::from(tanh(x)));
            // Half of the smallest subnormal where the result is one.
            let bound = 10.0 / f64::from(1 << 24) * exact + 2f64.powi(-150);
            assert!((given - exact).abs() <= bound, "tanh {x:e}: {given:e}, not {exact:e}");
            assert_eq!(tanh(-x).to_bits(), (-tanh(x)).to_bits());
        }
        assert_eq!((tanh(f32::INFINITY), tanh(-40.0)), (1.0, -1.0));
        assert!(tanh(f32::NAN).is_nan() && tanh_slope(f32::NAN).is_nan());
    }

    #[test]
    fn at_infinities_activations_and_their_slopes_are_their_limits() {
        let infinity = f32::INFINITY;
        for value in [gelu, gelu_tanh, silu, relu] {
            // The largest numbers have their limits' values too.
            assert_eq!([-infinity, f32::MIN].map(value), [0.0; 2]);
            assert_eq!([infinity, f32::MAX].map(value), [infinity, f32::MAX]);
            assert!(value(f32::NAN).is_nan());
        }
        for slope in [gelu_slope, gelu_tanh_slope, silu_slope, relu_slope] {
            assert_eq!([-infinity, f32::MIN, f32::MAX, infinity].map(slope), [0.0, 0.0, 1.0, 1.0]);
        }
        assert_eq!([-infinity, infinity].map(tanh_slope), [0.0; 2]);
        assert!(
            [gelu_slope, gelu_tanh_slope, silu_slope].iter().all(|slope| slope(f32::NAN).is_nan())
        );
    }

    #[test]
    fn silu_and_its_slope_are_those_of_the_activation() {
        for i in -30_000..=30_000 {
            let x = i as f32 * 0.007;
            let both = silu_and_slope(x);
            assert_eq!(
                (silu(x).to_bits(), silu_slope(x).to_bits()),
                (both.0.to_bits(), both.1.to_bits()),
                "{x}"
            );
        }
        let infinity = f32::INFINITY;
        assert_eq!(
            [-infinity, f32::MIN, f32::MAX, infinity].map(silu_and_slope),
            [(0.0, 0.0), (0.0, 0.0), (f32::MAX, 1.0), (infinity, 1.0),]
        );
        assert!(silu_and_slope(f32::NAN).0.is_nan() && silu_and_slope(f32::NAN).1.is_nan());
    }

    #[test]
    fn exp_is_within_its_bound() {
        let mut worst = 0.0f64;
        for i in 0..=4_000_000 {
            let x = -104.5 * (i as f32 / 4_000_000.0);
            let exact = f64::from(x).exp();
            // An ulp, from the smallest subnormal up.
            let ulp = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
            worst = worst.max((f64::from(exp(x)) - exact).abs() / ulp);
        }
        assert!(worst <= 1.5, "{worst} ulp");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }
}
