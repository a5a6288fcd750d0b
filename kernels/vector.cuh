// Tensors in global memory, eight elements (an octet) at a time, and the storage types' way to f32.
//
// `In` and `Out` are the only way to global memory. The accessor's name says the cache policy:
//
// - streaming: evict-first (ld.global.cs; FD_LOADS_EVICT_FIRST). For what is read once. Not the non-coherent
//   path (ld.global.nc): an in-place call writes what it reads.
// - cached: the default policy. For what several rows or blocks read, and for outputs, which the next
//   kernel reads from L2 (FD_STORES_EVICT_FIRST).
//
// `aligned` says that the octet starts on a 16-byte boundary and is whole: one 16-byte access (two for
// f32). Otherwise an octet's `count` elements are moved one by one; the threads of a warp still cover a
// contiguous range, which the first access brings into L1 and the others find there.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <string.h>

#include <type_traits>

#include "tuning.cuh"

#ifdef FUSED_DROPOUT_EMULATOR
#define FD_TOUCH(address, bytes, write) emulator_touch(address, bytes, write)
#else
#define FD_TOUCH(address, bytes, write)
#endif

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr bool LOADS_EVICT_FIRST = FD_LOADS_EVICT_FIRST;
constexpr bool STORES_EVICT_FIRST = FD_STORES_EVICT_FIRST;

/// The same bits as another type.
template <typename To, typename From>
__device__ __forceinline__ To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "the types differ in size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

/// The unsigned integer as wide as a storage type.
template <typename T>
struct Bits {
    using Type = unsigned short;
};
template <>
struct Bits<float> {
    using Type = unsigned;
};

/// Eight neighbouring elements as they are stored, lowest column in the lowest bits.
template <typename T>
struct Octet {
    static constexpr int WORDS = 2 * sizeof(T);
    unsigned words[WORDS];
};

/// Where half of an octet of f32 begins, and 8 elements behind it the same half of the next one.
struct Halves {
    unsigned long long first;
};
__device__ __forceinline__ Halves operator+(unsigned long long element, Halves halves) {
    return {element + halves.first};
}

/// Eight values in f32.
struct Values {
    float at[8];
};

/// Adds values to sums.
__device__ __forceinline__ void add(Values& sums, const Values& values) {
#pragma unroll
    for (int j = 0; j < 8; ++j) sums.at[j] = __fadd_rn(sums.at[j], values.at[j]);
}

/// The value of an element: exact.
__device__ __forceinline__ float to_f32(float value) { return value; }
__device__ __forceinline__ float to_f32(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_f32(f16 value) { return __half2float(value); }

/// The values of an octet: exact.
__device__ __forceinline__ Values unpack(const Octet<float>& octet) {
    Values values;
#pragma unroll
    for (int j = 0; j < 8; ++j) values.at[j] = bits_as<float>(octet.words[j]);
    return values;
}
__device__ __forceinline__ Values unpack(const Octet<bf16>& octet) {
    Values values;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        // A bf16 is the upper half of the f32 of the same value.
        values.at[2 * j] = bits_as<float>(octet.words[j] << 16);
        values.at[2 * j + 1] = bits_as<float>(octet.words[j] & 0xffff0000u);
    }
    return values;
}
__device__ __forceinline__ Values unpack(const Octet<f16>& octet) {
    Values values;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const __half2 pair = bits_as<__half2>(octet.words[j]);
        values.at[2 * j] = __low2float(pair);
        values.at[2 * j + 1] = __high2float(pair);
    }
    return values;
}

/// `values` rounded to T, nearest, ties to even.
template <typename T>
__device__ __forceinline__ Octet<T> pack(const Values& values);
template <>
__device__ __forceinline__ Octet<float> pack<float>(const Values& values) {
    Octet<float> octet;
#pragma unroll
    for (int j = 0; j < 8; ++j) octet.words[j] = bits_as<unsigned>(values.at[j]);
    return octet;
}
template <>
__device__ __forceinline__ Octet<bf16> pack<bf16>(const Values& values) {
    Octet<bf16> octet;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        octet.words[j] =
            bits_as<unsigned>(__floats2bfloat162_rn(values.at[2 * j], values.at[2 * j + 1]));
    }
    return octet;
}
template <>
__device__ __forceinline__ Octet<f16> pack<f16>(const Values& values) {
    Octet<f16> octet;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        octet.words[j] =
            bits_as<unsigned>(__floats2half2_rn(values.at[2 * j], values.at[2 * j + 1]));
    }
    return octet;
}

/// A tensor that a kernel reads: a pointer, with accessors that name their cache policy.
template <typename T>
class In {
    using Stored = typename Bits<T>::Type;
    const T* pointer;

    template <bool streaming, typename Word>
    __device__ static __forceinline__ Word load(const Word* address) {
        FD_TOUCH(address, sizeof(Word), false);
        return streaming && LOADS_EVICT_FIRST ? __ldcs(address) : *address;
    }

    /// Whole: in accesses of 16 bytes, `step` of 16 bytes from each other.
    template <bool streaming>
    __device__ __forceinline__ Octet<T> whole(unsigned long long element, int step) const {
        Octet<T> octet;
        const uint4* address = reinterpret_cast<const uint4*>(pointer + element);
#pragma unroll
        for (int i = 0; i < Octet<T>::WORDS / 4; ++i) {
            const uint4 words = load<streaming>(address + i * step);
            octet.words[4 * i] = words.x;
            octet.words[4 * i + 1] = words.y;
            octet.words[4 * i + 2] = words.z;
            octet.words[4 * i + 3] = words.w;
        }
        return octet;
    }

    template <bool streaming, bool aligned>
    __device__ __forceinline__ Octet<T> octet(unsigned long long element, unsigned count) const {
        if (aligned) return whole<streaming>(element, 1);
        Octet<T> octet = {};
        const Stored* address = reinterpret_cast<const Stored*>(pointer + element);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            if (j >= count) break;
            const unsigned stored = load<streaming>(address + j);
            octet.words[j * sizeof(T) / 4] |= stored << (8 * (j * sizeof(T) % 4));
        }
        return octet;
    }

public:
    /// Whether there is such a tensor.
    __device__ __forceinline__ bool present() const { return pointer != nullptr; }

    /// The tensor from an element on.
    __device__ __forceinline__ In from(unsigned long long element) const {
        In rest;
        rest.pointer = pointer + element;
        return rest;
    }

    /// Elements `element .. element + count`, 8 of them where `aligned`, read once.
    template <bool aligned>
    __device__ __forceinline__ Octet<T> streaming(unsigned long long element, unsigned count) const {
        return octet<true, aligned>(element, count);
    }

    /// Elements `element .. element + count`, 8 of them where `aligned`, read by others too.
    template <bool aligned>
    __device__ __forceinline__ Octet<T> cached(unsigned long long element, unsigned count) const {
        return octet<false, aligned>(element, count);
    }

    /// Two halves, read once.
    template <bool aligned>
    __device__ __forceinline__ Octet<T> streaming(Halves halves, unsigned) const {
        static_assert(aligned && sizeof(T) == 4, "an octet in two accesses");
        return whole<true>(halves.first, 2);
    }

    /// Two halves, read by others too.
    template <bool aligned>
    __device__ __forceinline__ Octet<T> cached(Halves halves, unsigned) const {
        static_assert(aligned && sizeof(T) == 4, "an octet in two accesses");
        return whole<false>(halves.first, 2);
    }

    /// One element of a tensor that kernels do arithmetic on as it is (f32, integers).
    __device__ __forceinline__ T cached(unsigned long long element) const {
        return load<false>(pointer + element);
    }
};

/// A tensor that a kernel writes.
template <typename T>
class Out {
    using Stored = typename Bits<T>::Type;
    T* pointer;

    template <typename Word>
    __device__ static __forceinline__ void store(Word* address, Word word) {
        FD_TOUCH(address, sizeof(Word), true);
        if constexpr (STORES_EVICT_FIRST && sizeof(Word) == 16) {
            __stcs(address, word);
        } else {
            *address = word;
        }
    }

    /// As `In::whole`.
    __device__ __forceinline__ void whole(unsigned long long element, int step,
                                          const Octet<T>& octet) const {
        uint4* address = reinterpret_cast<uint4*>(pointer + element);
#pragma unroll
        for (int i = 0; i < Octet<T>::WORDS / 4; ++i) {
            store(address + i * step, make_uint4(octet.words[4 * i], octet.words[4 * i + 1],
                                                 octet.words[4 * i + 2], octet.words[4 * i + 3]));
        }
    }

public:
    /// Whether there is such a tensor.
    __device__ __forceinline__ bool present() const { return pointer != nullptr; }

    /// The tensor from an element on.
    __device__ __forceinline__ Out from(unsigned long long element) const {
        Out rest;
        rest.pointer = pointer + element;
        return rest;
    }

    /// Writes elements `element .. element + count`, 8 of them where `aligned`.
    template <bool aligned>
    __device__ __forceinline__ void cached(unsigned long long element, unsigned count,
                                           const Octet<T>& octet) const {
        if (aligned) return whole(element, 1, octet);
        Stored* address = reinterpret_cast<Stored*>(pointer + element);
#pragma unroll
        for (unsigned j = 0; j < 8; ++j) {
            if (j >= count) break;
            const unsigned word = octet.words[j * sizeof(T) / 4];
            store(address + j, static_cast<Stored>(word >> (8 * (j * sizeof(T) % 4))));
        }
    }

    /// Writes two halves.
    template <bool aligned>
    __device__ __forceinline__ void cached(Halves halves, unsigned, const Octet<T>& octet) const {
        static_assert(aligned && sizeof(T) == 4, "an octet in two accesses");
        whole(halves.first, 2, octet);
    }

    /// Writes one element.
    __device__ __forceinline__ void cached(unsigned long long element, T value) const {
        store(pointer + element, value);
    }

    /// Lowers one element to `value` where it is larger; the order of the threads does not matter.
    __device__ __forceinline__ void lower(unsigned long long element, T value) const {
        FD_TOUCH(pointer + element, sizeof(T), false);
        FD_TOUCH(pointer + element, sizeof(T), true);
        atomicMin(pointer + element, value);
    }
};

/// A matrix that a kernel reads, and the elements from one row's start to the next one's.
template <typename T>
struct InMatrix : In<T> {
    unsigned long long stride;
};

/// A matrix that a kernel writes.
template <typename T>
struct OutMatrix : Out<T> {
    unsigned long long stride;
};

static_assert(sizeof(InMatrix<float>) == 16 && sizeof(OutMatrix<float>) == 16, "abi.rs: Matrix");
