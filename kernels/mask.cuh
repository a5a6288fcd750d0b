// The mask contract in CUDA: position -> octet -> eight lanes -> which elements are kept.
//
//     counter = stream * 2^64 + row * 2^32 + octet        (octet = column / 8)
//     lane j of an octet = 16-bit half j % 2 of word j / 2 of philox4x32_10(counter)
//     dropped <=> lane < threshold
//
// The structures are the twins of those in src/device/abi.rs, field for field.

#pragma once

#include "philox.cuh"
#include "vector.cuh"

/// Division by a constant, exact for every 32-bit n.
struct Divisor {
    unsigned divisor;
    unsigned multiplier;
    unsigned shift;

    __device__ __forceinline__ unsigned quotient(unsigned n) const {
        if (shift == 32) return n;
        const unsigned t = __umulhi(n, multiplier);
        return (((n - t) >> 1) + t) >> shift;
    }
};

/// Division by a constant of an index below 2^31: three instructions less.
struct IndexDivisor {
    unsigned divisor;
    unsigned multiplier;
    unsigned shift;

    __device__ __forceinline__ unsigned quotient(unsigned n) const {
        return __umulhi(2 * n, multiplier) >> shift;
    }
};

/// Which logical row a local row is.
struct Rows {
    In<unsigned> list;  // a logical row a local row; absent for an affine map
    unsigned first;
    unsigned head_stride;
    unsigned batch_stride;
    unsigned offset;  // local row of the launch's row 0
    Divisor queries;
    Divisor heads;
    unsigned contiguous;  // 1: the map is first + row, without a division
    unsigned reserved;

    /// The logical row of the launch's row `row`.
    __device__ __forceinline__ unsigned logical(unsigned row) const {
        if (contiguous) return first + offset + row;
        return mapped(offset + row);
    }

    __device__ __forceinline__ unsigned mapped(unsigned local) const {
        if (list.present()) return list.cached(local);
        const unsigned block = queries.quotient(local);
        const unsigned batch = heads.quotient(block);
        const unsigned head = block - batch * heads.divisor;
        const unsigned query = local - block * queries.divisor;
        return first + batch * batch_stride + head * head_stride + query;
    }
};

/// The mask of one launch.
struct Mask {
    unsigned round_keys[20];
    In<unsigned long long> stream_pointer;  // the stream number, where it is in device memory
    unsigned stream[2];                     // the stream number otherwise, low word first
    unsigned threshold;                     // 0 ..= 65535
    unsigned random;                        // 0: every lane is 0, no random numbers are needed
    float scale;
    unsigned first_octet;
    Rows rows;
};

static_assert(sizeof(Divisor) == 12 && sizeof(IndexDivisor) == 12, "abi.rs: Divisor, IndexDivisor");
static_assert(sizeof(Rows) == 56, "abi.rs: Rows");
static_assert(sizeof(Mask) == 168, "abi.rs: Mask");

/// The octets of a launch, counted row by row: octet `index` of the launch is octet
/// `index % per_row` of row `index / per_row`.
struct Octets {
    unsigned count;  // below 2^31 less a block's octets
    IndexDivisor per_row;
    unsigned long long cols;
};
static_assert(sizeof(Octets) == 24, "abi.rs: Octets");

/// The index of an octet in its launch, `base + ahead`: in two parts, of which `ahead` is known at
/// compile time, so that a thread's octets are one address and several offsets.
struct Index {
    unsigned base;
    unsigned ahead;

    __device__ __forceinline__ unsigned sum() const { return base + ahead; }
};

/// Where an octet of a launch lies.
struct Position {
    unsigned row;
    unsigned octet;

    __device__ __forceinline__ Position(const Octets& octets, Index index) {
        row = octets.per_row.quotient(index.sum());
        octet = index.sum() - row * octets.per_row.divisor;
    }

    /// Elements of the octet that lie within the row.
    __device__ __forceinline__ unsigned count(const Octets& octets) const {
        const unsigned long long left = octets.cols - 8ull * octet;
        return left < 8 ? static_cast<unsigned>(left) : 8;
    }
};

/// Index of an octet's first element. `aligned`: rows are whole octets, so octets follow each other.
template <bool aligned>
__device__ __forceinline__ unsigned long long element_of(const Octets& octets, Index index,
                                                         Position position) {
    if (aligned) return 8ull * index.base + 8 * index.ahead;
    return position.row * octets.cols + 8ull * position.octet;
}

/// What ptxas would read from the parameters again at every predicated use, in a register.
__device__ __forceinline__ float in_register(float value) {
#ifndef FUSED_DROPOUT_EMULATOR
    asm volatile("mov.b32 %0, %0;" : "+f"(value));
#endif
    return value;
}
__device__ __forceinline__ unsigned in_register(unsigned value) {
#ifndef FUSED_DROPOUT_EMULATOR
    asm volatile("mov.b32 %0, %0;" : "+r"(value));
#endif
    return value;
}

/// Which elements of an octet are kept.
struct Kept {
    bool at[8];
};

/// The stream number of a launch, low word first.
__device__ __forceinline__ uint2 stream_number(const Mask& mask) {
    if (!mask.stream_pointer.present()) return make_uint2(mask.stream[0], mask.stream[1]);
    const unsigned long long stream = mask.stream_pointer.cached(0);
    return make_uint2(static_cast<unsigned>(stream), static_cast<unsigned>(stream >> 32));
}

/// Compares both lanes of a word with the threshold; `thresholds` holds it twice.
__device__ __forceinline__ void compare(unsigned word, unsigned thresholds, bool& low, bool& high) {
#if defined(FUSED_DROPOUT_EMULATOR) || __CUDA_ARCH__ >= 900
    // One VIMNMX.U16x2 gives both predicates (lane >= threshold); its maximum is not used.
    __vibmax_u16x2(word, thresholds, &high, &low);
#else
    low = (word << 16) >= (thresholds << 16);
    high = word >= (thresholds & 0xffff0000u);
#endif
}

/// What a thread takes from the parameters once, for all its octets.
struct Draws {
    const Mask& mask;
    uint2 stream;         // stream number, low word first
    unsigned thresholds;  // twice the threshold
    float scale;

    __device__ __forceinline__ explicit Draws(const Mask& mask)
        : mask(mask),
          stream(stream_number(mask)),
          thresholds(in_register(mask.threshold * 0x10001u)),
          scale(in_register(mask.scale)) {}

    /// Which elements of octet `octet` of the launch are kept, in logical row `row`. `random` says that
    /// the mask needs random numbers.
    template <bool random>
    __device__ __forceinline__ Kept kept(unsigned row, unsigned octet) const {
        const unsigned column = mask.first_octet + octet;
        uint4 lanes = make_uint4(0, 0, 0, 0);
        if (random || mask.random) {
            lanes = philox4x32_10(make_uint4(column, row, stream.x, stream.y), mask.round_keys);
        }
        Kept kept;
        compare(lanes.x, thresholds, kept.at[0], kept.at[1]);
        compare(lanes.y, thresholds, kept.at[2], kept.at[3]);
        compare(lanes.z, thresholds, kept.at[4], kept.at[5]);
        compare(lanes.w, thresholds, kept.at[6], kept.at[7]);
        return kept;
    }

    /// The same in the launch's row `row`. `plain` says that `is_plain()`.
    template <bool plain>
    __device__ __forceinline__ Kept kept_in(unsigned row, unsigned octet) const {
        const Rows& rows = mask.rows;
        return kept<plain>(plain ? rows.first + rows.offset + row : rows.logical(row), octet);
    }

    /// Whether rows are contiguous and random numbers needed: the usual case, the same for a whole
    /// launch, for which the streaming kernels have a path without these two questions in each octet.
    __device__ __forceinline__ bool is_plain() const {
        return mask.random & mask.rows.contiguous;
    }
};
