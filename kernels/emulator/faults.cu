// Kernels that each do one thing that no kernel may do where `broken` is set, and are right where it
// is not: the emulator's tests prove on them that it notices. In no CUDA build.
//
// Blocks of 64 threads; thread i of the launch has element i of x and y, f32, `count` of them.

#include <cstdint>

namespace {

constexpr unsigned THREADS = 64;
constexpr unsigned ALL_LANES = 0xffffffffu;

struct Params {
    uint64_t x, y;
    uint32_t count;
    uint32_t broken;
};

template <typename T = float>
T load(uint64_t tensor, uint64_t index) {
    const T* address = reinterpret_cast<const T*>(tensor) + index;
    emulator_touch(address, sizeof(T), false);
    return *address;
}

template <typename T = float>
void store(uint64_t tensor, uint64_t index, T value) {
    T* address = reinterpret_cast<T*>(tensor) + index;
    emulator_touch(address, sizeof(T), true);
    *address = value;
}

unsigned element() { return blockIdx.x * THREADS + threadIdx.x; }
float* elements(uint64_t tensor) { return reinterpret_cast<float*>(tensor); }

// ---- accesses to tensors: y = x / 2 -----------------------------------------------------------

// Broken: the tail is not cut off.
void tail(const Params& p) {
    const unsigned i = element();
    if (!p.broken && i >= p.count) return;
    store(p.y, i, load(p.x, i) * 0.5f);
}

// Broken: the last store goes one element too far.
void store_past(const Params& p) {
    const unsigned i = element();
    if (i >= p.count) return;
    const bool last = i == p.count - 1;
    store(p.y, p.broken && last ? i + 1 : i, load(p.x, i) * 0.5f);
}

// Broken: the same without the accessors.
void raw_store(const Params& p) {
    const unsigned i = element();
    if (i >= p.count) return;
    const bool last = i == p.count - 1;
    elements(p.y)[p.broken && last ? i + 1 : i] = load(p.x, i) * 0.5f;
}

// Broken: one element in front of the tensor is read.
void raw_load(const Params& p) {
    const unsigned i = element();
    if (i >= p.count) return;
    store(p.y, i, elements(p.x)[int(i) - (p.broken && i == 0 ? 1 : 0)] * 0.5f);
}

// Broken: as raw_store, by code that the compiler does not instrument.
__attribute__((noinline, no_sanitize("thread"))) void unseen(float* address, float value) {
    *address = value;
}
void unseen_store(const Params& p) {
    const unsigned i = element();
    if (i >= p.count) return;
    const bool last = i == p.count - 1;
    unseen(elements(p.y) + (p.broken && last ? i + 1 : i), load(p.x, i) * 0.5f);
}

// Broken: the input is written.
void input_store(const Params& p) {
    const unsigned i = element();
    if (i >= p.count) return;
    store(p.y, i, load(p.x, i) * 0.5f);
    if (p.broken) store(p.x, i, 0.0f);
}

// Broken: a pointer to nothing.
void wild_store(const Params& p) {
    const unsigned i = element();
    if (i >= p.count) return;
    *(p.broken ? elements(4096) : elements(p.y) + i) = load(p.x, i) * 0.5f;
}

// Four elements a thread. Broken: the vector starts one element too late for its width.
void misaligned(const Params& p) {
    const unsigned i = 4 * element();
    if (i + 4 >= p.count) return;
    const uint4 bits = load<uint4>(p.x + (p.broken ? sizeof(float) : 0), element());
    store(p.y, i, __uint_as_float(bits.x) * 0.5f);
    store(p.y, i + 1, __uint_as_float(bits.y) * 0.5f);
    store(p.y, i + 2, __uint_as_float(bits.z) * 0.5f);
    store(p.y, i + 3, __uint_as_float(bits.w) * 0.5f);
}

// ---- barriers: y = x with every block's 64 elements reversed ----------------------------------

// Through y itself. Broken: nothing between the threads' stores and loads.
void reverse_global(const Params& p) {
    const unsigned i = element();
    store(p.y, i, load(p.x, i));
    if (!p.broken) __syncthreads();
    const float other = load(p.y, blockIdx.x * THREADS + THREADS - 1 - threadIdx.x);
    __syncthreads();
    store(p.y, i, other);
}

// Through shared memory. Broken: as above.
void reverse_shared(const Params& p) {
    __shared__ float tile[THREADS];
    const unsigned i = element();
    tile[threadIdx.x] = load(p.x, i);
    if (!p.broken) __syncthreads();
    store(p.y, i, tile[THREADS - 1 - threadIdx.x]);
}

// Twice through the same shared memory, which gives x back. Broken: no barrier between the first
// round's loads and the second one's stores.
void reverse_twice(const Params& p) {
    __shared__ float tile[THREADS];
    const unsigned i = element();
    float value = load(p.x, i);
    for (int round = 0; round < 2; ++round) {
        if (round == 1 && !p.broken) __syncthreads();
        tile[threadIdx.x] = value;
        __syncthreads();
        value = tile[THREADS - 1 - threadIdx.x];
    }
    store(p.y, i, value);
}

// Broken: half of the elements are never written to shared memory.
void uninitialised(const Params& p) {
    __shared__ float tile[THREADS];
    const unsigned i = element();
    if (!p.broken || threadIdx.x % 2 == 0) tile[threadIdx.x] = load(p.x, i);
    __syncthreads();
    store(p.y, i, tile[THREADS - 1 - threadIdx.x]);
}

// Broken: one element beyond the end of shared memory.
void shared_index(const Params& p) {
    __shared__ float tile[THREADS];
    const unsigned i = element();
    tile[threadIdx.x] = load(p.x, i);
    __syncthreads();
    store(p.y, i, tile[THREADS - (p.broken ? 0 : 1) - threadIdx.x]);
}

// Broken: the second warp leaves without it.
void divergent_barrier(const Params& p) {
    __shared__ float tile[THREADS];
    const unsigned i = element();
    tile[threadIdx.x] = load(p.x, i);
    if (p.broken && threadIdx.x >= 32) return;
    __syncthreads();
    store(p.y, i, tile[THREADS - 1 - threadIdx.x]);
}

// Broken: the two warps wait at different barriers.
void two_barriers(const Params& p) {
    __shared__ float tile[THREADS];
    const unsigned i = element();
    tile[threadIdx.x] = load(p.x, i);
    if (p.broken && threadIdx.x >= 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    store(p.y, i, tile[THREADS - 1 - threadIdx.x]);
}

// ---- warp collectives: y = x with neighbours exchanged ----------------------------------------

// Through shared memory. Broken: nothing between the lanes' stores and loads.
void swap_shared(const Params& p) {
    __shared__ float tile[THREADS];
    const unsigned i = element();
    tile[threadIdx.x] = load(p.x, i);
    if (!p.broken) __syncwarp();
    store(p.y, i, tile[threadIdx.x ^ 1]);
}

// Broken: a shuffle in place of the __syncwarp, which orders no memory.
void swap_after_shuffle(const Params& p) {
    __shared__ float tile[THREADS];
    const unsigned i = element();
    tile[threadIdx.x] = load(p.x, i);
    if (p.broken) __shfl_xor_sync(ALL_LANES, i, 1);
    else __syncwarp();
    store(p.y, i, tile[threadIdx.x ^ 1]);
}

// By shuffles within the halves of a warp. Broken: the lanes that are read are in the other half.
void swap_mask(const Params& p) {
    const unsigned i = element(), half = threadIdx.x & 16 ? 0xffff0000u : 0x0000ffffu;
    const float value = load(p.x, i);
    store(p.y, i, __shfl_xor_sync(half, value, p.broken ? 17 : 1));
}

// Broken: every lane names the lanes of the first half.
void swap_own_lane(const Params& p) {
    const unsigned i = element(), half = threadIdx.x & 16 ? 0xffff0000u : 0x0000ffffu;
    store(p.y, i, __shfl_xor_sync(p.broken ? 0xffffu : half, load(p.x, i), 1));
}

// Broken: the odd lanes are gone before the shuffle that names them.
void swap_absent(const Params& p) {
    const unsigned i = element();
    if (p.broken && threadIdx.x % 2 == 1) return;
    store(p.y, i, __shfl_xor_sync(ALL_LANES, load(p.x, i), 1));
}

// ---- arithmetic ---------------------------------------------------------------------------------

// y = x. Broken: a shift that a GPU and a CPU answer differently.
void shift(const Params& p) {
    const unsigned i = element(), one = 1u << (p.broken ? 32 + i : i % 32);
    if (i < p.count) store(p.y, i, one == 0 ? 0.0f : load(p.x, i));
}

} // namespace

#define FAULT(name) FD_EMULATED_KERNEL(fault_##name, Params, name)
FAULT(tail)
FAULT(store_past)
FAULT(raw_store)
FAULT(raw_load)
FAULT(unseen_store)
FAULT(input_store)
FAULT(wild_store)
FAULT(misaligned)
FAULT(reverse_global)
FAULT(reverse_shared)
FAULT(reverse_twice)
FAULT(uninitialised)
FAULT(shared_index)
FAULT(divergent_barrier)
FAULT(two_barriers)
FAULT(swap_shared)
FAULT(swap_after_shuffle)
FAULT(swap_mask)
FAULT(swap_own_lane)
FAULT(swap_absent)
FAULT(shift)
