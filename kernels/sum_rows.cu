// sum_rows: one level of the tree that adds up a gradient over the rows of a tensor.
//
//     sums[g, c] = factor * (parts[64 g, c] + parts[64 g + 1, c] + .. + parts[64 g + 63, c])
//
// in order, from +0. The operators' own kernels add up the first 64 rows of each column; this one is
// launched until one row is left. No atomics: the same bits in every run.
//
// Bytes an element of `parts`: 4 read, and a 64th of that written.

#include "sum_tile.cuh"

struct SumRowsParams {
    In<float> parts;  // [count, cols]
    Out<float> sums;  // [ceil(count / 64), cols], at least one row
    unsigned long long count;
    unsigned long long cols;
    IndexDivisor blocks_a_row;  // ceil(cols / 256)
    float factor;               // the scale on the last level, otherwise 1
};
static_assert(sizeof(SumRowsParams) == 48, "sum_rows.rs: Params");

__device__ __forceinline__ void sum_rows(const SumRowsParams& p) {
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

FD_KERNEL(sum_rows_f32, SumRowsParams, THREADS, sum_rows)
