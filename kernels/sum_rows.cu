// sum_rows: two levels of the tree that adds up a gradient over the rows of a tensor, for up to three gradients.
//
//     group[g, c] = parts[64 g, c] + parts[64 g + 1, c] + .. + parts[64 g + 63, c]
//     sums[s, c]  = factor * (group[64 s, c] + group[64 s + 1, c] + .. + group[64 s + 63, c])
//
// in order, from +0. On the last level the sum is added to `before`, where a gradient is accumulated. The
// operators' own kernels add up every 64 rows of each column; this one is launched until one row is left.
// Where there is one level more, its groups have one part each, to which +0 is added: the same bits. No
// atomics: the same bits in every run.
//
// A block has 32 columns of one sum, a warp a group at a time. It is few blocks, and what it costs is the
// time that loads take: FD_SUM_ROWS_AT_ONCE of them are on their way at once.
//
// Bytes an element of `parts`: 4 read, and a 4096th of that written.

#include "reduce.cuh"
#include "sum_tile.cuh"

/// Sums of one shape that a launch takes, at most: `SUMS` in src/device/sum_rows.rs.
constexpr unsigned SUMS = 3;

/// Parts of two levels: `SPAN` in src/device/sum_rows.rs.
constexpr unsigned SPAN = TILE_ROWS * TILE_ROWS;

struct SumRowsParams {
    In<float> parts[SUMS];  // [count, cols]
    Out<float> sums[SUMS];  // [ceil(count / 4096), cols], at least one row
    In<float> before[SUMS];  // null; or `sums`, where they are added to
    Factor factors[SUMS];    // the scale on the last level, otherwise 1
    unsigned long long count;
    unsigned long long cols;
    IndexDivisor blocks_a_row;  // ceil(cols / 32)
    IndexDivisor blocks_a_sum;
};
static_assert(sizeof(SumRowsParams) == 160, "sum_rows.rs: Params");

/// The sum of a column's parts `first` to `end`, in order. All threads of the warp must be here.
__device__ __forceinline__ float sum_group(const In<float>& parts, unsigned long long cols,
                                           unsigned long long column, unsigned long long first,
                                           unsigned long long end) {
    constexpr unsigned AT_ONCE = FD_SUM_ROWS_AT_ONCE;
    float total = 0.0f;
    for (unsigned long long part = first; part < end; part += AT_ONCE) {
        float terms[AT_ONCE];
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; ++i) {
            terms[i] = part + i < end ? parts.cached((part + i) * cols + column) : 0.0f;
        }
        __syncwarp();  // keeps the loads first
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; ++i) total = __fadd_rn(total, terms[i]);
    }
    return total;
}

__device__ __forceinline__ void sum_rows(const SumRowsParams& p) {
    __shared__ float groups[TILE_ROWS][32];
    const unsigned which = p.blocks_a_sum.quotient(blockIdx.x);
    const unsigned of_sum = p.blocks_a_sum.remainder(blockIdx.x, which);
    const unsigned span = p.blocks_a_row.quotient(of_sum);
    const unsigned block = p.blocks_a_row.remainder(of_sum, span);
    const unsigned rank = threadIdx.x % 32;
    const unsigned warp = threadIdx.x / 32;
    const unsigned long long column = 32ull * block + rank;
    const unsigned long long first = 1ull * span * SPAN;
    const unsigned long long left = p.count - first;
    const unsigned parts = left < SPAN ? static_cast<unsigned>(left) : SPAN;
    const unsigned count = (parts + TILE_ROWS - 1) / TILE_ROWS;
    // The threads beyond the last column add it up as well: a warp stays together.
    const unsigned long long own = min(column, p.cols - 1);
    const In<float> values = p.parts[which];
    for (unsigned group = warp; group < count; group += THREADS / 32) {
        const unsigned end = min((group + 1) * TILE_ROWS, parts);
        groups[group][rank] = sum_group(values, p.cols, own, first + group * TILE_ROWS, first + end);
    }
    __syncthreads();
    if (warp != 0 || column >= p.cols) return;
    float total = 0.0f;
    for (unsigned group = 0; group < count; ++group) {
        total = __fadd_rn(total, groups[group][rank]);
    }
    const unsigned long long at = span * p.cols + column;
    const float sum = __fmul_rn(total, p.factors[which].get());
    const In<float> before = p.before[which];
    p.sums[which].cached(at, before.present() ? __fadd_rn(before.cached(at), sum) : sum);
}

FD_KERNEL(sum_rows_f32, SumRowsParams, THREADS, sum_rows)
