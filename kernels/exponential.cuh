// 2^x, and e^x by it: the one exponential of the kernels.
//
// ex2.approx.ftz is one instruction of the multi-function unit, within 2 ulp by the PTX manual; results below the normal
// numbers are 0. CUDA's expf is nine instructions around the same one.

#pragma once

#include "vector.cuh"

/// log2 e, within 0.23 units of 2^-24, relatively.
constexpr float LOG2_E = 1.44269504f;

/// 2^x within 2 ulp; 0 for x below -126.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef FUSED_DROPOUT_EMULATOR
    const float power = std::exp2(x);
    return power < 1.17549435e-38f ? 0.0f : power;
#else
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
#endif
}

/// 1 / x within 1 ulp, for an x whose reciprocal is a normal number.
__device__ __forceinline__ float reciprocal_fast(float x) {
#ifdef FUSED_DROPOUT_EMULATOR
    return 1.0f / x;
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
