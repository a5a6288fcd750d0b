// The threads that share a row, and their walk over its octets.
//
// Every collective here wants all threads of its team: a warp's 32, or a block's. That of a PartTeam wants all of its block.

#pragma once

#include "kernel.cuh"
#include "reduce.cuh"

/// Elements of octet `octet` that lie below column `end`.
template <typename Column>
__device__ __forceinline__ unsigned below(Column end, Column octet) {
    if (8 * octet >= end) return 0;
    return static_cast<unsigned>(min(end - 8 * octet, Column(8)));
}

/// The index of an octet in its row, `base + ahead`: in two parts, of which `ahead` is known at compile time, so that a
/// thread's octets are one address and several offsets.
struct Index {
    unsigned base;
    unsigned ahead;

    __device__ __forceinline__ unsigned sum() const { return base + ahead; }
    /// The first element of an octet with this index.
    __device__ __forceinline__ unsigned long long element() const { return 8ull * base + 8 * ahead; }
};

/// A warp a row.
struct WarpTeam {
    static constexpr unsigned SIZE = 32;
    static constexpr unsigned BLOCK = 128;  // four rows
    using Scratch = float[1];

    unsigned row = blockIdx.x * (BLOCK / SIZE) + threadIdx.x / SIZE;
    unsigned rank = threadIdx.x % SIZE;

    __device__ __forceinline__ float max(float value, Scratch&) const { return warp_max(value); }
    __device__ __forceinline__ float sum(float value, Scratch&) const { return warp_sum(value); }
    /// The sums of several values.
    template <unsigned COUNT>
    __device__ __forceinline__ void sums(float (&values)[COUNT], Scratch (&)[COUNT]) const {
#pragma unroll
        for (unsigned i = 0; i < COUNT; ++i) values[i] = warp_sum(values[i]);
    }
    /// The value of the thread of rank 0.
    __device__ __forceinline__ float first(float value, Scratch&) const {
        return __shfl_sync(0xffffffffu, value, 0);
    }
};

/// A block a row.
template <unsigned THREADS_>
struct BlockTeam {
    static constexpr unsigned SIZE = THREADS_;
    static constexpr unsigned BLOCK = THREADS_;
    /// What a team needs of shared memory for one collective.
    using Scratch = float[THREADS_ / 32];

    unsigned row = blockIdx.x;
    unsigned rank = threadIdx.x;

    __device__ __forceinline__ float max(float value, Scratch& scratch) const {
        return block_max(value, scratch);
    }
    __device__ __forceinline__ float sum(float value, Scratch& scratch) const {
        return block_sum(value, scratch);
    }
    /// The sums of several values, at one barrier.
    template <unsigned COUNT>
    __device__ __forceinline__ void sums(float (&values)[COUNT], Scratch (&scratch)[COUNT]) const {
#pragma unroll
        for (unsigned i = 0; i < COUNT; ++i) leave(warp_sum(values[i]), scratch[i]);
        __syncthreads();
#pragma unroll
        for (unsigned i = 0; i < COUNT; ++i) values[i] = folded(scratch[i], plus<float>);
    }
    /// The value of the thread of rank 0.
    __device__ __forceinline__ float first(float value, Scratch& scratch) const {
        if (threadIdx.x == 0) scratch[0] = value;
        __syncthreads();
        return scratch[0];
    }
};

/// One of `TEAMS` teams of a block. A collective wants all of them.
template <unsigned THREADS_, unsigned TEAMS>
struct PartTeam {
    static constexpr unsigned SIZE = THREADS_;
    static constexpr unsigned BLOCK = THREADS_ * TEAMS;
    using Scratch = float[TEAMS][THREADS_ / 32];

    unsigned row;
    unsigned rank = threadIdx.x % SIZE;
    unsigned team = threadIdx.x / SIZE;

    /// The sums of several values, at one barrier; of a team of one warp at none.
    template <unsigned COUNT>
    __device__ __forceinline__ void sums(float (&values)[COUNT], Scratch (&scratch)[COUNT]) const {
#pragma unroll
        for (unsigned i = 0; i < COUNT; ++i) values[i] = warp_sum(values[i]);
        if constexpr (SIZE > 32) {
#pragma unroll
            for (unsigned i = 0; i < COUNT; ++i) {
                if (rank % 32 == 0) scratch[i][team][rank / 32] = values[i];
            }
            __syncthreads();
#pragma unroll
            for (unsigned i = 0; i < COUNT; ++i) values[i] = folded(scratch[i][team], plus<float>);
        }
    }
};

/// How the threads of a `Team` walk over the octets of their row: octet `rank`, then every `SIZE`th.
///
/// `HELD`: octets that a thread holds of a row that stays in registers, an array that `slot` indexes; 0: any number of
/// octets, none of them held, and the slot is 0. The octets of the first `SURE` slots exist for every thread: no test is needed.
/// `aligned`: octets are whole.
template <typename Team_, unsigned HELD, unsigned SURE_, bool aligned_>
struct Walk {
    using Team = Team_;
    using Scratch = typename Team::Scratch;
    static constexpr bool held = HELD > 0;
    static constexpr bool aligned = aligned_;
    static constexpr unsigned SLOTS = held ? HELD : 1;
    static constexpr unsigned SURE = SURE_;
    static constexpr unsigned BLOCK = Team::BLOCK;

    Team team;
    unsigned long long cols;

    /// The element of a row that a thread counts from, and the distance of an octet from it: of a row that is held a
    /// constant, so that a thread's octets are one address.
    __device__ __forceinline__ unsigned long long start() const { return held ? 8ull * team.rank : 0; }
    __device__ __forceinline__ unsigned long long from_start(Index octet) const {
        return held ? 8 * octet.ahead : octet.element();
    }

    /// Calls `each(slot, octet, count)` for the thread's octets, of which `octet` is the index and `count` elements exist.
    template <typename Each>
    __device__ __forceinline__ void each(Each each) const {
        if (held) {
#pragma unroll
            for (unsigned slot = 0; slot < SLOTS; ++slot) {
                const Index octet = {team.rank, slot * Team::SIZE};
                const unsigned count = existing(slot, octet.sum());
                if (count > 0) each(slot, octet, count);
            }
        } else {
            for (unsigned long long octet = team.rank; 8 * octet < cols; octet += Team::SIZE) {
                const unsigned count = aligned ? 8 : below(cols, octet);
                each(0u, Index{static_cast<unsigned>(octet), 0}, count);
            }
        }
    }

    /// The lanes of the octets that a thread holds. Those of a row of whole octets are drawn without a branch, of octets
    /// that do not exist too, so that the rounds of all share the round keys: 34 instructions less of a softmax of 1,024
    /// columns for sm_90.
    template <typename Draws>
    __device__ __forceinline__ void draw(const Draws& draws, Lanes (&lanes)[SLOTS]) const {
        static_assert(held, "a row that is not held is drawn an octet at a time");
        const unsigned logical = draws.logical(team.row);
#pragma unroll
        for (unsigned slot = 0; slot < SLOTS; ++slot) {
            const unsigned octet = team.rank + slot * Team::SIZE;
            if (aligned || existing(slot, octet) > 0) lanes[slot] = draws.lanes(logical, octet);
        }
    }

private:
    /// Elements of an octet of a row that is held, so short that its columns fit in 32 bits.
    __device__ __forceinline__ unsigned existing(unsigned slot, unsigned octet) const {
        if (SURE > 0 && slot < SURE) return 8;
        const unsigned end = static_cast<unsigned>(cols);
        if (aligned) return 8 * octet < end ? 8 : 0;
        return below(end, octet);
    }
};

/// Rows of any length: each pass reads the row again.
template <bool aligned>
using WideWalk = Walk<BlockTeam<THREADS>, 0, 0, aligned>;

/// Unaligned rows of at most 1024 columns, and of at most 8192.
using UnalignedWarpWalk = Walk<WarpTeam, 4, 0, false>;
using UnalignedBlockWalk = Walk<BlockTeam<THREADS>, 4, 0, false>;

/// The shapes of teams that hold a row whose octets are whole: threads, octets a thread, and how many of these every
/// thread has. src/device/rows.rs chooses the smallest one that has room for a row, so a row is longer than what the
/// shape before has room for.
///
/// Small kernels of these shapes were timed on an H200 at 2^28 elements of bf16. In shares of a copy:
///
/// | | 32x4 | 128x2 | 256x2 | 256x4 | 512x2 |
/// | --- | --- | --- | --- | --- | --- |
/// | softmax | 97 % | 97 % | 93 % | 94 % | 84 % |
/// | its gradient | 96 % | 99 % | | | 97 % |
/// | LayerNorm | 94 % | | 94 % | | 95 % |
///
/// LayerNorm of 1,024 columns had 97 % with 128x1, a shape that is not here. 512x4 was not timed.
using Walk32x1 = Walk<WarpTeam, 1, 0, true>;
using Walk32x2 = Walk<WarpTeam, 2, 1, true>;
using Walk32x3 = Walk<WarpTeam, 3, 2, true>;
using Walk32x4 = Walk<WarpTeam, 4, 3, true>;
using Walk128x2 = Walk<BlockTeam<128>, 2, 1, true>;
using Walk256x2 = Walk<BlockTeam<256>, 2, 1, true>;
using Walk256x4 = Walk<BlockTeam<256>, 4, 2, true>;
using Walk512x4 = Walk<BlockTeam<512>, 4, 2, true>;

/// `stamp(shape, Walk, T, type)` for each shape that has registers for the storage type. 512 threads have 128 each.
#define FD_ROW_SHAPES(stamp)            \
    FD_ROW_SHAPES_OF(stamp, float, f32) \
    FD_ROW_SHAPES_OF(stamp, f16, f16)   \
    FD_ROW_SHAPES_OF(stamp, bf16, bf16) \
    stamp(512x4, Walk512x4, f16, f16)   \
    stamp(512x4, Walk512x4, bf16, bf16)
#define FD_ROW_SHAPES_OF(stamp, T, type) \
    stamp(32x1, Walk32x1, T, type)       \
    stamp(32x2, Walk32x2, T, type)       \
    stamp(32x3, Walk32x3, T, type)       \
    stamp(32x4, Walk32x4, T, type)       \
    stamp(128x2, Walk128x2, T, type)     \
    stamp(256x2, Walk256x2, T, type)     \
    stamp(256x4, Walk256x4, T, type)     \
    stamp(wide, WideWalk<true>, T, type)

/// The same for rows of any alignment.
#define FD_UNALIGNED_ROW_SHAPES(stamp)            \
    FD_UNALIGNED_ROW_SHAPES_OF(stamp, float, f32) \
    FD_UNALIGNED_ROW_SHAPES_OF(stamp, f16, f16)   \
    FD_UNALIGNED_ROW_SHAPES_OF(stamp, bf16, bf16)
#define FD_UNALIGNED_ROW_SHAPES_OF(stamp, T, type)      \
    stamp(warp_unaligned, UnalignedWarpWalk, T, type)   \
    stamp(block_unaligned, UnalignedBlockWalk, T, type) \
    stamp(wide_unaligned, WideWalk<false>, T, type)
