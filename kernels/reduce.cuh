// Reductions over the threads that share a row: a warp, or a block of 8 warps.
//
// The order is fixed: within a warp a butterfly (thread t with thread t ^ 16, then 8, 4, 2, 1), which gives
// every thread the same bits because a + b is b + a; across warps from warp 0 to warp 7, by every thread
// alike. So results repeat from run to run.

#pragma once

/// All 32 threads of the warp must be here, and get the largest value that is not a NaN.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
}

/// One addition, in the type of a sum.
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double plus(double a, double b) { return a + b; }

/// All 32 threads of the warp must be here, and get the sum.
template <typename Sum>
__device__ __forceinline__ Sum warp_sum(Sum value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value = plus(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
}

/// Warps of a block.
constexpr unsigned WARPS = 8;

/// All 256 threads of the block must be here, and get the largest value that is not a NaN. `scratch`
/// is shared memory that nothing else uses before the block's next barrier but one.
__device__ __forceinline__ float block_max(float value, float (&scratch)[WARPS]) {
    value = warp_max(value);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[0];
#pragma unroll
    for (unsigned warp = 1; warp < WARPS; ++warp) value = fmaxf(value, scratch[warp]);
    return value;
}

/// All 256 threads of the block must be here, and get the sum. `scratch` as in `block_max`.
template <typename Sum>
__device__ __forceinline__ Sum block_sum(Sum value, Sum (&scratch)[WARPS]) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[0];
#pragma unroll
    for (unsigned warp = 1; warp < WARPS; ++warp) value = plus(value, scratch[warp]);
    return value;
}
