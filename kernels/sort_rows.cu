// sort_rows: the rows of a tensor in the order of the table's entry that they take, and those of an entry in their own order;
// for the gradients of tables (embedding_dropout.cu).
//
// A stable radix sort: 8 bits of the keys a pass, lowest first. The key of a row is its entry, or the number of entries where
// it takes none. The rows are cut into chunks, a warp each, and a pass is three kernels:
//
//     count    how many keys of each chunk have each digit
//     offsets  where the first of those goes: behind all keys with lower digits, and those of earlier chunks (one block)
//     scatter  each key and the number of its row go there, in order
//
// No atomics: the lanes of a warp find those with the same digit by eight votes.
//
// Bytes a row and pass: 4 read by count; 8 read by scatter, 4 in the first pass; 8 written.

#include "kernel.cuh"

/// Values of a digit.
constexpr unsigned DIGITS = 256;

/// Threads of the block that adds up the counts: four for each digit.
constexpr unsigned OFFSETS_THREADS = 1024;

struct SortParams {
    In<unsigned> ids;   // [rows]; of the first pass
    In<unsigned> keys;  // of the others, with the numbers of their rows
    In<unsigned> rows;
    Out<unsigned> keys_out;  // scatter
    Out<unsigned> rows_out;
    In<unsigned> counts;  // [chunks, DIGITS]; scatter: where each digit's first key goes
    Out<unsigned> counts_out;
    unsigned count;        // rows
    unsigned entries;
    unsigned chunk;  // rows of one, whole warps
    unsigned chunks;
    unsigned shift;  // of the digit in a key
    unsigned padding;

    __device__ __forceinline__ unsigned key(unsigned i) const {
        return ids.present() ? min(ids.cached(i), entries) : keys.cached(i);
    }
};
static_assert(sizeof(SortParams) == 80, "sort_rows.rs: SortParams");

/// A chunk, as its warp sees it: 32 keys at a time.
struct Chunk {
    unsigned number = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    unsigned rank = threadIdx.x % 32;

    /// The lanes of the warp that have the same digit, of those that have one. All 32 lanes must be here.
    __device__ __forceinline__ static unsigned peers(unsigned digit, bool exists) {
        unsigned peers = __ballot_sync(0xffffffffu, exists);
#pragma unroll
        for (unsigned bit = 0; bit < 8; ++bit) {
            const bool set = digit >> bit & 1;
            const unsigned lanes = __ballot_sync(0xffffffffu, set);
            peers &= set ? lanes : ~lanes;
        }
        return peers;
    }

    /// Calls `each(key, place, counter)` for the keys of the chunk. `place` is where the pass before put the key. `counter` is
    /// its digit's counter, and one more for each earlier key of the chunk with this digit. `counters` belong to the warp.
    template <typename Each>
    __device__ __forceinline__ void each(const SortParams& p, unsigned (&counters)[DIGITS],
                                         Each each) const {
        const unsigned end = min((number + 1) * p.chunk, p.count);
        for (unsigned first = number * p.chunk; first < end; first += 32) {
            const unsigned place = first + rank;
            const bool exists = place < end;
            const unsigned key = exists ? p.key(place) : 0;
            const unsigned digit = key >> p.shift & (DIGITS - 1);
            const unsigned lanes = peers(digit, exists);
            const unsigned before = __popc(lanes & ((1u << rank) - 1));
            const unsigned counter = counters[digit];
            if (exists) each(key, place, counter + before);
            __syncwarp();
            if (exists && before == 0) counters[digit] = counter + __popc(lanes);
            __syncwarp();
        }
    }
};

__device__ __forceinline__ void sort_count(const SortParams& p) {
    __shared__ unsigned counters[THREADS / 32][DIGITS];
    const Chunk chunk;
    if (chunk.number >= p.chunks) return;  // the whole warp
    unsigned(&own)[DIGITS] = counters[threadIdx.x / 32];
    for (unsigned digit = chunk.rank; digit < DIGITS; digit += 32) own[digit] = 0;
    __syncwarp();
    chunk.each(p, own, [](unsigned, unsigned, unsigned) {});
    for (unsigned digit = chunk.rank; digit < DIGITS; digit += 32) {
        p.counts_out.cached(1ull * chunk.number * DIGITS + digit, own[digit]);
    }
}

/// Calls `each(chunk, count)` for the chunks from `first` to `end`, with the counts of a digit. Some of them are loaded at once,
/// before `each` stores anything: offsets go where counts were, so the compiler moves no load ahead of a store.
template <typename Each>
__device__ __forceinline__ void each_count(const SortParams& p, unsigned digit, unsigned first, unsigned end, Each each) {
    constexpr unsigned AT_ONCE = FD_SORT_ROWS_AT_ONCE;
    for (unsigned chunk = first; chunk < end; chunk += AT_ONCE) {
        unsigned counts[AT_ONCE];
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; ++i) {
            counts[i] = chunk + i < end ? p.counts.cached((1ull * chunk + i) * DIGITS + digit) : 0;
        }
#pragma unroll
        for (unsigned i = 0; i < AT_ONCE; ++i) {
            if (chunk + i < end) each(chunk + i, counts[i]);
        }
    }
}

/// One block. Four threads a digit, a quarter of the chunks each.
__device__ __forceinline__ void sort_offsets(const SortParams& p) {
    constexpr unsigned PARTS = OFFSETS_THREADS / DIGITS;
    __shared__ unsigned totals[PARTS][DIGITS];
    __shared__ unsigned before[2][DIGITS];
    const unsigned digit = threadIdx.x % DIGITS;
    const unsigned part = threadIdx.x / DIGITS;
    const unsigned a_part = (p.chunks + PARTS - 1) / PARTS;
    const unsigned first = min(part * a_part, p.chunks);
    const unsigned end = min(first + a_part, p.chunks);
    unsigned total = 0;
    each_count(p, digit, first, end, [&](unsigned, unsigned count) { total += count; });
    totals[part][digit] = total;
    __syncthreads();
    unsigned of_digit = 0;
    unsigned of_parts = 0;
#pragma unroll
    for (unsigned i = 0; i < PARTS; ++i) {
        if (i < part) of_parts += totals[i][digit];
        of_digit += totals[i][digit];
    }
    // Sums over the digits up to each one, over twice as many at each step.
    if (part == 0) before[0][digit] = of_digit;
    unsigned now = 0;
    for (unsigned step = 1; step < DIGITS; step *= 2) {
        __syncthreads();
        if (part == 0) {
            const unsigned below = digit >= step ? before[now][digit - step] : 0;
            before[1 - now][digit] = before[now][digit] + below;
        }
        now = 1 - now;
    }
    __syncthreads();
    unsigned offset = before[now][digit] - of_digit + of_parts;
    each_count(p, digit, first, end, [&](unsigned chunk, unsigned count) {
        p.counts_out.cached(1ull * chunk * DIGITS + digit, offset);
        offset += count;
    });
}

__device__ __forceinline__ void sort_scatter(const SortParams& p) {
    __shared__ unsigned counters[THREADS / 32][DIGITS];
    const Chunk chunk;
    if (chunk.number >= p.chunks) return;  // the whole warp
    unsigned(&own)[DIGITS] = counters[threadIdx.x / 32];
    for (unsigned digit = chunk.rank; digit < DIGITS; digit += 32) {
        own[digit] = p.counts.cached(1ull * chunk.number * DIGITS + digit);
    }
    __syncwarp();
    chunk.each(p, own, [&](unsigned key, unsigned place, unsigned target) {
        p.keys_out.cached(target, key);
        p.rows_out.cached(target, p.rows.present() ? p.rows.cached(place) : place);
    });
}

FD_KERNEL(sort_rows_count, SortParams, THREADS, sort_count)
FD_KERNEL(sort_rows_offsets, SortParams, OFFSETS_THREADS, sort_offsets)
FD_KERNEL(sort_rows_scatter, SortParams, THREADS, sort_scatter)
