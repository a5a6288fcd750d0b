// binary16 storage: the conversions of CUDA's cuda_fp16.h, rounded to nearest, ties to even.
//
// Subnormal numbers are kept in both directions. A NaN stays a NaN; as on a GPU it loses its payload
// on the way into binary16.
#pragma once
#include "builtins.h"

struct __half_raw {
    unsigned short x;
};
struct __half2_raw {
    unsigned short x, y;
};

struct alignas(2) __half {
    unsigned short bits;
    __half() = default;
    __half(__half_raw raw) : bits(raw.x) {}
    operator __half_raw() const { return {bits}; }
};
using half = __half;

struct alignas(4) __half2 {
    __half x, y;
};
using half2 = __half2;

inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return __half(__half_raw{bits}); }

inline float __half2float(__half x) {
    unsigned sign = unsigned(x.bits & 0x8000) << 16;
    unsigned exponent = x.bits >> 10 & 0x1f, fraction = x.bits & 0x3ff;
    if (exponent == 31) {
        unsigned quiet = fraction == 0 ? 0 : 0x400000;
        return __uint_as_float(sign | 0x7f800000 | quiet | fraction << 13);
    }
    if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
    // A subnormal number (or zero) is a multiple of 2^-24, exact in f32.
    float magnitude = float(fraction) * 0x1p-24f;
    return __uint_as_float(sign | __float_as_uint(magnitude));
}

inline __half __float2half_rn(float x) {
    unsigned magnitude = __float_as_uint(x) & 0x7fffffff;
    unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
    auto give = [](unsigned bits) { return __ushort_as_half((unsigned short)bits); };
    if (magnitude > 0x7f800000) return give(0x7fff);
    // 65520, half-way between the largest number and the next power of two, rounds up to infinity.
    if (magnitude >= 0x477ff000) return give(sign | 0x7c00);
    if (magnitude >= 0x38800000) {
        unsigned rebased = magnitude - (112u << 23);
        return give(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
    }
    // Subnormal: round to a multiple of 2^-24. At most 2^-25 is a tie with zero, or less.
    if (magnitude <= 0x33000000) return give(sign);
    unsigned significand = (magnitude & 0x7fffff) | 0x800000, shift = 126 - (magnitude >> 23);
    unsigned quotient = significand >> shift;
    unsigned rest = significand & ((1u << shift) - 1), tie = 1u << (shift - 1);
    quotient += rest > tie || (rest == tie && (quotient & 1) != 0);
    return give(sign | quotient);
}
inline __half __float2half(float x) { return __float2half_rn(x); }

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline float __low2float(__half2 v) { return __half2float(v.x); }
inline float __high2float(__half2 v) { return __half2float(v.y); }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__float2half_rn(v.x), __float2half_rn(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) {
    return {__float2half_rn(x), __float2half_rn(y)};
}
