// matmul_pointers: where the matrices of a batch of products begin, for cuBLAS, which wants a list of addresses
// where two strides do not make one. For matrix x of a, b and c and product i = (outer, inner) of the batch,
//
//     pointers[x, i] = base[x] + outer * stride[x][0] + inner * stride[x][1]
//
// in bytes. Written anew before each batch: a list made on the host would have to outlive every captured graph.
//
// Bytes: 24 written a product.

#include "elements.cuh"

struct PointersParams {
    Out<unsigned long long> pointers;  // [3, count]
    unsigned long long base[3];
    unsigned long long stride[3][2];
    unsigned count;
    IndexDivisor inner;
};
static_assert(sizeof(PointersParams) == 96, "kernels.rs: PointersParams");

__device__ __forceinline__ void matmul_pointers(const PointersParams& p) {
    each_element(p.count, [&](unsigned long long i) {
        const unsigned index = static_cast<unsigned>(i);
        const unsigned outer = p.inner.quotient(index);
        const unsigned inner = p.inner.remainder(index, outer);
#pragma unroll
        for (unsigned x = 0; x < 3; ++x) {
            const unsigned long long offset = outer * p.stride[x][0] + inner * p.stride[x][1];
            p.pointers.cached(x * p.count + index, p.base[x] + offset);
        }
    });
}

FD_KERNEL(matmul_pointers_u64, PointersParams, THREADS, matmul_pointers)
