// The built-ins as kernels, for the tests that hold them to what Rust computes. In no CUDA build.
//
// Conversions: one element a thread, x to y. Collectives: one warp, lane l has x[l] and writes what
// it got to y[8 l ..]. Instructions on words: a few on each pair of words.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

struct Params {
    uint64_t x, y;
    uint32_t count;
    uint32_t unused;
};

template <typename To, typename From, typename F>
void each(const Params& p, F f) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.count) return;
    const From* x = reinterpret_cast<const From*>(p.x) + i;
    To* y = reinterpret_cast<To*>(p.y) + i;
    emulator_touch(x, sizeof(From), false);
    emulator_touch(y, sizeof(To), true);
    *y = f(*x);
}

void f16_to_f32(const Params& p) { each<float, __half>(p, __half2float); }
void f32_to_f16(const Params& p) { each<__half, float>(p, __float2half_rn); }
void bf16_to_f32(const Params& p) { each<float, __nv_bfloat16>(p, __bfloat162float); }
void f32_to_bf16(const Params& p) { each<__nv_bfloat16, float>(p, __float2bfloat16_rn); }

// Each lane gets what the collectives give it.
void collectives(const Params& p) {
    const unsigned all = 0xffffffffu, lane = threadIdx.x & 31;
    const uint32_t x = reinterpret_cast<const uint32_t*>(p.x)[lane];
    uint32_t* y = reinterpret_cast<uint32_t*>(p.y) + 8 * lane;
    y[0] = __shfl_sync(all, x, 5);
    y[1] = __shfl_xor_sync(all, x, 3);
    y[2] = __shfl_down_sync(all, x, 4);
    y[3] = __shfl_up_sync(all, x, 4);
    y[4] = __ballot_sync(all, x % 3 == 0);
    y[5] = unsigned(__any_sync(all, x == 7)) | unsigned(__all_sync(all, x > 0)) << 1;
    y[6] = __shfl_sync(all, x, 1, 8);
    y[7] = unsigned(__syncthreads_count(x % 5 == 0));
}

// Thread i has x[2 i] and x[2 i + 1], and writes what the instructions give it to y[8 i ..].
void words(const Params& p) {
    const unsigned i = threadIdx.x;
    if (2 * i >= p.count) return;
    const uint32_t* x = reinterpret_cast<const uint32_t*>(p.x) + 2 * i;
    const uint32_t a = x[0], b = x[1];
    uint32_t* y = reinterpret_cast<uint32_t*>(p.y) + 8 * i;
    bool high, low;
    y[0] = __umulhi(a, b);
    y[1] = __funnelshift_l(a, b, b);
    y[2] = __funnelshift_r(a, b, b);
    y[3] = __byte_perm(a, b, 0x6240);
    y[4] = __vibmax_u16x2(a, b, &high, &low);
    y[5] = unsigned(high) << 1 | unsigned(low);
    y[6] = __brev(a);
    y[7] = unsigned(__popc(a)) << 16 | unsigned(__clz(int(b)));
}

} // namespace

FD_EMULATED_KERNEL(convert_f16_to_f32, Params, f16_to_f32)
FD_EMULATED_KERNEL(convert_f32_to_f16, Params, f32_to_f16)
FD_EMULATED_KERNEL(convert_bf16_to_f32, Params, bf16_to_f32)
FD_EMULATED_KERNEL(convert_f32_to_bf16, Params, f32_to_bf16)
FD_EMULATED_KERNEL(convert_collectives, Params, collectives)
FD_EMULATED_KERNEL(convert_words, Params, words)
