// CUDA's built-ins on the host: what a `.cu` file of this crate uses of the language, for the
// machine's C++ compiler. build.rs puts this header in front of every kernel.
//
// A block's threads are fibers of one operating-system thread (runtime.cpp). A thread runs until it
// ends or waits at a barrier or a warp collective; nothing else yields. One block runs at a time in
// an operating-system thread, so `__shared__` memory is a static of that thread.
//
// Bytes moved: none of its own. Conventions: arithmetic is IEEE 754 f32, rounded to nearest, never
// contracted and never flushed, as the `_rn` intrinsics promise on a GPU.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define FUSED_DROPOUT_EMULATOR 1

// ---- language ---------------------------------------------------------------------------------

#define __global__ static
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ static thread_local
#ifndef __clang__
#define __builtin_assume(condition) ((condition) ? void() : __builtin_unreachable())
#endif

// ---- vector types -----------------------------------------------------------------------------

#define FD_VECTORS(scalar, name)                                                                  \
    struct name##1 {                                                                              \
        scalar x;                                                                                 \
    };                                                                                            \
    struct alignas(2 * sizeof(scalar)) name##2 {                                                  \
        scalar x, y;                                                                              \
    };                                                                                            \
    struct name##3 {                                                                              \
        scalar x, y, z;                                                                           \
    };                                                                                            \
    struct alignas(sizeof(scalar) < 4 ? 4 * sizeof(scalar) : 16) name##4 {                        \
        scalar x, y, z, w;                                                                        \
    };                                                                                            \
    inline name##1 make_##name##1(scalar x) { return {x}; }                                       \
    inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                          \
    inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }             \
    inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

FD_VECTORS(signed char, char)
FD_VECTORS(unsigned char, uchar)
FD_VECTORS(short, short)
FD_VECTORS(unsigned short, ushort)
FD_VECTORS(int, int)
FD_VECTORS(unsigned int, uint)
FD_VECTORS(long long, longlong)
FD_VECTORS(unsigned long long, ulonglong)
FD_VECTORS(float, float)
FD_VECTORS(double, double)
#undef FD_VECTORS

struct dim3 {
    unsigned int x = 1, y = 1, z = 1;
};

// ---- the running thread, and what it asks of the runtime ----------------------------------------

// `__thread`, not `thread_local`: an access is one load, without a call that could initialise it.
extern __thread uint3 threadIdx;
extern __thread uint3 blockIdx;
extern __thread dim3 blockDim;
extern __thread dim3 gridDim;
constexpr int warpSize = 32;

// Every access of a kernel to a tensor is announced here before it happens. An access that is not
// wholly inside one tensor of the launch, writes to a read-only one, has a width that no memory
// instruction has or is not aligned to its width, ends the launch: the function does not return.
void emulator_touch(const void* address, size_t bytes, bool write);

namespace emulator {

// One lane's part in a warp collective, and what comes back to it. Source lines tell collectives
// apart: the lanes of a mask must meet at the same one.
struct Site {
    const char* what;
    const char* file;
    int line;
};

// Waits until every thread of the block is here; returns how many gave a nonzero predicate.
unsigned barrier(const Site& site, bool predicate);
// Waits until all lanes of `mask` are here; returns the bits that `from` had as `value`.
uint64_t exchange(const Site& site, unsigned mask, uint64_t value, unsigned from);
// Waits until all lanes of `mask` are here; returns the lanes whose predicate is nonzero. Among the
// warp collectives only __syncwarp orders the lanes' accesses to memory.
unsigned vote(const Site& site, unsigned mask, bool predicate, bool orders_memory = false);
// Ends the launch with a message.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

inline unsigned lane() { return threadIdx.x & 31; }

// A kernel by its name; registers itself before main.
struct Kernel {
    const char* name;
    size_t params;
    void (*body)(const void*);
    const Kernel* next;
    Kernel(const char* name, size_t params, void (*body)(const void*));
};

template <class T>
inline T exchanged(const Site& site, unsigned mask, T value, unsigned from) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = exchange(site, mask, bits, from);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

} // namespace emulator

// Makes `body`, a function of `const Params&`, known under `name`.
#define FD_EMULATED_KERNEL(name, Params, ...)                                                     \
    static const ::emulator::Kernel emulated_##name(                                              \
        #name, sizeof(Params),                                                                    \
        [](const void* params) { __VA_ARGS__(*static_cast<const Params*>(params)); });

// ---- barriers and warp collectives --------------------------------------------------------------

#define FD_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FD_SITE) { emulator::barrier({"__syncthreads", file, line}, false); }
inline int __syncthreads_count(int predicate, FD_SITE) {
    return int(emulator::barrier({"__syncthreads_count", file, line}, predicate != 0));
}
inline int __syncthreads_or(int predicate, FD_SITE) {
    return emulator::barrier({"__syncthreads_or", file, line}, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, FD_SITE) {
    return emulator::barrier({"__syncthreads_and", file, line}, predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, FD_SITE) {
    emulator::vote({"__syncwarp", file, line}, mask, false, true);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, FD_SITE) {
    return emulator::vote({"__ballot_sync", file, line}, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, FD_SITE) {
    return emulator::vote({"__any_sync", file, line}, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FD_SITE) {
    return emulator::vote({"__all_sync", file, line}, mask, predicate != 0) == mask;
}

// The source lanes are those of PTX `shfl.sync`: a lane whose source lies outside of its segment of
// `width` lanes keeps its own value.
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, FD_SITE) {
    unsigned segment = emulator::lane() & ~unsigned(width - 1);
    unsigned from = segment | (unsigned(source) & unsigned(width - 1));
    return emulator::exchanged({"__shfl_sync", file, line}, mask, value, from);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, FD_SITE) {
    unsigned lane = emulator::lane(), from = lane ^ unsigned(flip);
    // Beyond the end of the segment: own value. Before its start is allowed, as in the hardware.
    if (from > (lane | unsigned(width - 1))) from = lane;
    return emulator::exchanged({"__shfl_xor_sync", file, line}, mask, value, from);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, FD_SITE) {
    unsigned lane = emulator::lane(), from = lane + delta;
    if (from > (lane | unsigned(width - 1))) from = lane;
    return emulator::exchanged({"__shfl_down_sync", file, line}, mask, value, from);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, FD_SITE) {
    unsigned lane = emulator::lane(), segment = lane & ~unsigned(width - 1);
    unsigned from = lane - segment < delta ? lane : lane - delta;
    return emulator::exchanged({"__shfl_up_sync", file, line}, mask, value, from);
}
#undef FD_SITE

inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- loads and stores with a cache policy: the policy is nothing here ---------------------------

#define FD_LOAD(name)                                                                             \
    template <class T>                                                                            \
    inline T name(const T* address) {                                                             \
        return *address;                                                                          \
    }
#define FD_STORE(name)                                                                            \
    template <class T>                                                                            \
    inline void name(T* address, T value) {                                                       \
        *address = value;                                                                         \
    }
FD_LOAD(__ldg) FD_LOAD(__ldca) FD_LOAD(__ldcg) FD_LOAD(__ldcs) FD_LOAD(__ldlu) FD_LOAD(__ldcv)
FD_STORE(__stwb) FD_STORE(__stcg) FD_STORE(__stcs) FD_STORE(__stwt)
#undef FD_LOAD
#undef FD_STORE

// ---- atomics: threads switch at barriers and collectives only, so these are whole -----------------

inline unsigned atomicMin(unsigned* address, unsigned value) {
    const unsigned before = *address;
    if (value < before) *address = value;
    return before;
}

// ---- arithmetic -------------------------------------------------------------------------------

namespace emulator {
template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits are kept");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

// The function on each 16-bit half.
template <class F>
inline unsigned halves(unsigned a, unsigned b, F f) {
    unsigned low = uint16_t(f(uint16_t(a), uint16_t(b)));
    unsigned high = uint16_t(f(uint16_t(a >> 16), uint16_t(b >> 16)));
    return low | high << 16;
}
} // namespace emulator

inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __int2float_rn(int x) { return float(x); }
inline float __ull2float_rn(unsigned long long x) { return float(x); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }

// The fast approximations of a GPU are the accurate functions here: a bound that holds on both
// must be derived from the GPU's documented error.
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __umul24(unsigned a, unsigned b) { return (a & 0xffffff) * (b & 0xffffff); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
    return reversed;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned select = selector >> (4 * i) & 0xf;
        unsigned byte = unsigned(bytes >> (8 * (select & 7))) & 0xff;
        // Bit 3 of a selector replicates the sign of the byte.
        if (select & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
    return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
    return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}

// Two 16-bit lanes in a word.
#define FD_HALVES(name, expression)                                                               \
    inline unsigned name(unsigned a, unsigned b) {                                                \
        return emulator::halves(a, b, [](uint16_t x, uint16_t y) { return expression; });         \
    }
FD_HALVES(__vadd2, x + y)
FD_HALVES(__vsub2, x - y)
FD_HALVES(__vmaxu2, x > y ? x : y)
FD_HALVES(__vminu2, x < y ? x : y)
FD_HALVES(__vmaxs2, int16_t(x) > int16_t(y) ? x : y)
FD_HALVES(__vmins2, int16_t(x) < int16_t(y) ? x : y)
FD_HALVES(__vsetgeu2, x >= y)
FD_HALVES(__vsetgtu2, x > y)
FD_HALVES(__vsetleu2, x <= y)
FD_HALVES(__vsetltu2, x < y)
FD_HALVES(__vseteq2, x == y)
FD_HALVES(__vsetne2, x != y)
FD_HALVES(__vcmpgeu2, x >= y ? 0xffff : 0)
FD_HALVES(__vcmpgtu2, x > y ? 0xffff : 0)
FD_HALVES(__vcmpleu2, x <= y ? 0xffff : 0)
FD_HALVES(__vcmpltu2, x < y ? 0xffff : 0)
FD_HALVES(__vcmpeq2, x == y ? 0xffff : 0)
FD_HALVES(__vcmpne2, x != y ? 0xffff : 0)
#undef FD_HALVES

// The larger (smaller) lanes; a predicate is true where its lane of the first word was taken.
inline unsigned __vibmax_u16x2(unsigned a, unsigned b, bool* high, bool* low) {
    *high = a >> 16 >= b >> 16;
    *low = (a & 0xffff) >= (b & 0xffff);
    return __vmaxu2(a, b);
}
inline unsigned __vibmin_u16x2(unsigned a, unsigned b, bool* high, bool* low) {
    *high = a >> 16 <= b >> 16;
    *low = (a & 0xffff) <= (b & 0xffff);
    return __vminu2(a, b);
}

// CUDA's overloads of min and max; of floating-point numbers, the one that is not a NaN.
#define FD_MIN_MAX(T)                                                                             \
    inline T min(T a, T b) { return b < a ? b : a; }                                              \
    inline T max(T a, T b) { return a < b ? b : a; }
FD_MIN_MAX(int)
FD_MIN_MAX(unsigned)
FD_MIN_MAX(long)
FD_MIN_MAX(unsigned long)
FD_MIN_MAX(long long)
FD_MIN_MAX(unsigned long long)
#undef FD_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
