// softmax_dropout: y = D(softmax(scale * x + mask)) along each row, and its gradient.
//
// With z = scale * x + mask over the visible columns, m = max z, e = exp(z - m), S = sum e:
//
//     forward:  y = kept ? (e / S) * dropout scale : +0,   statistics = (m, 1 / S)
//     backward: P = e / S, with m and 1 / S from the statistics where they are given; g = kept ? dy * dropout scale : 0
//               dx = scale * P * (g - sum P g)
//
// The visible columns of a row are its first ones: as many as the causal limit and the row's length
// allow. A column beyond them has y = dx = +0; octets that lie wholly beyond are neither loaded nor drawn.
// An additive mask of -infinity masks one by one. A row whose z are all -infinity gives zeros and the
// statistics (-infinity, 0). Where P is 0, dx is +0 and dy is not looked at.
//
// m and 1 / S are kept apart: their log-sum-exp m + ln S, rounded to f32, would lose ln S where |m| is large.
//
// The exponential is 2^(z log2 e - fl(m log2 e)): one fma, and one instruction of the multi-function unit. At z = m
// that is 2^t with a t near 0. The factor 2^t is common to a row: P does without it, the statistics are freed of
// it. Where |m| is so large that t would not be near 0, z - m takes the place of z. A scale that is a power of two is
// multiplied into log2 e and m instead of x: the same bits, and a multiplication an element less.
//
// With these e, h = kept ? e * dy : 0 and c = 1 / S, the gradient is
//
//     dx = (h - e * (c sum h)) * (scale * dropout scale * c)
//
// A row where c sum h is not finite is computed again from P and P dy, without its columns of P = 0.
//
// Bytes an element: forward one read, one written (4 in 16-bit storage); backward two read, one written
// (6). The row stays in registers between its passes where team.cuh has a shape for it; otherwise each pass
// reads the row again (L2 answers while it fits).
//
// A `masked` kernel is for a causal limit, lengths, an additive mask, or octets that are not whole. It tests which
// octets are visible, and in the last one of them which columns.
//
// Errors: z is one rounding, fma(x, scale, mask); the exponent one, and that of log2 e; exp2_fast is within 2 ulp; S is
// a tree of f32 sums of 8 * octets + 8 terms' depth at most; 1 / S is within 2 ulp; each product one rounding.
// In place: y may be x; dx may be dy. Each element is read and written by one thread.

#include "special.cuh"
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
    float multiplier;  // of x; z is what comes out, times `unit`
    float unit;        // a power of two; 1 where there is an additive mask
    Divisor queries;
    Divisor heads;
};
static_assert(sizeof(SoftmaxParams<float>) == 328, "softmax_dropout.rs: Params");

/// Minus infinity: the z of a column that is not visible.
__device__ __forceinline__ float minus_infinity() { return bits_as<float>(0xff800000u); }

/// The largest |m| with which z log2 e - m log2 e is computed as it is: t is within 2^-2.
constexpr float NEAR = 1 << 20;

/// How e follows from what is held of a row: from v = z / unit, or far from 0 from v = z - m.
struct Exponent {
    float shift;  // m
    float slope;
    float after;
    float t;
    bool near;

    /// Of a row with this m. Where it is -infinity there is nothing to shift (z is -infinity or NaN everywhere, and the
    /// exponential of either is right as it is).
    __device__ __forceinline__ Exponent(float maximum, float unit) {
        shift = maximum == minus_infinity() ? 0.0f : maximum;
        near = fabsf(shift) <= NEAR;
        slope = near ? __fmul_rn(unit, LOG2_E) : LOG2_E;
        after = near ? __fmul_rn(shift, LOG2_E) : 0.0f;
        t = near ? __fmaf_rn(shift, LOG2_E, -after) : 0.0f;
    }

    __device__ __forceinline__ void exponentiate(Values& v) const {
#pragma unroll
        for (int j = 0; j < 8; ++j) v.at[j] = exp2_fast(__fmaf_rn(v.at[j], slope, -after));
    }

    /// z - m in place of z / unit.
    __device__ __forceinline__ void bring_near(Values& v, float unit) const {
#pragma unroll
        for (int j = 0; j < 8; ++j) v.at[j] = __fsub_rn(__fmul_rn(v.at[j], unit), shift);
    }
};

/// 1 / S of a row, S at least 2^-2, within 2 ulp; 0 for a row without a visible column. A NaN stays one.
__device__ __forceinline__ float inverse_of(float sum) {
    return sum == 0.0f ? 0.0f : reciprocal_fast(sum);
}

/// A row's softmax, beside the e.
struct Softmax {
    float maximum;  // m
    Exponent exponent;
    float inverse;  // 1 over the sum of the e as they are

    /// 1 / S, as it is saved.
    __device__ __forceinline__ float reciprocal() const {
        return __fmul_rn(inverse, exp2_fast(exponent.t));
    }
    /// From a saved 1 / S.
    static __device__ __forceinline__ Softmax with(float maximum, const Exponent& exponent,
                                                   float reciprocal) {
        return {maximum, exponent, __fmul_rn(reciprocal, exp2_fast(-exponent.t))};
    }
};

/// The sum of an octet's values and `sum`.
__device__ __forceinline__ float total(const Values& values, float sum) {
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = __fadd_rn(sum, values.at[j]);
    return sum;
}

/// An octet's e, and h: P dy where it is kept, before both are divided by S.
struct Products {
    Values e;
    Values h;
};

/// One row, as its team has it. What is held is z / unit, then e; where nothing is held both are computed again in each
/// pass.
template <typename T, typename Walk, bool masked>
struct ScoreRow {
    static_assert(masked || Walk::aligned, "octets that are not whole have columns that are not visible");
    using Scratch = typename Walk::Scratch;

    // A row that is held has fewer than 2^32 columns.
    using Column = std::conditional_t<Walk::held, unsigned, unsigned long long>;

    const SoftmaxParams<T>& p;
    const Walk walk;
    const unsigned local;  // local row
    Column visible;        // columns
    const In<T> x;         // the matrices, from where the thread begins in the row
    const In<T> dy;
    In<T> additive;        // may be absent
    const Out<T> out;
    Values held[Walk::SLOTS];

    __device__ __forceinline__ ScoreRow(const SoftmaxParams<T>& p, typename Walk::Team team)
        : p(p),
          walk{team, p.cols},
          local(p.mask.rows.offset + team.row),
          x(p.x.from(local * p.x.stride + walk.start())),
          dy(p.dy.from(local * p.dy.stride + walk.start())),
          out(p.out.from(local * p.out.stride + walk.start())) {
        if (!masked) return;
        const unsigned head = p.queries.quotient(local);
        const unsigned query = local - head * p.queries.divisor;
        additive = p.additive;
        if (additive.present()) {
            const unsigned long long row = 1ull * p.heads.quotient(head) * p.queries.divisor + query;
            additive = additive.from(row * p.cols + walk.start());
        }
        const long long limit = query + p.causal + 1;
        visible = limit <= 0 ? 0 : static_cast<Column>(min(static_cast<unsigned long long>(limit), p.cols));
        if (p.lengths.present()) visible = min(visible, static_cast<Column>(p.lengths.cached(local)));
    }

    /// Whether an octet has a visible column.
    __device__ __forceinline__ bool sees(Index octet) const {
        return !masked || Column(8) * octet.sum() < visible;
    }

    /// Calls `each(slot, octet, count)` for the octets with visible columns, `count` of whose elements exist.
    template <typename Each>
    __device__ __forceinline__ void each_visible(Each each) const {
        walk.each([&](unsigned slot, Index octet, unsigned count) {
            if (sees(octet)) each(slot, octet, count);
        });
    }

    /// The same, where the row is not held or not masked. A masked row that is held has -infinity in the octets that are not
    /// visible: for all of them, without asking.
    template <typename Each>
    __device__ __forceinline__ void each_held(Each each) const {
        if constexpr (masked && Walk::held) {
#pragma unroll
            for (unsigned slot = 0; slot < Walk::SLOTS; ++slot) {
                each(slot, Index{walk.team.rank, slot * Walk::Team::SIZE}, 8u);
            }
        } else {
            each_visible(each);
        }
    }

    /// An octet of x or dy.
    __device__ __forceinline__ Octet<T> load(const In<T>& row, Index octet, unsigned count) const {
        return row.template streaming<Walk::aligned>(walk.from_start(octet), count);
    }

    /// An octet of the additive mask, which the other heads read again.
    __device__ __forceinline__ Octet<T> load_additive(Index octet, unsigned count) const {
        return additive.template cached<Walk::aligned>(walk.from_start(octet), count);
    }

    /// Whether x is multiplied by something before it is z / unit, or has something added.
    __device__ __forceinline__ bool changes() const {
        return p.multiplier != 1.0f || (masked && additive.present());
    }

    /// z / unit in place of x, all of whose columns are taken to be visible.
    __device__ __forceinline__ void change(Values& x, const Octet<T>& added) const {
        if (masked && additive.present()) {
            const Values values = unpack(added);
#pragma unroll
            for (int j = 0; j < 8; ++j) x.at[j] = __fmaf_rn(x.at[j], p.multiplier, values.at[j]);
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) x.at[j] = __fmul_rn(x.at[j], p.multiplier);
        }
    }

    /// Puts `value` where a column is not visible: in the last octet of those that are seen, where not all of it is.
    __device__ __forceinline__ void hide(Values& values, Index octet, float value) const {
        const Column first = Column(8) * octet.sum();
        if (masked && first + 8 > visible) {
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) {
                if (first + j >= visible) values.at[j] = value;
            }
        }
    }

    /// z / unit of an octet, read again.
    __device__ __forceinline__ Values reread(Index octet, unsigned count) const {
        Octet<T> added = {};
        if (masked && additive.present()) added = load_additive(octet, count);
        Values z = unpack(load(x, octet, count));
        if (changes()) change(z, added);
        hide(z, octet, minus_infinity());
        return z;
    }

    /// Loads what is held. `beside(slot, octet, count)` loads what is held beside it. What is the same for all octets is
    /// asked once.
    template <typename Beside>
    __device__ __forceinline__ void load(Beside beside) {
        if (!Walk::held) return;
        Octet<T> loaded[Walk::SLOTS];
        Octet<T> added[Walk::SLOTS];
        each_visible([&](unsigned slot, Index octet, unsigned count) {
            loaded[slot] = load(x, octet, count);
            beside(slot, octet, count);
        });
        if (masked && additive.present()) {
            each_visible([&](unsigned slot, Index octet, unsigned count) {
                added[slot] = load_additive(octet, count);
            });
        }
        __syncwarp();  // keeps the loads first; all threads are here
        each_visible([&](unsigned slot, Index, unsigned) { held[slot] = unpack(loaded[slot]); });
        if (changes()) {
            each_visible([&](unsigned slot, Index, unsigned) { change(held[slot], added[slot]); });
        }
        if (!masked) return;
        each_held([&](unsigned slot, Index octet, unsigned) {
            hide(held[slot], octet, minus_infinity());
        });
    }

    /// Makes e of what is held.
    __device__ __forceinline__ void exponentiate(const Exponent& exponent) {
        if (!Walk::held) return;
        if (!exponent.near) {
            each_held([&](unsigned slot, Index, unsigned) {
                exponent.bring_near(held[slot], p.unit);
            });
        }
        each_held([&](unsigned slot, Index, unsigned) { exponent.exponentiate(held[slot]); });
    }

    /// e of an octet, when what is held is e.
    __device__ __forceinline__ Values e(unsigned slot, Index octet, unsigned count,
                                        const Exponent& exponent) const {
        if (Walk::held) return held[slot];
        Values z = reread(octet, count);
        if (!exponent.near) exponent.bring_near(z, p.unit);
        exponent.exponentiate(z);
        return z;
    }

    /// The softmax of the row; what is held is e afterwards.
    __device__ __forceinline__ Softmax softmax(Scratch& max_scratch, Scratch& sum_scratch) {
        float maximum = minus_infinity();
        each_held([&](unsigned slot, Index octet, unsigned count) {
            const Values z = Walk::held ? held[slot] : reread(octet, count);
#pragma unroll
            for (int j = 0; j < 8; ++j) maximum = fmaxf(maximum, z.at[j]);
        });
        maximum = __fmul_rn(walk.team.max(maximum, max_scratch), p.unit);
        const Exponent exponent(maximum, p.unit);
        exponentiate(exponent);
        float sum = 0.0f;
        each_held([&](unsigned slot, Index octet, unsigned count) {
            sum = total(e(slot, octet, count, exponent), sum);
        });
        return {maximum, exponent, inverse_of(walk.team.sum(sum, sum_scratch))};
    }

    /// Writes the statistics, where they are asked for.
    __device__ __forceinline__ void save(const Softmax& softmax) const {
        if (walk.team.rank != 0 || !p.statistics_out.present()) return;
        p.statistics_out.cached(2ull * local, softmax.maximum);
        p.statistics_out.cached(2ull * local + 1, softmax.reciprocal());
    }

    /// The softmax with saved statistics; what is held is e afterwards.
    __device__ __forceinline__ Softmax saved(float maximum, float reciprocal) {
        const Exponent exponent(maximum, p.unit);
        exponentiate(exponent);
        return Softmax::with(maximum, exponent, reciprocal);
    }

    /// Writes the row: `get(slot, octet, count)` of octets with visible columns, +0 in the others.
    template <typename Get>
    __device__ __forceinline__ void write(Get get) const {
        walk.each([&](unsigned slot, Index octet, unsigned count) {
            Octet<T> values = {};
            if (sees(octet)) values = pack<T>(get(slot, octet, count));
            out.template cached<Walk::aligned>(walk.from_start(octet), count, values);
        });
    }
};

/// The lanes of a row's octets. Those of a row that is held and not masked are drawn together (`Walk::draw`). Otherwise an
/// octet's are drawn when they are asked for: of a masked row only where it is visible.
template <typename Walk, bool masked, typename Draws>
struct RowLanes {
    static constexpr bool together = Walk::held && !masked;

    const Draws& draws;
    unsigned logical;
    Lanes drawn[Walk::SLOTS];

    __device__ __forceinline__ RowLanes(const Walk& walk, const Draws& draws)
        : draws(draws), logical(draws.logical(walk.team.row)) {
        if constexpr (together) walk.draw(draws, drawn);
    }

    __device__ __forceinline__ Kept kept(unsigned slot, Index octet) const {
        return draws.kept(together ? drawn[slot] : draws.lanes(logical, octet.sum()));
    }
};

template <bool masked, typename Walk, typename Draws>
__device__ __forceinline__ RowLanes<Walk, masked, Draws> lanes_of(const Walk& walk, const Draws& draws) {
    return {walk, draws};
}

template <typename T, typename Walk, bool masked>
__device__ __forceinline__ void forward(const SoftmaxParams<T>& p) {
    __shared__ typename Walk::Scratch max_scratch;
    __shared__ typename Walk::Scratch sum_scratch;
    const typename Walk::Team team;
    if (team.row >= p.rows) return;  // the whole team
    ScoreRow<T, Walk, masked> row(p, team);
    row.load([](unsigned, Index, unsigned) {});
    const Softmax softmax = row.softmax(max_scratch, sum_scratch);
    row.save(softmax);

    const bool is_nan = softmax.inverse != softmax.inverse;  // what is not visible is +0 all the same
    with_draws(p.mask, [&](const auto& draws) {
        const auto lanes = lanes_of<masked>(row.walk, draws);
        const float factor = __fmul_rn(softmax.inverse, draws.odds.scale);
        row.write([&](unsigned slot, Index octet, unsigned count) {
            const Kept keep = lanes.kept(slot, octet);
            const Values e = row.e(slot, octet, count, softmax.exponent);
            Values y = {};
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                if (keep.at[j]) y.at[j] = __fmul_rn(e.at[j], factor);
            }
            if (is_nan) row.hide(y, octet, 0.0f);
            return y;
        });
    });
}

/// (h - e * mean) * factor. Adding +0 makes a -0 of e = 0 a +0.
__device__ __forceinline__ Values centred(const Products& products, float mean, float factor) {
    Values dx;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float difference = __fmaf_rn(-products.e.at[j], mean, products.h.at[j]);
        dx.at[j] = __fmaf_rn(difference, factor, 0.0f);
    }
    return dx;
}

/// h of an octet.
template <typename T>
__device__ __forceinline__ Values h_of(const Kept& keep, const Values& e, const Octet<T>& dy) {
    const Values values = unpack(dy);
    Values h = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (keep.at[j]) h.at[j] = __fmul_rn(e.at[j], values.at[j]);
    }
    return h;
}

/// P and P dy from e and h. A column of P = 0 takes no part, whatever its dy.
__device__ __forceinline__ Products normalised(const Products& products, float inverse) {
    Products out = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        out.e.at[j] = __fmul_rn(products.e.at[j], inverse);
        if (products.e.at[j] != 0.0f) out.h.at[j] = __fmul_rn(products.h.at[j], inverse);
    }
    return out;
}

/// Writes dx of a row where c sum h is not finite; `products(slot, octet, count)` are e and h of an octet.
template <typename Row, typename Get>
__device__ __forceinline__ void write_from_probabilities(const Row& row, typename Row::Scratch& scratch,
                                                         float inverse, float factor, Get products) {
    float sum = 0.0f;
    row.each_visible([&](unsigned slot, Index octet, unsigned count) {
        sum = total(normalised(products(slot, octet, count), inverse).h, sum);
    });
    sum = row.walk.team.sum(sum, scratch);
    row.write([&](unsigned slot, Index octet, unsigned count) {
        const Products own = normalised(products(slot, octet, count), inverse);
        Values dx = centred(own, sum, factor);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (own.e.at[j] == 0.0f) dx.at[j] = 0.0f;
        }
        row.hide(dx, octet, 0.0f);
        return dx;
    });
}

template <typename T, typename Walk, bool masked>
__device__ __forceinline__ void backward(const SoftmaxParams<T>& p) {
    __shared__ typename Walk::Scratch max_scratch;
    __shared__ typename Walk::Scratch sum_scratch;
    __shared__ typename Walk::Scratch product_scratch;
    const typename Walk::Team team;
    if (team.row >= p.rows) return;  // the whole team
    ScoreRow<T, Walk, masked> row(p, team);
    float maximum = 0.0f;
    float reciprocal = 0.0f;
    if (p.statistics.present()) {
        maximum = p.statistics.cached(2ull * row.local);
        reciprocal = p.statistics.cached(2ull * row.local + 1);
    }
    Octet<T> dy[Walk::SLOTS];
    row.load([&](unsigned slot, Index octet, unsigned count) {
        dy[slot] = row.load(row.dy, octet, count);
    });
    const auto computed = [&]() {
        const Softmax softmax = row.softmax(max_scratch, sum_scratch);
        // The same bits as from saved statistics.
        return Softmax::with(softmax.maximum, softmax.exponent, softmax.reciprocal());
    };
    const Softmax softmax =
        p.statistics.present() ? row.saved(maximum, reciprocal) : computed();

    Values held_h[Walk::SLOTS];
    float sum = 0.0f;
    if constexpr (Walk::held) {
        with_draws(p.mask, [&](const auto& draws) {
            const auto lanes = lanes_of<masked>(row.walk, draws);
            row.each_visible([&](unsigned slot, Index octet, unsigned) {
                held_h[slot] = h_of(lanes.kept(slot, octet), row.held[slot], dy[slot]);
                sum = total(held_h[slot], sum);
            });
        });
    }
    const auto products = [&](unsigned slot, Index octet, unsigned count) -> Products {
        if constexpr (Walk::held) {
            return {row.held[slot], held_h[slot]};
        } else {
            const MaskReader<false> draws(p.mask);
            const Kept keep = lanes_of<masked>(row.walk, draws).kept(slot, octet);
            const Octet<T> dy = row.load(row.dy, octet, count);
            const Values e = row.e(slot, octet, count, softmax.exponent);
            return {e, h_of(keep, e, dy)};
        }
    };
    if (!Walk::held) {
        row.each_visible([&](unsigned slot, Index octet, unsigned count) {
            sum = total(products(slot, octet, count).h, sum);
        });
    }
    sum = team.sum(sum, product_scratch);

    const float factor = __fmul_rn(p.scale, odds_of(p.mask).scale);
    const float mean = __fmul_rn(sum, softmax.inverse);
    const bool usual = fabsf(mean) <= bits_as<float>(0x7f7fffffu);  // the same for the whole team
    if (usual) {
        const float scaled = __fmul_rn(factor, softmax.inverse);
        row.write([&](unsigned slot, Index octet, unsigned count) {
            return centred(products(slot, octet, count), mean, scaled);
        });
        return;
    }
    write_from_probabilities(row, sum_scratch, softmax.inverse, factor, products);
}

/// The kernels of a shape; `.._threads`: what a multiprocessor must have registers for, where ptxas otherwise spills for no
/// reason.
#define FD_SOFTMAX_PASSES(shape, Walk, masked, T, type, forward_threads, backward_threads)          \
    FD_KERNEL_BLOCKS(softmax_dropout_forward_##shape##_##type, SoftmaxParams<T>, Walk::BLOCK,       \
                     blocks_for(forward_threads, Walk::BLOCK), forward<T, Walk, masked>)            \
    FD_KERNEL_BLOCKS(softmax_dropout_backward_##shape##_##type, SoftmaxParams<T>, Walk::BLOCK,      \
                     blocks_for(backward_threads, Walk::BLOCK), backward<T, Walk, masked>)
#define FD_SOFTMAX(shape, Walk, T, type)                                                            \
    FD_SOFTMAX_PASSES(shape, Walk, false, T, type, sizeof(T) == 2 ? FD_SOFTMAX_FORWARD_THREADS : 0, \
                      sizeof(T) == 2 ? FD_SOFTMAX_BACKWARD_THREADS : 0)                             \
    FD_SOFTMAX_PASSES(masked_##shape, Walk, true, T, type,                                          \
                      sizeof(T) == 2 && Walk::BLOCK == 128 ? FD_SOFTMAX_MASKED_FORWARD_THREADS : 512, \
                      sizeof(T) == 2 ? FD_SOFTMAX_MASKED_BACKWARD_THREADS : 512)
#define FD_SOFTMAX_UNALIGNED(shape, Walk, T, type)                                                  \
    FD_SOFTMAX_PASSES(shape, Walk, true, T, type, 512, 512)

FD_ROW_SHAPES(FD_SOFTMAX)
FD_UNALIGNED_ROW_SHAPES(FD_SOFTMAX_UNALIGNED)
