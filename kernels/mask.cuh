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

/// Where an octet of a launch lies.
struct Position {
    unsigned row;
    unsigned octet;

    __device__ __forceinline__ Position(const Octets& octets, unsigned index) {
        row = octets.per_row.quotient(index);
        octet = index - row * octets.per_row.divisor;
    }

    /// Elements of the octet that lie within the row.
    __device__ __forceinline__ unsigned count(const Octets& octets) const {
        const unsigned long long left = octets.cols - 8ull * octet;
        return left < 8 ? static_cast<unsigned>(left) : 8;
    }
};

/// Index of an octet's first element. `aligned`: rows are whole octets, so octets follow each other.
template <bool aligned>
__device__ __forceinline__ unsigned long long element_of(const Octets& octets, unsigned index,
                                                         Position position) {
    if (aligned) return 8ull * index;
    return position.row * octets.cols + 8ull * position.octet;
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

/// The lanes of octet `octet` of the launch, in logical row `row`: two a word, low half first.
__device__ __forceinline__ uint4 draw(const Mask& mask, uint2 stream, unsigned row, unsigned octet) {
    if (!mask.random) return make_uint4(0, 0, 0, 0);
    return philox4x32_10(make_uint4(mask.first_octet + octet, row, stream.x, stream.y),
                         mask.round_keys);
}

/// Compares both lanes of a word with the threshold.
__device__ __forceinline__ void compare(unsigned word, unsigned threshold, bool& low, bool& high) {
#if defined(FUSED_DROPOUT_EMULATOR) || __CUDA_ARCH__ >= 900
    // One VIMNMX.U16x2 gives both predicates (lane >= threshold); its maximum is not used.
    __vibmax_u16x2(word, threshold * 0x10001u, &high, &low);
#else
    low = (word << 16) >= (threshold << 16);
    high = word >= (threshold << 16);
#endif
}

/// Which elements the lanes keep.
__device__ __forceinline__ Kept kept(const Mask& mask, uint4 lanes) {
    Kept kept;
    compare(lanes.x, mask.threshold, kept.at[0], kept.at[1]);
    compare(lanes.y, mask.threshold, kept.at[2], kept.at[3]);
    compare(lanes.z, mask.threshold, kept.at[4], kept.at[5]);
    compare(lanes.w, mask.threshold, kept.at[6], kept.at[7]);
    return kept;
}

/// Which elements of an octet are kept; `row` as the launch counts them.
__device__ __forceinline__ Kept kept(const Mask& mask, uint2 stream, unsigned row, unsigned octet) {
    return kept(mask, draw(mask, stream, mask.rows.logical(row), octet));
}
