// What the transformer's own kernels share: tensors taken an element at a time, and sums of many values in a
// fixed order.
//
// Neighbouring threads take neighbouring elements, so a warp's accesses are whole 128-byte lines (64 in 16-bit
// storage) at any alignment.

#pragma once

#include "../kernel.cuh"
#include "../reduce.cuh"

/// A tensor that a kernel updates: both are the same address.
template <typename T>
struct InOut {
    In<T> in;
    Out<T> out;
};

/// `value` rounded to T, nearest, ties to even.
template <typename T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ f16 narrow<f16>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float value) {
    return __float2bfloat16_rn(value);
}

/// Elements a block, four a thread: `ELEMENTS_A_BLOCK` in src/transformer/device/kernels.rs.
constexpr unsigned ELEMENTS_A_BLOCK = 4 * THREADS;

/// Calls `each(element)` for the thread's elements of a tensor of `count`, of which this is block `block`.
template <typename Each>
__device__ __forceinline__ void each_element(unsigned block, unsigned long long count, Each each) {
    const unsigned long long first = 1ull * block * ELEMENTS_A_BLOCK + threadIdx.x;
#pragma unroll
    for (unsigned i = 0; i < ELEMENTS_A_BLOCK / THREADS; ++i) {
        const unsigned long long element = first + i * THREADS;
        if (element < count) each(element);
    }
}

/// Tensors of a launch that takes several, at most: `TENSORS` in src/transformer/device/kernels.rs. Their addresses are
/// the kernel's parameters, which all chips have 4 KiB for.
constexpr unsigned TENSORS = 48;

/// Which blocks of a launch each tensor has.
struct Blocks {
    unsigned first[TENSORS];  // ascending; of those that are not there, beyond every block

    /// The tensor of this block: the last one that begins at or before it.
    __device__ __forceinline__ unsigned tensor() const {
        unsigned tensor = 0;
#pragma unroll
        for (unsigned step = 32; step > 0; step /= 2) {
            const unsigned next = tensor + step;
            if (next < TENSORS && first[next] <= blockIdx.x) tensor = next;
        }
        return tensor;
    }
};

/// The sum of `term(i)` over i from `first` to `end`: each thread adds up every 256th, in order, and the block
/// these, in the type of the terms. All 256 threads of the block must be here, once in a kernel; they all get the
/// sum.
template <typename Term>
__device__ __forceinline__ auto block_total(unsigned long long first, unsigned long long end,
                                            Term term) {
    using Sum = decltype(term(first));
    constexpr unsigned AT_ONCE = 8;  // loads on their way: a block may be all that runs
    __shared__ Sum scratch[THREADS / 32];
    Sum sum = 0;
    for (unsigned long long i = first + threadIdx.x; i < end; i += AT_ONCE * THREADS) {
        Sum terms[AT_ONCE];
#pragma unroll
        for (unsigned j = 0; j < AT_ONCE; ++j) {
            terms[j] = i + j * THREADS < end ? term(i + j * THREADS) : Sum(0);
        }
#pragma unroll
        for (unsigned j = 0; j < AT_ONCE; ++j) sum = plus(sum, terms[j]);
    }
    return block_sum(sum, scratch);
}
