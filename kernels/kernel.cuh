// How a kernel gets its name, and the shape that the streaming kernels share.

#pragma once

#include "mask.cuh"

/// Stamps the kernel `name`: one parameter, a structure, given to the body (a function template's
/// instance, last because of its commas). The emulator makes a host function of it instead.
#ifdef FUSED_DROPOUT_EMULATOR
#define FD_BOUNDED_KERNEL(name, Params, bounds, ...) FD_EMULATED_KERNEL(name, Params, __VA_ARGS__)
#else
#define FD_BOUNDED_KERNEL(name, Params, bounds, ...)                                              \
    extern "C" __global__ void __launch_bounds__ bounds                                           \
        name(const __grid_constant__ Params params) {                                             \
        __VA_ARGS__(params);                                                                      \
    }
#endif
#define FD_KERNEL(name, Params, threads, ...)                                                     \
    FD_BOUNDED_KERNEL(name, Params, (threads), __VA_ARGS__)

/// The same with registers for so many blocks a multiprocessor, where ptxas spills to have more blocks.
#define FD_KERNEL_BLOCKS(name, Params, threads, blocks, ...)                                      \
    FD_BOUNDED_KERNEL(name, Params, (threads, blocks), __VA_ARGS__)

/// Blocks of `block` threads that have `threads` together; at least one.
constexpr unsigned blocks_for(unsigned threads, unsigned block) {
    return threads > block ? threads / block : 1;
}

/// Threads of a block, where a kernel does not say otherwise.
constexpr unsigned THREADS = 256;

// A streaming kernel takes one octet a thread: a 16-byte load of each 16-bit tensor. The reason is a measurement, on an H200
// at 2^28 elements of bf16. A memcpy takes 258 us; a kernel that copies takes 258 us with one octet a thread, 272 with two
// and 276 with four. What other stores gave is told beside FD_STORES_EVICT_FIRST in tuning.cuh.

/// A streaming kernel: each octet of the launch is loaded, computed and stored by one thread. `Op` has
/// `Params` with members `mask` and `octets`, `Loaded`, `load(params, position)` and
/// `finish(params, position, kept, scale, loaded)`. `dense`: no matrix has a stride, and a load does not wait for
/// the division that finds its row.
/// No thread reads what another one writes, so every call may be in place.
template <typename Op, bool dense = true>
__device__ __forceinline__ void stream(const typename Op::Params& params) {
    const unsigned index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= params.octets.count) return;
    const Position<dense> at(params.octets, index);
    const typename Op::Loaded loaded = Op::load(params, at);
    with_draws(params.mask, [&](const auto& draws) {
        const Lanes lanes = draws.lanes(draws.logical(at.row), at.octet);
        Op::finish(params, at, draws.kept(lanes), draws.odds.scale, loaded);
    });
}

/// The same for f32, where an octet is two accesses. Each of two threads takes the same half of a pair of neighbouring octets
/// (`PairPosition`), so that both accesses of a warp are whole 32-byte sectors. With an octet a thread each access is half
/// sectors: dropout had 72 % of the bandwidth of an H200 so. Rows have an even number of octets, one behind the other.
template <typename Op>
__device__ __forceinline__ void stream_pairs(const typename Op::Params& params) {
    const unsigned index = blockIdx.x * THREADS + threadIdx.x;
    const bool exists = index < params.octets.count;
    const unsigned there = __ballot_sync(0xffffffffu, exists);
    if (!exists) return;
    const PairPosition at(params.octets, index);
    const typename Op::Loaded loaded = Op::load(params, at);
    with_draws(params.mask, [&](const auto& draws) {
        const Lanes own = draws.lanes(draws.logical(at.row), at.octet);
        Op::finish(params, at, draws.kept(at.shared(own, there)), draws.odds.scale, loaded);
    });
}

/// The kernels of a streaming operator `Op<T, aligned>`, for each storage type: `name` where no matrix has a stride, and
/// its twins for strides between whole octets, and for any alignment (`Layout` in src/device/mod.rs).
#define FD_STREAM_KERNELS(name, Params, Op)                                      \
    FD_STREAM_KERNELS_OF(name, Params, Op, float, f32)                           \
    FD_STREAM_KERNELS_OF(name, Params, Op, f16, f16)                             \
    FD_STREAM_KERNELS_OF(name, Params, Op, bf16, bf16)                           \
    FD_KERNEL(name##_f32, Params<float>, THREADS, stream_pairs<Op<float, true>>) \
    FD_KERNEL(name##_f16, Params<f16>, THREADS, stream<Op<f16, true>>)           \
    FD_KERNEL(name##_bf16, Params<bf16>, THREADS, stream<Op<bf16, true>>)
#define FD_STREAM_KERNELS_OF(name, Params, Op, T, type)                              \
    FD_KERNEL(name##_strided_##type, Params<T>, THREADS, stream<Op<T, true>, false>) \
    FD_KERNEL(name##_unaligned_##type, Params<T>, THREADS, stream<Op<T, false>, false>)
