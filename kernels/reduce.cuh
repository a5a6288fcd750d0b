// Reductions over the threads that share a row: a warp, or the warps of a block.
//
// The order is fixed: within a warp a butterfly (thread t with thread t ^ 16, then 8, 4, 2, 1), which gives
// every thread the same bits because a + b is b + a; across warps pairs of neighbours, then pairs of pairs, by
// every thread alike. So results repeat from run to run, and a sum of equal values is as exact as a power of two.

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
template <typename Sum>
__device__ __forceinline__ Sum plus(Sum a, Sum b);
template <>
__device__ __forceinline__ float plus(float a, float b) {
    return __fadd_rn(a, b);
}
template <>
__device__ __forceinline__ double plus(double a, double b) {
    return a + b;
}

/// All 32 threads of the warp must be here, and get the sum.
template <typename Sum>
__device__ __forceinline__ Sum warp_sum(Sum value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        value = plus(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
}

/// Leaves a warp's value to the other warps. `scratch`, a power of two of values, is shared memory that nothing else uses
/// before the block's next barrier but one.
template <typename Value, unsigned WARPS>
__device__ __forceinline__ void leave(Value value, Value (&scratch)[WARPS]) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
}

/// What the warps left, folded by `fold`, behind a barrier.
template <typename Value, unsigned WARPS, typename Fold>
__device__ __forceinline__ Value folded(const Value (&scratch)[WARPS], Fold fold) {
    Value values[WARPS];
#pragma unroll
    for (unsigned warp = 0; warp < WARPS; ++warp) values[warp] = scratch[warp];
#pragma unroll
    for (unsigned step = 1; step < WARPS; step *= 2) {
#pragma unroll
        for (unsigned warp = 0; warp + step < WARPS; warp += 2 * step) {
            values[warp] = fold(values[warp], values[warp + step]);
        }
    }
    return values[0];
}

/// All threads of the block must be here, and get the largest value that is not a NaN.
template <unsigned WARPS>
__device__ __forceinline__ float block_max(float value, float (&scratch)[WARPS]) {
    leave(warp_max(value), scratch);
    __syncthreads();
    return folded(scratch, [](float a, float b) { return fmaxf(a, b); });
}

/// All threads of the block must be here, and get the sum.
template <typename Sum, unsigned WARPS>
__device__ __forceinline__ Sum block_sum(Sum value, Sum (&scratch)[WARPS]) {
    leave(warp_sum(value), scratch);
    __syncthreads();
    return folded(scratch, plus<Sum>);
}
