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
    In<T> x;
    Out<T> y;
};
static_assert(sizeof(DropoutParams<float>) == 232, "dropout.rs: Params");

template <typename T, bool aligned>
struct Dropout {
    using Params = DropoutParams<T>;
    using Loaded = Octet<T>;

    static __device__ __forceinline__ Loaded load(const Params& p, Index index) {
        const Position position(p.octets, index);
        return p.x.template streaming<aligned>(element_of<aligned>(p.octets, index, position),
                                               position.count(p.octets));
    }

    static __device__ __forceinline__ void finish(const Params& p, Index index, Position position,
                                                  const Kept& keep, float scale, const Loaded& x) {
        const Values values = unpack(x);
        Values y = {};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (keep.at[j]) y.at[j] = __fmul_rn(values.at[j], scale);
        }
        p.y.template cached<aligned>(element_of<aligned>(p.octets, index, position),
                                     position.count(p.octets), pack<T>(y));
    }
};

FD_KERNEL(dropout_f32, DropoutParams<float>, THREADS, stream<Dropout<float, true>>)
FD_KERNEL(dropout_f16, DropoutParams<f16>, THREADS, stream<Dropout<f16, true>>)
FD_KERNEL(dropout_bf16, DropoutParams<bf16>, THREADS, stream<Dropout<bf16, true>>)
FD_KERNEL(dropout_unaligned_f32, DropoutParams<float>, THREADS, stream_unaligned<Dropout<float, false>>)
FD_KERNEL(dropout_unaligned_f16, DropoutParams<f16>, THREADS, stream_unaligned<Dropout<f16, false>>)
FD_KERNEL(dropout_unaligned_bf16, DropoutParams<bf16>, THREADS, stream_unaligned<Dropout<bf16, false>>)
