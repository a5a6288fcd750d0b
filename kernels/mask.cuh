// The mask contract in CUDA: position -> octet -> eight lanes -> which elements are kept.
//
//     counter = stream * 2^64 + row * 2^32 + octet        (octet = column / 8)
//     lane j of an octet = 16-bit half j % 2 of word j / 2 of philox4x32_10(counter)
//     dropped <=> lane < threshold
//
// In groups, the row is divided by the rows of a group, and a row's columns may all take lane 0 of octet 0.
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
    unsigned minus_divisor;  // 2^32 - divisor: an IMAD adds, but does not subtract
    unsigned multiplier;
    unsigned shift;

    __device__ __forceinline__ unsigned quotient(unsigned n) const {
        return __umulhi(n + 1, multiplier) >> shift;
    }

    __device__ __forceinline__ unsigned remainder(unsigned n, unsigned quotient) const {
        return n + quotient * minus_divisor;
    }
};

/// Which logical row a local row is.
struct Rows {
    In<unsigned> list;  // a logical row a local row; absent for an affine map
    unsigned first;  // logical row of local row 0; where the map is contiguous, of the launch's row 0
    unsigned head_stride;
    unsigned batch_stride;
    unsigned offset;  // local row of the launch's row 0
    Divisor queries;
    Divisor heads;

    /// The logical row of the launch's row `row`.
    __device__ __forceinline__ unsigned logical(unsigned row) const {
        const unsigned local = offset + row;
        if (list.present()) return list.cached(local);
        const unsigned block = queries.quotient(local);
        const unsigned batch = heads.quotient(block);
        const unsigned head = block - batch * heads.divisor;
        const unsigned query = local - block * queries.divisor;
        return first + batch * batch_stride + head * head_stride + query;
    }
};

/// What is dropped, and what kept values are multiplied by: `Probability::packed` in src/mask.rs.
struct Odds {
    unsigned high_threshold;  // as in `Mask`
    float scale;

    /// Those that lie in device memory.
    static __device__ __forceinline__ Odds at(const In<unsigned long long>& probability) {
        const unsigned long long packed = probability.cached(0);
        return {static_cast<unsigned>(packed), bits_as<float>(static_cast<unsigned>(packed >> 32))};
    }
};

/// A factor that the host gives, or the scale of a probability in device memory.
struct Factor {
    In<unsigned long long> probability;  // packed; absent: `value`
    float value;
    unsigned padding;

    __device__ __forceinline__ float get() const {
        return probability.present() ? Odds::at(probability).scale : value;
    }
};

/// In place of a threshold, where no random numbers are needed. Less DROPS_ALL, each is a word whose lanes
/// `compare` keeps, and drops, by it.
constexpr unsigned KEEPS_ALL = 1;
constexpr unsigned DROPS_ALL = 2;

/// The mask of one launch.
struct Mask {
    unsigned round_keys[20];
    In<unsigned long long> stream_pointer;  // the stream number, where it is in device memory
    unsigned stream[2];                     // the stream number otherwise, low word first
    In<unsigned long long> probability;     // packed, where it is in device memory; otherwise the next two:
    unsigned high_threshold;  // the threshold, 1 ..= 65535, in the upper half of a word; where no random numbers
                              // are needed, KEEPS_ALL or DROPS_ALL
    float scale;
    unsigned first_octet;
    unsigned padding;
    Rows rows;
    Divisor group_rows;         // logical rows that share their decisions
    unsigned columns_together;  // 1: lane 0 of octet 0 decides about all columns of a row
    unsigned contiguous;        // 1: the logical row is rows.first + the launch's row
    unsigned plain;  // 1: contiguous, random, no groups, neither stream number nor probability in device memory
};

static_assert(sizeof(Divisor) == 12 && sizeof(IndexDivisor) == 12, "abi.rs: Divisor, IndexDivisor");
static_assert(sizeof(Rows) == 48, "abi.rs: Rows");
static_assert(sizeof(Mask) == 192, "abi.rs: Mask");
static_assert(sizeof(Factor) == 16, "abi.rs: Factor");

/// The octets of a launch, counted row by row: octet `index` of the launch is octet
/// `index % per_row` of row `index / per_row`.
struct Octets {
    unsigned count;  // below 2^31 less a block's octets
    IndexDivisor per_row;
    unsigned long long cols;
};
static_assert(sizeof(Octets) == 24, "abi.rs: Octets");

/// Where an octet of a launch lies. `dense`: rows are whole octets and follow each other in every matrix, so octets do.
template <bool dense>
struct Position {
    const Octets& octets;
    unsigned index;  // in the launch
    unsigned row;
    unsigned octet;

    __device__ __forceinline__ Position(const Octets& octets, unsigned index)
        : octets(octets), index(index) {
        row = octets.per_row.quotient(index);
        octet = octets.per_row.remainder(index, row);
    }

    /// Elements of the octet that lie within the row.
    __device__ __forceinline__ unsigned count() const {
        const unsigned long long left = octets.cols - 8ull * octet;
        return left < 8 ? static_cast<unsigned>(left) : 8;
    }

    /// The octet's first element in a matrix whose rows begin `stride` elements apart.
    __device__ __forceinline__ unsigned long long element(unsigned long long stride) const {
        if (dense) return 8ull * index;
        return row * stride + 8ull * octet;
    }

    /// Its first element in a value a column.
    __device__ __forceinline__ unsigned long long column() const { return 8ull * octet; }
};

/// What one of two threads takes of a pair of neighbouring octets of f32: the same half of both. It is at its own octet, of
/// which it draws the lanes. Rows have an even number of octets.
struct PairPosition : Position<true> {
    using Position<true>::Position;

    __device__ __forceinline__ unsigned count() const { return 8; }

    __device__ __forceinline__ Halves element(unsigned long long) const { return halves(index); }

    __device__ __forceinline__ Halves column() const { return halves(octet); }

    /// The lanes of the thread's elements, from those of its octet: each thread gives the other one the half that it
    /// needs. `there`: the threads of the warp that are here.
    __device__ __forceinline__ uint4 shared(uint4 own, unsigned there) const {
        const bool second = index % 2 == 1;
        const unsigned low = __shfl_xor_sync(there, second ? own.x : own.z, 1);
        const unsigned high = __shfl_xor_sync(there, second ? own.y : own.w, 1);
        return second ? make_uint4(low, high, own.z, own.w) : make_uint4(own.x, own.y, low, high);
    }

private:
    static __device__ __forceinline__ Halves halves(unsigned octet) {
        return {8ull * octet - 4 * (octet % 2)};
    }
};

/// A parameter in a register: the compiler would read it from the parameters again at every predicated
/// use. `threadIdx.y` is always 0, which the compiler does not know; without the empty asm it would
/// repeat the OR at every use.
__device__ __forceinline__ float in_register(float value) {
    unsigned bits = bits_as<unsigned>(value) | threadIdx.y;
    asm("" : "+r"(bits));
    return bits_as<float>(bits);
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

/// The odds of a launch.
__device__ __forceinline__ Odds odds_of(const Mask& mask) {
    if (!mask.probability.present()) return {mask.high_threshold, mask.scale};
    return Odds::at(mask.probability);
}

/// Whether each lane of `word` is at least the threshold, which is not 0; `high_threshold` is as in `Mask`.
///
/// Two instructions for sm_90: LEA, whose carry out of (word << 16) + 2^32 - (threshold << 16) says
/// that the low lane is at least the threshold, and ISETP. Compiled, not timed, the others take three:
/// a shift and two compares; __vibmax_u16x2 is one VIMNMX, but ptxas 13.0 leaves two dead PRMT beside it.
__device__ __forceinline__ void compare(unsigned word, unsigned high_threshold, bool& low,
                                        bool& high) {
    high = word >= high_threshold;
#ifdef FUSED_DROPOUT_EMULATOR
    low = (word << 16) >= high_threshold;
#else
    unsigned carry;
    asm("{.reg .u32 sum; add.cc.u32 sum, %1, %2; addc.u32 %0, 0, 0;}"
        : "=r"(carry)
        : "r"(word << 16), "r"(0u - high_threshold));
    low = carry;
#endif
}

/// The lanes of an octet: two a word, low half first.
using Lanes = uint4;

/// What a thread takes from the parameters, or from device memory, for its octets. `plain` says that the
/// mask is (`Mask::plain`): the usual case, the same for a whole launch, for which kernels have a path
/// of their own that asks nothing (`with_draws`).
template <bool plain>
struct MaskReader {
    const Mask& mask;
    uint2 stream;  // stream number, low word first
    Odds odds;

    __device__ __forceinline__ explicit MaskReader(const Mask& mask)
        : mask(mask),
          stream(plain ? make_uint2(mask.stream[0], mask.stream[1]) : stream_number(mask)),
          odds(plain ? Odds{mask.high_threshold, in_register(mask.scale)} : odds_of(mask)) {}

    /// The row whose lanes decide about the launch's row `row`.
    __device__ __forceinline__ unsigned logical(unsigned row) const {
        if (plain) return mask.rows.first + row;
        const unsigned logical =
            mask.contiguous ? mask.rows.first + row : mask.rows.logical(row);
        return mask.group_rows.quotient(logical);
    }

    /// The lanes of octet `octet` of the launch, in logical row `row`.
    __device__ __forceinline__ Lanes lanes(unsigned row, unsigned octet) const {
        if (plain || odds.high_threshold > DROPS_ALL) {
            const bool together = !plain && mask.columns_together;
            const unsigned column = together ? 0 : mask.first_octet + octet;
            const Lanes lanes =
                philox4x32_10(make_uint4(column, row, stream.x, stream.y), mask.round_keys);
            if (!together) return lanes;
            const unsigned both = (lanes.x & 0xffffu) * 0x10001u;
            return make_uint4(both, both, both, both);
        }
        const unsigned all = odds.high_threshold - DROPS_ALL;
        return make_uint4(all, all, all, all);
    }

    /// Which elements the lanes keep.
    __device__ __forceinline__ Kept kept(Lanes lanes) const {
        Kept kept;
        compare(lanes.x, odds.high_threshold, kept.at[0], kept.at[1]);
        compare(lanes.y, odds.high_threshold, kept.at[2], kept.at[3]);
        compare(lanes.z, odds.high_threshold, kept.at[4], kept.at[5]);
        compare(lanes.w, odds.high_threshold, kept.at[6], kept.at[7]);
        return kept;
    }
};

/// Calls `body` with the reader of a mask, which for a plain one asks nothing.
template <typename Body>
__device__ __forceinline__ void with_draws(const Mask& mask, Body body) {
    if (mask.plain) {
        body(MaskReader<true>(mask));
    } else {
        body(MaskReader<false>(mask));
    }
}
