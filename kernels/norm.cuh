// Normalisation of a row that a team shares (team.cuh); src/ops/norm.rs has the mathematics.
//
//     xhat = ((s - pivot) - delta) * rstd,  y = xhat * weight + bias
//
// The mean is pivot + delta: one f32 has no room for the digits of a mean of 1e4 that a deviation of 1e-2
// asks for; two have, and s - pivot is exact where s and the pivot are near each other. The pivot is the
// mean as a first sum gives it, of distances from the row's first value: what that sum lost where this value
// is far from the others, delta has again; and a row of one value has a deviation of exactly 0.
//
// A row's mean is a sum of shares, x / n: no sum of large values overflows. Squares do, and those of small values
// vanish: a variance out of range is computed again from the row times a power of two.
//
// Every function with a `Walk` wants all threads of its team, and `get(slot, octet, count)` gives an octet
// of the row as f32 `Values`: from registers, or by reading it again.

#pragma once

#include "team.cuh"

/// A normalisation, as the host describes it.
struct RowNorm {
    float columns;   // of a row, at least 1: what a mean divides by
    float epsilon;
    unsigned layer;  // 1: LayerNorm; 0: RMSNorm
};
static_assert(sizeof(RowNorm) == 12, "abi.rs: RowNorm");

/// Shared memory of the collectives of one row, in turns.
struct NormScratch {
    Scratch first;
    Scratch second;
    Scratch third;
};

/// How a row is standardised.
struct Standard {
    float pivot;
    float delta;
    float rstd;

    /// s less the mean.
    __device__ __forceinline__ float centred(float s) const {
        return __fsub_rn(__fsub_rn(s, pivot), delta);
    }
    /// xhat.
    __device__ __forceinline__ float apply(float s) const { return __fmul_rn(centred(s), rstd); }
    __device__ __forceinline__ float mean() const { return __fadd_rn(pivot, delta); }
};

/// What a value counts for in its row's mean.
__device__ __forceinline__ float share_of(const RowNorm& norm) {
    return __fdiv_rn(1.0f, norm.columns);
}

/// What `pivot` lacks of the row's mean.
template <typename Walk, typename Get>
__device__ __forceinline__ float delta_of(const RowNorm& norm, const Walk& walk, float pivot,
                                          Scratch& scratch, Get get) {
    if (!norm.layer) return 0.0f;
    return walk.mean(share_of(norm), scratch, get, [&](const Values& s, unsigned j) {
        return __fsub_rn(s.at[j], pivot);
    });
}

/// Mean and variance of a row: the mean is pivot + delta.
struct Moments {
    float pivot;
    float delta;
    float variance;
};

/// Of a row, or where `scaled` of the row times `power`.
template <bool scaled, typename Walk, typename Get>
__device__ __forceinline__ Moments moments_of(const RowNorm& norm, const Walk& walk, float power,
                                              NormScratch& scratch, Get get) {
    const auto value = [&](float s) { return scaled ? __fmul_rn(s, power) : s; };
    const float share = share_of(norm);
    Moments row = {};
    if (norm.layer) {
        float first = 0.0f;
        if (walk.team.rank == 0 && walk.cols > 0) {
            first = value(get(0u, 0u, below(walk.cols, 0)).at[0]);
        }
        first = walk.team.first(first, scratch.first);
        const float distance =
            walk.mean(share, scratch.second, get, [&](const Values& s, unsigned j) {
                return __fsub_rn(value(s.at[j]), first);
            });
        row.pivot = __fadd_rn(first, distance);
    }
    // Of d = s - pivot: delta is its mean, and the variance is what its mean square has beyond delta's.
    float delta = 0.0f;
    float square = 0.0f;
    walk.each([&](unsigned slot, unsigned octet, unsigned count) {
        const Values& s = get(slot, octet, count);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            if (!Walk::aligned && j >= count) continue;
            const float d = __fsub_rn(value(s.at[j]), row.pivot);
            delta = __fmaf_rn(d, share, delta);
            square = __fmaf_rn(d, d, square);
        }
    });
    if (norm.layer) row.delta = walk.team.sum(delta, scratch.third);
    square = __fmul_rn(walk.team.sum(square, scratch.first), share);
    row.variance = __fmaf_rn(-row.delta, row.delta, square);
    if (row.variance < 0.0f) row.variance = 0.0f;
    return row;
}

/// A variance in this range lost nothing to squares out of f32's own: 2^-90 and the largest number.
constexpr unsigned LEAST_VARIANCE = 0x12800000u;
constexpr unsigned MOST_VARIANCE = 0x7f7fffffu;

/// Of a row of any magnitude: from the row times a power of two that brings it, or the root of epsilon, near
/// 1. rstd is at most the largest f32.
template <typename Walk, typename Get>
__device__ __forceinline__ Standard scaled_standard_of(const RowNorm& norm, const Walk& walk,
                                                       NormScratch& scratch, Get get) {
    float largest = __fsqrt_rn(norm.epsilon);
    walk.each([&](unsigned slot, unsigned octet, unsigned count) {
        const Values& s = get(slot, octet, count);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            if (Walk::aligned || j < count) largest = fmaxf(largest, fabsf(s.at[j]));
        }
    });
    unsigned exponent = bits_as<unsigned>(walk.team.max(largest, scratch.second)) >> 23;
    // The ends of the range, where a power or its reciprocal is no normal number, take their neighbour's.
    exponent = min(max(exponent, 1u), 253u);
    const float power = bits_as<float>((254u - exponent) << 23);  // 2^(127 - exponent)
    const Moments row = moments_of<true>(norm, walk, power, scratch, get);
    const float epsilon = __fmul_rn(__fmul_rn(norm.epsilon, power), power);
    const float variance = __fadd_rn(row.variance, epsilon);
    const float rstd = variance == 0.0f ? 0.0f : __fdiv_rn(power, __fsqrt_rn(variance));
    const float most = bits_as<float>(0x7f7fffffu);
    const float back = __fdiv_rn(1.0f, power);
    return {__fmul_rn(row.pivot, back), __fmul_rn(row.delta, back), rstd > most ? most : rstd};
}

/// Of a row.
template <typename Walk, typename Get>
__device__ __forceinline__ Standard standard_of(const RowNorm& norm, const Walk& walk,
                                                NormScratch& scratch, Get get) {
    const Moments row = moments_of<false>(norm, walk, 1.0f, scratch, get);
    const float variance = __fadd_rn(row.variance, norm.epsilon);
    const bool usual =
        variance >= bits_as<float>(LEAST_VARIANCE) && variance <= bits_as<float>(MOST_VARIANCE);
    // The same for all threads of the team.
    if (!usual) return scaled_standard_of(norm, walk, scratch, get);
    return {row.pivot, row.delta, __fdiv_rn(1.0f, __fsqrt_rn(variance))};
}

/// Of the same row, from the mean and rstd that were saved. That mean is a rounded one: what it lacks is
/// computed again.
template <typename Walk, typename Get>
__device__ __forceinline__ Standard standard_saved(const RowNorm& norm, const Walk& walk, float mean,
                                                   float rstd, Scratch& scratch, Get get) {
    return {mean, delta_of(norm, walk, mean, scratch, get), rstd};
}

/// y of an octet; `bias` is zeros where there is none.
__device__ __forceinline__ Values normalised(const Standard& row, const Values& s,
                                             const Values& weight, const Values& bias) {
    Values y;
#pragma unroll
    for (int j = 0; j < 8; ++j) y.at[j] = __fmaf_rn(row.apply(s.at[j]), weight.at[j], bias.at[j]);
    return y;
}

/// How the gradient g = dy * weight of a row's xhat becomes that of the row.
struct NormGradient {
    float centre;  // mean of g; 0 for RMSNorm
    float slope;   // mean of g * xhat

    __device__ __forceinline__ float apply(const Standard& row, float xhat, float g) const {
        const float centred = __fsub_rn(g, centre);
        return __fmul_rn(row.rstd, __fmaf_rn(-xhat, slope, centred));
    }
};

/// A row's s, and the gradient of its xhat.
struct NormPair {
    Values s;
    Values g;
};

/// Of a row; `get` gives its octets as `NormPair`.
template <typename Walk, typename Get>
__device__ __forceinline__ NormGradient norm_gradient(const RowNorm& norm, const Walk& walk,
                                                      const Standard& row, NormScratch& scratch,
                                                      Get get) {
    NormGradient gradient = {};
    if (norm.layer) {
        const float sum = walk.sum(scratch.second, get, [&](const NormPair& pair, unsigned j) {
            return pair.g.at[j];
        });
        gradient.centre = __fdiv_rn(sum, norm.columns);
    }
    const float sum = walk.sum(scratch.third, get, [&](const NormPair& pair, unsigned j) {
        return __fmul_rn(pair.g.at[j], row.apply(pair.s.at[j]));
    });
    gradient.slope = __fdiv_rn(sum, norm.columns);
    return gradient;
}
