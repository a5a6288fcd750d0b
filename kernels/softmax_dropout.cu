// softmax_dropout: y = D(softmax(scale * x + mask)) along each row, and its gradient.
//
// With z = scale * x + mask over the visible columns, m = max z, e = exp(z - m), S = sum e:
//
//     forward:  y = kept ? (e / S) * dropout scale : +0,   statistics = (m, 1 / S)
//     backward: P = e / S, with m and 1 / S from the statistics where they are given; g = kept ? dy * dropout scale : 0
//               dx = scale * P * (g - sum P g)
//
// The visible columns of a row are its first ones: as many as the causal limit and the row's length
// allow. A column beyond them has y = dx = +0 and is not loaded; nor are octets that lie wholly beyond.
// An additive mask of -infinity masks one by one. A row whose z are all -infinity gives zeros and the
// statistics (-infinity, 0). Where P is 0, dx is +0 and dy is not looked at.
//
// m and 1 / S are kept apart: their log-sum-exp m + ln S, rounded to f32, would lose ln S where |m| is large.
//
// Bytes an element: forward one read, one written (4 in 16-bit storage); backward two read, one written
// (6). The row stays in registers between its passes:
//
//     warp   rows up to 1024 columns: a warp a row, 4 octets a thread
//     block  rows up to 8192 columns: a block a row, 4 octets a thread
//     wide   longer rows: a block a row; each pass reads the row again (L2 answers while it fits)
//
// Compiled, not timed: 4 octets are 32 f32 a thread forward and 64 backward, without a spill.
//
// Errors: z is one rounding, fma(x, scale, mask); z - m one; expf is
// within 2 ulp by CUDA's table for the default flags; S is a tree of f32 sums of 8 * octets + 8 terms'
// depth at most; 1 / S and each product one rounding.
// In place: y may be x; dx may be dy. Each element is read and written by one thread.

#include "team.cuh"

template <typename T>
struct SoftmaxParams {
    Mask mask;
    InMatrix<T> x;
    InMatrix<T> dy;  // backward
    OutMatrix<T> out;  // y or dx
    In<float> statistics;       // backward, [rows, 2]; absent: recomputed
    Out<float> statistics_out;  // forward, [rows, 2]; may be absent
    In<unsigned> lengths;  // visible columns of each row; may be absent
    In<T> additive;        // [batch, queries, cols]; may be absent
    unsigned long long cols;
    long long causal;  // query q sees columns <= q + causal; no limit: 2^40
    unsigned rows;     // of this launch, from local row mask.rows.offset on
    float scale;
    Divisor queries;
    Divisor heads;
};
static_assert(sizeof(SoftmaxParams<float>) == 320, "softmax_dropout.rs: Params");

/// One row, as the threads that share it see it.
struct Row {
    unsigned local;              // local row
    unsigned logical;            // logical row
    unsigned long long mask;     // index of its first element in the additive mask
    unsigned long long visible;  // columns

    template <typename T>
    __device__ __forceinline__ Row(const SoftmaxParams<T>& p, unsigned row) {
        local = p.mask.rows.offset + row;
        logical = MaskReader<false>(p.mask).logical(row);
        const unsigned head = p.queries.quotient(local);
        const unsigned query = local - head * p.queries.divisor;
        mask = (1ull * p.heads.quotient(head) * p.queries.divisor + query) * p.cols;
        const long long limit = query + p.causal + 1;
        visible = limit <= 0 ? 0 : static_cast<unsigned long long>(limit);
        if (p.lengths.present()) visible = min(visible, 1ull * p.lengths.cached(local));
        visible = min(visible, p.cols);
    }

    /// An octet's first element in a matrix whose rows begin `stride` elements apart.
    __device__ __forceinline__ unsigned long long element(unsigned long long stride,
                                                          unsigned long long octet) const {
        return local * stride + 8 * octet;
    }
};

/// Minus infinity: the z of a column that is not visible.
__device__ __forceinline__ float masked() { return bits_as<float>(0xff800000u); }

/// What an octet of x and its additive mask are before they are computed with.
template <typename T>
struct Scores {
    Octet<T> x;
    Octet<T> additive;
};

/// Loads an octet with at least one visible column; `exist` of its columns exist.
template <typename T, bool aligned>
__device__ __forceinline__ Scores<T> load_scores(const SoftmaxParams<T>& p, const Row& row,
                                                 unsigned long long octet, unsigned exist) {
    Scores<T> scores;
    scores.x = p.x.template streaming<aligned>(row.element(p.x.stride, octet), exist);
    // Read again by the other heads.
    if (p.additive.present()) {
        scores.additive = p.additive.template cached<aligned>(row.mask + 8 * octet, exist);
    }
    return scores;
}

/// z of an octet whose first `visible` columns are visible.
template <typename T>
__device__ __forceinline__ Values scaled(const SoftmaxParams<T>& p, const Scores<T>& scores,
                                         unsigned visible) {
    Values z = unpack(scores.x);
    if (p.additive.present()) {
        const Values additive = unpack(scores.additive);
#pragma unroll
        for (int j = 0; j < 8; ++j) z.at[j] = __fmaf_rn(z.at[j], p.scale, additive.at[j]);
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j) z.at[j] = __fmul_rn(z.at[j], p.scale);
    }
#pragma unroll
    for (unsigned j = 0; j < 8; ++j) {
        if (j >= visible) z.at[j] = masked();
    }
    return z;
}

__device__ __forceinline__ float largest(const Values& values, float largest) {
#pragma unroll
    for (int j = 0; j < 8; ++j) largest = fmaxf(largest, values.at[j]);
    return largest;
}

/// What z is shifted by before the exponential: the row's maximum. Where that is -infinity there is
/// nothing to shift (z is -infinity or NaN everywhere, and exp of either is right as it is).
__device__ __forceinline__ float shift_of(float maximum) {
    return maximum == masked() ? 0.0f : maximum;
}

/// exp(z - shift) in place of z.
__device__ __forceinline__ void exponentiate(Values& z, float shift) {
#pragma unroll
    for (int j = 0; j < 8; ++j) z.at[j] = expf(__fsub_rn(z.at[j], shift));
}

__device__ __forceinline__ float total(const Values& values, float sum) {
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = __fadd_rn(sum, values.at[j]);
    return sum;
}

/// 1 / S; 0 for a row without a visible column. A NaN stays one.
__device__ __forceinline__ float reciprocal(float sum) {
    return sum == 0.0f ? 0.0f : __fdiv_rn(1.0f, sum);
}

/// How a row's z become probabilities: P = exp(z - maximum) * reciprocal.
struct Statistics {
    float maximum;
    float reciprocal;
};

/// Writes a row's statistics, where they are asked for.
template <typename T>
__device__ __forceinline__ void save(const SoftmaxParams<T>& p, const Row& row,
                                     Statistics statistics) {
    if (!p.statistics_out.present()) return;
    p.statistics_out.cached(2ull * row.local, statistics.maximum);
    p.statistics_out.cached(2ull * row.local + 1, statistics.reciprocal);
}

/// What [`save`] wrote in the forward pass.
template <typename T>
__device__ __forceinline__ Statistics saved(const SoftmaxParams<T>& p, const Row& row) {
    return {p.statistics.cached(2ull * row.local), p.statistics.cached(2ull * row.local + 1)};
}

__device__ __forceinline__ void scale(Values& values, float factor) {
#pragma unroll
    for (int j = 0; j < 8; ++j) values.at[j] = __fmul_rn(values.at[j], factor);
}

/// P in place of z.
__device__ __forceinline__ void probabilities(Values& z, Statistics statistics) {
    exponentiate(z, shift_of(statistics.maximum));
    scale(z, statistics.reciprocal);
}

/// y of an octet, from e: `factor` is the dropout scale over S.
template <typename T>
__device__ __forceinline__ Octet<T> dropped(const Values& e, const Kept& keep, float factor,
                                            unsigned visible) {
    Values y = {};
#pragma unroll
    for (unsigned j = 0; j < 8; ++j) {
        if (keep.at[j] && j < visible) y.at[j] = __fmul_rn(e.at[j], factor);
    }
    return pack<T>(y);
}

/// g of an octet: D(dy), `scale` being the dropout's.
template <typename T>
__device__ __forceinline__ Values gradient(const Octet<T>& dy, const Kept& keep, float scale,
                                           unsigned visible) {
    const Values values = unpack(dy);
    Values g = {};
#pragma unroll
    for (unsigned j = 0; j < 8; ++j) {
        if (keep.at[j] && j < visible) g.at[j] = __fmul_rn(values.at[j], scale);
    }
    return g;
}

/// P g of an octet, added to `sum`. A masked column (P = 0) takes no part, whatever its g.
__device__ __forceinline__ float total_product(const Values& probabilities, const Values& g,
                                               float sum) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (probabilities.at[j] != 0.0f) sum = __fmaf_rn(probabilities.at[j], g.at[j], sum);
    }
    return sum;
}

/// dx of an octet: scale * P * (g - sum P g), +0 where P is.
template <typename T>
__device__ __forceinline__ Octet<T> score_gradient(const Values& probabilities, const Values& g,
                                                   float scale, float sum, unsigned visible) {
    Values dx = {};
#pragma unroll
    for (unsigned j = 0; j < 8; ++j) {
        if (probabilities.at[j] != 0.0f && j < visible) {
            const float centred = __fsub_rn(g.at[j], sum);
            dx.at[j] = __fmul_rn(__fmul_rn(probabilities.at[j], centred), scale);
        }
    }
    return pack<T>(dx);
}

/// z of one row, as its team has them: in registers where the walk holds them, otherwise read again in each pass.
template <typename T, typename Walk>
struct TeamRow {
    static constexpr bool aligned = Walk::aligned;

    const SoftmaxParams<T>& p;
    const Row row;
    const Walk walk;  // over all columns
    const Walk seen;  // over the visible ones
    Values held[Walk::SLOTS];

    __device__ __forceinline__ TeamRow(const SoftmaxParams<T>& p, typename Walk::Team team)
        : p(p), row(p, team.row), walk{team, p.cols}, seen{team, row.visible} {}

    __device__ __forceinline__ Scores<T> scores(unsigned octet) const {
        return load_scores<T, aligned>(p, row, octet, below(p.cols, octet));
    }

    /// Loads what is held. `beside(slot, octet)` loads what is held beside it.
    template <typename Beside>
    __device__ __forceinline__ void load(Beside beside) {
        if (!Walk::held) return;
        Scores<T> loaded[Walk::SLOTS];
        seen.each([&](unsigned slot, unsigned octet, unsigned) {
            loaded[slot] = scores(octet);
            beside(slot, octet);
        });
        __syncwarp();  // keeps the loads first; all threads are here
        seen.each([&](unsigned slot, unsigned, unsigned visible) {
            held[slot] = scaled(p, loaded[slot], visible);
        });
    }

    /// z of an octet, or what became of it where it is held.
    __device__ __forceinline__ Values z(unsigned slot, unsigned octet, unsigned visible) const {
        return Walk::held ? held[slot] : scaled(p, scores(octet), visible);
    }

    /// Calls `each(z)` for octets with visible columns. What it makes of z stays where z is held.
    template <typename Each>
    __device__ __forceinline__ void each(Each each) {
        seen.each([&](unsigned slot, unsigned octet, unsigned visible) {
            if (Walk::held) return each(held[slot]);
            Values z = scaled(p, scores(octet), visible);
            each(z);
        });
    }

    /// The statistics of the row. What is held is e afterwards.
    __device__ __forceinline__ Statistics statistics(Scratch& max_scratch, Scratch& sum_scratch) {
        float maximum = masked();
        each([&](Values& z) { maximum = largest(z, maximum); });
        maximum = walk.team.max(maximum, max_scratch);
        float sum = 0.0f;
        each([&](Values& z) {
            exponentiate(z, shift_of(maximum));
            sum = total(z, sum);
        });
        return {maximum, reciprocal(walk.team.sum(sum, sum_scratch))};
    }

    /// Writes the row: `get(slot, octet, visible)` of octets with visible columns, +0 in the others.
    template <typename Get>
    __device__ __forceinline__ void write(Get get) const {
        walk.each([&](unsigned slot, unsigned octet, unsigned exist) {
            const unsigned visible = below(row.visible, octet);
            Octet<T> out = {};
            if (visible > 0) out = get(slot, octet, visible);
            p.out.template cached<aligned>(row.element(p.out.stride, octet), exist, out);
        });
    }
};

template <typename T, typename Walk>
__device__ __forceinline__ void forward(const SoftmaxParams<T>& p) {
    __shared__ Scratch max_scratch;
    __shared__ Scratch sum_scratch;
    const typename Walk::Team team;
    if (team.row >= p.rows) return;  // the whole team
    TeamRow<T, Walk> row(p, team);
    row.load([](unsigned, unsigned) {});
    const Statistics statistics = row.statistics(max_scratch, sum_scratch);
    if (team.rank == 0) save(p, row.row, statistics);

    row.write([&](unsigned slot, unsigned octet, unsigned visible) {
        Values e = row.z(slot, octet, visible);
        if (!Walk::held) exponentiate(e, shift_of(statistics.maximum));
        const MaskReader<false> draws(p.mask);  // read late: it is not held beside the row
        const float factor = __fmul_rn(statistics.reciprocal, draws.odds.scale);
        const Kept keep = draws.kept(draws.lanes(row.row.logical, octet));
        return dropped<T>(e, keep, factor, visible);
    });
}

template <typename T, typename Walk>
__device__ __forceinline__ void backward(const SoftmaxParams<T>& p) {
    __shared__ Scratch max_scratch;
    __shared__ Scratch sum_scratch;
    __shared__ Scratch product_scratch;
    const typename Walk::Team team;
    if (team.row >= p.rows) return;  // the whole team
    TeamRow<T, Walk> row(p, team);
    const auto load_dy = [&](unsigned octet) -> Octet<T> {
        const unsigned long long element = row.row.element(p.dy.stride, octet);
        return p.dy.template streaming<Walk::aligned>(element, below(p.cols, octet));
    };
    Octet<T> dy[Walk::SLOTS];
    row.load([&](unsigned slot, unsigned octet) { dy[slot] = load_dy(octet); });

    Statistics statistics;
    if (p.statistics.present()) {
        statistics = saved(p, row.row);
        if (Walk::held) {
            row.each([&](Values& z) { probabilities(z, statistics); });
        }
    } else {
        statistics = row.statistics(max_scratch, sum_scratch);
        if (Walk::held) {
            row.each([&](Values& e) { scale(e, statistics.reciprocal); });
        }
    }

    const auto g_of = [&](const Octet<T>& dy, unsigned octet, unsigned visible) -> Values {
        const MaskReader<false> draws(p.mask);  // as in the forward pass
        const Kept keep = draws.kept(draws.lanes(row.row.logical, octet));
        return gradient(dy, keep, draws.odds.scale, visible);
    };
    // P, and in `g` the gradient: at hand where they are held, otherwise from loads that are issued together.
    Values g[Walk::SLOTS];
    const auto read = [&](unsigned slot, unsigned octet, unsigned visible) -> Values {
        const Scores<T> scores = row.scores(octet);
        g[slot] = g_of(load_dy(octet), octet, visible);
        Values z = scaled(p, scores, visible);
        probabilities(z, statistics);
        return z;
    };
    float product = 0.0f;
    row.seen.each([&](unsigned slot, unsigned octet, unsigned visible) {
        if (Walk::held) {
            g[slot] = g_of(dy[slot], octet, visible);
            product = total_product(row.held[slot], g[slot], product);
        } else {
            const Values z = read(slot, octet, visible);
            product = total_product(z, g[slot], product);
        }
    });
    product = team.sum(product, product_scratch);
    row.write([&](unsigned slot, unsigned octet, unsigned visible) {
        const Values z = Walk::held ? row.held[slot] : read(slot, octet, visible);
        return score_gradient<T>(z, g[slot], p.scale, product, visible);
    });
}

/// The kernels of one form and storage type. Without its bound the forward pass of unaligned rows of f32 spills on sm_80.
#define FD_SOFTMAX(form, walk, T, type)                                                            \
    FD_KERNEL(softmax_dropout_forward_##form##_##type, SoftmaxParams<T>, THREADS,                  \
              forward<T, walk<true>>)                                                              \
    FD_KERNEL_BLOCKS(softmax_dropout_forward_##form##_unaligned_##type, SoftmaxParams<T>, THREADS, \
                     2, forward<T, walk<false>>)                                                   \
    FD_KERNEL(softmax_dropout_backward_##form##_##type, SoftmaxParams<T>, THREADS,                 \
              backward<T, walk<true>>)                                                             \
    FD_KERNEL(softmax_dropout_backward_##form##_unaligned_##type, SoftmaxParams<T>, THREADS,       \
              backward<T, walk<false>>)

FD_ROW_FORMS(FD_SOFTMAX)
