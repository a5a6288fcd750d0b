// Activations and their slopes in f32. The exponential is 2^x (special.cuh): a value takes two instructions of the
// multi-function unit, and for 16-bit storage at most 14 others. Results agree with the CPU's within the bounds of
// CONTRACT.md, not to the bit. A factor that is 0 beyond some x meets a limited x: at an infinity a product is the limit,
// and not NaN.

#pragma once

#include "special.cuh"

/// `Activation` of src/ops/bias_act_dropout.rs, in its order.
enum class Activation : unsigned { gelu, gelu_tanh, relu, silu, tanh, identity };

/// Beyond these distances from 0 a tail of the normal and of the logistic function, and sigma(2u) of the
/// approximate GELU, are 0 in f32.
constexpr float NORMAL = 14.5f;
constexpr float LOGISTIC = 104.0f;
constexpr float CUBE = 20.0f;

/// x within `limit` of 0; a NaN stays one.
__device__ __forceinline__ float limited(float x, float limit) {
    return lesser(greater(x, -limit), limit);
}

/// e^(z^2/2) Phi(-z) for z from 0 to 14.5. In 16-bit storage, with t = 1 / (1 + 0.3 z), a polynomial within 2.1e-6,
/// relatively; for f32 the quotient of src/cpu/math.rs.
template <typename T>
__device__ __forceinline__ float mills(float z) {
    if (sizeof(T) == 2) {
        const float t = reciprocal_fast(__fmaf_rn(0.3f, z, 1.0f));
        float p = -0.0845898613f;
        p = __fmaf_rn(p, t, 0.240561619f);
        p = __fmaf_rn(p, t, -0.0486297235f);
        p = __fmaf_rn(p, t, 0.164754674f);
        p = __fmaf_rn(p, t, 0.10670802f);
        p = __fmaf_rn(p, t, 0.121274076f);
        return __fmaf_rn(p, t, -7.97446482e-05f);
    }
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
    return __fmul_rn(a, reciprocal_fast(b));
}

/// z = |x|, at most 14.5, and e^(-z^2/2).
struct Normal {
    float z;
    float e;

    __device__ __forceinline__ explicit Normal(float x) {
        z = lesser(fabsf(x), NORMAL);
        e = exp2_fast(__fmul_rn(__fmul_rn(-0.5f * LOG2_E, z), z));
    }
};

/// The logistic function of v, from the exponent of e^-v = 2^exponent. Beyond 2^126 it is 0; the exponent is limited, so that
/// `rest` is not an infinity times 0.
struct Logistic {
    float value;  // sigma(v)
    float rest;   // 1 - sigma(v)

    __device__ __forceinline__ explicit Logistic(float exponent) {
        const float e = exp2_fast(lesser(exponent, 127.0f));
        value = reciprocal_fast(__fadd_rn(1.0f, e));
        rest = __fmul_rn(e, value);
    }

    /// sigma(x).
    static __device__ __forceinline__ Logistic of(float x) { return Logistic(__fmul_rn(x, -LOG2_E)); }

    /// sigma(2u) of the approximate GELU, 2u = sqrt(8 / pi) (x + 0.044715 x^3), of x and its square.
    static __device__ __forceinline__ Logistic of_cube(float x, float square) {
        const float factor = __fmaf_rn(square, -0.071354814f * LOG2_E, -1.5957692f * LOG2_E);
        return Logistic(__fmul_rn(x, factor));
    }
};

/// x sigma(x), from both of them.
__device__ __forceinline__ float silu(float x, const Logistic& s) {
    return __fmul_rn(greater(x, -LOGISTIC), s.value);
}

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
    const float e = exp2_fast(__fmul_rn(-2.0f * LOG2_E, z));
    const float large = __fmul_rn(__fsub_rn(1.0f, e), reciprocal_fast(__fadd_rn(1.0f, e)));
    return copysignf(z < 0.625f ? small : large, x);
}

/// 1 - tanh^2 x = 4e / (1 + e)^2, e = e^(-2|x|): nothing cancels.
__device__ __forceinline__ float hyperbolic_tangent_slope(float x) {
    const float e = exp2_fast(__fmul_rn(-2.0f * LOG2_E, fabsf(x)));
    const float r = reciprocal_fast(__fadd_rn(1.0f, e));
    return __fmul_rn(__fmul_rn(__fmul_rn(4.0f, e), r), r);
}

/// act(x), for a value stored as T.
template <typename T, Activation activation>
__device__ __forceinline__ float activate(float x) {
    switch (activation) {
        case Activation::gelu: {
            // x Phi(x) is max(x, 0) - z Phi(-z) on both sides.
            const Normal normal(x);
            const float tail = __fmul_rn(normal.e, mills<T>(normal.z));
            return __fmaf_rn(-normal.z, tail, fmaxf(x, 0.0f));
        }
        case Activation::gelu_tanh: {
            const Logistic s = Logistic::of_cube(x, __fmul_rn(x, x));
            return __fmul_rn(greater(x, -CUBE), s.value);
        }
        case Activation::relu: return x < 0.0f ? 0.0f : x;  // a NaN stays one
        case Activation::silu: return silu(x, Logistic::of(x));
        case Activation::tanh: return hyperbolic_tangent(x);
        default: return x;
    }
}

/// act'(x), for a value stored as T.
template <typename T, Activation activation>
__device__ __forceinline__ float slope(float x) {
    switch (activation) {
        case Activation::gelu: {
            // Phi(x) + x phi(x) is s = Phi(-z) - z phi(z) below 0, and 1 - s above.
            const Normal normal(x);
            const float rest = __fmaf_rn(normal.z, -0.3989423f, mills<T>(normal.z));
            const float s = __fmul_rn(normal.e, rest);
            return x > 0.0f ? __fsub_rn(1.0f, s) : s;
        }
        case Activation::gelu_tanh: {
            x = limited(x, CUBE);
            const float square = __fmul_rn(x, x);
            const Logistic s = Logistic::of_cube(x, square);
            const float derivative = __fmaf_rn(square, 0.21406444f, 1.5957692f);
            return __fmaf_rn(__fmul_rn(__fmul_rn(x, s.value), s.rest), derivative, s.value);
        }
        case Activation::relu: return x <= 0.0f ? 0.0f : 1.0f;
        case Activation::silu: {
            x = limited(x, LOGISTIC);
            const Logistic s = Logistic::of(x);
            return __fmaf_rn(__fmul_rn(x, s.value), s.rest, s.value);
        }
        case Activation::tanh: return hyperbolic_tangent_slope(x);
        default: return 1.0f;
    }
}

/// act or act' of eight values.
template <typename T, Activation activation, bool derivative>
__device__ __forceinline__ void apply(Values& x) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        x.at[j] = derivative ? slope<T, activation>(x.at[j]) : activate<T, activation>(x.at[j]);
    }
}

/// The same, with one branch for all of them.
template <typename T, bool derivative>
__device__ __forceinline__ void apply(Activation activation, Values& x) {
    switch (activation) {
        case Activation::gelu: return apply<T, Activation::gelu, derivative>(x);
        case Activation::gelu_tanh: return apply<T, Activation::gelu_tanh, derivative>(x);
        case Activation::relu: return apply<T, Activation::relu, derivative>(x);
        case Activation::silu: return apply<T, Activation::silu, derivative>(x);
        case Activation::tanh: return apply<T, Activation::tanh, derivative>(x);
        default: return apply<T, Activation::identity, derivative>(x);
    }
}
