// The first levels of a sum over rows (src/ops/sum_rows.rs): what an operator adds to each column in 16 consecutive rows
// (a run), in order, from +0, and the sums of 4 such runs (a tile), in order. sum_rows.cu adds up the levels above.
//
// A warp has a tile of 64 columns. A lane has one octet of columns and one run, so the terms of its rows stay in its
// registers; the sums of the runs meet by shuffles, once a tile. No shared memory, no barrier.

#pragma once

#include "kernel.cuh"

/// Rows that are added one after the other.
constexpr unsigned RUN_ROWS = 16;

/// Rows of a tile, which are the radix of the tree above too; and a tile's runs.
constexpr unsigned TILE_ROWS = 64;
constexpr unsigned TILE_RUNS = TILE_ROWS / RUN_ROWS;

/// Columns of a tile, 8 octets: a row of it is whole 32-byte sectors (128 bytes in 16-bit storage).
constexpr unsigned TILE_COLS = 64;
constexpr unsigned TILE_OCTETS = TILE_COLS / 8;
constexpr unsigned TILE_THREADS = 32;  // of a block: `TILE_THREADS` in src/device/sum_rows.rs
static_assert(TILE_RUNS * TILE_OCTETS == TILE_THREADS, "a lane has an octet of columns in a run");

/// The tensor of a launch, in tiles, and where their sums go.
struct Tiles {
    Out<float> sums;  // [tiles of rows, cols]
    unsigned long long rows;
    unsigned long long cols;
    Factor factor;         // of the sums
    IndexDivisor per_row;  // ceil(cols / 64)
    unsigned padding;
};
static_assert(sizeof(Tiles) == 56, "sum_rows.rs: Tiles");

/// An octet of a tile.
struct TileOctet {
    unsigned long long row;
    unsigned octet;
    unsigned existing;

    /// Elements that exist.
    __device__ __forceinline__ unsigned count() const { return existing; }

    /// The octet's first element in a matrix whose rows begin `stride` elements apart.
    __device__ __forceinline__ unsigned long long element(unsigned long long stride) const {
        return row * stride + 8ull * octet;
    }

    /// Its first element in a value a column.
    __device__ __forceinline__ unsigned long long column() const { return 8ull * octet; }
};

/// Elements of an octet that exist.
__device__ __forceinline__ unsigned existing_of(const Tiles& tiles, unsigned long long row, unsigned octet) {
    const unsigned long long column = 8ull * octet;
    if (row >= tiles.rows || column >= tiles.cols) return 0;
    const unsigned long long left = tiles.cols - column;
    return left < 8 ? static_cast<unsigned>(left) : 8;
}

/// Rows of a run whose loads, `Loaded` each, are on their way at once where T is stored: a power of two, at least 2.
template <typename T, typename Loaded>
__device__ constexpr unsigned rows_at_once() {
    constexpr unsigned BYTES = sizeof(T) == 2 ? FD_SUM_TILE_BYTES : FD_SUM_TILE_BYTES_F32;
    unsigned rows = 2;
    while (rows < RUN_ROWS && rows * sizeof(Loaded) < BYTES) rows *= 2;
    return rows;
}

/// The sums of a run of a lane: its octet in the rows from `first` on. `whole`: all of its elements exist.
template <typename T, typename Op, bool whole, typename Draws>
__device__ __forceinline__ Values sum_run(const typename Op::Params& p, const Draws& draws, unsigned long long first,
                                          unsigned octet) {
    constexpr unsigned AT_ONCE = rows_at_once<T, typename Op::Loaded>();
    Values sums = {};
#pragma unroll 1
    for (unsigned done = 0; done < RUN_ROWS; done += AT_ONCE) {
        typename Op::Loaded loaded[AT_ONCE];
        const auto at = [&](unsigned i) -> TileOctet {
            const unsigned long long row = first + done + i;
            return {row, octet, whole ? 8 : existing_of(p.tiles, row, octet)};
        };
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; ++i) {
            if (whole || at(i).count() > 0) loaded[i] = Op::load(p, at(i));
        }
        __syncwarp();  // keeps the loads first; the whole warp is here
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; ++i) {
            if (!whole && at(i).count() == 0) continue;
            const Lanes lanes = draws.lanes(draws.logical(static_cast<unsigned>(at(i).row)), octet);
            add(sums, Op::finish(p, at(i), draws.kept(lanes), draws.odds.scale, loaded[i]));
        }
    }
    return sums;
}

/// A tile of 64 rows and 64 columns a block of one warp. `Op` has `Params` with members `mask` and `tiles`, `Loaded`,
/// `load(params, octet)`, and `finish(params, octet, kept, scale, loaded)`, which stores the octet's result and
/// returns the terms of its columns.
template <typename T, typename Op>
__device__ __forceinline__ void sum_tile(const typename Op::Params& p) {
    const Tiles& tiles = p.tiles;
    const unsigned tile_row = tiles.per_row.quotient(blockIdx.x);
    const unsigned tile_col = tiles.per_row.remainder(blockIdx.x, tile_row);
    const unsigned long long first = 1ull * tile_row * TILE_ROWS + threadIdx.x / TILE_OCTETS * RUN_ROWS;
    const unsigned octet = tile_col * TILE_OCTETS + threadIdx.x % TILE_OCTETS;

    Values sums;
    if ((tile_row + 1ull) * TILE_ROWS <= tiles.rows && (tile_col + 1ull) * TILE_COLS <= tiles.cols) {
        with_draws(p.mask, [&](const auto& draws) { sums = sum_run<T, Op, true>(p, draws, first, octet); });
    } else {
        sums = sum_run<T, Op, false>(p, MaskReader<false>(p.mask), first, octet);
    }
    // The lanes of the first run add up those of the others. A run without rows has +0, which changes no sum.
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float own = sums.at[j];
#pragma unroll
        for (unsigned run = 1; run < TILE_RUNS; ++run) {
            const float other = __shfl_down_sync(0xffffffffu, own, run * TILE_OCTETS);
            sums.at[j] = __fadd_rn(sums.at[j], other);
        }
        sums.at[j] = __fmul_rn(sums.at[j], tiles.factor.get());
    }
    const unsigned count = existing_of(tiles, 1ull * tile_row * TILE_ROWS, octet);
    if (threadIdx.x >= TILE_OCTETS || count == 0) return;
    tiles.sums.template cached<false>(tile_row * tiles.cols + 8ull * octet, count, pack<float>(sums));
}

/// The kernels of an operator `Op<T, aligned>` that sums by tiles, for each storage type.
#define FD_TILE_KERNELS(name, Params, Op)            \
    FD_TILE_KERNELS_OF(name, Params, Op, float, f32) \
    FD_TILE_KERNELS_OF(name, Params, Op, f16, f16)   \
    FD_TILE_KERNELS_OF(name, Params, Op, bf16, bf16)
#define FD_TILE_KERNELS_OF(name, Params, Op, T, type)                        \
    FD_KERNEL(name##_##type, Params<T>, TILE_THREADS, sum_tile<T, Op<T, true>>) \
    FD_KERNEL(name##_unaligned_##type, Params<T>, TILE_THREADS, sum_tile<T, Op<T, false>>)
