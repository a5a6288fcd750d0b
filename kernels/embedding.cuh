// What the kernels of embeddings share: which entries a row takes, and their sum.
//
// The structures are the twins of those in src/device/embedding_dropout.rs.

#pragma once

#include "mask.cuh"

/// Tables that a row can look up: token, position, segment.
constexpr unsigned TABLES = 3;

/// Which entry of a table each row takes.
struct Lookup {
    In<unsigned> ids;  // absent: row r takes entry r % sequence.divisor
    unsigned entries;
    Divisor sequence;

    /// The entry of a local row, which may be in no table.
    __device__ __forceinline__ unsigned entry(unsigned row) const {
        if (ids.present()) return ids.cached(row);
        return row - sequence.quotient(row) * sequence.divisor;
    }

    /// Which of rows `first`, `first + 32`, .. take an entry, a bit each; none from row `rows` on.
    template <unsigned COUNT>
    __device__ __forceinline__ unsigned matches(unsigned wanted, unsigned first,
                                                unsigned rows) const {
        unsigned matches = 0;
        if (!ids.present()) {
#pragma unroll 1
            for (unsigned i = 0; i < COUNT && first + 32 * i < rows; ++i) {
                matches |= unsigned(entry(first + 32 * i) == wanted) << i;
            }
            return matches;
        }
        unsigned taken[COUNT];  // all on their way at once
#pragma unroll
        for (unsigned i = 0; i < COUNT; ++i) {
            taken[i] = first + 32 * i < rows ? ids.cached(1ull * first + 32 * i) : ~wanted;
        }
#pragma unroll
        for (unsigned i = 0; i < COUNT; ++i) matches |= unsigned(taken[i] == wanted) << i;
        return matches;
    }
};
static_assert(sizeof(Lookup) == 24, "embedding_dropout.rs: LookupParams");

/// What a row takes from each table.
struct Entries {
    unsigned at[TABLES];
    bool exist;  // all of them

    __device__ __forceinline__ Entries(const Lookup (&lookups)[TABLES], unsigned row) {
        exist = true;
#pragma unroll
        for (unsigned i = 0; i < TABLES; ++i) at[i] = lookups[i].entry(row);
#pragma unroll
        for (unsigned i = 0; i < TABLES; ++i) exist &= at[i] < lookups[i].entries;
    }
};

/// The tables, and what each row takes from them.
template <typename T>
struct Embeddings {
    Lookup lookups[TABLES];  // of a table that is absent: entry 0 of one
    In<T> tables[TABLES];
    unsigned long long cols;

    /// An octet of the entries that a row takes.
    struct Loaded {
        Octet<T> parts[TABLES];
    };

    /// `column`: where in an entry the octet begins.
    template <bool aligned, typename Column>
    __device__ __forceinline__ Loaded load(const Entries& entries, Column column, unsigned count) const {
        Loaded loaded;
#pragma unroll
        for (unsigned i = 0; i < TABLES; ++i) {
            if (!tables[i].present()) continue;
            loaded.parts[i] = tables[i].template cached<aligned>(entries.at[i] * cols + column, count);
        }
        return loaded;
    }

    /// Their sum.
    __device__ __forceinline__ Values sum(const Loaded& loaded) const {
        Values sum = unpack(loaded.parts[0]);
#pragma unroll
        for (unsigned i = 1; i < TABLES; ++i) {
            if (!tables[i].present()) continue;
            add(sum, unpack(loaded.parts[i]));
        }
        return sum;
    }
};
