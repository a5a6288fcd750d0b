// accumulate: to[i] = round(to[i] + from[i]), the sum in f32.
//
// Bytes an element: 4 of `from` read; `to` read and written (8 in all in 16-bit storage).

#include "elements.cuh"

template <typename T>
struct AccumulateParams {
    In<float> from;  // [count]
    InOut<T> to;     // [count]
    unsigned long long count;
};
static_assert(sizeof(AccumulateParams<float>) == 32, "kernels.rs: AccumulateParams");

template <typename T>
__device__ __forceinline__ void accumulate(const AccumulateParams<T>& p) {
    each_element(blockIdx.x, p.count, [&](unsigned long long i) {
        p.to.out.cached(i, narrow<T>(__fadd_rn(to_f32(p.to.in.cached(i)), p.from.cached(i))));
    });
}

FD_KERNEL(accumulate_f32, AccumulateParams<float>, THREADS, accumulate<float>)
FD_KERNEL(accumulate_f16, AccumulateParams<f16>, THREADS, accumulate<f16>)
FD_KERNEL(accumulate_bf16, AccumulateParams<bf16>, THREADS, accumulate<bf16>)
