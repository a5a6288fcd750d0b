// bias_act_dropout: y = D(act(x + bias)), and its gradients.
//
// With x' = x, or x + bias rounded to f32:
//
//     y[r, c]  = kept(r, c) ? round(act(x'[r, c]) * scale) : +0
//     dx[r, c] = kept(r, c) ? round((dy[r, c] * scale) * act'(x'[r, c])) : +0
//     dbias[c] = sum over r of dx[r, c] before it is rounded, by the tree of src/ops/sum_rows.rs
//
// The activation is recomputed from x in the backward pass: nothing is saved. Which one it is is a
// parameter: the branch is the same for a whole launch.
//
// Bytes an element: forward one read, one written (4 in 16-bit storage); backward two read, one written (6);
// the bias is read from L2 or L1, and its gradient writes a 16th of an f32 for the first level of the sums.
// In place: y may be x; dx may be dy or x.

#include "activation.cuh"
#include "kernel.cuh"
#include "sum_tile.cuh"

template <typename T>
struct BiasActParams {
    Mask mask;
    Octets octets;
    In<T> x;
    In<T> bias;  // may be absent
    Out<T> y;
    Activation activation;
    unsigned padding;
};
static_assert(sizeof(BiasActParams<float>) == 248, "bias_act_dropout.rs: ForwardParams");

/// x or x + bias in f32.
template <typename T>
__device__ __forceinline__ Values biased(const Octet<T>& x, const Octet<T>& bias, bool with_bias) {
    Values sum = unpack(x);
    if (!with_bias) return sum;
    const Values values = unpack(bias);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum.at[j] = __fadd_rn(sum.at[j], values.at[j]);
    return sum;
}

template <typename T, bool aligned>
struct BiasAct {
    using Params = BiasActParams<T>;
    struct Loaded {
        Octet<T> x;
        Octet<T> bias;
    };

    static __device__ __forceinline__ Loaded load(const Params& p, Index index) {
        const Position position(p.octets, index);
        const unsigned count = position.count(p.octets);
        Loaded loaded = {};
        loaded.x = p.x.template streaming<aligned>(element_of<aligned>(p.octets, index, position), count);
        if (p.bias.present()) {
            loaded.bias = p.bias.template cached<aligned>(8ull * position.octet, count);
        }
        return loaded;
    }

    static __device__ __forceinline__ void finish(const Params& p, Index index, Position position,
                                                  const Kept& keep, float scale, const Loaded& loaded) {
        Values activated = biased(loaded.x, loaded.bias, p.bias.present());
        apply<false>(p.activation, activated);
        Values y = {};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (keep.at[j]) y.at[j] = __fmul_rn(activated.at[j], scale);
        }
        p.y.template cached<aligned>(element_of<aligned>(p.octets, index, position),
                                     position.count(p.octets), pack<T>(y));
    }
};

FD_KERNEL(bias_act_dropout_f32, BiasActParams<float>, THREADS, stream<BiasAct<float, true>>)
FD_KERNEL(bias_act_dropout_f16, BiasActParams<f16>, THREADS, stream<BiasAct<f16, true>>)
FD_KERNEL(bias_act_dropout_bf16, BiasActParams<bf16>, THREADS, stream<BiasAct<bf16, true>>)
FD_KERNEL(bias_act_dropout_unaligned_f32, BiasActParams<float>, THREADS,
          stream_unaligned<BiasAct<float, false>>)
FD_KERNEL(bias_act_dropout_unaligned_f16, BiasActParams<f16>, THREADS, stream_unaligned<BiasAct<f16, false>>)
FD_KERNEL(bias_act_dropout_unaligned_bf16, BiasActParams<bf16>, THREADS, stream_unaligned<BiasAct<bf16, false>>)

/// Tensors of a backward call.
template <typename T>
struct BiasActGrad {
    In<T> x;
    In<T> bias;  // may be absent
    In<T> dy;
    Out<T> dx;
    Activation activation;
    unsigned padding;
};

template <typename T>
struct BiasActGradParams {
    Mask mask;
    Octets octets;
    BiasActGrad<T> grad;
};
static_assert(sizeof(BiasActGradParams<float>) == 256, "bias_act_dropout.rs: GradParams");

template <typename T>
struct BiasActBiasGradParams {
    Mask mask;
    Tiles tiles;
    BiasActGrad<T> grad;
};
static_assert(sizeof(BiasActBiasGradParams<float>) == 288, "bias_act_dropout.rs: BiasGradParams");

/// dx, element by element (`GradParams`) or in tiles, with the terms of dbias (`BiasGradParams`).
template <typename T, typename GradParams, bool aligned>
struct BiasActBackward {
    using Params = GradParams;
    struct Loaded {
        Octet<T> x;
        Octet<T> bias;
        Octet<T> dy;
    };

    static __device__ __forceinline__ Loaded load_at(const Params& p, unsigned long long element,
                                                     unsigned octet, unsigned count) {
        Loaded loaded = {};
        loaded.x = p.grad.x.template streaming<aligned>(element, count);
        loaded.dy = p.grad.dy.template streaming<aligned>(element, count);
        if (p.grad.bias.present()) {
            loaded.bias = p.grad.bias.template cached<aligned>(8ull * octet, count);
        }
        return loaded;
    }

    static __device__ __forceinline__ Values finish_at(const Params& p, unsigned long long element,
                                                       unsigned count, const Kept& keep, float scale,
                                                       const Loaded& loaded) {
        Values slope = biased(loaded.x, loaded.bias, p.grad.bias.present());
        apply<true>(p.grad.activation, slope);
        const Values dy = unpack(loaded.dy);
        Values dx = {};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (keep.at[j]) dx.at[j] = __fmul_rn(__fmul_rn(dy.at[j], scale), slope.at[j]);
        }
        p.grad.dx.template cached<aligned>(element, count, pack<T>(dx));
        return dx;
    }

    static __device__ __forceinline__ Loaded load(const Params& p, Index index) {
        const Position position(p.octets, index);
        return load_at(p, element_of<aligned>(p.octets, index, position), position.octet,
                       position.count(p.octets));
    }

    static __device__ __forceinline__ void finish(const Params& p, Index index, Position position,
                                                  const Kept& keep, float scale, const Loaded& loaded) {
        finish_at(p, element_of<aligned>(p.octets, index, position), position.count(p.octets), keep,
                  scale, loaded);
    }
};

template <typename T, bool aligned>
using BiasActDx = BiasActBackward<T, BiasActGradParams<T>, aligned>;

template <typename T, bool aligned>
using BiasActDbias = BiasActBackward<T, BiasActBiasGradParams<T>, aligned>;

FD_KERNEL(bias_act_dropout_grad_f32, BiasActGradParams<float>, THREADS,
          stream<BiasActDx<float, true>>)
FD_KERNEL(bias_act_dropout_grad_f16, BiasActGradParams<f16>, THREADS, stream<BiasActDx<f16, true>>)
FD_KERNEL(bias_act_dropout_grad_bf16, BiasActGradParams<bf16>, THREADS,
          stream<BiasActDx<bf16, true>>)
FD_KERNEL(bias_act_dropout_grad_unaligned_f32, BiasActGradParams<float>, THREADS,
          stream_unaligned<BiasActDx<float, false>>)
FD_KERNEL(bias_act_dropout_grad_unaligned_f16, BiasActGradParams<f16>, THREADS,
          stream_unaligned<BiasActDx<f16, false>>)
FD_KERNEL(bias_act_dropout_grad_unaligned_bf16, BiasActGradParams<bf16>, THREADS,
          stream_unaligned<BiasActDx<bf16, false>>)
FD_KERNEL(bias_act_dropout_bias_grad_f32, BiasActBiasGradParams<float>, THREADS,
          sum_tile<BiasActDbias<float, true>>)
FD_KERNEL(bias_act_dropout_bias_grad_f16, BiasActBiasGradParams<f16>, THREADS,
          sum_tile<BiasActDbias<f16, true>>)
FD_KERNEL(bias_act_dropout_bias_grad_bf16, BiasActBiasGradParams<bf16>, THREADS,
          sum_tile<BiasActDbias<bf16, true>>)
FD_KERNEL(bias_act_dropout_bias_grad_unaligned_f32, BiasActBiasGradParams<float>, THREADS,
          sum_tile<BiasActDbias<float, false>>)
FD_KERNEL(bias_act_dropout_bias_grad_unaligned_f16, BiasActBiasGradParams<f16>, THREADS,
          sum_tile<BiasActDbias<f16, false>>)
FD_KERNEL(bias_act_dropout_bias_grad_unaligned_bf16, BiasActBiasGradParams<bf16>, THREADS,
          sum_tile<BiasActDbias<bf16, false>>)
