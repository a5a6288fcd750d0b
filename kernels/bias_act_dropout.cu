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
// the bias is read from L2 or L1, and its gradient writes a 64th of an f32 for the first levels of the sums.
// In place: y may be x; dx may be dy or x.

#include "activation.cuh"
#include "kernel.cuh"
#include "sum_tile.cuh"

template <typename T>
struct BiasActParams {
    Mask mask;
    Octets octets;
    InMatrix<T> x;
    In<T> bias;  // may be absent
    OutMatrix<T> y;
    Activation activation;
    unsigned padding;
};
static_assert(sizeof(BiasActParams<float>) == 264, "bias_act_dropout.rs: ForwardParams");

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

    template <typename Position>
    static __device__ __forceinline__ Loaded load(const Params& p, const Position& at) {
        Loaded loaded = {};
        loaded.x = p.x.template streaming<aligned>(at.element(p.x.stride), at.count());
        if (p.bias.present()) {
            loaded.bias = p.bias.template cached<aligned>(at.column(), at.count());
        }
        return loaded;
    }

    template <typename Position>
    static __device__ __forceinline__ void finish(const Params& p, const Position& at,
                                                  const Kept& keep, float scale, const Loaded& loaded) {
        Values activated = biased(loaded.x, loaded.bias, p.bias.present());
        apply<T, false>(p.activation, activated);
        Values y = {};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (keep.at[j]) y.at[j] = __fmul_rn(activated.at[j], scale);
        }
        p.y.template cached<aligned>(at.element(p.y.stride), at.count(), pack<T>(y));
    }
};

FD_STREAM_KERNELS(bias_act_dropout, BiasActParams, BiasAct)

/// Tensors of a backward call.
template <typename T>
struct BiasActGrad {
    InMatrix<T> x;
    InMatrix<T> dy;
    OutMatrix<T> dx;
    In<T> bias;  // may be absent
    Activation activation;
    unsigned padding;
};

template <typename T>
struct BiasActGradParams {
    Mask mask;
    Octets octets;
    BiasActGrad<T> grad;
};
static_assert(sizeof(BiasActGradParams<float>) == 280, "bias_act_dropout.rs: GradParams");

template <typename T>
struct BiasActBiasGradParams {
    Mask mask;
    Tiles tiles;
    BiasActGrad<T> grad;
};
static_assert(sizeof(BiasActBiasGradParams<float>) == 312, "bias_act_dropout.rs: BiasGradParams");

/// dx, element by element (`GradParams`) or in tiles, with the terms of dbias (`BiasGradParams`).
template <typename T, typename GradParams, bool aligned>
struct BiasActBackward {
    using Params = GradParams;
    struct Loaded {
        Octet<T> x;
        Octet<T> bias;
        Octet<T> dy;
    };

    template <typename Position>
    static __device__ __forceinline__ Loaded load(const Params& p, const Position& at) {
        const BiasActGrad<T>& grad = p.grad;
        Loaded loaded = {};
        loaded.x = grad.x.template streaming<aligned>(at.element(grad.x.stride), at.count());
        loaded.dy = grad.dy.template streaming<aligned>(at.element(grad.dy.stride), at.count());
        if (grad.bias.present()) {
            loaded.bias = grad.bias.template cached<aligned>(at.column(), at.count());
        }
        return loaded;
    }

    /// Returns dx before it is rounded.
    template <typename Position>
    static __device__ __forceinline__ Values finish(const Params& p, const Position& at,
                                                    const Kept& keep, float scale,
                                                    const Loaded& loaded) {
        Values slope = biased(loaded.x, loaded.bias, p.grad.bias.present());
        apply<T, true>(p.grad.activation, slope);
        const Values dy = unpack(loaded.dy);
        Values dx = {};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (keep.at[j]) dx.at[j] = __fmul_rn(__fmul_rn(dy.at[j], scale), slope.at[j]);
        }
        p.grad.dx.template cached<aligned>(at.element(p.grad.dx.stride), at.count(), pack<T>(dx));
        return dx;
    }
};

template <typename T, bool aligned>
using BiasActDx = BiasActBackward<T, BiasActGradParams<T>, aligned>;

template <typename T, bool aligned>
using BiasActDbias = BiasActBackward<T, BiasActBiasGradParams<T>, aligned>;

FD_STREAM_KERNELS(bias_act_dropout_grad, BiasActGradParams, BiasActDx)
FD_TILE_KERNELS(bias_act_dropout_bias_grad, BiasActBiasGradParams, BiasActDbias)
