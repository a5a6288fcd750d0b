// cross_entropy: the loss of class numbers, and its gradient in place of the logits. For row r with the label l
// and m = max x[r, :],
//
//     e[c]      = exp(x[r, c] - m),   s = sum of e
//     losses[r] = log s - (x[r, l] - m)
//     x[r, c]   = round(factor * (e[c] / s - (c == l)))
//     loss      = factor * sum of losses
//
// A negative label is ignored: +0 in its row of both. A label that is no column makes the loss a NaN, which the
// host cannot but see, and its row of the gradient +0. The factor lies in memory: a captured graph has batches with
// other numbers of labels.
//
// A warp a row of at most 1024 columns, a block a longer one. Each octet is read and written by one thread. The sum
// over the rows has a fixed order: thread t of one block adds up rows t, t + 256, .., and the block these.
//
// Bytes an element: one read from memory, two from L2 or L1, one written (4 in 16-bit storage); a row's label and
// loss are 4 bytes each.

#include "../team.cuh"
#include "elements.cuh"

template <typename T>
struct CrossEntropyParams {
    InOut<T> logits;    // [rows, cols]
    In<int> labels;     // [rows]
    In<float> factor;   // one
    Out<float> losses;  // [rows]
    unsigned long long cols;
    unsigned rows;
    unsigned padding;
};
static_assert(sizeof(CrossEntropyParams<float>) == 56, "kernels.rs: CrossEntropyParams");

template <typename T, typename Walk>
__device__ __forceinline__ void cross_entropy(const CrossEntropyParams<T>& p) {
    constexpr bool aligned = Walk::aligned;
    __shared__ typename Walk::Scratch maxima;
    __shared__ typename Walk::Scratch sums;
    const Walk walk = {{}, p.cols};
    const unsigned row = walk.team.row;
    if (row >= p.rows) return;  // the whole team
    const unsigned long long start = row * p.cols;
    const auto load = [&](Index octet, unsigned count) {
        return unpack(p.logits.in.template cached<aligned>(start + octet.element(), count));
    };
    const auto store = [&](Index octet, unsigned count, const Values& values) {
        p.logits.out.template cached<aligned>(start + octet.element(), count, pack<T>(values));
    };

    const int label = p.labels.cached(row);
    if (label < 0 || label >= static_cast<long long>(p.cols)) {  // the whole team
        walk.each([&](unsigned, Index octet, unsigned count) { store(octet, count, {}); });
        if (walk.team.rank != 0) return;
        p.losses.cached(row, label < 0 ? 0.0f : bits_as<float>(0x7fc00000u));
        return;
    }

    float most = bits_as<float>(0xff800000u);  // -infinity
    walk.each([&](unsigned, Index octet, unsigned count) {
        const Values x = load(octet, count);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            if (aligned || j < count) most = fmaxf(most, x.at[j]);
        }
    });
    most = walk.team.max(most, maxima);
    float sum = 0.0f;
    walk.each([&](unsigned, Index octet, unsigned count) {
        const Values x = load(octet, count);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            if (aligned || j < count) sum = __fadd_rn(sum, expf(__fsub_rn(x.at[j], most)));
        }
    });
    sum = walk.team.sum(sum, sums);

    const float inverse = __fdiv_rn(1.0f, sum);
    const float factor = p.factor.cached(0);
    walk.each([&](unsigned, Index octet, unsigned count) {
        Values x = load(octet, count);
        // The label's place in its octet; 8 in the others.
        const unsigned target_at = octet.base == label / 8u ? label % 8u : 8u;
        float of_label = 0.0f;
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            const float shifted = __fsub_rn(x.at[j], most);
            if (j == target_at) of_label = shifted;
            const float probability = __fmul_rn(expf(shifted), inverse);
            const float target = j == target_at ? 1.0f : 0.0f;
            x.at[j] = __fmul_rn(factor, __fsub_rn(probability, target));
        }
        store(octet, count, x);
        if (target_at < 8) p.losses.cached(row, __fsub_rn(logf(sum), of_label));
    });
}

/// Each pass reads the row again.
template <bool aligned>
using WideWarpWalk = Walk<WarpTeam, 0, 0, aligned>;

/// The kernels of one form and storage type.
#define FD_CROSS_ENTROPY(form, walk, T, type)                                                     \
    FD_KERNEL(cross_entropy_##form##_##type, CrossEntropyParams<T>, walk<true>::BLOCK,            \
              cross_entropy<T, walk<true>>)                                                       \
    FD_KERNEL(cross_entropy_##form##_unaligned_##type, CrossEntropyParams<T>, walk<true>::BLOCK,  \
              cross_entropy<T, walk<false>>)

FD_CROSS_ENTROPY(warp, WideWarpWalk, float, f32)
FD_CROSS_ENTROPY(warp, WideWarpWalk, f16, f16)
FD_CROSS_ENTROPY(warp, WideWarpWalk, bf16, bf16)
FD_CROSS_ENTROPY(block, WideWalk, float, f32)
FD_CROSS_ENTROPY(block, WideWalk, f16, f16)
FD_CROSS_ENTROPY(block, WideWalk, bf16, bf16)

struct CrossEntropyLossParams {
    In<float> losses;  // [rows]
    In<float> factor;  // one
    Out<float> loss;   // one
    unsigned long long rows;
};
static_assert(sizeof(CrossEntropyLossParams) == 32, "kernels.rs: CrossEntropyLossParams");

/// One block.
__device__ __forceinline__ void cross_entropy_loss(const CrossEntropyLossParams& p) {
    const auto loss_of = [&](unsigned long long row) { return p.losses.cached(row); };
    const float total = block_total(0, p.rows, loss_of);
    if (threadIdx.x == 0) p.loss.cached(0, __fmul_rn(p.factor.cached(0), total));
}

FD_KERNEL(cross_entropy_loss_f32, CrossEntropyLossParams, THREADS, cross_entropy_loss)
