// dropout: y = D(x), and its gradient dx = D(dy): one kernel serves both.
//
//     y[r, c] = kept(r, c) ? round(f32(x[r, c]) * scale) : +0
//
// Bytes an element: one read, one written (4 in 16-bit storage).
// In place: y may be x.

#include "kernel.cuh"

template <typename T>
struct DropoutParams {
    Mask mask;
    Octets octets;
    InMatrix<T> x;
    OutMatrix<T> y;
};
static_assert(sizeof(DropoutParams<float>) == 248, "dropout.rs: Params");

template <typename T, bool aligned>
struct Dropout {
    using Params = DropoutParams<T>;
    using Loaded = Octet<T>;

    template <typename Position>
    static __device__ __forceinline__ Loaded load(const Params& p, const Position& at) {
        return p.x.template streaming<aligned>(at.element(p.x.stride), at.count());
    }

    template <typename Position>
    static __device__ __forceinline__ void finish(const Params& p, const Position& at,
                                                  const Kept& keep, float scale, const Loaded& x) {
        const Values values = unpack(x);
        Values y = {};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (keep.at[j]) y.at[j] = __fmul_rn(values.at[j], scale);
        }
        p.y.template cached<aligned>(at.element(p.y.stride), at.count(), pack<T>(y));
    }
};

FD_STREAM_KERNELS(dropout, DropoutParams, Dropout)
