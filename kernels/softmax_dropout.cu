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
//     warp   rows up to 1024 columns: a warp a row, 4 octets a lane
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
    In<T> x;
    In<T> dy;              // backward
    Out<T> out;            // y or dx
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
static_assert(sizeof(SoftmaxParams<float>) == 288, "softmax_dropout.rs: Params");

/// One row, as the threads that share it see it.
struct Row {
    unsigned local;              // local row
    unsigned logical;            // logical row
    unsigned long long first;    // index of its first element
    unsigned long long mask;     // index of its first element in the additive mask
    unsigned long long visible;  // columns

    template <typename T>
    __device__ __forceinline__ Row(const SoftmaxParams<T>& p, unsigned row) {
        local = p.mask.rows.offset + row;
        logical = Draws<false>(p.mask).logical(row);
        first = local * p.cols;
        const unsigned head = p.queries.quotient(local);
        const unsigned query = local - head * p.queries.divisor;
        mask = (1ull * p.heads.quotient(head) * p.queries.divisor + query) * p.cols;
        const long long limit = query + p.causal + 1;
        visible = limit <= 0 ? 0 : static_cast<unsigned long long>(limit);
        if (p.lengths.present()) visible = min(visible, 1ull * p.lengths.cached(local));
        visible = min(visible, p.cols);
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
    scores.x = p.x.template streaming<aligned>(row.first + 8 * octet, exist);
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

/// P in place of z.
__device__ __forceinline__ void probabilities(Values& z, Statistics statistics) {
    exponentiate(z, shift_of(statistics.maximum));
#pragma unroll
    for (int j = 0; j < 8; ++j) z.at[j] = __fmul_rn(z.at[j], statistics.reciprocal);
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

/// g of an octet: D(dy).
template <typename T>
__device__ __forceinline__ Values gradient(const SoftmaxParams<T>& p, const Octet<T>& dy,
                                           const Kept& keep, unsigned visible) {
    const Values values = unpack(dy);
    Values g = {};
#pragma unroll
    for (unsigned j = 0; j < 8; ++j) {
        if (keep.at[j] && j < visible) g.at[j] = __fmul_rn(values.at[j], p.mask.scale);
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

/// Forward, the row in registers.
template <typename T, typename Team, bool aligned>
__device__ __forceinline__ void forward(const SoftmaxParams<T>& p) {
    __shared__ Scratch max_scratch;
    __shared__ Scratch sum_scratch;
    Team team;
    if (team.row >= p.rows) return;  // the whole team
    const Row row(p, team.row);

    Scores<T> scores[OCTETS_HELD];
#pragma unroll
    for (unsigned i = 0; i < OCTETS_HELD; ++i) {
        const unsigned octet = team.rank + i * Team::SIZE;
        scores[i] = {};
        if (below(row.visible, octet) > 0) {
            scores[i] = load_scores<T, aligned>(p, row, octet, below(p.cols, octet));
        }
    }
    __syncwarp();  // keeps the loads first; all lanes are here

    Values e[OCTETS_HELD];
    float maximum = masked();
#pragma unroll
    for (unsigned i = 0; i < OCTETS_HELD; ++i) {
        e[i] = scaled(p, scores[i], below(row.visible, team.rank + i * Team::SIZE));
        maximum = largest(e[i], maximum);
    }
    maximum = team.max(maximum, max_scratch);
    float sum = 0.0f;
#pragma unroll
    for (unsigned i = 0; i < OCTETS_HELD; ++i) {
        exponentiate(e[i], shift_of(maximum));
        sum = total(e[i], sum);
    }
    sum = team.sum(sum, sum_scratch);
    const Statistics statistics = {maximum, reciprocal(sum)};
    if (team.rank == 0) save(p, row, statistics);

    const float factor = __fmul_rn(statistics.reciprocal, p.mask.scale);
    const Draws<false> draws(p.mask);
#pragma unroll
    for (unsigned i = 0; i < OCTETS_HELD; ++i) {
        const unsigned octet = team.rank + i * Team::SIZE;
        const unsigned exist = below(p.cols, octet);
        if (exist == 0) continue;
        const unsigned visible = below(row.visible, octet);
        Octet<T> y = {};
        if (visible > 0) {
            const Kept keep = draws.kept(draws.lanes(row.logical, octet));
            y = dropped<T>(e[i], keep, factor, visible);
        }
        p.out.template cached<aligned>(row.first + 8ull * octet, exist, y);
    }
}

/// Forward, the row read again in each pass.
template <typename T, bool aligned>
__device__ __forceinline__ void forward_wide(const SoftmaxParams<T>& p) {
    __shared__ Scratch max_scratch;
    __shared__ Scratch sum_scratch;
    BlockTeam team;
    const Row row(p, team.row);

    float maximum = masked();
    for (unsigned long long octet = team.rank; 8 * octet < row.visible; octet += THREADS) {
        const auto scores = load_scores<T, aligned>(p, row, octet, below(p.cols, octet));
        maximum = largest(scaled(p, scores, below(row.visible, octet)), maximum);
    }
    maximum = team.max(maximum, max_scratch);
    float sum = 0.0f;
    for (unsigned long long octet = team.rank; 8 * octet < row.visible; octet += THREADS) {
        const auto scores = load_scores<T, aligned>(p, row, octet, below(p.cols, octet));
        Values e = scaled(p, scores, below(row.visible, octet));
        exponentiate(e, shift_of(maximum));
        sum = total(e, sum);
    }
    sum = team.sum(sum, sum_scratch);
    const Statistics statistics = {maximum, reciprocal(sum)};
    if (team.rank == 0) save(p, row, statistics);

    const float factor = __fmul_rn(statistics.reciprocal, p.mask.scale);
    const Draws<false> draws(p.mask);
    for (unsigned long long octet = team.rank; 8 * octet < p.cols; octet += THREADS) {
        const unsigned exist = below(p.cols, octet);
        const unsigned visible = below(row.visible, octet);
        Octet<T> y = {};
        if (visible > 0) {
            Values e = scaled(p, load_scores<T, aligned>(p, row, octet, exist), visible);
            exponentiate(e, shift_of(maximum));
            const unsigned at = static_cast<unsigned>(octet);
            y = dropped<T>(e, draws.kept(draws.lanes(row.logical, at)), factor, visible);
        }
        p.out.template cached<aligned>(row.first + 8 * octet, exist, y);
    }
}

/// Backward, the row in registers.
template <typename T, typename Team, bool aligned>
__device__ __forceinline__ void backward(const SoftmaxParams<T>& p) {
    __shared__ Scratch max_scratch;
    __shared__ Scratch sum_scratch;
    __shared__ Scratch product_scratch;
    Team team;
    if (team.row >= p.rows) return;  // the whole team
    const Row row(p, team.row);

    Scores<T> scores[OCTETS_HELD];
    Octet<T> dy[OCTETS_HELD];
#pragma unroll
    for (unsigned i = 0; i < OCTETS_HELD; ++i) {
        const unsigned octet = team.rank + i * Team::SIZE;
        scores[i] = {};
        dy[i] = {};
        if (below(row.visible, octet) > 0) {
            const unsigned exist = below(p.cols, octet);
            scores[i] = load_scores<T, aligned>(p, row, octet, exist);
            dy[i] = p.dy.template streaming<aligned>(row.first + 8ull * octet, exist);
        }
    }
    __syncwarp();  // keeps the loads first; all lanes are here

    Values z[OCTETS_HELD];
#pragma unroll
    for (unsigned i = 0; i < OCTETS_HELD; ++i) {
        z[i] = scaled(p, scores[i], below(row.visible, team.rank + i * Team::SIZE));
    }
    if (p.statistics.present()) {
        const Statistics statistics = saved(p, row);
#pragma unroll
        for (unsigned i = 0; i < OCTETS_HELD; ++i) probabilities(z[i], statistics);
    } else {
        float maximum = masked();
#pragma unroll
        for (unsigned i = 0; i < OCTETS_HELD; ++i) maximum = largest(z[i], maximum);
        maximum = team.max(maximum, max_scratch);
        float sum = 0.0f;
#pragma unroll
        for (unsigned i = 0; i < OCTETS_HELD; ++i) {
            exponentiate(z[i], shift_of(maximum));
            sum = total(z[i], sum);
        }
        const float factor = reciprocal(team.sum(sum, sum_scratch));
#pragma unroll
        for (unsigned i = 0; i < OCTETS_HELD; ++i) {
#pragma unroll
            for (int j = 0; j < 8; ++j) z[i].at[j] = __fmul_rn(z[i].at[j], factor);
        }
    }

    const Draws<false> draws(p.mask);
    Values g[OCTETS_HELD];
    float product = 0.0f;
#pragma unroll
    for (unsigned i = 0; i < OCTETS_HELD; ++i) {
        const unsigned octet = team.rank + i * Team::SIZE;
        const unsigned visible = below(row.visible, octet);
        g[i] = {};
        if (visible == 0) continue;
        const Kept keep = draws.kept(draws.lanes(row.logical, octet));
        g[i] = gradient(p, dy[i], keep, visible);
        product = total_product(z[i], g[i], product);
    }
    product = team.sum(product, product_scratch);
#pragma unroll
    for (unsigned i = 0; i < OCTETS_HELD; ++i) {
        const unsigned octet = team.rank + i * Team::SIZE;
        const unsigned exist = below(p.cols, octet);
        if (exist == 0) continue;
        const unsigned visible = below(row.visible, octet);
        p.out.template cached<aligned>(row.first + 8ull * octet, exist,
                                       score_gradient<T>(z[i], g[i], p.scale, product, visible));
    }
}

/// Backward, the row read again in each pass.
template <typename T, bool aligned>
struct BackwardWide {
    const SoftmaxParams<T>& p;
    const Row& row;
    Draws<false> draws;

    __device__ __forceinline__ Values scores(unsigned long long octet) const {
        const auto loaded = load_scores<T, aligned>(p, row, octet, below(p.cols, octet));
        return scaled(p, loaded, below(row.visible, octet));
    }

    __device__ __forceinline__ Values gradients(unsigned long long octet) const {
        const Octet<T> dy =
            p.dy.template streaming<aligned>(row.first + 8 * octet, below(p.cols, octet));
        const Kept keep = draws.kept(draws.lanes(row.logical, static_cast<unsigned>(octet)));
        return gradient(p, dy, keep, below(row.visible, octet));
    }
};

template <typename T, bool aligned>
__device__ __forceinline__ void backward_wide(const SoftmaxParams<T>& p) {
    __shared__ Scratch max_scratch;
    __shared__ Scratch sum_scratch;
    __shared__ Scratch product_scratch;
    BlockTeam team;
    const Row row(p, team.row);
    const BackwardWide<T, aligned> at = {p, row, Draws<false>(p.mask)};

    Statistics statistics;
    if (p.statistics.present()) {
        statistics = saved(p, row);
    } else {
        float maximum = masked();
        for (unsigned long long octet = team.rank; 8 * octet < row.visible; octet += THREADS) {
            maximum = largest(at.scores(octet), maximum);
        }
        maximum = team.max(maximum, max_scratch);
        float sum = 0.0f;
        for (unsigned long long octet = team.rank; 8 * octet < row.visible; octet += THREADS) {
            Values e = at.scores(octet);
            exponentiate(e, shift_of(maximum));
            sum = total(e, sum);
        }
        statistics = {maximum, reciprocal(team.sum(sum, sum_scratch))};
    }
    float product = 0.0f;
    for (unsigned long long octet = team.rank; 8 * octet < row.visible; octet += THREADS) {
        Values z = at.scores(octet);
        probabilities(z, statistics);
        product = total_product(z, at.gradients(octet), product);
    }
    product = team.sum(product, product_scratch);
    for (unsigned long long octet = team.rank; 8 * octet < p.cols; octet += THREADS) {
        const unsigned visible = below(row.visible, octet);
        Octet<T> dx = {};
        if (visible > 0) {
            Values z = at.scores(octet);
            probabilities(z, statistics);
            dx = score_gradient<T>(z, at.gradients(octet), p.scale, product, visible);
        }
        p.out.template cached<aligned>(row.first + 8 * octet, below(p.cols, octet), dx);
    }
}

FD_KERNEL(softmax_dropout_forward_warp_f32, SoftmaxParams<float>, THREADS,
          forward<float, WarpTeam, true>)
FD_KERNEL(softmax_dropout_forward_warp_f16, SoftmaxParams<f16>, THREADS,
          forward<f16, WarpTeam, true>)
FD_KERNEL(softmax_dropout_forward_warp_bf16, SoftmaxParams<bf16>, THREADS,
          forward<bf16, WarpTeam, true>)
FD_KERNEL(softmax_dropout_forward_block_f32, SoftmaxParams<float>, THREADS,
          forward<float, BlockTeam, true>)
FD_KERNEL(softmax_dropout_forward_block_f16, SoftmaxParams<f16>, THREADS,
          forward<f16, BlockTeam, true>)
FD_KERNEL(softmax_dropout_forward_block_bf16, SoftmaxParams<bf16>, THREADS,
          forward<bf16, BlockTeam, true>)
FD_KERNEL(softmax_dropout_forward_wide_f32, SoftmaxParams<float>, THREADS,
          forward_wide<float, true>)
FD_KERNEL(softmax_dropout_forward_wide_f16, SoftmaxParams<f16>, THREADS, forward_wide<f16, true>)
FD_KERNEL(softmax_dropout_forward_wide_bf16, SoftmaxParams<bf16>, THREADS, forward_wide<bf16, true>)
FD_KERNEL(softmax_dropout_forward_warp_any_f32, SoftmaxParams<float>, THREADS,
          forward<float, WarpTeam, false>)
FD_KERNEL(softmax_dropout_forward_warp_any_f16, SoftmaxParams<f16>, THREADS,
          forward<f16, WarpTeam, false>)
FD_KERNEL(softmax_dropout_forward_warp_any_bf16, SoftmaxParams<bf16>, THREADS,
          forward<bf16, WarpTeam, false>)
FD_KERNEL(softmax_dropout_forward_block_any_f32, SoftmaxParams<float>, THREADS,
          forward<float, BlockTeam, false>)
FD_KERNEL(softmax_dropout_forward_block_any_f16, SoftmaxParams<f16>, THREADS,
          forward<f16, BlockTeam, false>)
FD_KERNEL(softmax_dropout_forward_block_any_bf16, SoftmaxParams<bf16>, THREADS,
          forward<bf16, BlockTeam, false>)
FD_KERNEL(softmax_dropout_forward_wide_any_f32, SoftmaxParams<float>, THREADS,
          forward_wide<float, false>)
FD_KERNEL(softmax_dropout_forward_wide_any_f16, SoftmaxParams<f16>, THREADS,
          forward_wide<f16, false>)
FD_KERNEL(softmax_dropout_forward_wide_any_bf16, SoftmaxParams<bf16>, THREADS,
          forward_wide<bf16, false>)
FD_KERNEL(softmax_dropout_backward_warp_f32, SoftmaxParams<float>, THREADS,
          backward<float, WarpTeam, true>)
FD_KERNEL(softmax_dropout_backward_warp_f16, SoftmaxParams<f16>, THREADS,
          backward<f16, WarpTeam, true>)
FD_KERNEL(softmax_dropout_backward_warp_bf16, SoftmaxParams<bf16>, THREADS,
          backward<bf16, WarpTeam, true>)
FD_KERNEL(softmax_dropout_backward_block_f32, SoftmaxParams<float>, THREADS,
          backward<float, BlockTeam, true>)
FD_KERNEL(softmax_dropout_backward_block_f16, SoftmaxParams<f16>, THREADS,
          backward<f16, BlockTeam, true>)
FD_KERNEL(softmax_dropout_backward_block_bf16, SoftmaxParams<bf16>, THREADS,
          backward<bf16, BlockTeam, true>)
FD_KERNEL(softmax_dropout_backward_wide_f32, SoftmaxParams<float>, THREADS,
          backward_wide<float, true>)
FD_KERNEL(softmax_dropout_backward_wide_f16, SoftmaxParams<f16>, THREADS, backward_wide<f16, true>)
FD_KERNEL(softmax_dropout_backward_wide_bf16, SoftmaxParams<bf16>, THREADS,
          backward_wide<bf16, true>)
FD_KERNEL(softmax_dropout_backward_warp_any_f32, SoftmaxParams<float>, THREADS,
          backward<float, WarpTeam, false>)
FD_KERNEL(softmax_dropout_backward_warp_any_f16, SoftmaxParams<f16>, THREADS,
          backward<f16, WarpTeam, false>)
FD_KERNEL(softmax_dropout_backward_warp_any_bf16, SoftmaxParams<bf16>, THREADS,
          backward<bf16, WarpTeam, false>)
FD_KERNEL(softmax_dropout_backward_block_any_f32, SoftmaxParams<float>, THREADS,
          backward<float, BlockTeam, false>)
FD_KERNEL(softmax_dropout_backward_block_any_f16, SoftmaxParams<f16>, THREADS,
          backward<f16, BlockTeam, false>)
FD_KERNEL(softmax_dropout_backward_block_any_bf16, SoftmaxParams<bf16>, THREADS,
          backward<bf16, BlockTeam, false>)
FD_KERNEL(softmax_dropout_backward_wide_any_f32, SoftmaxParams<float>, THREADS,
          backward_wide<float, false>)
FD_KERNEL(softmax_dropout_backward_wide_any_f16, SoftmaxParams<f16>, THREADS,
          backward_wide<f16, false>)
FD_KERNEL(softmax_dropout_backward_wide_any_bf16, SoftmaxParams<bf16>, THREADS,
          backward_wide<bf16, false>)
