// dropout_add: y = residual + D(x + bias), and its gradients.
//
// Forward: x' = x, or x + bias rounded to f32;
//
//     y[r, c] = kept(r, c) ? round(fma(x'[r, c], scale, residual[r, c])) : residual[r, c]
//
// Bytes an element: two read, one written (6 in 16-bit storage); the bias is read from L2 or L1.
// In place: y may be the residual.
//
// Instructions for sm_90 (bf16, no bias): 123 a thread (usual.txt). Of those the octet needs 78: 19 wide multiplications (20
// less that of the stream number, which the uniform datapath does), 20 three-way exclusive ors, 8 compares, 16
// unpackings, 8 FMA, 4 packings, 2 loads, 1 store. The others read parameters and find the octet.
//
// Backward: dx = D(dy), which is the kernel of dropout.cu where there is no bias. With one, the kernel
// here also sums kept dy over the 64 rows of a tile: the first levels of the tree that src/ops/sum_rows.rs
// defines; sum_rows.cu adds up the others. Bytes an element: one read, one written, and a 64th of an f32 for
// the sums.
// In place: dx may be dy.

#include "kernel.cuh"
#include "sum_tile.cuh"

template <typename T>
struct DropoutAddParams {
    Mask mask;
    Octets octets;
    InMatrix<T> x;
    In<T> bias;
    InMatrix<T> residual;
    OutMatrix<T> y;
};
static_assert(sizeof(DropoutAddParams<float>) == 272, "dropout_add.rs: ForwardParams");

template <typename T, bool with_bias, bool aligned>
struct DropoutAdd {
    using Params = DropoutAddParams<T>;
    struct Loaded {
        Octet<T> x;
        Octet<T> bias;
        Octet<T> residual;
    };

    template <typename Position>
    static __device__ __forceinline__ Loaded load(const Params& p, const Position& at) {
        Loaded loaded;
        loaded.x = p.x.template streaming<aligned>(at.element(p.x.stride), at.count());
        loaded.residual =
            p.residual.template streaming<aligned>(at.element(p.residual.stride), at.count());
        if (with_bias) loaded.bias = p.bias.template cached<aligned>(at.column(), at.count());
        return loaded;
    }

    template <typename Position>
    static __device__ __forceinline__ void finish(const Params& p, const Position& at,
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
        p.y.template cached<aligned>(at.element(p.y.stride), at.count(), pack<T>(y));
    }
};

template <typename T, bool aligned>
using DropoutAddAlone = DropoutAdd<T, false, aligned>;
template <typename T, bool aligned>
using DropoutAddBias = DropoutAdd<T, true, aligned>;

FD_STREAM_KERNELS(dropout_add, DropoutAddParams, DropoutAddAlone)
FD_STREAM_KERNELS(dropout_add_bias, DropoutAddParams, DropoutAddBias)

template <typename T>
struct BiasGradParams {
    Mask mask;
    Tiles tiles;
    InMatrix<T> dy;
    OutMatrix<T> dx;  // may be absent
};
static_assert(sizeof(BiasGradParams<float>) == 280, "dropout_add.rs: BiasGradParams");

/// dx, and kept dy as the terms of dbias.
template <typename T, bool aligned>
struct BiasGrad {
    using Params = BiasGradParams<T>;
    using Loaded = Octet<T>;

    static __device__ __forceinline__ Loaded load(const Params& p, const TileOctet& at) {
        return p.dy.template streaming<aligned>(at.element(p.dy.stride), at.count());
    }

    static __device__ __forceinline__ Values finish(const Params& p, const TileOctet& at,
                                                    const Kept& keep, float scale,
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
        if (p.dx.present()) {
            p.dx.template cached<aligned>(at.element(p.dx.stride), at.count(), pack<T>(dx));
        }
        return kept_dy;
    }
};

FD_TILE_KERNELS(dropout_add_bias_grad, BiasGradParams, BiasGrad)
