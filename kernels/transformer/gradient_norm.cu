// gradient_norm: how long the gradient of all weights together is, and what clips it.
//
//     parts[b] = sum of g[i]^2 over block b's 16,384 elements of a tensor
//     norm[0]  = sqrt(sum of parts);  norm[1] = min(1, max_norm / (norm[0] + 1e-6))
//
// The first kernel is launched once for 48 tensors, the second, of one block, once. No atomics: every sum has a fixed
// order (thread t adds up the elements t, t + 256, .. of its block). A norm that is a NaN clips to a NaN.
//
// Bytes an element: 4 read.

#include "elements.cuh"

/// Elements a block: `PART_ELEMENTS` in src/transformer/device/kernels.rs.
constexpr unsigned PART_ELEMENTS = 64 * THREADS;

struct SquaresParams {
    Out<float> parts;  // one a block
    Blocks blocks;
    In<float> values[TENSORS];  // [count] each
    unsigned long long counts[TENSORS];
};
static_assert(sizeof(SquaresParams) == 968, "kernels.rs: SquaresParams");

__device__ __forceinline__ void squares(const SquaresParams& p) {
    const unsigned tensor = p.blocks.tensor();
    const unsigned block = blockIdx.x - p.blocks.first[tensor];
    const unsigned long long first = 1ull * block * PART_ELEMENTS;
    const unsigned long long end = min(first + PART_ELEMENTS, p.counts[tensor]);
    const In<float> values = p.values[tensor];
    const float total = block_total(first, end, [&](unsigned long long i) {
        const float value = values.cached(i);
        return __fmul_rn(value, value);
    });
    if (threadIdx.x == 0) p.parts.cached(blockIdx.x, total);
}

FD_KERNEL(gradient_norm_squares_f32, SquaresParams, THREADS, squares)

struct NormParams {
    In<float> parts;  // [count]
    Out<float> norm;  // two
    unsigned long long count;
    float max_norm;
    unsigned padding;
};
static_assert(sizeof(NormParams) == 32, "kernels.rs: NormParams");

/// One block.
__device__ __forceinline__ void gradient_norm(const NormParams& p) {
    const auto part = [&](unsigned long long i) { return p.parts.cached(i); };
    const float norm = __fsqrt_rn(block_total(0, p.count, part));
    const float factor = __fdiv_rn(p.max_norm, __fadd_rn(norm, 1e-6f));
    if (threadIdx.x != 0) return;
    p.norm.cached(0, norm);
    p.norm.cached(1, factor > 1.0f ? 1.0f : factor);
}

FD_KERNEL(gradient_norm_f32, NormParams, THREADS, gradient_norm)
