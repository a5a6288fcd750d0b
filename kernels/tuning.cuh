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
// A macro has one value, or one for a chip (`__CUDA_ARCH__ == 900`) and one for the others: nothing but an H200 was timed, and
// its value holds for all of sm_90. "H200" in a comment is the run of 2026-11-28 at commit ca5544d, microseconds a call of bf16
// at 16384x1024 where nothing else is said: `value: time`. All but the first constant were timed with FD_LOADS_EVICT_FIRST = 1.
// What is not named there was not timed.
//
// Constants with a twin in Rust are not here: THREADS (kernel.cuh), the shapes of teams (team.cuh), the sizes of tiles and
// spans (sum_tile.cuh, dropout_add_norm.cu, embedding_dropout.cu), DIGITS and OFFSETS_THREADS (sort_rows.cu), TENSORS and
// ELEMENTS_A_BLOCK (transformer/elements.cuh). device_bench does not time the kernels in transformer/, so nothing of them is
// here. The bounds of kernels for unaligned rows stand in their files: they prevent spills.

#pragma once

/// 1: what is read once is loaded evict-first, in every operator; 0: by the default policy. H200: dropout forward 0: 17.3,
/// 1: 17.8; dropout_add forward 0: 24.8, 1: 25.8, and at 262144x1024 0: 368, 1: 388. Other operators were not timed.
// tune: 0 1
// file: dropout.cu dropout_add.cu bias_act_dropout.cu dropout_add_norm.cu softmax_dropout.cu
// case: dropout forward bf16 16384x1024
// case: dropout_add forward bf16 16384x1024
// case: dropout_add forward bf16 262144x1024
// case: bias_gelu_dropout forward bf16 16384x1024
// case: dropout_add_layernorm forward bf16 16384x1024
// case: dropout_add_layernorm backward bf16 16384x1024
// case: softmax_dropout forward bf16 16384x1024
// case: softmax_dropout backward bf16 16384x1024
#ifndef FD_LOADS_EVICT_FIRST
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#define FD_LOADS_EVICT_FIRST 0
#else
#define FD_LOADS_EVICT_FIRST 1
#endif
#endif
static_assert(FD_LOADS_EVICT_FIRST == 0 || FD_LOADS_EVICT_FIRST == 1, "FD_LOADS_EVICT_FIRST: 0 or 1");

/// 1: whole octets are stored evict-first; 0: by the default policy, and the next kernel finds in L2 what was written. H200:
/// dropout forward 0: 17.7, 1: 17.9; dropout_add forward 0: 25.7, 1: 25.9, and at 262144x1024 0: 387, 1: 388. (On another H200,
/// 2026-11-26, with two octets a thread, dropout of 2^28 elements took 0: 274, 1: 260, and a memcpy 258.)
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
/// where ptxas would take 128 for sm_90; for the other chips it then spills. H200: 512: 36.5, 640: 36.1, 768: 42.3, 1024: 60.5;
/// 2048x8192: 512: 39.1, 640: 39.0, 768: 44.2, 1024: 61.7.
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

/// Such threads of a norm's backward pass in 16-bit storage, rows that are not summed in one pass. ptxas takes up to 128
/// registers. H200, 2048x8192: 0: 80.3, 768: 89.1.
// tune: 0 768
// file: dropout_add_norm.cu
// case: dropout_add_layernorm backward bf16 2048x8192
#ifndef FD_NORM_BACKWARD_THREADS
#define FD_NORM_BACKWARD_THREADS 0
#endif
static_assert(FD_NORM_BACKWARD_THREADS >= 0 && FD_NORM_BACKWARD_THREADS <= 2048, "FD_NORM_BACKWARD_THREADS");

/// Such threads of a softmax's forward pass without a mask, aligned rows in 16-bit storage. H200: 0: 19.2, 640: 19.1, 768: 19.1,
/// 1024: 19.0.
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

/// Such threads of its backward pass. H200: 0: 28.4, 640: 27.7, 768: 28.6; 1024, which spills: 35.1.
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

/// Such threads of a softmax's forward pass with a mask, rows of at most 2,048 columns in 16-bit storage. Without a bound ptxas
/// spills for no reason; with 1024 it spills for sm_80. H200, causal: 512: 18.9, 640: 18.9, 768: 18.9, 1024: 17.7.
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

/// Such threads of its backward pass, rows of any length that is held. H200, causal: 512: 25.1, 640: 25.1, 1024: 35.0; 768: 23.7,
/// for all that it spills 76 bytes: with fewer registers by other means there are 5 % to gain.
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

/// Rows of an entry that a thread loads at once. H200, when all entries were summed by blocks: 2: 419, 4: 432; 8, which spills:
/// 598. In a walk: not timed.
// tune: 1 2 4
// file: embedding_dropout.cu
// case: embedding_dropout backward bf16 16384x1024
#ifndef FD_TABLE_GRAD_ROWS
#define FD_TABLE_GRAD_ROWS 2
#endif
static_assert(FD_TABLE_GRAD_ROWS >= 1 && FD_TABLE_GRAD_ROWS <= 64, "FD_TABLE_GRAD_ROWS: of a tile's 64");

/// Counts that a thread of sort_rows_offsets loads at once. H200, before the second loop loaded several: 8, 16 and 32 made no
/// difference.
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
/// registers spill. H200: dropout_add 64: 25.8, 128: 25.8, 256: 26.1; bias_act_dropout with GELU 64: 39.4, 128: 38.8, 256: 50.0.
// tune: 64 128
// file: dropout_add.cu bias_act_dropout.cu
// case: bias_dropout_add backward bf16 16384x1024
// case: bias_gelu_dropout backward bf16 16384x1024
#ifndef FD_SUM_TILE_BYTES
#define FD_SUM_TILE_BYTES 128
#endif
static_assert(FD_SUM_TILE_BYTES >= 16 && FD_SUM_TILE_BYTES <= 1024, "FD_SUM_TILE_BYTES");

/// The same in f32. H200, dropout_add, f32: 64: 47.5, 128: 51.7, 256: 49.3. bias_act_dropout, which has 2 rows either way, was
/// not timed.
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

/// Partial sums that a thread loads at once, of the 64 of a group. Not timed.
// tune: 8 16 32 64
// file: sum_rows.cu
// case: bias_dropout_add backward bf16 16384x1024
// case: bias_dropout_add backward bf16 262144x1024
#ifndef FD_SUM_ROWS_AT_ONCE
#define FD_SUM_ROWS_AT_ONCE 16
#endif
static_assert(FD_SUM_ROWS_AT_ONCE >= 1 && FD_SUM_ROWS_AT_ONCE <= 64, "FD_SUM_ROWS_AT_ONCE: of a group's 64");
