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

/// 1: what is read once is loaded evict-first; 0: by the default policy. On an H200 of 2026-11-28, us with 0 and with 1:
/// dropout 17.3 and 17.8, dropout_add 24.8 and 25.8 at 2^24 elements, 368 and 388 at 2^28.
// tune: 0 1
// file: dropout.cu dropout_add.cu
// case: dropout forward bf16 16384x1024
// case: dropout_add forward bf16 16384x1024
// case: dropout_add forward bf16 262144x1024
#ifndef FD_LOADS_EVICT_FIRST
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define FD_LOADS_EVICT_FIRST 0
#else
#define FD_LOADS_EVICT_FIRST 1
#endif
#endif
static_assert(FD_LOADS_EVICT_FIRST == 0 || FD_LOADS_EVICT_FIRST == 1, "FD_LOADS_EVICT_FIRST: 0 or 1");

/// 1: whole octets are stored evict-first; 0: by the default policy, and the next kernel finds in L2 what was written. On an
/// H200, 2^28 elements of bf16, a dropout with two octets a thread took 274 us with 0 and 260 us with 1; a memcpy took 258 us.
/// With one octet a thread, as the kernels have it, 2026-11-28, us with 0 and with 1: dropout 17.7 and 17.9, dropout_add 25.7
/// and 25.9 at 2^24 elements, 387 and 388 at 2^28.
// tune: 0 1
// file: dropout.cu dropout_add.cu
// case: dropout forward bf16 16384x1024
// case: dropout_add forward bf16 16384x1024
// case: dropout_add forward bf16 262144x1024
#ifndef FD_STORES_EVICT_FIRST
#define FD_STORES_EVICT_FIRST 0
#endif
static_assert(FD_STORES_EVICT_FIRST == 0 || FD_STORES_EVICT_FIRST == 1, "FD_STORES_EVICT_FIRST: 0 or 1");

// Threads that a multiprocessor must have registers for: this bounds the registers of each. With 0 there is no such bound, and
// __launch_bounds__ only promises that one block fits.

/// Such threads of a norm's forward pass, aligned rows in 16-bit storage. In blocks of 128 threads 640 are 96 registers each,
/// where ptxas would take 128 for sm_90; for the other chips it then spills. On an H200 of 2026-11-28, us, rows of 1,024 and of
/// 8,192 columns: 36.5 and 39.1 with 512, 36.1 and 39.0 with 640, 42.3 and 44.2 with 768, 60.5 and 61.7 with 1024.
// tune: 512 640 768
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

/// Such threads of a norm's backward pass, rows that are not summed in one pass. ptxas takes up to 128 registers. On an H200
/// of 2026-11-28, us: 80.3 with 0, 89.1 with 768.
// tune: 0 768
// file: dropout_add_norm.cu
// case: dropout_add_layernorm backward bf16 2048x8192
#ifndef FD_NORM_BACKWARD_THREADS
#define FD_NORM_BACKWARD_THREADS 0
#endif
static_assert(FD_NORM_BACKWARD_THREADS >= 0 && FD_NORM_BACKWARD_THREADS <= 2048, "FD_NORM_BACKWARD_THREADS");

/// Such threads of a softmax's forward pass without a mask, aligned rows. On an H200 of 2026-11-28, us: 19.2 with 0, 19.1 with
/// 640 and 768, 19.0 with 1024.
// tune: 0 640 768 1024
// file: softmax_dropout.cu
// case: softmax_dropout forward bf16 16384x1024
// case: softmax_dropout forward bf16 2048x8192
#ifndef FD_SOFTMAX_FORWARD_THREADS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define FD_SOFTMAX_FORWARD_THREADS 1024
#else
#define FD_SOFTMAX_FORWARD_THREADS 0
#endif
#endif
static_assert(FD_SOFTMAX_FORWARD_THREADS >= 0 && FD_SOFTMAX_FORWARD_THREADS <= 2048, "FD_SOFTMAX_FORWARD_THREADS");

/// Such threads of its backward pass: 28.4 with 0, 27.7 with 640, 28.6 with 768, 35.1 with 1024, which spills.
// tune: 0 512 640 768
// file: softmax_dropout.cu
// case: softmax_dropout backward bf16 16384x1024
// case: softmax_dropout backward bf16 2048x8192
#ifndef FD_SOFTMAX_BACKWARD_THREADS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define FD_SOFTMAX_BACKWARD_THREADS 640
#else
#define FD_SOFTMAX_BACKWARD_THREADS 0
#endif
#endif
static_assert(FD_SOFTMAX_BACKWARD_THREADS >= 0 && FD_SOFTMAX_BACKWARD_THREADS <= 2048, "FD_SOFTMAX_BACKWARD_THREADS");

/// Such threads of a softmax's forward pass with a mask, rows of at most 2,048 columns. Without a bound ptxas spills for no
/// reason, and for the other chips it spills with this one. On an H200 of 2026-11-28, us, causal: 18.9 with 512 to 768, 17.7
/// with 1024.
// tune: 512 768 1024
// file: softmax_dropout.cu
// case: causal_softmax_dropout forward bf16 16384x1024
#ifndef FD_SOFTMAX_MASKED_FORWARD_THREADS
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define FD_SOFTMAX_MASKED_FORWARD_THREADS 1024
#else
#define FD_SOFTMAX_MASKED_FORWARD_THREADS 512
#endif
#endif
static_assert(FD_SOFTMAX_MASKED_FORWARD_THREADS >= 0 && FD_SOFTMAX_MASKED_FORWARD_THREADS <= 2048,
              "FD_SOFTMAX_MASKED_FORWARD_THREADS");

/// Such threads of its backward pass: 25.1 with 512 and 640, 35.0 with 1024. It is 23.7 with 768, which spills 80 bytes in
/// rows of 1,024 columns: with fewer registers by other means there are 5 % to gain.
// tune: 512 640 768
// file: softmax_dropout.cu
// case: causal_softmax_dropout backward bf16 16384x1024
// case: causal_softmax_dropout backward bf16 2048x8192
#ifndef FD_SOFTMAX_MASKED_BACKWARD_THREADS
#define FD_SOFTMAX_MASKED_BACKWARD_THREADS 512
#endif
static_assert(FD_SOFTMAX_MASKED_BACKWARD_THREADS >= 0 && FD_SOFTMAX_MASKED_BACKWARD_THREADS <= 2048,
              "FD_SOFTMAX_MASKED_BACKWARD_THREADS");

// The gradient of a table.

/// Threads that a multiprocessor must have registers for in a walk, in 16-bit storage. Not timed.
// tune: 512 768 1024
// file: embedding_dropout.cu
// case: embedding_dropout backward bf16 16384x1024
#ifndef FD_TABLE_WALK_THREADS
#define FD_TABLE_WALK_THREADS 1024
#endif
static_assert(FD_TABLE_WALK_THREADS >= 0 && FD_TABLE_WALK_THREADS <= 2048, "FD_TABLE_WALK_THREADS");

/// The same in f32. Not timed.
// tune: 512 768
// file: embedding_dropout.cu
// case: embedding_dropout backward f32 16384x1024
#ifndef FD_TABLE_WALK_THREADS_F32
#define FD_TABLE_WALK_THREADS_F32 768
#endif
static_assert(FD_TABLE_WALK_THREADS_F32 >= 0 && FD_TABLE_WALK_THREADS_F32 <= 2048, "FD_TABLE_WALK_THREADS_F32");

/// Rows of an entry that a thread loads at once. In blocks alone, before there was a walk, us on an H200 of 2026-11-28: 419
/// with 2, 432 with 4, 598 with 8, which spills.
// tune: 1 2 4
// file: embedding_dropout.cu
// case: embedding_dropout backward bf16 16384x1024
#ifndef FD_TABLE_GRAD_ROWS
#define FD_TABLE_GRAD_ROWS 2
#endif
static_assert(FD_TABLE_GRAD_ROWS >= 1 && FD_TABLE_GRAD_ROWS <= 64, "FD_TABLE_GRAD_ROWS: of a tile's 64");

/// Counts that a thread of sort_rows_offsets loads at once. Not timed. (It was, when the second loop had a load and a store in
/// turn: 8, 16 and 32 took the same time.)
// tune: 8 16 32
// file: sort_rows.cu
// case: embedding_dropout backward bf16 16384x1024
#ifndef FD_SORT_ROWS_AT_ONCE
#define FD_SORT_ROWS_AT_ONCE 16
#endif
static_assert(FD_SORT_ROWS_AT_ONCE >= 1 && FD_SORT_ROWS_AT_ONCE <= 64, "FD_SORT_ROWS_AT_ONCE");

// Sums over rows.

/// Bytes that a lane loads at once where a warp sums a tile in 16-bit storage: the least power of two of rows, from 2 on, that
/// has so many. Those are 8 rows of dropout_add, 96 registers, and 4 rows of bias_act_dropout, 128 registers. Bounds of 64 to 80
/// registers spill. On an H200 of 2026-11-28, us, dropout_add and bias_act_dropout (GELU): 25.8 and 39.4 with 64, 25.8 and 38.8 with 128,
/// 26.1 and 50.0 with 256.
// tune: 64 128
// file: dropout_add.cu bias_act_dropout.cu
// case: bias_dropout_add backward bf16 16384x1024
// case: bias_gelu_dropout backward bf16 16384x1024
#ifndef FD_SUM_TILE_BYTES
#define FD_SUM_TILE_BYTES 128
#endif
static_assert(FD_SUM_TILE_BYTES >= 16 && FD_SUM_TILE_BYTES <= 1024, "FD_SUM_TILE_BYTES");

/// The same in f32. dropout_add: 47.5 with 64, 51.7 with 128, 49.3 with 256.
// tune: 32 64 128
// file: dropout_add.cu bias_act_dropout.cu
// case: bias_dropout_add backward f32 16384x1024
// case: bias_gelu_dropout backward f32 16384x1024
#ifndef FD_SUM_TILE_BYTES_F32
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define FD_SUM_TILE_BYTES_F32 64
#else
#define FD_SUM_TILE_BYTES_F32 128
#endif
#endif
static_assert(FD_SUM_TILE_BYTES_F32 >= 32 && FD_SUM_TILE_BYTES_F32 <= 1024, "FD_SUM_TILE_BYTES_F32");

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

/// By how many rows such a team has a row brought to L2 before it loads it; 0: not at all. Not timed.
// tune: 0 1 2
// file: dropout_add_norm.cu
// case: dropout_add_layernorm backward bf16 16384x1024
// case: dropout_add_layernorm backward f32 16384x1024
#ifndef FD_NORM_SUMS_AHEAD
#define FD_NORM_SUMS_AHEAD 0
#endif
static_assert(FD_NORM_SUMS_AHEAD >= 0 && FD_NORM_SUMS_AHEAD <= 16, "FD_NORM_SUMS_AHEAD: of a run's 16");

/// Partial sums that a thread loads at once, of the 64 of a group. Not timed.
// tune: 8 16 32 64
// file: sum_rows.cu
// case: bias_dropout_add backward bf16 16384x1024
// case: bias_dropout_add backward bf16 262144x1024
#ifndef FD_SUM_ROWS_AT_ONCE
#define FD_SUM_ROWS_AT_ONCE 16
#endif
static_assert(FD_SUM_ROWS_AT_ONCE >= 1 && FD_SUM_ROWS_AT_ONCE <= 64, "FD_SUM_ROWS_AT_ONCE: of a group's 64");
