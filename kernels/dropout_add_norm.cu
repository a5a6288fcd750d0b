// dropout_add_norm: s = residual + D(x + bias), y = norm(s), LayerNorm or RMSNorm, and its gradients.
//
// Forward, with x' = x, or x + bias rounded to f32, and T the storage type:
//
//     s    = kept ? round_T(fma(x', scale, residual)) : residual
//     xhat = (s - mean) * rstd,  rstd = 1 / sqrt(mean((s - mean)^2) + epsilon);  RMSNorm: mean = 0
//     y    = xhat * weight + norm_bias
//
// The mean is of s less the row's first value, and kept in two parts (norm.cuh), so that a deviation far
// below the mean keeps its digits.
//
// Backward, with g = dy * weight and E the mean of a row (RMSNorm: without E[g]):
//
//     t = ds + rstd * (g - E[g] - xhat * E[g * xhat]),  dresidual = t,  dx = kept ? t * scale : +0
//     dweight = sum of dy * xhat,  dnorm_bias = sum of dy,  dbias = scale * sum of kept t, over the rows
//
// s is read where it was kept, and otherwise computed again from x, bias and residual.
//
// Bytes an element in 16-bit storage, beside a few f32 a row, and bias, weight and norm_bias from L2 or L1:
//
//     forward       two read, one or two written: 8 with s, 6 without
//     backward      s and dy read, ds too where there is one, two written: 10 with ds. The row in registers.
//     with sums     backward without outputs, which leaves three means a row (s and dy read: 4); then tiles of
//                   64 rows and 32 columns do the rest (10 with ds): 14, and a 64th of an f32 for each sum.
//                   sum_rows.cu adds up the levels of the tree (src/ops/sum_rows.rs) above the first.
//
// A row computed from its inputs reads x and residual in place of s: 2 more each time.
//
// The forms of the row kernels are those of softmax_dropout.cu: warp (up to 1024 columns), block (up to
// 8192), wide (each pass reads and computes the row again).
//
// In place: s may be the residual, and y may be x or the residual where s is not asked for: each element is
// read and written by one thread. The outputs of backward are no input of it.

#include "norm.cuh"

/// Where s comes from.
template <typename T>
struct SumOf {
    InMatrix<T> x;  // absent: `residual` is s itself
    In<T> bias;     // may be absent
    InMatrix<T> residual;
};

template <typename T>
struct NormForwardParams {
    Mask mask;
    SumOf<T> sum;
    In<T> weight;
    In<T> norm_bias;   // may be absent
    OutMatrix<T> s;    // may be absent
    OutMatrix<T> y;
    Out<float> stats;  // [rows, 2]: mean, rstd; may be absent
    unsigned long long cols;
    RowNorm norm;
    unsigned rows;  // of this launch, from local row mask.rows.offset on
};
static_assert(sizeof(NormForwardParams<float>) == 312, "dropout_add_norm.rs: ForwardParams");

template <typename T>
struct NormBackwardParams {
    Mask mask;
    SumOf<T> sum;
    In<T> weight;
    In<float> stats;
    InMatrix<T> dy;
    InMatrix<T> ds;  // may be absent
    OutMatrix<T> dresidual;  // absent: only `means` is asked for
    OutMatrix<T> dx;
    Out<float> means_out;  // [rows, 3]: delta, E[g], E[g * xhat]
    In<float> means;       // the same, for the tiles
    Out<float> sums[3];    // [tiles of rows, cols]: dbias, dweight, dnorm_bias; each may be absent
    Factor factor;         // of dbias: the scale where a tile holds all rows, otherwise 1
    unsigned long long cols;
    RowNorm norm;
    unsigned rows;  // of this launch, from local row mask.rows.offset on
    IndexDivisor tiles_a_row;  // ceil(cols / 32)
    unsigned padding;
};
static_assert(sizeof(NormBackwardParams<float>) == 408, "dropout_add_norm.rs: BackwardParams");

/// What an octet of s is before it is computed.
template <typename T>
struct Terms {
    Octet<T> x;
    Octet<T> residual;
};

/// One row's s, an octet at a time.
template <typename T, bool aligned>
struct SumRow {
    const SumOf<T>& of;
    const Mask& mask;
    unsigned logical;
    unsigned local;

    __device__ __forceinline__ SumRow(const SumOf<T>& of, const Mask& mask, unsigned row)
        : of(of),
          mask(mask),
          logical(MaskReader<false>(mask).logical(row)),
          local(mask.rows.offset + row) {}

    /// An octet's first element in a matrix whose rows begin `stride` elements apart.
    __device__ __forceinline__ unsigned long long element(unsigned long long stride,
                                                          unsigned octet) const {
        return local * stride + 8ull * octet;
    }

    __device__ __forceinline__ Terms<T> load(unsigned octet, unsigned count) const {
        Terms<T> terms = {};
        terms.residual =
            of.residual.template streaming<aligned>(element(of.residual.stride, octet), count);
        if (of.x.present()) {
            terms.x = of.x.template streaming<aligned>(element(of.x.stride, octet), count);
        }
        return terms;
    }

    /// s, as it is stored.
    __device__ __forceinline__ Values sum(unsigned octet, unsigned count, const Terms<T>& terms) const {
        if (!of.x.present()) return unpack(terms.residual);
        Values x = unpack(terms.x);
        if (of.bias.present()) {
            const Values bias = unpack(of.bias.template cached<aligned>(8ull * octet, count));
#pragma unroll
            for (int j = 0; j < 8; ++j) x.at[j] = __fadd_rn(x.at[j], bias.at[j]);
        }
        const MaskReader<false> draws(mask);  // read late: it is not held beside the row
        const Kept keep = draws.kept(draws.lanes(logical, octet));
        Values s = unpack(terms.residual);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (keep.at[j]) s.at[j] = __fmaf_rn(x.at[j], draws.odds.scale, s.at[j]);
        }
        return unpack(pack<T>(s));
    }
};

template <typename T, typename Walk>
__device__ __forceinline__ void norm_forward(const NormForwardParams<T>& p) {
    constexpr bool aligned = Walk::aligned;
    __shared__ NormScratch scratch;
    const Walk walk = {{}, p.cols};
    if (walk.team.row >= p.rows) return;  // the whole team
    const SumRow<T, aligned> row(p.sum, p.mask, walk.team.row);

    Values held[Walk::SLOTS];
    if (Walk::held) {
        Terms<T> terms[Walk::SLOTS];
        walk.each([&](unsigned slot, unsigned octet, unsigned count) {
            terms[slot] = row.load(octet, count);
        });
        __syncwarp();  // keeps the loads first; all threads are here
        walk.each([&](unsigned slot, unsigned octet, unsigned count) {
            held[slot] = row.sum(octet, count, terms[slot]);
        });
    }
    const auto s_of = [&](unsigned slot, unsigned octet, unsigned count) -> Values {
        return Walk::held ? held[slot] : row.sum(octet, count, row.load(octet, count));
    };

    const Standard standard = standard_of(p.norm, walk, scratch, s_of);
    if (walk.team.rank == 0 && p.stats.present()) {
        const unsigned long long local = p.mask.rows.offset + walk.team.row;
        p.stats.cached(2 * local, standard.mean());
        p.stats.cached(2 * local + 1, standard.rstd);
    }
    walk.each([&](unsigned slot, unsigned octet, unsigned count) {
        const Values s = s_of(slot, octet, count);
        const Values weight = unpack(p.weight.template cached<aligned>(8ull * octet, count));
        Values bias = {};
        if (p.norm_bias.present()) {
            bias = unpack(p.norm_bias.template cached<aligned>(8ull * octet, count));
        }
        if (p.s.present()) {
            p.s.template cached<aligned>(row.element(p.s.stride, octet), count, pack<T>(s));
        }
        p.y.template cached<aligned>(row.element(p.y.stride, octet), count,
                                     pack<T>(normalised(standard, s, weight, bias)));
    });
}

/// What an octet of a row and the gradient of its xhat come from.
template <typename T>
struct PairTerms {
    Terms<T> s;
    Octet<T> dy;
};

/// One row's s and gradients, an octet at a time.
template <typename T, bool aligned>
struct GradientRow {
    const NormBackwardParams<T>& p;
    SumRow<T, aligned> sum;

    __device__ __forceinline__ GradientRow(const NormBackwardParams<T>& p, unsigned row)
        : p(p), sum(p.sum, p.mask, row) {}

    __device__ __forceinline__ PairTerms<T> load(unsigned octet, unsigned count) const {
        const unsigned long long element = sum.element(p.dy.stride, octet);
        return {sum.load(octet, count), p.dy.template streaming<aligned>(element, count)};
    }

    __device__ __forceinline__ Octet<T> load_ds(unsigned octet, unsigned count) const {
        if (!p.ds.present()) return {};
        return p.ds.template streaming<aligned>(sum.element(p.ds.stride, octet), count);
    }

    __device__ __forceinline__ NormPair pair(unsigned octet, unsigned count,
                                             const PairTerms<T>& terms) const {
        NormPair pair = {sum.sum(octet, count, terms.s), unpack(terms.dy)};
        const Values weight = unpack(p.weight.template cached<aligned>(8ull * octet, count));
#pragma unroll
        for (int j = 0; j < 8; ++j) pair.g.at[j] = __fmul_rn(pair.g.at[j], weight.at[j]);
        return pair;
    }

    /// Writes dresidual and dx of an octet, and returns what is kept of dresidual before its rounding.
    __device__ __forceinline__ Values write(unsigned octet, unsigned count, const Standard& standard,
                                            const NormGradient& gradient, const NormPair& pair,
                                            const Octet<T>& ds) const {
        const MaskReader<false> draws(p.mask);
        const Kept keep = draws.kept(draws.lanes(sum.logical, octet));
        Values t = unpack(ds);
        Values kept = {};
        Values dx;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float xhat = standard.apply(pair.s.at[j]);
            t.at[j] = __fadd_rn(t.at[j], gradient.apply(standard, xhat, pair.g.at[j]));
            if (keep.at[j]) kept.at[j] = t.at[j];
            // +0 times the scale, which is finite, is +0.
            dx.at[j] = __fmul_rn(kept.at[j], draws.odds.scale);
        }
        p.dresidual.template cached<aligned>(sum.element(p.dresidual.stride, octet), count, pack<T>(t));
        p.dx.template cached<aligned>(sum.element(p.dx.stride, octet), count, pack<T>(dx));
        return kept;
    }
};

template <typename T, typename Walk>
__device__ __forceinline__ void norm_backward(const NormBackwardParams<T>& p) {
    __shared__ NormScratch scratch;
    const Walk walk = {{}, p.cols};
    if (walk.team.row >= p.rows) return;  // the whole team
    const GradientRow<T, Walk::aligned> row(p, walk.team.row);
    const unsigned long long local = p.mask.rows.offset + walk.team.row;

    NormPair held[Walk::SLOTS];
    Octet<T> ds[Walk::SLOTS];
    if (Walk::held) {
        PairTerms<T> terms[Walk::SLOTS];
        walk.each([&](unsigned slot, unsigned octet, unsigned count) {
            terms[slot] = row.load(octet, count);
            ds[slot] = row.load_ds(octet, count);
        });
        __syncwarp();  // keeps the loads first; all threads are here
        walk.each([&](unsigned slot, unsigned octet, unsigned count) {
            held[slot] = row.pair(octet, count, terms[slot]);
        });
    }
    const auto pair_of = [&](unsigned slot, unsigned octet, unsigned count) -> NormPair {
        return Walk::held ? held[slot] : row.pair(octet, count, row.load(octet, count));
    };
    const auto s_of = [&](unsigned slot, unsigned octet, unsigned count) -> Values {
        if (Walk::held) return held[slot].s;
        return row.sum.sum(octet, count, row.sum.load(octet, count));
    };

    const Standard standard =
        standard_saved(p.norm, walk, p.stats.cached(2 * local), p.stats.cached(2 * local + 1),
                       scratch.first, s_of);
    const NormGradient gradient = norm_gradient(p.norm, walk, standard, scratch, pair_of);
    if (!p.dresidual.present()) {
        if (walk.team.rank != 0) return;
        p.means_out.cached(3 * local, standard.delta);
        p.means_out.cached(3 * local + 1, gradient.centre);
        p.means_out.cached(3 * local + 2, gradient.slope);
        return;
    }
    walk.each([&](unsigned slot, unsigned octet, unsigned count) {
        const Octet<T> from_ds = Walk::held ? ds[slot] : row.load_ds(octet, count);
        row.write(octet, count, standard, gradient, pair_of(slot, octet, count), from_ds);
    });
}

/// A tile: rows are the radix of the sums' tree, columns four octets, so that a thread has one of them and
/// a row of the tile is whole 32-byte sectors.
constexpr unsigned NORM_TILE_ROWS = 64;
constexpr unsigned NORM_TILE_OCTETS = 4;
constexpr unsigned NORM_TILE_COLS = 8 * NORM_TILE_OCTETS;
static_assert(NORM_TILE_ROWS * NORM_TILE_OCTETS == THREADS, "a thread has an octet of a tile");

/// dresidual and dx of a tile, and the first level of the sums over its rows. The terms go through shared
/// memory to the threads that add them up row by row, a column of one sum each.
template <typename T, bool aligned>
__device__ __forceinline__ void norm_tile(const NormBackwardParams<T>& p) {
    __shared__ Values terms[3][THREADS];
    const unsigned tile_row = p.tiles_a_row.quotient(blockIdx.x);
    const unsigned tile_col = p.tiles_a_row.remainder(blockIdx.x, tile_row);
    const unsigned row = tile_row * NORM_TILE_ROWS + threadIdx.x / NORM_TILE_OCTETS;
    const unsigned octet = tile_col * NORM_TILE_OCTETS + threadIdx.x % NORM_TILE_OCTETS;
    const unsigned count = row < p.rows ? below(p.cols, octet) : 0;
    // A thread without an element still has a row that exists: its number may be read from a list.
    const GradientRow<T, aligned> of(p, min(row, p.rows - 1));

    PairTerms<T> loaded = {};
    Octet<T> ds = {};
    if (count > 0) {
        loaded = of.load(octet, count);
        ds = of.load_ds(octet, count);
    }
    __syncwarp();  // keeps the loads first; the whole block is here

    Values dbias = {};
    Values dweight = {};
    Values dnorm_bias = {};
    if (count > 0) {
        const Standard standard = {p.stats.cached(2ull * row), p.means.cached(3ull * row),
                                   p.stats.cached(2ull * row + 1)};
        const NormGradient gradient = {p.means.cached(3ull * row + 1), p.means.cached(3ull * row + 2)};
        const NormPair pair = of.pair(octet, count, loaded);
        dbias = of.write(octet, count, standard, gradient, pair, ds);
        dnorm_bias = unpack(loaded.dy);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            dweight.at[j] = __fmul_rn(dnorm_bias.at[j], standard.apply(pair.s.at[j]));
        }
    }
    terms[0][threadIdx.x] = dbias;
    terms[1][threadIdx.x] = dweight;
    terms[2][threadIdx.x] = dnorm_bias;
    __syncthreads();

    const unsigned which = threadIdx.x / NORM_TILE_COLS;
    const unsigned column = threadIdx.x % NORM_TILE_COLS;
    const unsigned long long target = 1ull * tile_col * NORM_TILE_COLS + column;
    if (which >= 3 || target >= p.cols || !p.sums[which].present()) return;
    float sum = 0.0f;
#pragma unroll 16
    for (unsigned r = 0; r < NORM_TILE_ROWS; ++r) {
        sum = __fadd_rn(sum, terms[which][r * NORM_TILE_OCTETS + column / 8].at[column % 8]);
    }
    if (which == 0) sum = __fmul_rn(sum, p.factor.get());
    p.sums[which].cached(tile_row * p.cols + target, sum);
}

/// The kernels of one storage type. Without its bound the forward pass of unaligned rows of f16 spills on sm_80.
#define FD_NORM_KERNELS(form, walk, T, type)                                                       \
    FD_KERNEL(dropout_add_norm_forward_##form##_##type, NormForwardParams<T>, THREADS,             \
              norm_forward<T, walk<true>>)                                                      \
    FD_KERNEL_BLOCKS(dropout_add_norm_forward_##form##_unaligned_##type, NormForwardParams<T>, THREADS, \
                     2, norm_forward<T, walk<false>>)                                              \
    FD_KERNEL(dropout_add_norm_backward_##form##_##type, NormBackwardParams<T>, THREADS,           \
              norm_backward<T, walk<true>>)                                                     \
    FD_KERNEL(dropout_add_norm_backward_##form##_unaligned_##type, NormBackwardParams<T>, THREADS, \
              norm_backward<T, walk<false>>)

FD_ROW_FORMS(FD_NORM_KERNELS)
FD_KERNEL(dropout_add_norm_tile_f32, NormBackwardParams<float>, THREADS, norm_tile<float, true>)
FD_KERNEL(dropout_add_norm_tile_f16, NormBackwardParams<f16>, THREADS, norm_tile<f16, true>)
FD_KERNEL(dropout_add_norm_tile_bf16, NormBackwardParams<bf16>, THREADS, norm_tile<bf16, true>)
FD_KERNEL(dropout_add_norm_tile_unaligned_f32, NormBackwardParams<float>, THREADS, norm_tile<float, false>)
FD_KERNEL(dropout_add_norm_tile_unaligned_f16, NormBackwardParams<f16>, THREADS, norm_tile<f16, false>)
FD_KERNEL(dropout_add_norm_tile_unaligned_bf16, NormBackwardParams<bf16>, THREADS, norm_tile<bf16, false>)
