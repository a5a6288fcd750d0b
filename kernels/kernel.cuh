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

/// Threads of a block, in every kernel.
constexpr unsigned THREADS = 256;

/// Octets a thread of a streaming kernel: two 16-byte loads a 16-bit tensor in flight, 4 KiB apart.
/// Four would take 97.5 instructions an octet in place of 104.5 (dropout_add_bf16 for sm_90), but 63
/// registers in place of 36 and half the blocks, which small tensors do not have to spare.
constexpr unsigned OCTETS_A_THREAD = 2;

/// Octets a block of a streaming kernel.
constexpr unsigned OCTETS_A_BLOCK = THREADS * OCTETS_A_THREAD;

/// Two octets that were loaded, in a block whose octets all exist.
template <typename Op, bool plain, bool dense>
__device__ __forceinline__ void finish_both(const typename Op::Params& params, Index first,
                                            const typename Op::Loaded& a, Index second,
                                            const typename Op::Loaded& b) {
    const MaskReader<plain> draws(params.mask);
    // Anew: held from before the loads, they would be registers (sm_80, bias_act_dropout_bf16: 61 in place of 48).
    const Position<dense> at(params.octets, first);
    const Position<dense> beyond(params.octets, second);
    // Both Philox blocks before the rest: their rounds alternate and share each pair of round keys.
    const Lanes lanes_a = draws.lanes(draws.logical(at.row), at.octet);
    const Lanes lanes_b = draws.lanes(draws.logical(beyond.row), beyond.octet);
    Op::finish(params, at, draws.kept(lanes_a), draws.odds.scale, a);
    Op::finish(params, beyond, draws.kept(lanes_b), draws.odds.scale, b);
}

/// One octet, where it exists.
template <typename Op, bool dense>
__device__ __forceinline__ void load_and_finish(const typename Op::Params& params, Index index) {
    if (index.sum() >= params.octets.count) return;
    const MaskReader<false> draws(params.mask);
    const typename Op::Loaded loaded = Op::load(params, Position<dense>(params.octets, index));
    const Position<dense> at(params.octets, index);
    const Lanes lanes = draws.lanes(draws.logical(at.row), at.octet);
    Op::finish(params, at, draws.kept(lanes), draws.odds.scale, loaded);
}

/// A streaming kernel, an octet after the other: for tensors that are not aligned, where an octet alone
/// is enough loads, and both at once are more registers than ptxas grants without a spill.
template <typename Op, bool dense = false>
__device__ __forceinline__ void stream_unaligned(const typename Op::Params& params) {
    const unsigned start = blockIdx.x * OCTETS_A_BLOCK + threadIdx.x;
    load_and_finish<Op, dense>(params, {start, 0});
    load_and_finish<Op, dense>(params, {start, THREADS});
}

/// A streaming kernel: each octet of the launch is loaded, computed and stored by one thread. `Op` has
/// `Params` with members `mask` and `octets`, `Loaded`, `load(params, position)` and
/// `finish(params, position, kept, scale, loaded)`. `dense`: no matrix has a stride, and a load does not wait for
/// the division that finds its row.
/// No thread reads what another one writes, so every call may be in place.
template <typename Op, bool dense = true>
__device__ __forceinline__ void stream(const typename Op::Params& params) {
    const unsigned start = blockIdx.x * OCTETS_A_BLOCK;
    // The last block, where it is not full: no collective there.
    if (start + OCTETS_A_BLOCK > params.octets.count) return stream_unaligned<Op, dense>(params);
    const Index first = {start + threadIdx.x, 0};
    const Index second = {start + threadIdx.x, THREADS};
    const typename Op::Loaded a = Op::load(params, Position<dense>(params.octets, first));
    const typename Op::Loaded b = Op::load(params, Position<dense>(params.octets, second));
    // All threads of the block are here. ptxas would sink the second octet's loads behind the first
    // one's arithmetic; it does not move them across this and the branch. (One branch for both, before
    // the loads, is four instructions less a thread, but then it does move them. A bound on the
    // registers keeps them, but has parameters read again at every use.)
    __syncwarp();
    if (params.mask.plain) {
        finish_both<Op, true, dense>(params, first, a, second, b);
    } else {
        finish_both<Op, false, dense>(params, first, a, second, b);
    }
}

/// The kernels of a streaming operator `Op<T, aligned>`, for each storage type: `name` where no matrix has a stride, and
/// its twins for strides between whole octets, and for any alignment (src/device/stream.rs chooses).
#define FD_STREAM_KERNELS(name, Params, Op)          \
    FD_STREAM_KERNELS_OF(name, Params, Op, float, f32) \
    FD_STREAM_KERNELS_OF(name, Params, Op, f16, f16)   \
    FD_STREAM_KERNELS_OF(name, Params, Op, bf16, bf16)
#define FD_STREAM_KERNELS_OF(name, Params, Op, T, type) \
    FD_ALIGNED_STREAM_KERNELS(name, Params, Op, T, type) \
    FD_KERNEL(name##_unaligned_##type, Params<T>, THREADS, stream_unaligned<Op<T, false>>)
#define FD_ALIGNED_STREAM_KERNELS(name, Params, Op, T, type)                      \
    FD_KERNEL(name##_##type, Params<T>, THREADS, stream<Op<T, true>>)             \
    FD_KERNEL(name##_strided_##type, Params<T>, THREADS, stream<Op<T, true>, false>)
