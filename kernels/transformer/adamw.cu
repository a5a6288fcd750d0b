// adamw: one step of AdamW (Loshchilov and Hutter, ICLR 2019) on up to 48 weights, with g = grad * norm[1]:
//
//     m = beta1 m + (1 - beta1) g
//     v = beta2 v + (1 - beta2) g^2
//     w = w - lr * decay * w - lr * (m * correction1) / (sqrt(v * correction2) + epsilon)
//
// in f32, and the weight that the operators read is w rounded. The step's numbers and the clip factor are read
// from memory, so that a captured graph takes new ones at each replay.
//
// Bytes an element: 16 read and 12 written, and the size of the rounded weight where it is not f32.

#include "elements.cuh"

template <typename T>
struct AdamwWeight {
    In<float> grad;       // [count]
    InOut<float> m;       // [count]
    InOut<float> v;       // [count]
    InOut<float> master;  // [count]
    Out<T> weight;        // [count]; absent where it is the master
    unsigned long long count;
    float decay;
    unsigned padding;
};

template <typename T>
struct AdamwParams {
    In<float> numbers;  // lr, beta1, beta2, epsilon, correction1, correction2
    In<float> norm;     // the gradient's norm, its clip factor
    Blocks blocks;
    AdamwWeight<T> weights[TENSORS];
};
static_assert(sizeof(AdamwParams<float>) == 4048, "kernels.rs: AdamwParams");

/// beta old + (1 - beta) new.
__device__ __forceinline__ float mixed(float beta, float old, float fresh) {
    return __fadd_rn(__fmul_rn(beta, old), __fmul_rn(__fsub_rn(1.0f, beta), fresh));
}

template <typename T>
__device__ __forceinline__ void adamw(const AdamwParams<T>& p) {
    const float lr = p.numbers.cached(0);
    const float beta1 = p.numbers.cached(1);
    const float beta2 = p.numbers.cached(2);
    const float epsilon = p.numbers.cached(3);
    const float correction1 = p.numbers.cached(4);
    const float correction2 = p.numbers.cached(5);
    const float clip = p.norm.cached(1);
    const unsigned tensor = p.blocks.tensor();
    const AdamwWeight<T>& weight = p.weights[tensor];
    const float decay = __fmul_rn(lr, weight.decay);
    each_element(blockIdx.x - p.blocks.first[tensor], weight.count, [&](unsigned long long i) {
        const float g = __fmul_rn(weight.grad.cached(i), clip);
        const float m = mixed(beta1, weight.m.in.cached(i), g);
        const float v = mixed(beta2, weight.v.in.cached(i), __fmul_rn(g, g));
        const float deviation = __fsqrt_rn(__fmul_rn(v, correction2));
        const float step = __fdiv_rn(__fmul_rn(m, correction1), __fadd_rn(deviation, epsilon));
        const float old = weight.master.in.cached(i);
        const float decayed = __fsub_rn(old, __fmul_rn(decay, old));
        const float w = __fsub_rn(decayed, __fmul_rn(lr, step));
        weight.m.out.cached(i, m);
        weight.v.out.cached(i, v);
        weight.master.out.cached(i, w);
        if (weight.weight.present()) weight.weight.cached(i, narrow<T>(w));
    });
}

FD_KERNEL(adamw_f32, AdamwParams<float>, THREADS, adamw<float>)
FD_KERNEL(adamw_f16, AdamwParams<f16>, THREADS, adamw<f16>)
FD_KERNEL(adamw_bf16, AdamwParams<bf16>, THREADS, adamw<bf16>)
