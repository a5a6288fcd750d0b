// keep_mask: the mask itself, 1 for kept, for whoever must store one.
//
// bits:  each row takes ceil(cols / 8) bytes, column c is bit c % 8 of byte c / 8, the unused high bits
//        of a row's last byte are 0. An octet is a byte. An eighth of a byte an element written, so
//        this one is bound by the random numbers, not by memory.
// bytes: one byte an element, 0 or 1.

#include "kernel.cuh"

struct KeepMaskParams {
    Mask mask;
    Octets octets;
    Out<unsigned char> out;
};
static_assert(sizeof(KeepMaskParams) == 224, "keep_mask.rs: Params");

/// The mask of an octet, bit j for element j.
__device__ __forceinline__ unsigned keep_bits(const Kept& keep) {
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (keep.at[j]) bits |= 1u << j;
    }
    return bits;
}

/// Nothing is loaded.
struct Nothing {};

struct KeepBits {
    using Params = KeepMaskParams;
    using Loaded = Nothing;

    template <typename Position>
    static __device__ __forceinline__ Loaded load(const Params&, const Position&) {
        return {};
    }

    template <typename Position>
    static __device__ __forceinline__ void finish(const Params& p, const Position& at,
                                                  const Kept& keep, float, Loaded) {
        const unsigned exist = (1u << at.count()) - 1;
        const unsigned bits = keep_bits(keep) & exist;
        // Rows are whole bytes, so octet and byte have the same index.
        p.out.cached(at.index, static_cast<unsigned char>(bits));
    }
};

struct KeepBytes {
    using Params = KeepMaskParams;
    using Loaded = Nothing;

    template <typename Position>
    static __device__ __forceinline__ Loaded load(const Params&, const Position&) {
        return {};
    }

    template <typename Position>
    static __device__ __forceinline__ void finish(const Params& p, const Position& at,
                                                  const Kept& keep, float, Loaded) {
        const unsigned long long element = at.element(p.octets.cols);
        const unsigned bits = keep_bits(keep);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            if (j < at.count()) p.out.cached(element + j, static_cast<unsigned char>(bits >> j & 1));
        }
    }
};

FD_KERNEL(keep_mask_bits, KeepMaskParams, THREADS, stream<KeepBits>)
// Not dense: rows need not be whole octets.
FD_KERNEL(keep_mask_bytes, KeepMaskParams, THREADS, stream<KeepBytes, false>)
