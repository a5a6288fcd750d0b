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
// in the order of the tree that src/ops/sum_rows.rs defines, without atomics. The rows that do not take an entry are +0. They
// are left out, which changes no sum that started from +0. There are two kernels:
//
// - `table_walk`: a warp has an entry and 32 octets of columns, and a lane adds up its octet row after row. No barrier, and
//   what a warp waits for is two loads one after the other: which rows it has, and their dy. For entries of few rows.
// - `table_grad`: a block has an entry and some columns. It takes 4096 rows (a span) at a time. Each 64 of them (a tile) are
//   added by one thread an octet, in four runs of 16; tiles at the same time by the other threads of the block, and then in
//   order. For entries of many rows.
//
// Which rows an entry has is found in one of three ways:
//
// - of ids that are given, where rows times entries are many: in the order of the entries (sort_rows.cu), in which they
//   follow each other. There is a warp for each place in that order, and the one at an entry's first place goes on. There is
//   a block for each PLACES places, and goes on where one entry fills them;
// - otherwise of ids that are given: by a block among all ids. There is a block for each entry or, where rows are fewer, for
//   each row, and only that of an entry's first row goes on;
// - of a sequence: row r takes entry r % length. A warp has an entry. Where that is few warps with many rows each, a block.
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

/// Places of the order: an entry that has those from a multiple of PLACES on, and the next one, is for table_grad.
/// `PLACES` in src/device/embedding_dropout.rs.
constexpr unsigned PLACES = 32;

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
    unsigned rows;        // at most 2^24: 64^4
    unsigned candidates;  // table_walk: warps a column of warps
    unsigned by_row;      // table_grad: 1: blocks for each row; 0: for each entry, or PLACES in the order
    unsigned log_width;   // table_grad: octets of columns a block: 2^log_width, 4 to 256
    IndexDivisor blocks;  // of a candidate: ceil(octets / width); table_walk: of 8 candidates, width 32
    unsigned padding;
};
static_assert(sizeof(TableGradParams<float>) == 368, "embedding_dropout.rs: TableGradParams");

/// The first place from `first` to `end` of which `values` is not below `least`; they ascend.
__device__ __forceinline__ unsigned lower_bound(const In<unsigned>& values, unsigned first,
                                                unsigned end, unsigned least) {
    while (first < end) {
        const unsigned middle = first + (end - first) / 2;
        if (values.cached(middle) < least) {
            first = middle + 1;
        } else {
            end = middle;
        }
    }
    return first;
}

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

/// The sum of ascending rows of a tile: in order in each run, and of the runs in order.
struct TileSum {
    unsigned last;  // the row before
    Values run = {};
    Values before = {};  // of the runs before

    /// Where the terms of a row go.
    __device__ __forceinline__ Values& sum_of(unsigned row) {
        const bool same = (row ^ last) < RUN_ROWS;
        last = row;
        if (same) return run;
        add(before, run);
        run = {};
        return run;
    }

    __device__ __forceinline__ Values total() const {
        Values sums = before;
        add(sums, run);
        return sums;
    }
};

/// An octet of columns of dy, as the thread that adds up rows of it sees it.
template <typename T, bool aligned>
struct Column {
    /// Rows whose dy is loaded at once.
    static constexpr unsigned ROWS = FD_TABLE_GRAD_ROWS;

    const TableGradParams<T>& p;
    unsigned octet;
    unsigned count;  // elements of it

    /// Adds g of rows to `sum_of(row)`, in the order of the bits of `rows`: `row_of(bit)` is the row.
    template <typename Rows, typename RowOf, typename SumOf>
    __device__ __forceinline__ void add_rows(Rows rows, RowOf row_of, SumOf sum_of) const {
        const MaskReader<false> draws(p.mask);
        while (rows != 0) {
            Octet<T> dy[ROWS];
            unsigned at[ROWS];
            Rows rest = rows;
#pragma unroll
            for (unsigned i = 0; i < ROWS; ++i) {
                if (rest == 0) break;
                at[i] = row_of(__ffsll(rest) - 1);
                rest &= rest - 1;
                if (count > 0) dy[i] = p.dy.template streaming<aligned>(at[i] * p.cols + 8ull * octet, count);
            }
#pragma unroll
            for (unsigned i = 0; i < ROWS; ++i) {
                if (rows == 0) break;
                rows &= rows - 1;
                Values& sum = sum_of(at[i]);
                const Kept keep = draws.kept(draws.lanes(draws.logical(at[i]), octet));
                const Values values = unpack(dy[i]);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const float g = __fmul_rn(values.at[j], draws.odds.scale);
                    if (keep.at[j]) sum.at[j] = __fadd_rn(sum.at[j], g);
                }
            }
        }
    }

    /// The sum of g over the rows `rows` of the 64 from `first_row` on.
    __device__ __forceinline__ Values sum(unsigned first_row, unsigned long long rows) const {
        TileSum tile = {first_row};
        const auto row_of = [&](unsigned bit) { return first_row + bit; };
        add_rows(rows, row_of, [&](unsigned row) -> Values& { return tile.sum_of(row); });
        return tile.total();
    }
};

/// The tree of a thread that adds up ascending rows alone. A level above the tiles is used once a part of it is complete: most
/// entries have a row or two.
struct Climb {
    Shelf (&above)[3];  // sums over tiles, over spans, and over 64 spans
    unsigned used = 0;  // a bit for each of these
    TileSum tile = {};

    __device__ __forceinline__ void put(unsigned level, Values sums) {
        if (used >> level & 1) add(sums, above[level].get(threadIdx.x));
        above[level].put(sums);
        used |= 1u << level;
    }

    /// A level is complete, and part of the next one.
    __device__ __forceinline__ void close(unsigned level) {
        put(level + 1, above[level].get(threadIdx.x));
        used &= ~(1u << level);
    }

    /// Where the terms of a row go.
    __device__ __forceinline__ Values& sum_of(unsigned row) {
        const unsigned differ = row ^ tile.last;
        if (differ < TILE_ROWS) return tile.sum_of(row);
        put(0, tile.total());
        tile = {row};
        if (differ >= SPAN) close(0);
        if (differ >= RADIX * SPAN) close(1);
        return tile.run;
    }

    __device__ __forceinline__ Values total() const {
        Values sums = tile.total();
#pragma unroll
        for (unsigned level = 0; level < 3; ++level) {
            if (used >> level & 1) add(sums, above[level].get(threadIdx.x));
        }
        return sums;
    }
};

/// A row that a lane of a walk finds, and the entry that it takes; none where there is no such row.
struct Taker {
    unsigned entry = ~0u;
    unsigned row = 0;
};

/// Row `number` of those that a walk may take.
template <typename T>
__device__ __forceinline__ Taker taker(const TableGradParams<T>& p, unsigned candidate, unsigned number) {
    if (p.keys.present()) {
        const unsigned place = candidate + number;
        return place < p.rows ? Taker{p.keys.cached(place), p.order.cached(place)} : Taker{};
    }
    const unsigned long long row = candidate + 1ull * number * p.taken.sequence.divisor;
    return row < p.rows ? Taker{candidate, static_cast<unsigned>(row)} : Taker{};
}

/// An entry's gradient in 32 octets of columns, a warp.
template <typename T, bool aligned>
__device__ __forceinline__ void table_walk(const TableGradParams<T>& p) {
    constexpr unsigned WARPS = THREADS / 32;
    __shared__ Shelf above[3];
    const unsigned group = p.blocks.quotient(blockIdx.x);
    const unsigned candidate = WARPS * group + threadIdx.x / 32;
    // Every return here is the whole warp's.
    if (candidate >= p.candidates) return;
    const bool sorted = p.keys.present();
    const unsigned rank = threadIdx.x % 32;
    Taker own = taker(p, candidate, rank);
    unsigned entry = candidate;
    if (sorted) {
        const unsigned before = candidate > 0 ? p.keys.cached(candidate - 1) : ~0u;
        const unsigned far = (candidate + PLACES - 1) / PLACES * PLACES + PLACES;
        const unsigned behind = far < p.rows ? p.keys.cached(far) : ~0u;
        entry = __shfl_sync(0xffffffffu, own.entry, 0);
        if (entry >= p.taken.entries || before == entry || behind == entry) return;
    }
    const unsigned octet = 32 * p.blocks.remainder(blockIdx.x, group) + rank;
    const unsigned long long left = 8ull * octet < p.cols ? p.cols - 8ull * octet : 0;
    const Column<T, aligned> column = {p, octet, static_cast<unsigned>(min(left, 8ull))};
    const unsigned long long element = entry * p.cols + 8ull * octet;
    Octet<float> gradient = {};  // on its way beside the rows
    if (column.count > 0) gradient = p.before.template cached<aligned>(element, column.count);

    Climb climb = {above};
    bool taken = false;
    for (unsigned done = 32;; done += 32) {
        const bool found = own.entry == entry;
        // A row with an id that is in no table takes nothing.
        const unsigned rows = __ballot_sync(0xffffffffu, found && Entries(p.lookups, own.row).exist);
        const auto row_of = [&](unsigned lane) { return __shfl_sync(0xffffffffu, own.row, lane); };
        if (rows != 0 && !taken) {
            taken = true;
            climb.tile.last = row_of(__ffs(rows) - 1);
        }
        column.add_rows(rows, row_of, [&](unsigned row) -> Values& { return climb.sum_of(row); });
        if (!__all_sync(0xffffffffu, found)) break;
        own = taker(p, candidate, done + rank);
    }
    if (!taken || column.count == 0) return;
    Values after = unpack(gradient);
    add(after, climb.total());
    p.after.template cached<aligned>(element, column.count, pack<float>(after));
}

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
    unsigned entry = candidate;
    unsigned place = 0;  // where the entry's rows are in the order
    unsigned end = 0;
    // Every return here is the whole block's.
    if (p.by_row) {
        if (!Entries(p.lookups, candidate).exist) return;
        entry = p.taken.entry(candidate);
    } else if (sorted) {
        place = candidate * PLACES;
        if (place + PLACES >= p.rows) return;
        entry = p.keys.cached(place);
        if (entry >= p.taken.entries || p.keys.cached(place + PLACES) != entry) return;
        if (place > 0 && p.keys.cached(place - PLACES) == entry) return;  // not the first such place
        const bool takes = threadIdx.x < min(place, PLACES) && p.keys.cached(place - 1 - threadIdx.x) == entry;
        end = lower_bound(p.keys, place + PLACES, p.rows, entry + 1);
        place -= __syncthreads_count(takes);
    }

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
        if (p.by_row && tiles != 0) {
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

/// The walk with registers for so many threads a multiprocessor, the other for so many blocks: one more than ptxas would take,
/// without a spill.
#define FD_TABLE_GRAD(T, type, threads, blocks)                                                    \
    FD_KERNEL_BLOCKS(embedding_dropout_table_walk_##type, TableGradParams<T>, THREADS,             \
                     blocks_for(threads, THREADS), table_walk<T, true>)                            \
    FD_KERNEL_BLOCKS(embedding_dropout_table_walk_unaligned_##type, TableGradParams<T>, THREADS,   \
                     blocks_for(threads, THREADS), table_walk<T, false>)                           \
    FD_KERNEL_BLOCKS(embedding_dropout_table_grad_##type, TableGradParams<T>, THREADS, blocks,     \
                     table_grad<T, true>)                                                          \
    FD_KERNEL_BLOCKS(embedding_dropout_table_grad_unaligned_##type, TableGradParams<T>, THREADS,   \
                     blocks, table_grad<T, false>)

FD_TABLE_GRAD(float, f32, FD_TABLE_WALK_THREADS_F32, 2)
FD_TABLE_GRAD(f16, f16, FD_TABLE_WALK_THREADS, 3)
FD_TABLE_GRAD(bf16, bf16, FD_TABLE_WALK_THREADS, 3)
