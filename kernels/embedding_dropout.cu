// embedding_dropout: y = D(token[id] + position[pos] + segment[seg]), and the gradients of the tables.
//
// Forward, a row r (a token) at a time; the sum is rounded to f32 after each addition:
//
//     y[r, c] = kept(r, c) ? round((token[id[r], c] + position[pos[r], c] + segment[seg[r], c]) * scale) : +0
//
// A row with an id that is in no table has y = +0, and the smallest such row is left in `report`.
//
// Bytes an element: one written, and one read for each table (4 to 8 in 16-bit storage); what repeats, as
// positions and segments do, is read from L2. The ids of a row, 4 bytes each, are read by all of its
// octets, from L1; the loads of an octet's entries wait for them. All 16-byte loads of a thread are issued
// before the first of them is waited for (sm_90, CUDA 13.0; compiled, not timed).
//
// Backward, for a table, with g = kept ? dy * scale : +0 in f32:
//
//     gradient[e, c] += sum over r of (id[r] == e ? g[r, c] : +0)
//
// in the order of the tree that src/ops/sum_rows.rs defines, without atomics. A block owns an entry and some columns. It
// takes 4096 rows (a span) at a time, and adds up those that take the entry. The others are +0 and are left out, which
// changes no sum that started from +0. Each 64 rows (a tile) are added by one thread an octet, in four runs of 16; tiles at
// the same time by the other threads of the block, and then in order.
//
// A block finds its rows in one of two ways:
//
// - where rows times blocks are few, among all ids;
// - otherwise in the order of the entries (sort_rows.cu), where they follow each other.
//
// There is a block for each entry. Where entries are more than rows there is one for each row, or for each place in that
// order, and only that of an entry's first row goes on.
//
// Bytes: each element of dy read once a table, each gradient of an entry that was taken read and written once. Beside them
// the ids: 4 * rows * blocks for each 2048 columns at most, from L2, or what sort_rows.cu moves.

#include "embedding.cuh"
#include "kernel.cuh"
#include "sum_tile.cuh"

template <typename T>
struct EmbeddingParams {
    Mask mask;
    Octets octets;
    Embeddings<T> embeddings;
    Out<T> y;
    Out<unsigned> report;
};
static_assert(sizeof(EmbeddingParams<float>) == 336, "embedding_dropout.rs: ForwardParams");

template <typename T, bool aligned>
struct EmbeddingDropout {
    using Params = EmbeddingParams<T>;
    struct Loaded {
        typename Embeddings<T>::Loaded entries;
        bool exist;
    };

    template <typename Position>
    static __device__ __forceinline__ Loaded load(const Params& p, const Position& at) {
        const Entries entries(p.embeddings.lookups, p.mask.rows.offset + at.row);
        Loaded loaded = {};
        loaded.exist = entries.exist;
        if (entries.exist) {
            loaded.entries = p.embeddings.template load<aligned>(entries, at.column(), at.count());
        }
        return loaded;
    }

    template <typename Position>
    static __device__ __forceinline__ void finish(const Params& p, const Position& at,
                                                  const Kept& keep, float scale,
                                                  const Loaded& loaded) {
        if (!loaded.exist && at.octet == 0) p.report.lower(0, p.mask.rows.offset + at.row);
        const Values sum = p.embeddings.sum(loaded.entries);
        Values y = {};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (keep.at[j] && loaded.exist) y.at[j] = __fmul_rn(sum.at[j], scale);
        }
        p.y.template cached<aligned>(at.element(p.octets.cols), at.count(), pack<T>(y));
    }
};

FD_KERNEL(embedding_dropout_f32, EmbeddingParams<float>, THREADS,
          stream_pairs<EmbeddingDropout<float, true>>)
// Rows of an odd number of octets.
FD_KERNEL(embedding_dropout_strided_f32, EmbeddingParams<float>, THREADS,
          stream<EmbeddingDropout<float, true>>)
FD_KERNEL(embedding_dropout_f16, EmbeddingParams<f16>, THREADS, stream<EmbeddingDropout<f16, true>>)
FD_KERNEL(embedding_dropout_bf16, EmbeddingParams<bf16>, THREADS,
          stream<EmbeddingDropout<bf16, true>>)
FD_KERNEL(embedding_dropout_unaligned_f32, EmbeddingParams<float>, THREADS,
          stream<EmbeddingDropout<float, false>, false>)
FD_KERNEL(embedding_dropout_unaligned_f16, EmbeddingParams<f16>, THREADS,
          stream<EmbeddingDropout<f16, false>, false>)
FD_KERNEL(embedding_dropout_unaligned_bf16, EmbeddingParams<bf16>, THREADS,
          stream<EmbeddingDropout<bf16, false>, false>)

/// Tiles of a span, and spans of the level above: the radix of the tree. A span's rows are looked at together.
constexpr unsigned RADIX = TILE_ROWS;
constexpr unsigned SPAN = RADIX * RADIX;

template <typename T>
struct TableGradParams {
    Mask mask;
    In<T> dy;  // [rows, cols]
    In<float> before;  // [entries, cols]
    Out<float> after;  // the same memory
    Lookup taken;      // of the table whose gradient it is
    Lookup lookups[TABLES];
    unsigned long long cols;
    In<unsigned> keys;    // [rows], entries in order, `taken.entries` where a row takes none; absent: not sorted
    In<unsigned> order;   // [rows], their rows
    In<unsigned> starts;  // [entries + 1], where in this order an entry's rows begin
    unsigned rows;        // at most 2^24: 64^4
    unsigned by_place;    // 1: blocks for each place of the order, or row where there is none; 0: for each entry
    unsigned log_width;   // octets of columns a block: 2^log_width, 4 to 256
    IndexDivisor blocks;  // of an entry: ceil(octets / width)
};
static_assert(sizeof(TableGradParams<float>) == 368, "embedding_dropout.rs: TableGradParams");

/// The rows of a span that take an entry, a bit each.
struct Matches {
    unsigned words[SPAN / 32];

    /// Among all rows. All threads of the block must be here; what they find is there after the block's next barrier.
    template <typename T>
    __device__ __forceinline__ void find(const TableGradParams<T>& p, unsigned entry,
                                         unsigned first_row) {
        constexpr unsigned WORDS = SPAN / THREADS;  // of a warp; each thread has a bit of them
        const unsigned rank = threadIdx.x % 32;
        const unsigned first_word = threadIdx.x / 32 * WORDS;
        const unsigned first = first_row + 32 * first_word + rank;
        unsigned mine = p.taken.template matches<WORDS>(entry, first, p.rows);
        for (unsigned rest = mine; rest != 0; rest &= rest - 1) {
            // A row with an id that is in no table takes nothing.
            const unsigned i = __ffs(rest) - 1;
            if (!Entries(p.lookups, first + 32 * i).exist) mine &= ~(1u << i);
        }
        if (!__any_sync(0xffffffffu, mine)) {  // the usual case
            if (rank < WORDS) words[first_word + rank] = 0;
            return;
        }
#pragma unroll
        for (unsigned i = 0; i < WORDS; ++i) {
            const unsigned word = __ballot_sync(0xffffffffu, mine >> i & 1);
            if (rank == i) words[first_word + i] = word;
        }
    }

    /// Among the rows from `first` to `end` in the order of the entries, all of which take it. As `find`.
    template <typename T>
    __device__ __forceinline__ void list(const TableGradParams<T>& p, unsigned first, unsigned end,
                                         unsigned first_row) {
        const unsigned word = threadIdx.x;
        if (word >= SPAN / 32) return;
        const unsigned from = first_row + 32 * word;
        unsigned bits = 0;
        for (unsigned i = lower_bound(p.order, first, end, from); i < end; ++i) {
            const unsigned row = p.order.cached(i);
            if (row - from >= 32) break;
            // A row with an id that is in no table takes nothing.
            if (Entries(p.lookups, row).exist) bits |= 1u << (row - from);
        }
        words[word] = bits;
    }

    /// The rows of a tile.
    __device__ __forceinline__ unsigned long long tile(unsigned tile) const {
        return words[2 * tile] | 1ull * words[2 * tile + 1] << 32;
    }

    /// The tiles that have a row. All 32 threads of the warp must be here, and get the same.
    __device__ __forceinline__ unsigned long long tiles() const {
        const unsigned rank = threadIdx.x % 32;
        const unsigned low = __ballot_sync(0xffffffffu, tile(rank) != 0);
        return low | 1ull * __ballot_sync(0xffffffffu, tile(rank + 32) != 0) << 32;
    }
};

/// The bits below bit `n`, which is at most 64.
__device__ __forceinline__ unsigned long long bits_below(unsigned n) {
    return n < 64 ? (1ull << n) - 1 : ~0ull;
}

/// An octet of values a thread, in shared memory: a thread's own ones need no barrier.
struct Shelf {
    float at[8][THREADS];

    __device__ __forceinline__ void put(const Values& values) {
#pragma unroll
        for (int j = 0; j < 8; ++j) at[j][threadIdx.x] = values.at[j];
    }
    __device__ __forceinline__ Values get(unsigned thread) const {
        Values values;
#pragma unroll
        for (int j = 0; j < 8; ++j) values.at[j] = at[j][thread];
        return values;
    }
    /// Adds this thread's values to those of `above`, and makes zeros of them.
    __device__ __forceinline__ void close(Shelf& above) {
        Values sums = above.get(threadIdx.x);
        add(sums, get(threadIdx.x));
        above.put(sums);
        put({});
    }
};

/// An octet of columns of dy, as the thread that adds up its tiles sees it.
template <typename T, bool aligned>
struct Column {
    /// Rows whose dy is loaded at once.
    static constexpr unsigned ROWS = FD_TABLE_GRAD_ROWS;

    const TableGradParams<T>& p;
    unsigned octet;
    unsigned count;  // elements of it

    /// The sum of g over the rows `rows` of the 64 from `first_row` on: in order in each run, and of the runs in order.
    __device__ __forceinline__ Values sum(unsigned first_row, unsigned long long rows) const {
        const MaskReader<false> draws(p.mask);
        Values sum = {};      // of a run
        Values tile_sum = {};  // of the runs before
        unsigned run = 0;
        while (rows != 0) {
            Octet<T> dy[ROWS];
            unsigned long long rest = rows;
#pragma unroll
            for (unsigned i = 0; i < ROWS; ++i) {
                if (rest == 0) break;
                const unsigned row = first_row + __ffsll(rest) - 1;
                rest &= rest - 1;
                dy[i] = p.dy.template streaming<aligned>(row * p.cols + 8ull * octet, count);
            }
#pragma unroll
            for (unsigned i = 0; i < ROWS; ++i) {
                if (rows == 0) break;
                const unsigned row = first_row + __ffsll(rows) - 1;
                rows &= rows - 1;
                if (row / RUN_ROWS != run) {
                    run = row / RUN_ROWS;
                    add(tile_sum, sum);
                    sum = {};
                }
                const Kept keep = draws.kept(draws.lanes(draws.logical(row), octet));
                const Values values = unpack(dy[i]);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float g = __fmul_rn(values.at[j], draws.odds.scale);
                    if (keep.at[j]) sum.at[j] = __fadd_rn(sum.at[j], g);
                }
            }
        }
        add(tile_sum, sum);
        return tile_sum;
    }
};

/// An entry's gradient in 2^log_width octets of columns, a block. The threads are as many rows of as many
/// octets: each row adds up tiles of its own, and the first one adds up the tiles.
template <typename T, bool aligned>
__device__ __forceinline__ void table_grad(const TableGradParams<T>& p) {
    __shared__ Matches matches;
    __shared__ Shelf tile_sums;
    __shared__ Shelf second;  // sums over the tiles of a span
    __shared__ Shelf third;   // over the spans of 64 spans
    __shared__ Shelf fourth;  // and over those
    __shared__ unsigned taken;  // whether a row took the entry: written before a tile's barriers

    const unsigned candidate = p.blocks.quotient(blockIdx.x);
    const bool sorted = p.keys.present();
    const bool by_row = p.by_place && !sorted;
    unsigned entry = candidate;
    // Every return here is the whole block's.
    if (by_row) {
        if (!Entries(p.lookups, candidate).exist) return;
        entry = p.taken.entry(candidate);
    } else if (p.by_place) {
        entry = p.keys.cached(candidate);
        if (entry >= p.taken.entries) return;
        // Not the entry's first row.
        if (candidate > 0 && p.keys.cached(candidate - 1) == entry) return;
    }
    // Where the entry's rows are in the order.
    unsigned place = sorted ? p.starts.cached(entry) : 0;
    const unsigned end = sorted ? p.starts.cached(1ull * entry + 1) : 0;
    if (sorted && place == end) return;

    const unsigned width = 1u << p.log_width;
    const unsigned at_once = THREADS >> p.log_width;
    const unsigned rank = threadIdx.x >> p.log_width;
    const unsigned block = p.blocks.remainder(blockIdx.x, candidate);
    const unsigned octet = (block << p.log_width) + threadIdx.x % width;
    const unsigned long long left = 8ull * octet < p.cols ? p.cols - 8ull * octet : 0;
    const Column<T, aligned> column = {p, octet, static_cast<unsigned>(min(left, 8ull))};

    const bool adds_tiles = rank == 0 && column.count > 0;
    if (adds_tiles) {
        second.put({});
        third.put({});
        fourth.put({});
    }
    if (threadIdx.x == 0) taken = 0;
    // Spans without a row of the entry are left out where that is known.
    unsigned span = sorted ? p.order.cached(place) / SPAN : 0;
    while (span * SPAN < p.rows) {
        __syncthreads();  // nobody reads the last span's matches any more
        unsigned next = span + 1;
        if (sorted) {
            matches.list(p, place, end, span * SPAN);
            place = lower_bound(p.order, place, end, next * SPAN);
            next = place < end ? p.order.cached(place) / SPAN : p.rows / SPAN + 1;
        } else {
            matches.find(p, entry, span * SPAN);
        }
        __syncthreads();
        const unsigned long long tiles = matches.tiles();
        if (by_row && tiles != 0) {
            const unsigned tile = __ffsll(tiles) - 1;
            const unsigned row = span * SPAN + tile * RADIX + __ffsll(matches.tile(tile)) - 1;
            if (row < candidate) return;  // the whole block: an earlier row takes the entry
        }
        if (tiles != 0 && threadIdx.x == 0) taken = 1;
        for (unsigned first = 0; first < RADIX; first += at_once) {
            const unsigned long long now = tiles >> first & bits_below(at_once);
            if (now == 0) continue;  // the whole block
            const unsigned tile = first + rank;
            if (column.count > 0 && now >> rank & 1) {
                tile_sums.put(column.sum(span * SPAN + tile * RADIX, matches.tile(tile)));
            }
            __syncthreads();
            if (adds_tiles) {
                Values sum = second.get(threadIdx.x);
                for (unsigned i = 0; i < at_once; ++i) {
                    if (now >> i & 1) add(sum, tile_sums.get(i * width + threadIdx.x));
                }
                second.put(sum);
            }
            __syncthreads();
        }
        if (adds_tiles && tiles != 0) second.close(third);
        if (adds_tiles && next / RADIX != span / RADIX) third.close(fourth);
        span = next;
    }
    if (taken == 0 || !adds_tiles) return;
    third.close(fourth);
    const unsigned long long element = entry * p.cols + 8ull * octet;
    Values after = unpack(p.before.template cached<aligned>(element, column.count));
    add(after, fourth.get(threadIdx.x));
    p.after.template cached<aligned>(element, column.count, pack<float>(after));
}

/// With registers for so many blocks a multiprocessor.
#define FD_TABLE_GRAD(T, type, blocks)                                                             \
    FD_KERNEL_BLOCKS(embedding_dropout_table_grad_##type, TableGradParams<T>, THREADS, blocks,     \
                     table_grad<T, true>)                                                          \
    FD_KERNEL_BLOCKS(embedding_dropout_table_grad_unaligned_##type, TableGradParams<T>, THREADS,   \
                     blocks, table_grad<T, false>)

FD_TABLE_GRAD(float, f32, FD_TABLE_GRAD_BLOCKS_F32)
FD_TABLE_GRAD(f16, f16, FD_TABLE_GRAD_BLOCKS)
FD_TABLE_GRAD(bf16, bf16, FD_TABLE_GRAD_BLOCKS)
