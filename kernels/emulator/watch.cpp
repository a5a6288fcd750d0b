// Looks at every access to memory that a kernel makes, whether it goes through the accessors or not.
//
// build.rs compiles the kernels with the instrumentation of -fsanitize=thread, which puts a call of
// `__tsan_<read or write><bytes>` in front of every access that somebody else could see, and of
// -fsanitize=bounds,shift-exponent. The sanitizers' own libraries are not linked: the functions that
// the instrumentation calls are the ones below. They hold each access to what a kernel may touch:
//
//   its parameters and the program's constants   read
//   a tensor of the launch                        read; written if the launch may write it
//   the thread's own stack                        read, written
//   shared memory                                 read, written; see `shared`
//
// Where the compiler has no such instrumentation, what is left is `emulator_touch` and guard zones.
#include "runtime.h"

#ifdef __linux__
#include <link.h>
#endif

namespace emulator {

__thread Scene* scene;

namespace {

// Bytes from `start` on.
struct Range {
    const uint8_t* start = nullptr;
    size_t bytes = 0;
    bool holds(const uint8_t* at) const { return size_t(at - start) < bytes; }
};

// The program (or library) that contains this function: its image in memory, and the static storage
// of the running thread, in which `__shared__` variables lie.
struct Module {
    Range image, statics;
};

#ifdef __linux__
int look_at(dl_phdr_info* info, size_t, void* result) {
    Module& module = *static_cast<Module*>(result);
    Module found;
    uintptr_t low = UINTPTR_MAX, high = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& segment = info->dlpi_phdr[i];
        uintptr_t start = info->dlpi_addr + segment.p_vaddr;
        if (segment.p_type == PT_LOAD) {
            low = start < low ? start : low;
            high = start + segment.p_memsz > high ? start + segment.p_memsz : high;
        }
        if (segment.p_type == PT_TLS)
            found.statics = {static_cast<const uint8_t*>(info->dlpi_tls_data), segment.p_memsz};
    }
    found.image = {reinterpret_cast<const uint8_t*>(low), high > low ? high - low : 0};
    if (!found.image.holds(reinterpret_cast<const uint8_t*>(&look_at))) return 0;
    module = found;
    return 1;
}
Module find_module() {
    Module module;
    dl_iterate_phdr(look_at, &module);
    return module;
}
#else
// Not known here: shared memory is not watched, nor is memory that belongs to nobody.
Module find_module() { return {}; }
#endif

const Module& module() {
    static thread_local const Module found = find_module();
    return found;
}

template <class T>
bool part_of(const T& variable, const uint8_t* at) {
    return size_t(at - reinterpret_cast<const uint8_t*>(&variable)) < sizeof(T);
}

// Whether the running thread's access is not ordered behind `last`, another thread's.
bool unordered(const Touched& last) {
    unsigned self = threadIdx.x;
    if (last.epoch != scene->epoch) return false;
    if (last.warps || last.thread / 32 != self / 32) return true;
    return last.sync == scene->sync[self / 32] && (last.lanes || last.thread != self);
}

void note(Touched& last) {
    unsigned self = threadIdx.x;
    uint32_t sync = scene->sync[self / 32];
    bool same_epoch = last.epoch == scene->epoch;
    bool warps = same_epoch && (last.warps || last.thread / 32 != self / 32);
    bool lanes = same_epoch && last.sync == sync && (last.lanes || last.thread != self);
    last = Touched{scene->epoch, sync, uint16_t(self), lanes, warps};
}

// Shared memory, a byte at a time: what is read was written in this block, and two accesses by
// different threads, one of them a write, have a __syncthreads between them (or a __syncwarp, if the
// threads are of one warp). Shuffles and votes order no memory. A __syncwarp of a part of a warp is
// taken for one of the whole warp.
void shared(const uint8_t* at, size_t bytes, bool write) {
    const Range& statics = module().statics;
    if (scene->written.size() < statics.bytes) {
        scene->written.resize(statics.bytes);
        scene->read.resize(statics.bytes);
    }
    size_t offset = size_t(at - statics.start);
    const char* what = write ? "write" : "read";
    for (size_t i = offset; i < offset + bytes && i < statics.bytes; ++i) {
        Touched &written = scene->written[i], &read = scene->read[i];
        if (!write && written.epoch < scene->block_start)
            fault("a read of %zu bytes of shared memory that nobody in the block has written", bytes);
        if (unordered(written))
            fault("a %s of %zu bytes of shared memory that thread %u has written, without a barrier "
                  "between", what, bytes, written.thread);
        if (write && unordered(read))
            fault("a write of %zu bytes of shared memory that thread %u has read, without a barrier "
                  "between", bytes, read.thread);
        note(write ? written : read);
    }
}

void check(const void* address, size_t bytes, bool write, bool aligned) {
    if (scene == nullptr) return;
    const uint8_t* at = static_cast<const uint8_t*>(address);
    if (Range{scene->stack, scene->stack_bytes}.holds(at)) return;

    const FdLaunch& launch = *scene->launch;
    const char* what = write ? "write" : "read";
    Range params{static_cast<const uint8_t*>(launch.params), launch.kernel->params};
    if (params.holds(at)) {
        if (write) fault("a write to the kernel's parameters");
        return;
    }
    const Module& own = module();
    if (own.statics.holds(at)) {
        bool index = part_of(threadIdx, at) || part_of(blockIdx, at) || part_of(blockDim, at) ||
                     part_of(gridDim, at);
        if (!index) return shared(at, bytes, write);
        if (write) fault("a write to a built-in variable");
        return;
    }
    for (size_t i = 0; i < launch.tensor_count; ++i) {
        const FdGuarded& tensor = launch.tensors[i];
        if (!Range{tensor.base, tensor.mapped}.holds(at)) continue;
        if (at < tensor.start || at + bytes > tensor.start + tensor.bytes)
            fault("a %s of %zu bytes past the accessors at byte %td of tensor %zu, which has %zu bytes",
                  what, bytes, at - tensor.start, i, tensor.bytes);
        if (write && !tensor.writable)
            fault("a write of %zu bytes past the accessors at byte %td of tensor %zu, which is read "
                  "only", bytes, at - tensor.start, i);
        if (aligned && reinterpret_cast<uintptr_t>(at) % bytes != 0)
            fault("a %s of %zu bytes past the accessors at byte %td of tensor %zu, which is not "
                  "aligned", what, bytes, at - tensor.start, i);
        return;
    }
    if (own.image.bytes == 0 || (!write && own.image.holds(at))) return;
    fault("a %s of %zu bytes at %p, in no tensor of this launch", what, bytes, address);
}

// The beginning of what -fsanitize=undefined tells about each place.
struct Place {
    const char* file;
    uint32_t line, column;
};

void undefined(const void* data, const char* what) {
    const Place& place = *static_cast<const Place*>(data);
    if (scene != nullptr) fault("%s at %s:%u", what, place.file, place.line);
}

} // namespace
} // namespace emulator

// Weak: a program that is itself built with a sanitizer brings its own.
#define FD_HOOK __attribute__((weak))
#define FD_ACCESS(bytes)                                                                          \
    FD_HOOK void __tsan_read##bytes(void* at) { emulator::check(at, bytes, false, true); }        \
    FD_HOOK void __tsan_write##bytes(void* at) { emulator::check(at, bytes, true, true); }        \
    FD_HOOK void __tsan_unaligned_read##bytes(void* at) {                                         \
        emulator::check(at, bytes, false, false);                                                 \
    }                                                                                             \
    FD_HOOK void __tsan_unaligned_write##bytes(void* at) {                                        \
        emulator::check(at, bytes, true, false);                                                  \
    }                                                                                             \
    FD_HOOK void __tsan_read##bytes##_pc(void* at, void*) {                                       \
        emulator::check(at, bytes, false, true);                                                  \
    }                                                                                             \
    FD_HOOK void __tsan_write##bytes##_pc(void* at, void*) {                                      \
        emulator::check(at, bytes, true, true);                                                   \
    }                                                                                             \
    FD_HOOK void __tsan_read_write##bytes(void* at) {                                             \
        emulator::check(at, bytes, false, true);                                                  \
        emulator::check(at, bytes, true, true);                                                   \
    }

extern "C" {
FD_ACCESS(1)
FD_ACCESS(2)
FD_ACCESS(4)
FD_ACCESS(8)
FD_ACCESS(16)

FD_HOOK void __tsan_read_range(void* at, size_t bytes) {
    if (bytes != 0) emulator::check(at, bytes, false, false);
}
FD_HOOK void __tsan_write_range(void* at, size_t bytes) {
    if (bytes != 0) emulator::check(at, bytes, true, false);
}
FD_HOOK void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
    __tsan_read_range(const_cast<void*>(from), bytes);
    __tsan_write_range(to, bytes);
    return memcpy(to, from, bytes);
}
FD_HOOK void* __tsan_memmove(void* to, const void* from, size_t bytes) {
    __tsan_read_range(const_cast<void*>(from), bytes);
    __tsan_write_range(to, bytes);
    return memmove(to, from, bytes);
}
FD_HOOK void* __tsan_memset(void* to, int value, size_t bytes) {
    __tsan_write_range(to, bytes);
    return memset(to, value, bytes);
}
FD_HOOK void __tsan_init() {}
FD_HOOK void __tsan_func_entry(void*) {}
FD_HOOK void __tsan_func_exit() {}
FD_HOOK void __tsan_vptr_read(void**) {}
FD_HOOK void __tsan_vptr_update(void**, void*) {}

FD_HOOK void __ubsan_handle_out_of_bounds(void* data, void*) {
    emulator::undefined(data, "an index beyond the end of an array");
}
FD_HOOK void __ubsan_handle_local_out_of_bounds() {
    if (emulator::scene != nullptr) emulator::fault("an index beyond the end of a variable");
}
FD_HOOK void __ubsan_handle_shift_out_of_bounds(void* data, void*, void*) {
    emulator::undefined(data, "a shift by more bits than the type has");
}
}
