// Kernels that each do one thing that no kernel may do, beside a twin that does not: the emulator's
// tests prove on them that it notices. In no CUDA build.
//
// Every kernel copies, exchanges or reverses `count` elements of f32; `broken` chooses the fault.
#include <cstdint>

namespace {

struct Params {
    uint64_t x, y;
    uint32_t count;
    uint32_t broken;
};

template <class T>
T load(uint64_t base, uint64_t index) {
    const T* address = reinterpret_cast<const T*>(base) + index;
    emulator_touch(address, sizeof(T), false);
    return *address;
}

template <class T>
void store(uint64_t base, uint64_t index, T value) {
    T* address = reinterpret_cast<T*>(base) + index;
    emulator_touch(address, sizeof(T), true);
    *address = value;
}

// y[i] = x[i] / 2; broken: the tail is not cut off.
void tail(const Params& p) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (!p.broken && i >= p.count) return;
    store(p.y, i, load<float>(p.x, i) * 0.5f);
}

} // namespace

FD_EMULATED_KERNEL(fault_tail, Params, tail)
