// Normalisation of a row that a team shares (team.cuh); src/ops/norm.rs has the mathematics.
//
//     xhat = ((s - pivot) - delta) * rstd,  y = xhat * weight + bias
//
// The mean is pivot + delta: one f32 has no room for the digits of a mean of 1e4 that a deviation of 1e-2
// asks for; two have, and s - pivot is exact where s and the pivot are near each other.
//
// The pivot is a mean of m of the row's n columns, those of the team's first octets, where all of its threads have one. The mean
// of any m of n values is within sqrt(n / m - 1) deviations of that of all: here within sqrt(3), so the variance, which is mean
// d^2 - delta^2, loses two bits at most. m is a power of two, and the sum of so many equal values is exact: a row of one value
// has a deviation of 0. Where a thread may lack an octet, the pivot is the mean of the whole row, by a sum of distances from its
// first value.
//
// A row whose squares are out of f32's range, or whose sums are, is computed again from the row times a power of two.
//
// Every function with a `Walk` wants all threads of its team, and `get(slot, octet, count)` gives an octet
// of the row as f32 `Values`: from registers, or by reading it again.

#pragma once

#include "special.cuh"
#include "team.cuh"

/// A normalisation, as the host describes it.
struct RowNorm {
    float share;  // 1 over the columns of a row: what a value counts for in a mean
    float epsilon;
    unsigned layer;  // 1: LayerNorm; 0: RMSNorm
};
static_assert(sizeof(RowNorm) == 12, "abi.rs: RowNorm");

/// Shared memory of the collectives of one row, in turns.
template <typename Walk>
struct NormScratch {
    typename Walk::Scratch first;
    typename Walk::Scratch second;
    typename Walk::Scratch moments[2];
    typename Walk::Scratch sums[3];
};

/// How a row is standardised.
struct Standard {
    float pivot;
    float rstd;
    float shift;  // -delta * rstd

    __device__ __forceinline__ float centred(float s) const { return __fsub_rn(s, pivot); }
    /// xhat, but for the shift.
    __device__ __forceinline__ float scaled(float s) const { return __fmul_rn(centred(s), rstd); }
    /// xhat from s - pivot.
    __device__ __forceinline__ float xhat(float centred) const {
        return __fmaf_rn(centred, rstd, shift);
    }
};

/// Mean and variance of a row: the mean is pivot + delta.
struct Moments {
    float pivot;
    float delta;
    float variance;
};

/// The sum of an octet, as a tree.
__device__ __forceinline__ float tree_sum(const Values& s) {
    float sums[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[j] = __fadd_rn(s.at[2 * j], s.at[2 * j + 1]);
    return __fadd_rn(__fadd_rn(sums[0], sums[1]), __fadd_rn(sums[2], sums[3]));
}

/// The pivot of a row of values `get`.
template <typename Walk, typename Get>
__device__ __forceinline__ float pivot_of(const RowNorm& norm, const Walk& walk,
                                          NormScratch<Walk>& scratch, Get get) {
    if (Walk::SURE > 0) {
        const float sum = tree_sum(get(0u, Index{walk.team.rank, 0}, 8u));
        return __fmul_rn(walk.team.sum(sum, scratch.first), 1.0f / (8 * Walk::Team::SIZE));
    }
    float first = 0.0f;
    if (walk.team.rank == 0 && walk.cols > 0) {
        first = get(0u, Index{0, 0}, below(walk.cols, 0ull)).at[0];
    }
    first = walk.team.first(first, scratch.first);
    float distance = 0.0f;
    walk.each([&](unsigned slot, Index octet, unsigned count) {
        const Values s = get(slot, octet, count);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            if (!Walk::aligned && j >= count) continue;
            distance = __fmaf_rn(__fsub_rn(s.at[j], first), norm.share, distance);
        }
    });
    return __fadd_rn(first, walk.team.sum(distance, scratch.second));
}

/// s - pivot of an octet.
__device__ __forceinline__ Values less(const Values& s, float pivot) {
    Values d;
#pragma unroll
    for (int j = 0; j < 8; ++j) d.at[j] = __fsub_rn(s.at[j], pivot);
    return d;
}

/// The moments of a row of values `get`. Leaves s - pivot in `centred` where the walk holds.
template <typename Walk, typename Get>
__device__ __forceinline__ Moments moments_of(const RowNorm& norm, const Walk& walk,
                                              NormScratch<Walk>& scratch, Get get,
                                              Values (&centred)[Walk::SLOTS]) {
    Moments row = {};
    if (norm.layer) row.pivot = pivot_of(norm, walk, scratch, get);
    // Of d = s - pivot: delta is its mean, and the variance is what its mean square has beyond delta's.
    float sums[2] = {};
    walk.each([&](unsigned slot, Index octet, unsigned count) {
        const Values d = less(get(slot, octet, count), row.pivot);
        if (Walk::held) centred[slot] = d;
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            if (!Walk::aligned && j >= count) continue;
            sums[0] = __fmaf_rn(d.at[j], norm.share, sums[0]);
            sums[1] = __fmaf_rn(d.at[j], d.at[j], sums[1]);
        }
    });
    walk.team.sums(sums, scratch.moments);
    if (norm.layer) row.delta = sums[0];
    row.variance = __fmaf_rn(-row.delta, row.delta, __fmul_rn(sums[1], norm.share));
    if (row.variance < 0.0f) row.variance = 0.0f;
    return row;
}

/// A row's mean, and how it is standardised.
struct Normal {
    float mean;
    Standard standard;
};

/// Of a row of any magnitude: from the row times a power of two that brings it, or the root of epsilon, near
/// 1. rstd is at most the largest f32.
template <typename Walk, typename Get>
__device__ __forceinline__ Normal scaled_normal_of(const RowNorm& norm, const Walk& walk,
                                                   NormScratch<Walk>& scratch, Get get,
                                                   Values (&centred)[Walk::SLOTS]) {
    float largest = __fsqrt_rn(norm.epsilon);
    walk.each([&](unsigned slot, Index octet, unsigned count) {
        const Values s = get(slot, octet, count);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            if (Walk::aligned || j < count) largest = fmaxf(largest, fabsf(s.at[j]));
        }
    });
    unsigned exponent = bits_as<unsigned>(walk.team.max(largest, scratch.second)) >> 23;
    // The ends of the range, where a power or its reciprocal is no normal number, take their neighbour's.
    exponent = min(max(exponent, 1u), 253u);
    const float power = bits_as<float>((254u - exponent) << 23);  // 2^(127 - exponent)
    const auto times_power = [&](unsigned slot, Index octet, unsigned count) {
        Values s = get(slot, octet, count);
#pragma unroll
        for (int j = 0; j < 8; ++j) s.at[j] = __fmul_rn(s.at[j], power);
        return s;
    };
    const Moments row = moments_of(norm, walk, scratch, times_power, centred);
    const float epsilon = __fmul_rn(__fmul_rn(norm.epsilon, power), power);
    const float variance = __fadd_rn(row.variance, epsilon);
    const float rstd = variance == 0.0f ? 0.0f : __fdiv_rn(power, __fsqrt_rn(variance));
    const float most = bits_as<float>(0x7f7fffffu);
    const float limited = rstd > most ? most : rstd;
    const float back = __fdiv_rn(1.0f, power);
    const float pivot = __fmul_rn(row.pivot, back);
    const float delta = __fmul_rn(row.delta, back);
    walk.each([&](unsigned slot, Index octet, unsigned count) {
        if (Walk::held) centred[slot] = less(get(slot, octet, count), pivot);
    });
    return {__fadd_rn(pivot, delta), {pivot, limited, -__fmul_rn(delta, limited)}};
}

/// A variance in this range lost nothing to squares out of f32's own: 2^-90 and the largest number.
constexpr unsigned LEAST_VARIANCE = 0x12800000u;
constexpr unsigned MOST_VARIANCE = 0x7f7fffffu;

/// Of a row of values `get`. Leaves s - pivot in `centred` where the walk holds.
template <typename Walk, typename Get>
__device__ __forceinline__ Normal normal_of(const RowNorm& norm, const Walk& walk,
                                            NormScratch<Walk>& scratch, Get get,
                                            Values (&centred)[Walk::SLOTS]) {
    const Moments row = moments_of(norm, walk, scratch, get, centred);
    const float variance = __fadd_rn(row.variance, norm.epsilon);
    const bool usual =
        variance >= bits_as<float>(LEAST_VARIANCE) && variance <= bits_as<float>(MOST_VARIANCE);
    // The same for all threads of the team.
    if (!usual) return scaled_normal_of(norm, walk, scratch, get, centred);
    const float rstd = rsqrt_fast(variance);
    return {__fadd_rn(row.pivot, row.delta), {row.pivot, rstd, -__fmul_rn(row.delta, rstd)}};
}

/// y of an octet, from s - pivot; `bias` is zeros where there is none.
__device__ __forceinline__ Values normalised(const Standard& row, const Values& centred,
                                             const Values& weight, const Values& bias) {
    Values y;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        y.at[j] = __fmaf_rn(row.xhat(centred.at[j]), weight.at[j], bias.at[j]);
    }
    return y;
}

/// How the gradient g = dy * weight of a row's xhat becomes that of the row.
struct NormGradient {
    Standard standard;
    float centre;  // mean of g; 0 for RMSNorm
    float slope;   // mean of g * xhat

    /// rstd * (g - centre - xhat * slope), added to `ds`.
    __device__ __forceinline__ float add_to(float ds, float s, float g) const {
        const float offset = __fmaf_rn(-standard.shift, slope, -centre);  // the same for a row
        const float rest = __fmaf_rn(standard.scaled(s), -slope, offset);
        return __fmaf_rn(standard.rstd, __fadd_rn(g, rest), ds);
    }
};

/// A row's s, and the gradient of its xhat.
struct NormPair {
    Values s;
    Values g;
};

/// Of a row, from the mean and rstd that were saved; `get` gives its octets as `NormPair`. The saved mean is a rounded
/// one: what it lacks is computed again.
template <typename Walk, typename Get>
__device__ __forceinline__ NormGradient norm_gradient(const RowNorm& norm, const Walk& walk,
                                                      float mean, float rstd,
                                                      NormScratch<Walk>& scratch, Get get) {
    const Standard saved = {mean, rstd, 0.0f};
    float sums[3] = {};
    walk.each([&](unsigned slot, Index octet, unsigned count) {
        const NormPair pair = get(slot, octet, count);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            if (!Walk::aligned && j >= count) continue;
            const float x = saved.scaled(pair.s.at[j]);
            sums[0] = __fadd_rn(sums[0], x);
            sums[1] = __fadd_rn(sums[1], pair.g.at[j]);
            sums[2] = __fmaf_rn(x, pair.g.at[j], sums[2]);
        }
    });
    walk.team.sums(sums, scratch.sums);
    const float shift = norm.layer ? __fmul_rn(-sums[0], norm.share) : 0.0f;
    const float centre = norm.layer ? __fmul_rn(sums[1], norm.share) : 0.0f;
    return {{mean, rstd, shift}, centre, __fmaf_rn(shift, centre, __fmul_rn(sums[2], norm.share))};
}
