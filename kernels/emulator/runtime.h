// What runtime.cpp (threads and launches) and watch.cpp (every access of a kernel) share.
#pragma once

#include "builtins.h"

#include <vector>

// src/emulator/runtime.rs declares the same structures.
extern "C" {

// A tensor's copy between guard zones.
struct FdGuarded {
    uint8_t* base;    // the mapping: an inaccessible page, the zones and the tensor, another page
    size_t mapped;    // bytes of the mapping
    uint8_t* start;   // the tensor
    size_t bytes;     // of the tensor
    uint32_t writable;
    uint32_t reserved;
};

// Accesses through the accessors, by width: 1, 2, 4, 8 and 16 bytes.
struct FdTraffic {
    uint64_t reads[5];
    uint64_t writes[5];
};

struct FdLaunch {
    const emulator::Kernel* kernel;
    const void* params;
    uint32_t blocks, threads;
    const FdGuarded* tensors;
    size_t tensor_count;
    uint64_t order;
    FdTraffic traffic; // out
    char message[512]; // out: the fault, empty without one
};
}

namespace emulator {

// Who touched a byte of shared memory last, in the one way (reading or writing).
struct Touched {
    uint32_t epoch = 0, sync = 0; // when: see Scene
    uint16_t thread = 0;
    bool lanes = false; // other lanes of the warp too, since its last __syncwarp
    bool warps = false; // other warps too, since the last __syncthreads
};

// What the watch has to know about the thread that runs.
struct Scene {
    const FdLaunch* launch = nullptr;
    const uint8_t* stack = nullptr; // the running fiber's
    size_t stack_bytes = 0;

    // Time is a number that grows at every barrier, and at every __syncwarp of a warp. It is never
    // set back, so the notes of earlier blocks and launches are out of date by themselves.
    uint32_t clock = 0;
    uint32_t block_start = 0; // when the block began
    uint32_t epoch = 0;       // last __syncthreads
    uint32_t sync[32] = {};   // last __syncwarp of each warp
    std::vector<Touched> written, read; // for each byte of this thread's static storage

    void begin_block() {
        block_start = ++clock;
        passed_barrier();
    }
    void passed_barrier() {
        epoch = ++clock;
        for (uint32_t& warp : sync) warp = clock;
    }
    void passed_syncwarp(unsigned warp) { sync[warp] = ++clock; }
};

// Null where no kernel runs.
extern __thread Scene* scene;

} // namespace emulator
