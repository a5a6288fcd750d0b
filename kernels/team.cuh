// The threads that share a row, and their walk over its octets.
//
// Every collective here wants all threads of its team: a warp's 32, or a block's 256 threads.

#pragma once

#include "kernel.cuh"
#include "reduce.cuh"

/// Octets that a thread holds of a row that stays in registers.
constexpr unsigned OCTETS_HELD = 4;

/// Elements of octet `octet` that lie below column `end`.
__device__ __forceinline__ unsigned below(unsigned long long end, unsigned long long octet) {
    if (8 * octet >= end) return 0;
    return static_cast<unsigned>(min(end - 8 * octet, 8ull));
}

/// What a block's teams need of shared memory for one collective.
using Scratch = float[WARPS];

/// A warp a row.
struct WarpTeam {
    static constexpr unsigned SIZE = 32;
    unsigned row = blockIdx.x * WARPS + threadIdx.x / 32;
    unsigned rank = threadIdx.x % 32;

    __device__ __forceinline__ float max(float value, Scratch&) const { return warp_max(value); }
    __device__ __forceinline__ float sum(float value, Scratch&) const { return warp_sum(value); }
    /// The value of the thread of rank 0.
    __device__ __forceinline__ float first(float value, Scratch&) const {
        return __shfl_sync(0xffffffffu, value, 0);
    }
};

/// A block a row.
struct BlockTeam {
    static constexpr unsigned SIZE = THREADS;
    unsigned row = blockIdx.x;
    unsigned rank = threadIdx.x;

    __device__ __forceinline__ float max(float value, Scratch& scratch) const {
        return block_max(value, scratch);
    }
    __device__ __forceinline__ float sum(float value, Scratch& scratch) const {
        return block_sum(value, scratch);
    }
    /// The value of the thread of rank 0.
    __device__ __forceinline__ float first(float value, Scratch& scratch) const {
        if (threadIdx.x == 0) scratch[0] = value;
        __syncthreads();
        return scratch[0];
    }
};

/// How the threads of a `Team` walk over the octets of their row: octet `rank`, then every `SIZE`th.
/// `held`: at most OCTETS_HELD of them each, which may lie in registers, an array that `slot` indexes;
/// otherwise any number, and the slot is 0. `aligned`: octets are whole.
template <typename Team_, bool held_, bool aligned_>
struct Walk {
    using Team = Team_;
    static constexpr bool held = held_;
    static constexpr bool aligned = aligned_;
    /// Slots of what a thread holds.
    static constexpr unsigned SLOTS = held ? OCTETS_HELD : 1;

    Team team;
    unsigned long long cols;

    /// Calls `each(slot, octet, count)` for the thread's octets, `count` of whose elements exist.
    template <typename Each>
    __device__ __forceinline__ void each(Each each) const {
        if (held) {
#pragma unroll
            for (unsigned slot = 0; slot < SLOTS; ++slot) {
                const unsigned octet = team.rank + slot * Team::SIZE;
                const unsigned count = below(cols, octet);
                if (count > 0) each(slot, octet, count);
            }
        } else {
            for (unsigned long long octet = team.rank; 8 * octet < cols; octet += Team::SIZE) {
                each(0u, static_cast<unsigned>(octet), below(cols, octet));
            }
        }
    }

    /// The team's sum of `term(values, j)` over the elements j of the octets `values = get(slot, octet,
    /// count)`.
    template <typename Get, typename Term>
    __device__ __forceinline__ float sum(Scratch& scratch, Get get, Term term) const {
        return total(scratch, get, [&](float sum, const auto& values, unsigned j) {
            return __fadd_rn(sum, term(values, j));
        });
    }

    /// The sum of the same terms, each times `share`: their mean, where that is 1 over their number.
    template <typename Get, typename Term>
    __device__ __forceinline__ float mean(float share, Scratch& scratch, Get get, Term term) const {
        return total(scratch, get, [&](float sum, const auto& values, unsigned j) {
            return __fadd_rn(sum, __fmul_rn(term(values, j), share));
        });
    }

private:
    template <typename Get, typename Add>
    __device__ __forceinline__ float total(Scratch& scratch, Get get, Add add) const {
        float sum = 0.0f;
        each([&](unsigned slot, unsigned octet, unsigned count) {
            const auto& values = get(slot, octet, count);
#pragma unroll
            for (unsigned j = 0; j < 8; ++j) {
                if (aligned || j < count) sum = add(sum, values, j);
            }
        });
        return team.sum(sum, scratch);
    }
};

/// The forms of a kernel whose threads share a row: by a warp or a block that holds it, or by a block that reads it again
/// in each pass (src/device/rows.rs chooses).
template <bool aligned>
using WarpWalk = Walk<WarpTeam, true, aligned>;
template <bool aligned>
using BlockWalk = Walk<BlockTeam, true, aligned>;
template <bool aligned>
using WideWalk = Walk<BlockTeam, false, aligned>;

/// `stamp(form, walk, T, type)` for each form and storage type.
#define FD_ROW_FORMS(stamp)             \
    stamp(warp, WarpWalk, float, f32)   \
    stamp(warp, WarpWalk, f16, f16)     \
    stamp(warp, WarpWalk, bf16, bf16)   \
    stamp(block, BlockWalk, float, f32) \
    stamp(block, BlockWalk, f16, f16)   \
    stamp(block, BlockWalk, bf16, bf16) \
    stamp(wide, WideWalk, float, f32)   \
    stamp(wide, WideWalk, f16, f16)     \
    stamp(wide, WideWalk, bf16, bf16)
