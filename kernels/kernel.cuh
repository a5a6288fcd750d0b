// How a kernel gets its name, and the shape that the streaming kernels share.

#pragma once

#include "mask.cuh"

/// Stamps the kernel `name`: one parameter, a structure, given to the body (a function template's
/// instance, last because of its commas). The emulator makes a host function of it instead.
#ifdef FUSED_DROPOUT_EMULATOR
#define FD_KERNEL(name, Params, threads, ...) FD_EMULATED_KERNEL(name, Params, __VA_ARGS__)
#else
#define FD_KERNEL(name, Params, threads, ...)                                                     \
    extern "C" __global__ void __launch_bounds__(threads)                                         \
        name(const __grid_constant__ Params params) {                                             \
        __VA_ARGS__(params);                                                                      \
    }
#endif

/// Threads of a block, in every kernel.
constexpr unsigned THREADS = 256;

/// Octets a thread of a streaming kernel: two 16-byte loads a 16-bit tensor in flight, 4 KiB apart.
constexpr unsigned OCTETS_A_THREAD = 2;

/// Octets a block of a streaming kernel.
constexpr unsigned OCTETS_A_BLOCK = THREADS * OCTETS_A_THREAD;

/// A streaming kernel: each octet of the launch is loaded, computed and stored by one thread. `Op` has
/// `Params` with members `mask` and `octets`, `Loaded`, `load(params, index)` and
/// `finish<plain>(params, draws, index, loaded)`.
/// No thread reads what another one writes, so every call may be in place.
template <typename Op>
__device__ __forceinline__ void stream(const typename Op::Params& params) {
    const unsigned start = blockIdx.x * OCTETS_A_BLOCK;
    const Index first = {start + threadIdx.x, 0};
    const Index second = {start + threadIdx.x, THREADS};
    if (start + OCTETS_A_BLOCK <= params.octets.count) {
        const typename Op::Loaded a = Op::load(params, first);
        const typename Op::Loaded b = Op::load(params, second);
        // All threads of the block are here. ptxas would sink the second octet's loads behind the
        // first one's arithmetic; it does not move them across this.
        __syncwarp();
        const Draws draws(params.mask);
        if (draws.is_plain()) {
            Op::template finish<true>(params, draws, first, a);
            Op::template finish<true>(params, draws, second, b);
        } else {
            Op::template finish<false>(params, draws, first, a);
            Op::template finish<false>(params, draws, second, b);
        }
        return;
    }
    // The last block, where it is not full: no collective may follow.
    const Draws draws(params.mask);
    if (first.sum() < params.octets.count) {
        Op::template finish<false>(params, draws, first, Op::load(params, first));
    }
    if (second.sum() < params.octets.count) {
        Op::template finish<false>(params, draws, second, Op::load(params, second));
    }
}
