// The constants of kernels that can be tried on a GPU without a change of the host's code.
//
// Each is a macro, so that nvcc's command line can give another value: -DFD_SUM_ROWS_AT_ONCE=32. Its comment says what it is
// and what was measured. `run tune` (benches/peers/tune.py) compiles the values behind `tune:`, and times them on the cases.
// A value that is taken must also pass .ci/budget.py of the sources, which forbids spills on every chip.
//
// Above each macro stand three kinds of lines:
//
//     tune: the values to try, the present one among them
//     file: the kernels to compile
//     case: operator, pass, storage type and shape, as device_bench names them; one a line
//
// Constants with a twin in Rust are not here: THREADS (kernel.cuh), the shapes of teams (team.cuh), the sizes of tiles and
// spans (sum_tile.cuh, dropout_add_norm.cu, embedding_dropout.cu), DIGITS and OFFSETS_THREADS (sort_rows.cu), TENSORS and
// ELEMENTS_A_BLOCK (transformer/elements.cuh). device_bench does not time the kernels in transformer/, so nothing of them is
// here. The bounds of kernels for unaligned rows stand in their files: they prevent spills.

#pragma once

/// 1: what is read once is loaded evict-first; 0: by the default policy. Not timed.
// tune: 0 1
// file: dropout.cu dropout_add.cu
// case: dropout forward bf16 16384x1024
// case: dropout_add forward bf16 16384x1024
// case: dropout_add forward bf16 262144x1024
#ifndef FD_LOADS_EVICT_FIRST
#define FD_LOADS_EVICT_FIRST 1
#endif
static_assert(FD_LOADS_EVICT_FIRST == 0 || FD_LOADS_EVICT_FIRST == 1, "FD_LOADS_EVICT_FIRST: 0 or 1");

/// 1: whole octets are stored evict-first; 0: by the default policy, and the next kernel finds in L2 what was written. On an
/// H200, 2^28 elements of bf16, a dropout with two octets a thread took 274 us with 0 and 260 us with 1; a memcpy took 258 us.
/// With one octet a thread, as the kernels have it: not timed.
// tune: 0 1
// file: dropout.cu dropout_add.cu
// case: dropout forward bf16 16384x1024
// case: dropout_add forward bf16 16384x1024
// case: dropout_add forward bf16 262144x1024
#ifndef FD_STORES_EVICT_FIRST
#define FD_STORES_EVICT_FIRST 0
#endif
static_assert(FD_STORES_EVICT_FIRST == 0 || FD_STORES_EVICT_FIRST == 1, "FD_STORES_EVICT_FIRST: 0 or 1");

// Threads that a multiprocessor must have registers for. 0: ptxas takes what registers it likes, for one block at least.

/// Such threads of a norm's forward pass, aligned rows in 16-bit storage. In blocks of 128 threads 640 are 96 registers each,
/// where ptxas would take 128 for sm_90; for the other chips it then spills. Not timed.
// tune: 512 640 768 1024
// file: dropout_add_norm.cu
// case: dropout_add_layernorm forward bf16 16384x1024
// case: dropout_add_layernorm forward bf16 2048x8192
#ifndef FD_NORM_FORWARD_THREADS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define FD_NORM_FORWARD_THREADS 640
#else
#define FD_NORM_FORWARD_THREADS 512
#endif
#endif
static_assert(FD_NORM_FORWARD_THREADS >= 0 && FD_NORM_FORWARD_THREADS <= 2048, "FD_NORM_FORWARD_THREADS");

/// Such threads of a norm's backward pass, rows that are not summed in one pass. ptxas takes up to 128 registers. Not timed.
// tune: 0 768
// file: dropout_add_norm.cu
// case: dropout_add_layernorm backward bf16 2048x8192
#ifndef FD_NORM_BACKWARD_THREADS
#define FD_NORM_BACKWARD_THREADS 0
#endif
static_assert(FD_NORM_BACKWARD_THREADS >= 0 && FD_NORM_BACKWARD_THREADS <= 2048, "FD_NORM_BACKWARD_THREADS");

/// Such threads of both passes of a softmax without a mask, aligned rows. Not timed.
// tune: 0 640 768 1024
// file: softmax_dropout.cu
// case: softmax_dropout forward bf16 16384x1024
// case: softmax_dropout backward bf16 16384x1024
#ifndef FD_SOFTMAX_THREADS
#define FD_SOFTMAX_THREADS 0
#endif
static_assert(FD_SOFTMAX_THREADS >= 0 && FD_SOFTMAX_THREADS <= 2048, "FD_SOFTMAX_THREADS");

/// Such threads of both passes of a softmax with a mask. Without a bound ptxas spills for no reason. Not timed.
// tune: 512 640 768 1024
// file: softmax_dropout.cu
// case: causal_softmax_dropout forward bf16 16384x1024
// case: causal_softmax_dropout backward bf16 16384x1024
#ifndef FD_SOFTMAX_MASKED_THREADS
#define FD_SOFTMAX_MASKED_THREADS 512
#endif
static_assert(FD_SOFTMAX_MASKED_THREADS >= 0 && FD_SOFTMAX_MASKED_THREADS <= 2048, "FD_SOFTMAX_MASKED_THREADS");

// The gradient of a table.

/// Blocks that a multiprocessor must have registers for, in 16-bit storage: one more than ptxas would take, without a spill.
/// Not timed.
// tune: 2 3 4
// file: embedding_dropout.cu
// case: embedding_dropout backward bf16 16384x1024
#ifndef FD_TABLE_GRAD_BLOCKS
#define FD_TABLE_GRAD_BLOCKS 3
#endif
static_assert(FD_TABLE_GRAD_BLOCKS >= 1 && FD_TABLE_GRAD_BLOCKS <= 8, "FD_TABLE_GRAD_BLOCKS: of 256 threads");

/// The same in f32. 1 gives the same code as 2 for sm_90. Not timed.
// tune: 2 3
// file: embedding_dropout.cu
// case: embedding_dropout backward f32 16384x1024
#ifndef FD_TABLE_GRAD_BLOCKS_F32
#define FD_TABLE_GRAD_BLOCKS_F32 2
#endif
static_assert(FD_TABLE_GRAD_BLOCKS_F32 >= 1 && FD_TABLE_GRAD_BLOCKS_F32 <= 8, "FD_TABLE_GRAD_BLOCKS_F32: of 256 threads");

/// Rows of a tile that a thread loads at once. Not timed.
// tune: 2 4 8
// file: embedding_dropout.cu
// case: embedding_dropout backward bf16 16384x1024
#ifndef FD_TABLE_GRAD_ROWS
#define FD_TABLE_GRAD_ROWS 4
#endif
static_assert(FD_TABLE_GRAD_ROWS >= 1 && FD_TABLE_GRAD_ROWS <= 64, "FD_TABLE_GRAD_ROWS: of a tile's 64");

/// Counts that a thread of sort_rows_offsets loads at once. Not timed.
// tune: 8 16 32
// file: sort_rows.cu
// case: embedding_dropout backward bf16 16384x1024
#ifndef FD_SORT_ROWS_AT_ONCE
#define FD_SORT_ROWS_AT_ONCE 16
#endif
static_assert(FD_SORT_ROWS_AT_ONCE >= 1 && FD_SORT_ROWS_AT_ONCE <= 64, "FD_SORT_ROWS_AT_ONCE");

// Sums over rows.

/// Bytes that a lane loads at once where a warp sums a tile: the least power of two of rows that has so many. Of 16-bit storage
/// those are 8 rows of dropout_add, 96 registers, and 4 rows of bias_act_dropout, 128 registers. A multiprocessor of sm_90 then
/// has 80 and 64 KB on their way. Bounds of 64 to 80 registers spill. Not timed.
// tune: 64 128 256
// file: dropout_add.cu bias_act_dropout.cu
// case: bias_dropout_add backward bf16 16384x1024
// case: bias_gelu_dropout backward bf16 16384x1024
// case: bias_dropout_add backward f32 16384x1024
#ifndef FD_SUM_TILE_BYTES
#define FD_SUM_TILE_BYTES 128
#endif
static_assert(FD_SUM_TILE_BYTES >= 16 && FD_SUM_TILE_BYTES <= 1024, "FD_SUM_TILE_BYTES");

/// Threads that a multiprocessor must have registers for where a norm's gradient sums over rows, in 16-bit storage. 512 are 128
/// registers each. Not timed.
// tune: 256 512
// file: dropout_add_norm.cu
// case: dropout_add_layernorm backward bf16 16384x1024
// case: dropout_add_layernorm backward bf16 2048x1024
#ifndef FD_NORM_SUMS_THREADS
#define FD_NORM_SUMS_THREADS 512
#endif
static_assert(FD_NORM_SUMS_THREADS >= 0 && FD_NORM_SUMS_THREADS <= 2048, "FD_NORM_SUMS_THREADS");

/// Partial sums that a thread loads at once, of the 64 of a group. Not timed.
// tune: 8 16 32 64
// file: sum_rows.cu
// case: bias_dropout_add backward bf16 16384x1024
// case: bias_dropout_add backward bf16 262144x1024
#ifndef FD_SUM_ROWS_AT_ONCE
#define FD_SUM_ROWS_AT_ONCE 16
#endif
static_assert(FD_SUM_ROWS_AT_ONCE >= 1 && FD_SUM_ROWS_AT_ONCE <= 64, "FD_SUM_ROWS_AT_ONCE: of a group's 64");
