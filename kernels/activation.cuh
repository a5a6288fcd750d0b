// Activations and their slopes in f32. The formulas, and where they come from, are those of
// src/cpu/math.rs; the exponential is CUDA's expf, within 2 ulp, so results agree with the CPU's within the
// bounds of CONTRACT.md, not to the bit. As there, a factor that is 0 beyond some x meets a limited x: at an
// infinity a product is the limit, and not NaN.

#pragma once

#include "vector.cuh"

/// `Activation` of src/ops/bias_act_dropout.rs, in its order.
enum class Activation : unsigned { gelu, gelu_tanh, relu, silu, tanh, identity };

/// 1 / x for x >= 1, within 2 ulp, and 0 beyond 2^126. Not __frcp_rn, which adds a branch a value for
/// numbers that do not come here.
__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }

/// Beyond these distances from 0 a tail of the normal and of the logistic function, and sigma(2u) of the
/// approximate GELU, are 0 in f32.
constexpr float NORMAL = 14.5f;
constexpr float LOGISTIC = 104.0f;
constexpr float CUBE = 20.0f;

/// x, at least -limit; a NaN stays one, as it would not with fmaxf.
__device__ __forceinline__ float at_least(float x, float limit) { return x < -limit ? -limit : x; }

/// x, at most `limit` from 0; a NaN stays one.
__device__ __forceinline__ float limited(float x, float limit) {
    x = at_least(x, limit);
    return x > limit ? limit : x;
}

/// The standard normal distribution.
struct Normal {
    float cdf;      // Phi(x)
    float density;  // phi(x)

    /// With z = |x|: phi = e^(-z^2/2) / sqrt(2 pi), Phi(-z) = e^(-z^2/2) A(z) / B(z); both are 0 beyond 14.5.
    __device__ __forceinline__ explicit Normal(float x) {
        const float z = fminf(fabsf(x), NORMAL);
        const float e = expf(__fmul_rn(__fmul_rn(-0.5f, z), z));
        float a = 0.004116297f;
        a = __fmaf_rn(a, z, 0.040633146f);
        a = __fmaf_rn(a, z, 0.1832349f);
        a = __fmaf_rn(a, z, 0.43829465f);
        a = __fmaf_rn(a, z, 0.5f);
        float b = 0.010317907f;
        b = __fmaf_rn(b, z, 0.10185864f);
        b = __fmaf_rn(b, z, 0.46947f);
        b = __fmaf_rn(b, z, 1.2025021f);
        b = __fmaf_rn(b, z, 1.6744742f);
        b = __fmaf_rn(b, z, 1.0f);
        const float tail = __fmul_rn(e, __fdividef(a, b));
        cdf = x < 0.0f ? tail : __fsub_rn(1.0f, tail);
        density = __fmul_rn(e, 0.3989423f);
    }
};

/// The logistic function.
struct Logistic {
    float value;  // sigma(x)
    float rest;   // 1 - sigma(x)

    __device__ __forceinline__ explicit Logistic(float x) {
        const float e = expf(-fabsf(x));
        const float large = reciprocal(__fadd_rn(1.0f, e));
        const float small = __fmul_rn(e, large);
        value = x < 0.0f ? small : large;
        rest = x < 0.0f ? large : small;
    }
};

/// tanh x within 10 units of 2^-24, relatively: with z = |x|, z + z^3 P(z^2) below 0.625, then (1 - e) / (1 + e)
/// with e = e^(-2z).
__device__ __forceinline__ float hyperbolic_tangent(float x) {
    const float z = fabsf(x);
    const float t = __fmul_rn(z, z);
    float p = -0.0057057787f;
    p = __fmaf_rn(p, t, 0.020639767f);
    p = __fmaf_rn(p, t, -0.053739914f);
    p = __fmaf_rn(p, t, 0.13331445f);
    p = __fmaf_rn(p, t, -0.33333282f);
    const float small = __fmaf_rn(z, __fmul_rn(t, p), z);
    const float e = expf(__fmul_rn(-2.0f, z));
    const float large = __fmul_rn(__fsub_rn(1.0f, e), reciprocal(__fadd_rn(1.0f, e)));
    return copysignf(z < 0.625f ? small : large, x);
}

/// 1 - tanh^2 x = 4e / (1 + e)^2, e = e^(-2|x|): nothing cancels.
__device__ __forceinline__ float hyperbolic_tangent_slope(float x) {
    const float e = expf(__fmul_rn(-2.0f, fabsf(x)));
    const float r = reciprocal(__fadd_rn(1.0f, e));
    return __fmul_rn(__fmul_rn(__fmul_rn(4.0f, e), r), r);
}

/// 2u of the approximate GELU, sqrt(8 / pi) (x + 0.044715 x^3), and its derivative, for an x within CUBE.
struct TwiceU {
    float value;
    float slope;

    __device__ __forceinline__ explicit TwiceU(float x) {
        const float square = __fmul_rn(x, x);
        value = __fmul_rn(x, __fmaf_rn(square, 0.071354814f, 1.5957692f));
        slope = __fmaf_rn(square, 0.21406444f, 1.5957692f);
    }
};

/// act(x).
template <Activation activation>
__device__ __forceinline__ float activate(float x) {
    switch (activation) {
        case Activation::gelu: return __fmul_rn(at_least(x, NORMAL), Normal(x).cdf);
        case Activation::gelu_tanh: {
            const float low = at_least(x, CUBE);
            return __fmul_rn(low, Logistic(TwiceU(fminf(low, CUBE)).value).value);
        }
        case Activation::relu: return x < 0.0f ? 0.0f : x;  // a NaN stays one
        case Activation::silu: return __fmul_rn(at_least(x, LOGISTIC), Logistic(x).value);
        case Activation::tanh: return hyperbolic_tangent(x);
        default: return x;
    }
}

/// act'(x).
template <Activation activation>
__device__ __forceinline__ float slope(float x) {
    switch (activation) {
        case Activation::gelu: {
            x = limited(x, NORMAL);
            const Normal normal(x);
            return __fmaf_rn(x, normal.density, normal.cdf);
        }
        case Activation::gelu_tanh: {
            x = limited(x, CUBE);
            const TwiceU u(x);
            const Logistic s(u.value);
            return __fmaf_rn(__fmul_rn(x, __fmul_rn(s.value, s.rest)), u.slope, s.value);
        }
        case Activation::relu: return x <= 0.0f ? 0.0f : 1.0f;
        case Activation::silu: {
            x = limited(x, LOGISTIC);
            const Logistic s(x);
            return __fmaf_rn(__fmul_rn(x, s.value), s.rest, s.value);
        }
        case Activation::tanh: return hyperbolic_tangent_slope(x);
        default: return 1.0f;
    }
}

/// act or act' of eight values.
template <Activation activation, bool derivative>
__device__ __forceinline__ void apply(Values& x) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        x.at[j] = derivative ? slope<activation>(x.at[j]) : activate<activation>(x.at[j]);
    }
}

/// The same, with one branch for all of them.
template <bool derivative>
__device__ __forceinline__ void apply(Activation activation, Values& x) {
    switch (activation) {
        case Activation::gelu: return apply<Activation::gelu, derivative>(x);
        case Activation::gelu_tanh: return apply<Activation::gelu_tanh, derivative>(x);
        case Activation::relu: return apply<Activation::relu, derivative>(x);
        case Activation::silu: return apply<Activation::silu, derivative>(x);
        case Activation::tanh: return apply<Activation::tanh, derivative>(x);
        default: return apply<Activation::identity, derivative>(x);
    }
}
