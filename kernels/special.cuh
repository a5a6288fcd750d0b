// The functions of the multi-function unit, and the limits beside them, an instruction each.
//
// The exponential is ex2.approx.ftz: within 2 ulp by the PTX manual; a result below the normal numbers is 0. CUDA's expf
// is nine instructions around the same one.

#pragma once

#include "vector.cuh"

/// log2 e, within 0.23 units of 2^-24, relatively.
constexpr float LOG2_E = 1.44269504f;

#ifdef FUSED_DROPOUT_EMULATOR
/// What an instruction with .ftz makes of a result.
inline float flushed(float result) { return std::fabs(result) < 1.17549435e-38f ? 0.0f : result; }
#endif

/// 2^x within 2 ulp; 0 for x below -126.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef FUSED_DROPOUT_EMULATOR
    return flushed(std::exp2(x));
#else
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#endif
}

/// 1 / x within 1 ulp; 0 where that is below the normal numbers.
__device__ __forceinline__ float reciprocal_fast(float x) {
#ifdef FUSED_DROPOUT_EMULATOR
    return flushed(1.0f / x);
#else
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(x));
    return reciprocal;
#endif
}

/// 1 / sqrt(x) within 2.2 units of 2^-24, for an x and a result that are normal numbers.
__device__ __forceinline__ float rsqrt_fast(float x) {
#ifdef FUSED_DROPOUT_EMULATOR
    return 1.0f / std::sqrt(x);
#else
    float root;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
    return root;
#endif
}

/// The lesser of two numbers; a NaN stays one, as it would not with fminf.
__device__ __forceinline__ float lesser(float a, float b) {
#ifdef FUSED_DROPOUT_EMULATOR
    return a != a ? a : b < a ? b : a;
#else
    float lesser;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(lesser) : "f"(a), "f"(b));
    return lesser;
#endif
}

/// The greater of two numbers; a NaN stays one.
__device__ __forceinline__ float greater(float a, float b) {
#ifdef FUSED_DROPOUT_EMULATOR
    return a != a ? a : b > a ? b : a;
#else
    float greater;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(greater) : "f"(a), "f"(b));
    return greater;
#endif
}
