// dropout_add: y = residual + D(x + bias), and its gradients.
//
// Forward: x' = x, or x + bias rounded to f32;
//
//     y[r, c] = kept(r, c) ? round(fma(x'[r, c], scale, residual[r, c])) : residual[r, c]
//
// Bytes an element: two read, one written (6 in 16-bit storage); the bias is read from L2 or L1.
// In place: y may be the residual.
//
// Instructions for sm_90 (CUDA 13.0, bf16, no bias, full block; compiled, not timed): 209 a thread with
// two octets. Of those an octet needs 78: 19 wide multiplications (20 less that of the stream number,
// which the uniform datapath does once), 20 three-way exclusive ors, 8 compares, 16 unpackings, 8 FMA,
// 4 packings, 2 loads, 1 store. The other 53 are once a thread: 23 reads of parameters (10 of them round
// keys: for sm_90 ptxas makes no parameter another instruction's operand), 12 for the two positions,
// 6 for index and addresses, 5 for the choice of the path, 7 others. All four loads are issued before
// the first wait; no spills.
//
// Backward: dx = D(dy), which is the kernel of dropout.cu where there is no bias. With one, the kernel
// here also sums kept dy over rows, by the tree that src/ops/dropout_add.rs defines: 64 rows in order
// from +0, then 64 such sums in order, until one is left, times the scale. No atomics: the same bits
// in every run. Bytes an element: one read, one written, and a 16th of an f32 for the sums.
// In place: dx may be dy.

#include "kernel.cuh"

template <typename T>
struct DropoutAddParams {
    Mask mask;
    Octets octets;
    In<T> x;
    In<T> bias;
    In<T> residual;
    Out<T> y;
};
static_assert(sizeof(DropoutAddParams<float>) == 224, "dropout_add.rs: ForwardParams");

template <typename T, bool with_bias, bool aligned>
struct DropoutAdd {
    using Params = DropoutAddParams<T>;
    struct Loaded {
        Octet<T> x;
        Octet<T> bias;
        Octet<T> residual;
    };

    static __device__ __forceinline__ Loaded load(const Params& p, Index index) {
        const Position position(p.octets, index);
        const unsigned long long element = element_of<aligned>(p.octets, index, position);
        const unsigned count = position.count(p.octets);
        Loaded loaded;
        loaded.x = p.x.template streaming<aligned>(element, count);
        loaded.residual = p.residual.template streaming<aligned>(element, count);
        if (with_bias) {
            loaded.bias = p.bias.template cached<aligned>(8ull * position.octet, count);
        }
        return loaded;
    }

    static __device__ __forceinline__ void finish(const Params& p, Index index, Position position,
                                                  const Kept& keep, float scale, const Loaded& loaded) {
        Values x = unpack(loaded.x);
        if (with_bias) {
            const Values bias = unpack(loaded.bias);
#pragma unroll
            for (int j = 0; j < 8; ++j) x.at[j] = __fadd_rn(x.at[j], bias.at[j]);
        }
        Values y = unpack(loaded.residual);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (keep.at[j]) y.at[j] = __fmaf_rn(x.at[j], scale, y.at[j]);
        }
        p.y.template cached<aligned>(element_of<aligned>(p.octets, index, position),
                                     position.count(p.octets), pack<T>(y));
    }
};

FD_KERNEL(dropout_add_f32, DropoutAddParams<float>, THREADS, stream<DropoutAdd<float, false, true>>)
FD_KERNEL(dropout_add_f16, DropoutAddParams<f16>, THREADS, stream<DropoutAdd<f16, false, true>>)
FD_KERNEL(dropout_add_bf16, DropoutAddParams<bf16>, THREADS, stream<DropoutAdd<bf16, false, true>>)
FD_KERNEL(dropout_add_any_f32, DropoutAddParams<float>, THREADS,
          stream_any<DropoutAdd<float, false, false>>)
FD_KERNEL(dropout_add_any_f16, DropoutAddParams<f16>, THREADS,
          stream_any<DropoutAdd<f16, false, false>>)
FD_KERNEL(dropout_add_any_bf16, DropoutAddParams<bf16>, THREADS,
          stream_any<DropoutAdd<bf16, false, false>>)
FD_KERNEL(dropout_add_bias_f32, DropoutAddParams<float>, THREADS,
          stream<DropoutAdd<float, true, true>>)
FD_KERNEL(dropout_add_bias_f16, DropoutAddParams<f16>, THREADS, stream<DropoutAdd<f16, true, true>>)
FD_KERNEL(dropout_add_bias_bf16, DropoutAddParams<bf16>, THREADS,
          stream<DropoutAdd<bf16, true, true>>)
FD_KERNEL(dropout_add_bias_any_f32, DropoutAddParams<float>, THREADS,
          stream_any<DropoutAdd<float, true, false>>)
FD_KERNEL(dropout_add_bias_any_f16, DropoutAddParams<f16>, THREADS,
          stream_any<DropoutAdd<f16, true, false>>)
FD_KERNEL(dropout_add_bias_any_bf16, DropoutAddParams<bf16>, THREADS,
          stream_any<DropoutAdd<bf16, true, false>>)

/// Rows of a tile: the radix of the bias gradient's tree.
constexpr unsigned TILE_ROWS = 64;

/// Columns of a tile, 8 octets: a tile is two octets a thread, as in the streaming kernels, and a row
/// of it is whole 32-byte sectors (128 bytes in 16-bit storage).
constexpr unsigned TILE_COLS = 64;
constexpr unsigned TILE_OCTETS = TILE_COLS / 8;
static_assert(TILE_ROWS * TILE_OCTETS == OCTETS_A_BLOCK, "a thread has two octets of a tile");

template <typename T>
struct BiasGradParams {
    Mask mask;
    In<T> dy;
    Out<T> dx;
    Out<float> sums;  // [tiles of rows, cols]
    unsigned long long rows;
    unsigned long long cols;
    IndexDivisor tiles_a_row;  // ceil(cols / 64)
    float factor;              // of the sums: the scale where a tile holds all rows, otherwise 1
};
static_assert(sizeof(BiasGradParams<float>) == 224, "dropout_add.rs: BiasGradParams");

/// What a thread does in a tile of 64 rows and 64 columns: the same octet of columns in two rows, so
/// that its two Philox blocks share three multiplications.
template <typename T, bool aligned>
struct TileThread {
    const BiasGradParams<T>& p;
    unsigned octet;

    /// Elements of the octet in `row` that exist.
    __device__ __forceinline__ unsigned count(unsigned long long row) const {
        const unsigned long long column = 8ull * octet;
        if (row >= p.rows || column >= p.cols) return 0;
        const unsigned long long left = p.cols - column;
        return left < 8 ? static_cast<unsigned>(left) : 8;
    }

    __device__ __forceinline__ Octet<T> load(unsigned long long row) const {
        return p.dy.template streaming<aligned>(row * p.cols + 8ull * octet, count(row));
    }

    template <bool plain>
    __device__ __forceinline__ Lanes lanes(const Draws<plain>& draws, unsigned long long row) const {
        return draws.lanes(draws.logical(static_cast<unsigned>(row)), octet);
    }

    /// Writes dx and returns kept dy.
    __device__ __forceinline__ Octet<T> finish(unsigned long long row, const Kept& keep, float scale,
                                               const Octet<T>& dy) const {
        const Values values = unpack(dy);
        Values kept_dy = {};
        Values dx;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (keep.at[j]) kept_dy.at[j] = values.at[j];
            // +0 times the scale, which is finite, is +0.
            dx.at[j] = __fmul_rn(kept_dy.at[j], scale);
        }
        p.dx.template cached<aligned>(row * p.cols + 8ull * octet, count(row), pack<T>(dx));
        return pack<T>(kept_dy);
    }

    /// Both rows, which exist: dy in, kept dy out.
    template <bool plain>
    __device__ __forceinline__ void finish_both(unsigned long long row_a, Octet<T>& a,
                                                unsigned long long row_b, Octet<T>& b) const {
        const Draws<plain> draws(p.mask);
        const Lanes lanes_a = lanes(draws, row_a);
        const Lanes lanes_b = lanes(draws, row_b);
        a = finish(row_a, draws.kept(lanes_a), draws.scale, a);
        b = finish(row_b, draws.kept(lanes_b), draws.scale, b);
    }

    /// Kept dy of a row, where it exists; +0 otherwise, which changes no sum.
    __device__ __forceinline__ Octet<T> load_and_finish(unsigned long long row) const {
        if (count(row) == 0) return {};
        const Draws<false> draws(p.mask);
        return finish(row, draws.kept(lanes(draws, row)), draws.scale, load(row));
    }
};

/// A tile of 64 rows and 64 columns a block. Kept dy goes through shared memory, in storage type, to
/// the threads that add it up row by row, a column each.
template <typename T, bool aligned>
__device__ __forceinline__ void bias_grad(const BiasGradParams<T>& p) {
    constexpr unsigned WORDS = Octet<T>::WORDS;
    __shared__ unsigned tile[TILE_ROWS * TILE_OCTETS * WORDS];

    const unsigned tile_row = p.tiles_a_row.quotient(blockIdx.x);
    const unsigned tile_col = p.tiles_a_row.remainder(blockIdx.x, tile_row);
    const unsigned long long row_a = 1ull * tile_row * TILE_ROWS + threadIdx.x / TILE_OCTETS;
    const unsigned long long row_b = row_a + TILE_ROWS / 2;
    const TileThread<T, aligned> thread = {p, tile_col * TILE_OCTETS + threadIdx.x % TILE_OCTETS};

    Octet<T> a;
    Octet<T> b;
    if ((tile_row + 1ull) * TILE_ROWS <= p.rows && (tile_col + 1ull) * TILE_COLS <= p.cols) {
        a = thread.load(row_a);
        b = thread.load(row_b);
        __syncwarp();  // keeps both loads first; the whole block is here
        if (p.mask.plain) {
            thread.template finish_both<true>(row_a, a, row_b, b);
        } else {
            thread.template finish_both<false>(row_a, a, row_b, b);
        }
    } else {
        a = thread.load_and_finish(row_a);
        b = thread.load_and_finish(row_b);
    }
#pragma unroll
    for (unsigned i = 0; i < WORDS; ++i) {
        tile[threadIdx.x * WORDS + i] = a.words[i];
        tile[(threadIdx.x + THREADS) * WORDS + i] = b.words[i];
    }
    __syncthreads();

    if (threadIdx.x >= TILE_COLS) return;
    const unsigned long long column = 1ull * tile_col * TILE_COLS + threadIdx.x;
    if (column >= p.cols) return;
    const typename Bits<T>::Type* stored =
        reinterpret_cast<const typename Bits<T>::Type*>(tile) + threadIdx.x;
    float sum = 0.0f;
#pragma unroll 16
    for (unsigned r = 0; r < TILE_ROWS; ++r) {
        sum = __fadd_rn(sum, to_f32(bits_as<T>(stored[r * TILE_COLS])));
    }
    p.sums.cached(tile_row * p.cols + column, __fmul_rn(sum, p.factor));
}

FD_KERNEL(dropout_add_bias_grad_f32, BiasGradParams<float>, THREADS, bias_grad<float, true>)
FD_KERNEL(dropout_add_bias_grad_f16, BiasGradParams<f16>, THREADS, bias_grad<f16, true>)
FD_KERNEL(dropout_add_bias_grad_bf16, BiasGradParams<bf16>, THREADS, bias_grad<bf16, true>)
FD_KERNEL(dropout_add_bias_grad_any_f32, BiasGradParams<float>, THREADS, bias_grad<float, false>)
FD_KERNEL(dropout_add_bias_grad_any_f16, BiasGradParams<f16>, THREADS, bias_grad<f16, false>)
FD_KERNEL(dropout_add_bias_grad_any_bf16, BiasGradParams<bf16>, THREADS, bias_grad<bf16, false>)

/// One level of the tree above the tiles: sums[g, c] = sum of parts[64 g .. 64 g + 64, c] in order.
struct SumParams {
    In<float> parts;  // [count, cols]
    Out<float> sums;  // [ceil(count / 64), cols], at least one row
    unsigned long long count;
    unsigned long long cols;
    IndexDivisor blocks_a_row;  // ceil(cols / 256)
    float factor;               // the scale on the last level, otherwise 1
};
static_assert(sizeof(SumParams) == 48, "dropout_add.rs: SumParams");

__device__ __forceinline__ void sum(const SumParams& p) {
    const unsigned group = p.blocks_a_row.quotient(blockIdx.x);
    const unsigned block = p.blocks_a_row.remainder(blockIdx.x, group);
    const unsigned long long column = 1ull * block * THREADS + threadIdx.x;
    if (column >= p.cols) return;
    const unsigned long long first = 1ull * group * TILE_ROWS;
    const unsigned long long end = first + TILE_ROWS < p.count ? first + TILE_ROWS : p.count;
    float total = 0.0f;
    for (unsigned long long part = first; part < end; ++part) {
        total = __fadd_rn(total, p.parts.cached(part * p.cols + column));
    }
    p.sums.cached(group * p.cols + column, __fmul_rn(total, p.factor));
}

FD_KERNEL(dropout_add_sum_f32, SumParams, THREADS, sum)
