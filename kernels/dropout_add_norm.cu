// dropout_add_norm: s = residual + D(x + bias), y = norm(s), LayerNorm or RMSNorm, and its gradients.
//
// Forward, with x' = x, or x + bias rounded to f32, and T the storage type:
//
//     s    = kept ? round_T(fma(x', scale, residual)) : residual
//     xhat = (s - mean) * rstd,  rstd = 1 / sqrt(mean((s - mean)^2) + epsilon);  RMSNorm: mean = 0
//     y    = xhat * weight + norm_bias
//
// The mean is kept in two parts (norm.cuh), so that a deviation far below it keeps its digits.
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
//     with sums     the same in one pass, of 2048 rows and more that are whole octets, of at most 2048 columns
//                   (1024 of f32): a block has 64 rows, and what they add to the sums in registers. A 64th of
//                   an f32 for each sum.
//                   Otherwise: backward without outputs, which leaves three means a row (s and dy read: 4);
//                   then tiles of 64 rows and 32 columns do the rest (10 with ds): 14.
//                   sum_rows.cu adds up the levels of the tree (src/ops/sum_rows.rs) above the tiles.
//
// A row computed from its inputs reads x and residual in place of s: 2 more each time.
//
// The shapes of the row kernels are those of team.cuh; in a wide one each pass reads and computes the row again.
//
// In place: s may be the residual, and y may be x or the residual where s is not asked for: each element is
// read and written by one thread. The outputs of backward are no input of it.

#include "norm.cuh"
#include "sum_tile.cuh"

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
    Out<float> means_out;  // [rows, 3]: -delta * rstd, E[g], E[g * xhat]
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

/// One row's s, an octet at a time. `computed`: x is there in every call.
template <typename T, bool aligned, bool computed>
struct SumRow {
    const SumOf<T>& of;
    const Mask& mask;
    unsigned row;    // of the launch
    unsigned local;  // local row

    __device__ __forceinline__ SumRow(const SumOf<T>& of, const Mask& mask, unsigned row)
        : of(of), mask(mask), row(row), local(mask.rows.offset + row) {}

    /// Whether s is computed from x, and not read.
    __device__ __forceinline__ bool computes() const { return computed || of.x.present(); }

    /// The row's part of a matrix from octet `octet.base` on: all octets of a thread are at a fixed distance from it.
    template <typename Matrix>
    __device__ __forceinline__ auto place(const Matrix& matrix, Index octet) const {
        return matrix.from(local * matrix.stride + 8ull * octet.base);
    }

    __device__ __forceinline__ Octet<T> load(const InMatrix<T>& matrix, Index octet,
                                             unsigned count) const {
        return place(matrix, octet).template streaming<aligned>(8 * octet.ahead, count);
    }

    __device__ __forceinline__ void store(const OutMatrix<T>& matrix, Index octet, unsigned count,
                                          const Octet<T>& values) const {
        place(matrix, octet).template cached<aligned>(8 * octet.ahead, count, values);
    }

    /// An octet of a value a column.
    __device__ __forceinline__ Octet<T> parameter(const In<T>& values, Index octet,
                                                  unsigned count) const {
        const In<T> place = values.from(8ull * octet.base);
        return place.template cached<aligned>(8 * octet.ahead, count);
    }

    __device__ __forceinline__ Terms<T> load_terms(Index octet, unsigned count) const {
        Terms<T> terms = {};
        terms.residual = load(of.residual, octet, count);
        if (computes()) terms.x = load(of.x, octet, count);
        return terms;
    }

    /// The terms of the octets that a thread holds: one question for all of them.
    template <typename Walk>
    __device__ __forceinline__ void load_terms(const Walk& walk, Terms<T> (&terms)[Walk::SLOTS]) const {
        walk.each([&](unsigned slot, Index octet, unsigned count) {
            terms[slot].residual = load(of.residual, octet, count);
        });
        if (!computes()) return;
        walk.each([&](unsigned slot, Index octet, unsigned count) {
            terms[slot].x = load(of.x, octet, count);
        });
    }

    /// x + bias.
    __device__ __forceinline__ void add_bias(Values& x, Index octet, unsigned count) const {
        const Values bias = unpack(parameter(of.bias, octet, count));
#pragma unroll
        for (int j = 0; j < 8; ++j) x.at[j] = __fadd_rn(x.at[j], bias.at[j]);
    }

    /// s from x + bias and the residual, rounded to T.
    template <typename Draws>
    __device__ __forceinline__ Octet<T> sum(const Draws& draws, const Lanes& lanes, const Values& x,
                                            const Octet<T>& residual) const {
        const Kept keep = draws.kept(lanes);
        Values s = unpack(residual);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (keep.at[j]) s.at[j] = __fmaf_rn(x.at[j], draws.odds.scale, s.at[j]);
        }
        return pack<T>(s);
    }

    /// s of an octet that is not held.
    __device__ __forceinline__ Octet<T> sum(Index octet, unsigned count, const Terms<T>& terms) const {
        if (!computes()) return terms.residual;
        Values x = unpack(terms.x);
        if (of.bias.present()) add_bias(x, octet, count);
        const MaskReader<false> draws(mask);
        return sum(draws, draws.lanes(draws.logical(row), octet.sum()), x, terms.residual);
    }

    /// s of the octets that a thread holds. What is the same for all of them is asked once.
    template <typename Walk>
    __device__ __forceinline__ void sums(const Walk& walk, const Terms<T> (&terms)[Walk::SLOTS],
                                         Octet<T> (&s)[Walk::SLOTS]) const {
        if (!computes()) {
            walk.each([&](unsigned slot, Index, unsigned) { s[slot] = terms[slot].residual; });
            return;
        }
        Values x[Walk::SLOTS];
        walk.each([&](unsigned slot, Index, unsigned) { x[slot] = unpack(terms[slot].x); });
        if (of.bias.present()) {
            walk.each([&](unsigned slot, Index octet, unsigned count) {
                add_bias(x[slot], octet, count);
            });
        }
        with_draws(mask, [&](const auto& draws) {
            Lanes lanes[Walk::SLOTS];
            walk.draw(draws, lanes);
            walk.each([&](unsigned slot, Index, unsigned) {
                s[slot] = sum(draws, lanes[slot], x[slot], terms[slot].residual);
            });
        });
    }
};

template <typename T, typename Walk>
__device__ __forceinline__ void norm_forward(const NormForwardParams<T>& p) {
    __shared__ NormScratch<Walk> scratch;
    const Walk walk = {{}, p.cols};
    if (walk.team.row >= p.rows) return;  // the whole team
    const SumRow<T, Walk::aligned, true> row(p.sum, p.mask, walk.team.row);

    Octet<T> held[Walk::SLOTS];
    if constexpr (Walk::held) {
        Terms<T> terms[Walk::SLOTS];
        row.load_terms(walk, terms);
        __syncwarp();  // keeps the loads first; all threads are here
        row.sums(walk, terms, held);
    }
    const auto stored = [&](unsigned slot, Index octet, unsigned count) -> Octet<T> {
        if constexpr (Walk::held) {
            return held[slot];
        } else {
            return row.sum(octet, count, row.load_terms(octet, count));
        }
    };
    const auto s_of = [&](unsigned slot, Index octet, unsigned count) {
        return unpack(stored(slot, octet, count));
    };

    // On their way while the row is summed.
    Octet<T> weights[Walk::SLOTS];
    Octet<T> biases[Walk::SLOTS];
    if constexpr (Walk::held) {
        walk.each([&](unsigned slot, Index octet, unsigned count) {
            weights[slot] = row.parameter(p.weight, octet, count);
        });
        if (p.norm_bias.present()) {
            walk.each([&](unsigned slot, Index octet, unsigned count) {
                biases[slot] = row.parameter(p.norm_bias, octet, count);
            });
        }
    }
    Values centred[Walk::SLOTS];
    const Normal normal = normal_of(p.norm, walk, scratch, s_of, centred);
    if (walk.team.rank == 0 && p.stats.present()) {
        p.stats.cached(2ull * row.local, normal.mean);
        p.stats.cached(2ull * row.local + 1, normal.standard.rstd);
    }
    if (Walk::held && p.s.present()) {
        walk.each([&](unsigned slot, Index octet, unsigned count) {
            row.store(p.s, octet, count, held[slot]);
        });
    }
    // Asked once: two walks, neither of which asks.
    const auto write = [&](auto biased) {
        walk.each([&](unsigned slot, Index octet, unsigned count) {
            const Octet<T> s = stored(slot, octet, count);
            const float pivot = normal.standard.pivot;
            const Values d = Walk::held ? centred[slot] : less(unpack(s), pivot);
            if (!Walk::held) weights[slot] = row.parameter(p.weight, octet, count);
            if (!Walk::held && biased.value) biases[slot] = row.parameter(p.norm_bias, octet, count);
            Values bias = {};
            if (biased.value) bias = unpack(biases[slot]);
            // Behind all reads of the octet, of which s or y may be in place.
            if (!Walk::held && p.s.present()) row.store(p.s, octet, count, s);
            const Values y = normalised(normal.standard, d, unpack(weights[slot]), bias);
            row.store(p.y, octet, count, pack<T>(y));
        });
    };
    if (p.norm_bias.present()) {
        write(std::true_type{});
    } else {
        write(std::false_type{});
    }
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
    SumRow<T, aligned, false> sum;

    __device__ __forceinline__ GradientRow(const NormBackwardParams<T>& p, unsigned row)
        : p(p), sum(p.sum, p.mask, row) {}

    __device__ __forceinline__ PairTerms<T> load(Index octet, unsigned count) const {
        return {sum.load_terms(octet, count), sum.load(p.dy, octet, count)};
    }

    __device__ __forceinline__ Octet<T> load_ds(Index octet, unsigned count) const {
        if (!p.ds.present()) return {};
        return sum.load(p.ds, octet, count);
    }

    __device__ __forceinline__ NormPair pair(Index octet, unsigned count, const Octet<T>& s,
                                             const Octet<T>& dy) const {
        NormPair pair = {unpack(s), unpack(dy)};
        const Values weight = unpack(sum.parameter(p.weight, octet, count));
#pragma unroll
        for (int j = 0; j < 8; ++j) pair.g.at[j] = __fmul_rn(pair.g.at[j], weight.at[j]);
        return pair;
    }

    /// The pair of an octet that is not held.
    __device__ __forceinline__ NormPair pair(Index octet, unsigned count,
                                             const PairTerms<T>& terms) const {
        return pair(octet, count, sum.sum(octet, count, terms.s), terms.dy);
    }

    /// Writes dresidual and dx of an octet, and returns what is kept of dresidual before its rounding.
    template <typename Draws>
    __device__ __forceinline__ Values write(const Draws& draws, const Lanes& lanes, Index octet,
                                            unsigned count, const NormGradient& gradient,
                                            const NormPair& pair, const Octet<T>& ds) const {
        const Kept keep = draws.kept(lanes);
        Values t = unpack(ds);
        Values kept = {};
        Values dx;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            t.at[j] = gradient.add_to(t.at[j], pair.s.at[j], pair.g.at[j]);
            if (keep.at[j]) kept.at[j] = t.at[j];
            // +0 times the scale, which is finite, is +0.
            dx.at[j] = __fmul_rn(kept.at[j], draws.odds.scale);
        }
        sum.store(p.dresidual, octet, count, pack<T>(t));
        sum.store(p.dx, octet, count, pack<T>(dx));
        return kept;
    }
};

template <typename T, typename Walk>
__device__ __forceinline__ void norm_backward(const NormBackwardParams<T>& p) {
    __shared__ NormScratch<Walk> scratch;
    const Walk walk = {{}, p.cols};
    if (walk.team.row >= p.rows) return;  // the whole team
    const GradientRow<T, Walk::aligned> row(p, walk.team.row);
    const unsigned long long local = row.sum.local;
    const float mean = p.stats.cached(2 * local);
    const float rstd = p.stats.cached(2 * local + 1);

    NormPair held[Walk::SLOTS];
    Octet<T> ds[Walk::SLOTS];
    if constexpr (Walk::held) {
        Terms<T> terms[Walk::SLOTS];
        Octet<T> dy[Walk::SLOTS];
        row.sum.load_terms(walk, terms);
        walk.each([&](unsigned slot, Index octet, unsigned count) {
            dy[slot] = row.sum.load(p.dy, octet, count);
            ds[slot] = {};
        });
        if (p.ds.present()) {
            walk.each([&](unsigned slot, Index octet, unsigned count) {
                ds[slot] = row.sum.load(p.ds, octet, count);
            });
        }
        __syncwarp();  // keeps the loads first; all threads are here
        Octet<T> s[Walk::SLOTS];
        row.sum.sums(walk, terms, s);
        walk.each([&](unsigned slot, Index octet, unsigned count) {
            held[slot] = row.pair(octet, count, s[slot], dy[slot]);
        });
    }
    const auto pair_of = [&](unsigned slot, Index octet, unsigned count) -> NormPair {
        if constexpr (Walk::held) {
            return held[slot];
        } else {
            return row.pair(octet, count, row.load(octet, count));
        }
    };

    const NormGradient gradient = norm_gradient(p.norm, walk, mean, rstd, scratch, pair_of);
    if (!p.dresidual.present()) {
        if (walk.team.rank != 0) return;
        p.means_out.cached(3 * local, gradient.standard.shift);
        p.means_out.cached(3 * local + 1, gradient.centre);
        p.means_out.cached(3 * local + 2, gradient.slope);
        return;
    }
    if constexpr (Walk::held) {
        with_draws(p.mask, [&](const auto& draws) {
            Lanes lanes[Walk::SLOTS];
            walk.draw(draws, lanes);
            walk.each([&](unsigned slot, Index octet, unsigned count) {
                row.write(draws, lanes[slot], octet, count, gradient, held[slot], ds[slot]);
            });
        });
    } else {
        const MaskReader<false> draws(p.mask);
        const unsigned logical = draws.logical(walk.team.row);
        walk.each([&](unsigned slot, Index octet, unsigned count) {
            const Lanes lanes = draws.lanes(logical, octet.sum());
            const NormPair pair = pair_of(slot, octet, count);
            row.write(draws, lanes, octet, count, gradient, pair, row.load_ds(octet, count));
        });
    }
}

/// What a run adds to the sums, an octet of columns a slot.
template <unsigned SLOTS>
struct RunSums {
    Values dbias[SLOTS];
    Values dweight[SLOTS];
    Values dnorm_bias[SLOTS];
};

/// An element's term of dweight: dy * xhat.
__device__ __forceinline__ float weight_term(const Standard& standard, float s, float dy) {
    return __fmul_rn(dy, standard.xhat(standard.centred(s)));
}

/// Adds the terms of an octet of a row: what is kept of dresidual, dy * xhat, and dy. In one loop: three spill.
template <unsigned SLOTS>
__device__ __forceinline__ void add_terms(RunSums<SLOTS>& sums, unsigned slot, const Standard& standard, const Values& kept,
                                          const Values& s, const Values& dy) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float dweight = weight_term(standard, s.at[j], dy.at[j]);
        sums.dbias[slot].at[j] = __fadd_rn(sums.dbias[slot].at[j], kept.at[j]);
        sums.dweight[slot].at[j] = __fadd_rn(sums.dweight[slot].at[j], dweight);
        sums.dnorm_bias[slot].at[j] = __fadd_rn(sums.dnorm_bias[slot].at[j], dy.at[j]);
    }
}

/// Adds up the sums of a block's runs in order. All of its threads must be here.
template <typename Walk>
__device__ __forceinline__ void write_sums(const Walk& walk, const Values (&of_run)[Walk::SLOTS], const Out<float>& sums,
                                           float factor) {
    __shared__ float runs[TILE_RUNS][8 * Walk::SLOTS * Walk::Team::SIZE];
    if (!sums.present()) return;  // the whole block
    __syncthreads();  // nobody reads the last sums any more
    walk.each([&](unsigned slot, Index octet, unsigned) {
#pragma unroll
        for (int j = 0; j < 8; ++j) runs[walk.team.team][8 * octet.sum() + j] = of_run[slot].at[j];
    });
    __syncthreads();
    for (unsigned column = threadIdx.x; column < walk.cols; column += Walk::BLOCK) {
        float sum = runs[0][column];
#pragma unroll
        for (unsigned run = 1; run < TILE_RUNS; ++run) sum = __fadd_rn(sum, runs[run][column]);
        sums.cached(blockIdx.x * walk.cols + column, __fmul_rn(sum, factor));
    }
}

/// dresidual and dx of 64 rows, and the first levels of the sums over them. A team takes its 16 rows one after the other.
/// The row and the sums stay in registers.
template <typename T, typename Walk>
__device__ __forceinline__ void norm_sums(const NormBackwardParams<T>& p) {
    __shared__ NormScratch<Walk> scratch[2];  // in turns: a barrier a row
    Walk walk = {{}, p.cols};
    const unsigned first = blockIdx.x * TILE_ROWS;
    RunSums<Walk::SLOTS> sums = {};
#pragma unroll 1
    for (unsigned i = 0; i < RUN_ROWS && first + i < p.rows; ++i) {
        // A team without a row still takes part in what all teams do, with a row that exists.
        const unsigned own = first + walk.team.team * RUN_ROWS + i;
        walk.team.row = min(own, p.rows - 1);
        const GradientRow<T, true> row(p, walk.team.row);
        const float mean = p.stats.cached(2ull * row.sum.local);
        const float rstd = p.stats.cached(2ull * row.sum.local + 1);
        Octet<T> s[Walk::SLOTS];
        Octet<T> dy[Walk::SLOTS];
        Octet<T> ds[Walk::SLOTS] = {};
        walk.each([&](unsigned slot, Index octet, unsigned count) {
            s[slot] = row.sum.load(p.sum.residual, octet, count);
            dy[slot] = row.sum.load(p.dy, octet, count);
        });
        if (p.ds.present()) {
            walk.each([&](unsigned slot, Index octet, unsigned count) {
                ds[slot] = row.sum.load(p.ds, octet, count);
            });
        }
        if (row.sum.computes()) {
            walk.each([&](unsigned slot, Index octet, unsigned count) {
                s[slot] = row.sum.sum(octet, count, {row.sum.load(p.sum.x, octet, count), s[slot]});
            });
        }
        __syncwarp();  // keeps the loads first; all threads are here
        const auto pair_of = [&](unsigned slot, Index octet, unsigned count) {
            return row.pair(octet, count, s[slot], dy[slot]);
        };
        const NormGradient gradient = norm_gradient(p.norm, walk, mean, rstd, scratch[i % 2], pair_of);
        if (own >= p.rows) continue;
        with_draws(p.mask, [&](const auto& draws) {
            const unsigned logical = draws.logical(walk.team.row);
            walk.each([&](unsigned slot, Index octet, unsigned count) {
                const NormPair pair = pair_of(slot, octet, count);
                const Values kept = row.write(draws, draws.lanes(logical, octet.sum()), octet, count, gradient, pair, ds[slot]);
                add_terms(sums, slot, gradient.standard, kept, pair.s, unpack(dy[slot]));
            });
        });
    }
    write_sums(walk, sums.dbias, p.sums[0], p.factor.get());
    write_sums(walk, sums.dweight, p.sums[1], 1.0f);
    write_sums(walk, sums.dnorm_bias, p.sums[2], 1.0f);
}

/// A tile of rows that are not in registers: four octets of columns, so that a thread has one of them and a row of the tile
/// is whole 32-byte sectors.
constexpr unsigned NORM_TILE_OCTETS = 4;
constexpr unsigned NORM_TILE_COLS = 8 * NORM_TILE_OCTETS;
static_assert(TILE_ROWS * NORM_TILE_OCTETS == THREADS, "a thread has an octet of a tile");

/// dresidual and dx of a tile, and the first levels of the sums over its rows. The terms go through shared
/// memory to the threads that add them up row by row, a column of one sum each.
template <typename T, bool aligned>
__device__ __forceinline__ void norm_tile(const NormBackwardParams<T>& p) {
    __shared__ Values terms[3][THREADS];
    const unsigned tile_row = p.tiles_a_row.quotient(blockIdx.x);
    const unsigned tile_col = p.tiles_a_row.remainder(blockIdx.x, tile_row);
    const unsigned row = tile_row * TILE_ROWS + threadIdx.x / NORM_TILE_OCTETS;
    const Index octet = {tile_col * NORM_TILE_OCTETS + threadIdx.x % NORM_TILE_OCTETS, 0};
    const unsigned count = row < p.rows ? below(p.cols, 1ull * octet.base) : 0;
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
        const Standard standard = {p.stats.cached(2ull * row), p.stats.cached(2ull * row + 1),
                                   p.means.cached(3ull * row)};
        const NormGradient gradient = {standard, p.means.cached(3ull * row + 1),
                                       p.means.cached(3ull * row + 2)};
        const NormPair pair = of.pair(octet, count, loaded);
        const MaskReader<false> draws(p.mask);
        const Lanes lanes = draws.lanes(draws.logical(of.sum.row), octet.base);
        dbias = of.write(draws, lanes, octet, count, gradient, pair, ds);
        dnorm_bias = unpack(loaded.dy);
#pragma unroll
        for (int j = 0; j < 8; ++j) dweight.at[j] = weight_term(standard, pair.s.at[j], dnorm_bias.at[j]);
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
    for (unsigned first = 0; first < TILE_ROWS; first += RUN_ROWS) {
        float of_run = 0.0f;
#pragma unroll
        for (unsigned r = first; r < first + RUN_ROWS; ++r) {
            of_run = __fadd_rn(of_run, terms[which][r * NORM_TILE_OCTETS + column / 8].at[column % 8]);
        }
        sum = __fadd_rn(sum, of_run);
    }
    if (which == 0) sum = __fmul_rn(sum, p.factor.get());
    p.sums[which].cached(tile_row * p.cols + target, sum);
}

#define FD_NORM_PASSES(shape, Walk, T, type, forward_threads, backward_threads)                    \
    FD_KERNEL_BLOCKS(dropout_add_norm_forward_##shape##_##type, NormForwardParams<T>, Walk::BLOCK, \
                     blocks_for(forward_threads, Walk::BLOCK), norm_forward<T, Walk>)              \
    FD_KERNEL_BLOCKS(dropout_add_norm_backward_##shape##_##type, NormBackwardParams<T>, Walk::BLOCK, \
                     blocks_for(backward_threads, Walk::BLOCK), norm_backward<T, Walk>)
#define FD_NORM(shape, Walk, T, type)                                                  \
    FD_NORM_PASSES(shape, Walk, T, type, sizeof(T) == 2 ? FD_NORM_FORWARD_THREADS : 0, \
                   sizeof(T) == 2 ? FD_NORM_BACKWARD_THREADS : 0)
#define FD_NORM_UNALIGNED(shape, Walk, T, type) \
    FD_NORM_PASSES(shape, Walk, T, type, sizeof(T) == 2 ? 512 : 256, 256)

/// Shapes of the teams that sum over rows, four of which are a block: threads and octets a thread (`one_pass` in
/// src/device/dropout_add_norm.rs). A thread has 24 sums an octet, and 4 loads of a row on their way, or 6 with ds, in 16-bit storage.
using Sum32x2 = Walk<PartTeam<32, TILE_RUNS>, 2, 0, true>;
using Sum64x2 = Walk<PartTeam<64, TILE_RUNS>, 2, 1, true>;
using Sum128x2 = Walk<PartTeam<128, TILE_RUNS>, 2, 1, true>;
#define FD_NORM_SUMS(shape, Walk, T, type)                                                       \
    FD_KERNEL_BLOCKS(dropout_add_norm_sums_##shape##_##type, NormBackwardParams<T>, Walk::BLOCK, \
                     blocks_for(sizeof(T) == 2 ? FD_NORM_SUMS_THREADS : 256, Walk::BLOCK), norm_sums<T, Walk>)
FD_NORM_SUMS(32x2, Sum32x2, float, f32)
FD_NORM_SUMS(32x2, Sum32x2, f16, f16)
FD_NORM_SUMS(32x2, Sum32x2, bf16, bf16)
FD_NORM_SUMS(64x2, Sum64x2, float, f32)
FD_NORM_SUMS(64x2, Sum64x2, f16, f16)
FD_NORM_SUMS(64x2, Sum64x2, bf16, bf16)
FD_NORM_SUMS(128x2, Sum128x2, f16, f16)
FD_NORM_SUMS(128x2, Sum128x2, bf16, bf16)

FD_ROW_SHAPES(FD_NORM)
FD_UNALIGNED_ROW_SHAPES(FD_NORM_UNALIGNED)
FD_KERNEL(dropout_add_norm_tile_f32, NormBackwardParams<float>, THREADS, norm_tile<float, true>)
FD_KERNEL(dropout_add_norm_tile_f16, NormBackwardParams<f16>, THREADS, norm_tile<f16, true>)
FD_KERNEL(dropout_add_norm_tile_bf16, NormBackwardParams<bf16>, THREADS, norm_tile<bf16, true>)
FD_KERNEL(dropout_add_norm_tile_unaligned_f32, NormBackwardParams<float>, THREADS, norm_tile<float, false>)
FD_KERNEL(dropout_add_norm_tile_unaligned_f16, NormBackwardParams<f16>, THREADS, norm_tile<f16, false>)
FD_KERNEL(dropout_add_norm_tile_unaligned_bf16, NormBackwardParams<bf16>, THREADS, norm_tile<bf16, false>)
