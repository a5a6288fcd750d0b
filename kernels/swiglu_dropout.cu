// swiglu_dropout: y = D(silu(gate) * up), and its gradients.
//
//     y[r, c]     = kept(r, c) ? round((silu(gate[r, c]) * up[r, c]) * scale) : +0
//     dgate[r, c] = kept(r, c) ? round(((dy[r, c] * scale) * up[r, c]) * silu'(gate[r, c])) : +0
//     dup[r, c]   = kept(r, c) ? round((dy[r, c] * scale) * silu(gate[r, c])) : +0
//
// silu is computed again from gate in the backward pass: nothing is saved. Value and slope share an exponential.
//
// Bytes an element: forward two read, one written (6 in 16-bit storage); backward three read, two written (10).
// In place: y may be gate or up; dup may be dy.

#include "activation.cuh"
#include "kernel.cuh"

/// silu(x) and silu'(x).
struct Silu {
    float value;
    float slope;

    __device__ __forceinline__ explicit Silu(float x) {
        const float near = limited(x, LOGISTIC);
        const Logistic s = Logistic::of(near);
        value = silu(x, s);
        slope = __fmaf_rn(__fmul_rn(near, s.value), s.rest, s.value);
    }
};

template <typename T>
struct SwigluParams {
    Mask mask;
    Octets octets;
    InMatrix<T> gate;
    InMatrix<T> up;
    OutMatrix<T> y;
};
static_assert(sizeof(SwigluParams<float>) == 264, "swiglu_dropout.rs: ForwardParams");

template <typename T, bool aligned>
struct Swiglu {
    using Params = SwigluParams<T>;
    struct Loaded {
        Octet<T> gate;
        Octet<T> up;
    };

    template <typename Position>
    static __device__ __forceinline__ Loaded load(const Params& p, const Position& at) {
        Loaded loaded;
        loaded.gate = p.gate.template streaming<aligned>(at.element(p.gate.stride), at.count());
        loaded.up = p.up.template streaming<aligned>(at.element(p.up.stride), at.count());
        return loaded;
    }

    template <typename Position>
    static __device__ __forceinline__ void finish(const Params& p, const Position& at,
                                                  const Kept& keep, float scale, const Loaded& loaded) {
        const Values gate = unpack(loaded.gate);
        const Values up = unpack(loaded.up);
        Values y = {};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float product = __fmul_rn(Silu(gate.at[j]).value, up.at[j]);
            if (keep.at[j]) y.at[j] = __fmul_rn(product, scale);
        }
        p.y.template cached<aligned>(at.element(p.y.stride), at.count(), pack<T>(y));
    }
};

FD_STREAM_KERNELS(swiglu_dropout, SwigluParams, Swiglu)

template <typename T>
struct SwigluGradParams {
    Mask mask;
    Octets octets;
    InMatrix<T> gate;
    InMatrix<T> up;
    InMatrix<T> dy;
    OutMatrix<T> dgate;
    OutMatrix<T> dup;
};
static_assert(sizeof(SwigluGradParams<float>) == 296, "swiglu_dropout.rs: GradParams");

template <typename T, bool aligned>
struct SwigluGrad {
    using Params = SwigluGradParams<T>;
    struct Loaded {
        Octet<T> gate;
        Octet<T> up;
        Octet<T> dy;
    };

    template <typename Position>
    static __device__ __forceinline__ Loaded load(const Params& p, const Position& at) {
        Loaded loaded;
        loaded.gate = p.gate.template streaming<aligned>(at.element(p.gate.stride), at.count());
        loaded.up = p.up.template streaming<aligned>(at.element(p.up.stride), at.count());
        loaded.dy = p.dy.template streaming<aligned>(at.element(p.dy.stride), at.count());
        return loaded;
    }

    template <typename Position>
    static __device__ __forceinline__ void finish(const Params& p, const Position& at,
                                                  const Kept& keep, float scale, const Loaded& loaded) {
        const Values gate = unpack(loaded.gate);
        const Values up = unpack(loaded.up);
        const Values dy = unpack(loaded.dy);
        Values dgate = {};
        Values dup = {};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const Silu silu(gate.at[j]);
            const float g = __fmul_rn(dy.at[j], scale);
            if (!keep.at[j]) continue;
            dgate.at[j] = __fmul_rn(__fmul_rn(g, up.at[j]), silu.slope);
            dup.at[j] = __fmul_rn(g, silu.value);
        }
        p.dgate.template cached<aligned>(at.element(p.dgate.stride), at.count(), pack<T>(dgate));
        p.dup.template cached<aligned>(at.element(p.dup.stride), at.count(), pack<T>(dup));
    }
};

FD_STREAM_KERNELS(swiglu_dropout_grad, SwigluGradParams, SwigluGrad)
