// dropout_add: y = residual + D(x + bias), and its gradients.
//
// Forward: x' = x, or x + bias rounded to f32;
//
//     y[r, c] = kept(r, c) ? round(fma(x'[r, c], scale, residual[r, c])) : residual[r, c]
//
// Bytes an element: two read, one written (6 in 16-bit storage); the bias is read from L2 or L1.
// In place: y may be the residual.
//
// Instructions for sm_90 (CUDA 13.0, bf16, no bias, full block; compiled, not timed): 209 a thread with
// two octets. Of those an octet needs 78: 19 wide multiplications (20 less that of the stream number,
// which the uniform datapath does once), 20 three-way exclusive ors, 8 compares, 16 unpackings, 8 FMA,
// 4 packings, 2 loads, 1 store. The other 53 are once a thread: 23 reads of parameters (10 of them round
// keys: for sm_90 ptxas makes no parameter another instruction's operand), 12 for the two positions,
// 6 for index and addresses, 5 for the choice of the path, 7 others. All four loads are issued before
// the first wait; no spills.
//
// Backward: dx = D(dy), which is the kernel of dropout.cu where there is no bias. With one, the kernel
// here also sums kept dy over the 64 rows of a tile in order from +0: the first level of the tree that
// src/ops/sum_rows.rs defines; sum_rows.cu adds up the others. Bytes an element: one read, one written,
// and a 16th of an f32 for the sums.
// In place: dx may be dy.

#include "kernel.cuh"
#include "sum_tile.cuh"

template <typename T>
struct DropoutAddParams {
    Mask mask;
    Octets octets;
    In<T> x;
    In<T> bias;
    In<T> residual;
    Out<T> y;
};
static_assert(sizeof(DropoutAddParams<float>) == 248, "dropout_add.rs: ForwardParams");

template <typename T, bool with_bias, bool aligned>
struct DropoutAdd {
    using Params = DropoutAddParams<T>;
    struct Loaded {
        Octet<T> x;
        Octet<T> bias;
        Octet<T> residual;
    };

    static __device__ __forceinline__ Loaded load(const Params& p, Index index) {
        const Position position(p.octets, index);
        const unsigned long long element = element_of<aligned>(p.octets, index, position);
        const unsigned count = position.count(p.octets);
        Loaded loaded;
        loaded.x = p.x.template streaming<aligned>(element, count);
        loaded.residual = p.residual.template streaming<aligned>(element, count);
        if (with_bias) {
            loaded.bias = p.bias.template cached<aligned>(8ull * position.octet, count);
        }
        return loaded;
    }

    static __device__ __forceinline__ void finish(const Params& p, Index index, Position position,
                                                  const Kept& keep, float scale, const Loaded& loaded) {
        Values x = unpack(loaded.x);
        if (with_bias) {
            const Values bias = unpack(loaded.bias);
#pragma unroll
            for (int j = 0; j < 8; ++j) x.at[j] = __fadd_rn(x.at[j], bias.at[j]);
        }
        Values y = unpack(loaded.residual);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (keep.at[j]) y.at[j] = __fmaf_rn(x.at[j], scale, y.at[j]);
        }
        p.y.template cached<aligned>(element_of<aligned>(p.octets, index, position),
                                     position.count(p.octets), pack<T>(y));
    }
};

FD_KERNEL(dropout_add_f32, DropoutAddParams<float>, THREADS, stream<DropoutAdd<float, false, true>>)
FD_KERNEL(dropout_add_f16, DropoutAddParams<f16>, THREADS, stream<DropoutAdd<f16, false, true>>)
FD_KERNEL(dropout_add_bf16, DropoutAddParams<bf16>, THREADS, stream<DropoutAdd<bf16, false, true>>)
FD_KERNEL(dropout_add_unaligned_f32, DropoutAddParams<float>, THREADS,
          stream_unaligned<DropoutAdd<float, false, false>>)
FD_KERNEL(dropout_add_unaligned_f16, DropoutAddParams<f16>, THREADS,
          stream_unaligned<DropoutAdd<f16, false, false>>)
FD_KERNEL(dropout_add_unaligned_bf16, DropoutAddParams<bf16>, THREADS,
          stream_unaligned<DropoutAdd<bf16, false, false>>)
FD_KERNEL(dropout_add_bias_f32, DropoutAddParams<float>, THREADS,
          stream<DropoutAdd<float, true, true>>)
FD_KERNEL(dropout_add_bias_f16, DropoutAddParams<f16>, THREADS, stream<DropoutAdd<f16, true, true>>)
FD_KERNEL(dropout_add_bias_bf16, DropoutAddParams<bf16>, THREADS,
          stream<DropoutAdd<bf16, true, true>>)
FD_KERNEL(dropout_add_bias_unaligned_f32, DropoutAddParams<float>, THREADS,
          stream_unaligned<DropoutAdd<float, true, false>>)
FD_KERNEL(dropout_add_bias_unaligned_f16, DropoutAddParams<f16>, THREADS,
          stream_unaligned<DropoutAdd<f16, true, false>>)
FD_KERNEL(dropout_add_bias_unaligned_bf16, DropoutAddParams<bf16>, THREADS,
          stream_unaligned<DropoutAdd<bf16, true, false>>)

template <typename T>
struct BiasGradParams {
    Mask mask;
    Tiles tiles;
    In<T> dy;
    Out<T> dx;  // may be absent
};
static_assert(sizeof(BiasGradParams<float>) == 264, "dropout_add.rs: BiasGradParams");

/// dx, and kept dy as the terms of dbias.
template <typename T, bool aligned>
struct BiasGrad {
    using Params = BiasGradParams<T>;
    using Loaded = Octet<T>;

    static __device__ __forceinline__ Loaded load_at(const Params& p, unsigned long long element,
                                                     unsigned, unsigned count) {
        return p.dy.template streaming<aligned>(element, count);
    }

    static __device__ __forceinline__ Values finish_at(const Params& p, unsigned long long element,
                                                       unsigned count, const Kept& keep, float scale,
                                                       const Loaded& dy) {
        const Values values = unpack(dy);
        Values kept_dy = {};
        Values dx;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (keep.at[j]) kept_dy.at[j] = values.at[j];
            // +0 times the scale, which is finite, is +0.
            dx.at[j] = __fmul_rn(kept_dy.at[j], scale);
        }
        if (p.dx.present()) p.dx.template cached<aligned>(element, count, pack<T>(dx));
        return kept_dy;
    }
};

FD_KERNEL(dropout_add_bias_grad_f32, BiasGradParams<float>, THREADS, sum_tile<BiasGrad<float, true>>)
FD_KERNEL(dropout_add_bias_grad_f16, BiasGradParams<f16>, THREADS, sum_tile<BiasGrad<f16, true>>)
FD_KERNEL(dropout_add_bias_grad_bf16, BiasGradParams<bf16>, THREADS, sum_tile<BiasGrad<bf16, true>>)
FD_KERNEL(dropout_add_bias_grad_unaligned_f32, BiasGradParams<float>, THREADS, sum_tile<BiasGrad<float, false>>)
FD_KERNEL(dropout_add_bias_grad_unaligned_f16, BiasGradParams<f16>, THREADS, sum_tile<BiasGrad<f16, false>>)
FD_KERNEL(dropout_add_bias_grad_unaligned_bf16, BiasGradParams<bf16>, THREADS, sum_tile<BiasGrad<bf16, false>>)
