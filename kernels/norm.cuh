// Normalisation of a row that a team shares (team.cuh); src/ops/norm.rs has the mathematics.
//
//     xhat = ((s - pivot) - delta) * rstd,  y = xhat * weight + bias
//
// The mean is pivot + delta: one f32 has no room for the digits of a mean of 1e4 that a deviation of 1e-2
// asks for; two have, and s - pivot is exact where s and the pivot are near each other.
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

/// Shared memory of the three collectives of one row.
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

/// What `pivot` lacks of the row's mean.
template <typename Walk, typename Get>
__device__ __forceinline__ float delta_of(const RowNorm& norm, const Walk& walk, float pivot,
                                          Scratch& scratch, Get get) {
    if (!norm.layer) return 0.0f;
    const float sum = walk.sum(scratch, get, [&](const Values& s, unsigned j) {
        return __fsub_rn(s.at[j], pivot);
    });
    return __fdiv_rn(sum, norm.columns);
}

/// Of a row.
template <typename Walk, typename Get>
__device__ __forceinline__ Standard standard_of(const RowNorm& norm, const Walk& walk,
                                                NormScratch& scratch, Get get) {
    Standard row = {};
    if (norm.layer) {
        float first = 0.0f;
        if (walk.team.rank == 0 && walk.cols > 0) first = get(0u, 0u, below(walk.cols, 0)).at[0];
        row.pivot = walk.team.first(first, scratch.first);
        row.delta = delta_of(norm, walk, row.pivot, scratch.second, get);
    }
    const float sum = walk.sum(scratch.third, get, [&](const Values& s, unsigned j) {
        const float centred = row.centred(s.at[j]);
        return __fmul_rn(centred, centred);
    });
    const float variance = __fadd_rn(__fdiv_rn(sum, norm.columns), norm.epsilon);
    row.rstd = variance == 0.0f ? 0.0f : __fdiv_rn(1.0f, __fsqrt_rn(variance));
    return row;
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
