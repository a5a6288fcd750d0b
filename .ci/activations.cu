// Each activation and slope of an octet in bf16, alone: .ci/budget.py counts their instructions. `identity` is what is
// around them.

#include "../kernels/activation.cuh"

struct ActivationParams {
    In<bf16> x;
    Out<bf16> y;
};

#define FD_ACTIVATION(name)                                                                        \
    FD_ACTIVATION_PASS(activation_##name##_bf16, Activation::name, false)                          \
    FD_ACTIVATION_PASS(slope_##name##_bf16, Activation::name, true)
#define FD_ACTIVATION_PASS(name, activation, derivative)                                           \
    extern "C" __global__ void name(const __grid_constant__ ActivationParams p) {                  \
        Values x = unpack(p.x.cached<true>(8ull * threadIdx.x, 8));                                \
        apply<bf16, activation, derivative>(x);                                                    \
        p.y.cached<true>(8ull * threadIdx.x, 8, pack<bf16>(x));                                    \
    }

FD_ACTIVATION(gelu)
FD_ACTIVATION(gelu_tanh)
FD_ACTIVATION(silu)
FD_ACTIVATION(tanh)
FD_ACTIVATION(identity)
