// The first level of a sum over rows (src/ops/sum_rows.rs): what an operator adds to each column in 64
// consecutive rows, in order, from +0. sum_rows.cu adds up the levels above.

#pragma once

#include "kernel.cuh"

/// Rows of a tile: the radix of the tree.
constexpr unsigned TILE_ROWS = 64;

/// Columns of a tile, 8 octets: a tile is two octets a thread, and a row of it is whole 32-byte sectors
/// (128 bytes in 16-bit storage).
constexpr unsigned TILE_COLS = 64;
constexpr unsigned TILE_OCTETS = TILE_COLS / 8;
static_assert(TILE_ROWS * TILE_OCTETS == 2 * THREADS, "a thread has two octets of a tile");

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

template <typename Draws>
__device__ __forceinline__ Lanes lanes_of(const Draws& draws, const TileOctet& at) {
    return draws.lanes(draws.logical(static_cast<unsigned>(at.row)), at.octet);
}

/// An octet where it exists; +0 otherwise, which changes no sum.
template <typename Op>
__device__ __forceinline__ Values load_and_finish_tile(const typename Op::Params& p,
                                                       const TileOctet& at) {
    if (at.count() == 0) return {};
    const MaskReader<false> draws(p.mask);
    const typename Op::Loaded loaded = Op::load(p, at);
    return Op::finish(p, at, draws.kept(lanes_of(draws, at)), draws.odds.scale, loaded);
}

/// A tile of 64 rows and 64 columns a block. `Op` has `Params` with members `mask` and `tiles`, `Loaded`,
/// `load(params, octet)`, and `finish(params, octet, kept, scale, loaded)`, which stores the octet's result and
/// returns the terms of its columns. They go through shared memory to the threads that add them up row by
/// row, a column each.
template <typename Op>
__device__ __forceinline__ void sum_tile(const typename Op::Params& p) {
    __shared__ float tile[TILE_ROWS * TILE_COLS];

    const Tiles& tiles = p.tiles;
    const unsigned tile_row = tiles.per_row.quotient(blockIdx.x);
    const unsigned tile_col = tiles.per_row.remainder(blockIdx.x, tile_row);
    const unsigned long long row = 1ull * tile_row * TILE_ROWS + threadIdx.x / TILE_OCTETS;
    const unsigned octet = tile_col * TILE_OCTETS + threadIdx.x % TILE_OCTETS;

    Values terms_a;
    Values terms_b;
    if ((tile_row + 1ull) * TILE_ROWS <= tiles.rows && (tile_col + 1ull) * TILE_COLS <= tiles.cols) {
        const TileOctet a = {row, octet, 8};
        const TileOctet b = {row + TILE_ROWS / 2, octet, 8};
        const typename Op::Loaded loaded_a = Op::load(p, a);
        const typename Op::Loaded loaded_b = Op::load(p, b);
        __syncwarp();  // keeps both loads first; the whole block is here
        with_draws(p.mask, [&](const auto& draws) {
            // Of one octet column: the Philox blocks share three multiplications.
            const Lanes lanes_a = lanes_of(draws, a);
            const Lanes lanes_b = lanes_of(draws, b);
            terms_a = Op::finish(p, a, draws.kept(lanes_a), draws.odds.scale, loaded_a);
            terms_b = Op::finish(p, b, draws.kept(lanes_b), draws.odds.scale, loaded_b);
        });
    } else {
        const unsigned long long row_b = row + TILE_ROWS / 2;
        terms_a = load_and_finish_tile<Op>(p, {row, octet, existing_of(tiles, row, octet)});
        terms_b = load_and_finish_tile<Op>(p, {row_b, octet, existing_of(tiles, row_b, octet)});
    }
#pragma unroll
    for (unsigned j = 0; j < 8; ++j) {
        tile[threadIdx.x * 8 + j] = terms_a.at[j];
        tile[(threadIdx.x + THREADS) * 8 + j] = terms_b.at[j];
    }
    __syncthreads();

    if (threadIdx.x >= TILE_COLS) return;
    const unsigned long long column = 1ull * tile_col * TILE_COLS + threadIdx.x;
    if (column >= tiles.cols) return;
    float sum = 0.0f;
#pragma unroll 16
    for (unsigned r = 0; r < TILE_ROWS; ++r) {
        sum = __fadd_rn(sum, tile[r * TILE_COLS + threadIdx.x]);
    }
    tiles.sums.cached(tile_row * tiles.cols + column, __fmul_rn(sum, tiles.factor.get()));
}

/// The kernels of an operator `Op<T, aligned>` that sums by tiles, for each storage type.
#define FD_TILE_KERNELS(name, Params, Op)            \
    FD_TILE_KERNELS_OF(name, Params, Op, float, f32) \
    FD_TILE_KERNELS_OF(name, Params, Op, f16, f16)   \
    FD_TILE_KERNELS_OF(name, Params, Op, bf16, bf16)
#define FD_TILE_KERNELS_OF(name, Params, Op, T, type)                     \
    FD_KERNEL(name##_##type, Params<T>, THREADS, sum_tile<Op<T, true>>)   \
    FD_KERNEL(name##_unaligned_##type, Params<T>, THREADS, sum_tile<Op<T, false>>)
