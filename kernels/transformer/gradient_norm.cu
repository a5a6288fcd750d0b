// gradient_norm: how long the gradient of all weights together is, and what clips it.
//
//     parts[b] = sqrt(sum of g[i]^2) / 128 over block b's 16,384 elements of a tensor
//     norm[0]  = 128 sqrt(sum of parts[b]^2);  norm[1] = min(1, max_norm / (norm[0] + 1e-6))
//
// Sums are in f64, in which no square of an f32 overflows or is rounded; a part is no larger than its largest element.
// The first kernel is launched once for 48 tensors, the second, of one block, once. No atomics: every sum has a fixed
// order (thread t adds up the elements t, t + 256, .. of its block). Gradients that are not finite clip to a NaN:
// they must not go unseen, as they would with a factor of 0.
//
// Bytes an element: 4 read.

#include "elements.cuh"

/// Elements a block: `PART_ELEMENTS` in src/transformer/device/kernels.rs.
constexpr unsigned PART_ELEMENTS = 64 * THREADS;

/// The root of PART_ELEMENTS.
constexpr double PART_SCALE = 128.0;

__device__ __forceinline__ double squared(float value) { return double(value) * double(value); }

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
    const double total =
        block_total(first, end, [&](unsigned long long i) { return squared(values.cached(i)); });
    if (threadIdx.x == 0) p.parts.cached(blockIdx.x, float(sqrt(total) / PART_SCALE));
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
    const auto part = [&](unsigned long long i) { return squared(p.parts.cached(i)); };
    const double norm = PART_SCALE * sqrt(block_total(0, p.count, part));
    // The last term is 0, or a NaN of an infinite norm.
    const double factor = double(p.max_norm) / (norm + 1e-6) + 0.0 * norm;
    if (threadIdx.x != 0) return;
    p.norm.cached(0, float(norm));
    p.norm.cached(1, factor > 1.0 ? 1.0f : float(factor));
}

FD_KERNEL(gradient_norm_f32, NormParams, THREADS, gradient_norm)
