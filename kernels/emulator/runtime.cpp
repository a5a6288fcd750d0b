// Runs an emulated kernel: blocks one after the other, a block's threads as fibers that switch only
// at barriers and warp collectives.
//
// A fiber runs until its thread ends or waits. The order in which waiting and new threads get their
// turn comes from the launch's order seed. Every access through the kernels' accessors is checked
// against the launch's tensors (`emulator_touch`), and so is every other one (watch.cpp). Tensors lie
// between guard zones and inaccessible pages all the same.
#include "runtime.h"

#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <utility>

#include <sys/mman.h>
#include <unistd.h>

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(FD_EMULATOR_UCONTEXT)
#define FD_EMULATOR_UCONTEXT 1
#endif
#ifdef FD_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

__thread uint3 threadIdx;
__thread uint3 blockIdx;
__thread dim3 blockDim;
__thread dim3 gridDim;

namespace {

using emulator::Scene;
using emulator::Site;

constexpr size_t STACK_BYTES = 128 * 1024;
constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;

// ---- fibers -----------------------------------------------------------------------------------

// A suspended flow of control: its stack pointer, the registers that a function call preserves on
// top of its stack. `swapcontext` would do the same with a system call a switch.
#ifdef FD_EMULATOR_UCONTEXT
struct Context {
    ucontext_t context;
};
void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
void prepare(Context& context, uint8_t* stack, void (*entry)()) {
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = stack;
    context.context.uc_stack.ss_size = STACK_BYTES;
    context.context.uc_link = nullptr;
    makecontext(&context.context, entry, 0);
}
#else
struct Context {
    void* stack_pointer = nullptr;
};
extern "C" void fused_dropout_emulator_switch(void** save, void* load) __asm__(
    "fused_dropout_emulator_switch");
void switch_context(Context& from, Context& to) {
    fused_dropout_emulator_switch(&from.stack_pointer, to.stack_pointer);
}
#if defined(__x86_64__)
__asm__(R"(
.text
.globl fused_dropout_emulator_switch
fused_dropout_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
void prepare(Context& context, uint8_t* stack, void (*entry)()) {
    // Six registers, the address that `ret` goes to, and a null return address: a function starts
    // with its stack pointer 8 below a multiple of 16.
    void** top = reinterpret_cast<void**>(stack + STACK_BYTES);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(entry);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    context.stack_pointer = top - 8;
}
#else
__asm__(R"(
.text
.globl fused_dropout_emulator_switch
.p2align 2
fused_dropout_emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
void prepare(Context& context, uint8_t* stack, void (*entry)()) {
    // Twenty registers; the twelfth is the link register, where `ret` goes to.
    void** registers = reinterpret_cast<void**>(stack + STACK_BYTES) - 20;
    for (int i = 0; i < 20; ++i) registers[i] = nullptr;
    registers[11] = reinterpret_cast<void*>(entry);
    context.stack_pointer = registers;
}
#endif
#endif

struct Fiber {
    uint8_t* stack = nullptr;
    Context context;
    unsigned thread = 0;
};

size_t page() {
    static const size_t bytes = size_t(sysconf(_SC_PAGESIZE));
    return bytes;
}

// Fresh zeroed memory, or null.
uint8_t* map(size_t bytes) {
    void* address =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    return address == MAP_FAILED ? nullptr : static_cast<uint8_t*>(address);
}

// ---- a launch ---------------------------------------------------------------------------------

enum class Wait : uint8_t { nothing, barrier, warp, ended };

struct Thread {
    Fiber* fiber = nullptr; // null before the first turn and after the end
    Wait wait = Wait::nothing;
    Site site{};
    // A warp collective: what this lane brings, from whom it takes, and what it gets.
    unsigned mask = 0, from = 0;
    bool predicate = false;
    uint64_t value = 0, result = 0;
};

struct Runtime {
    std::vector<Fiber*> all, idle;
    Context hub; // the operating-system thread's own flow: picks who is next
    Fiber* running = nullptr;

    FdLaunch* launch = nullptr;
    Scene scene; // what the watch sees
    bool faulted = false;
    uint64_t random = 0;
    Thread threads[MAX_THREADS];
    std::vector<unsigned> ready;
    unsigned at_barrier = 0;

    ~Runtime() {
        for (Fiber* fiber : all) {
            munmap(fiber->stack - page(), STACK_BYTES + page());
            delete fiber;
        }
    }
    Fiber* fiber();
    unsigned pick();
    void release(unsigned thread);
    void block();
    void run();
    void stuck();
};

__thread Runtime* current;

// Runs threads as the hub assigns them, for ever: a fiber is used again when its thread has ended.
void fiber_main() {
    for (;;) {
        Runtime& runtime = *current;
        runtime.launch->kernel->body(runtime.launch->params);
        runtime.threads[runtime.running->thread].wait = Wait::ended;
        switch_context(runtime.running->context, runtime.hub);
    }
}

Fiber* Runtime::fiber() {
    if (!idle.empty()) {
        Fiber* fiber = idle.back();
        idle.pop_back();
        return fiber;
    }
    uint8_t* memory = map(STACK_BYTES + page());
    if (memory == nullptr) return nullptr;
    mprotect(memory, page(), PROT_NONE); // an overflow stops here
    Fiber* fiber = new Fiber;
    fiber->stack = memory + page();
    prepare(fiber->context, fiber->stack, fiber_main);
    all.push_back(fiber);
    return fiber;
}

// SplitMix64's step: the order needs to vary, no more.
uint64_t next(uint64_t& state) {
    uint64_t z = state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

// Who is next among the ready threads: the last of the list for order 0 and 1 (which keep the list
// sorted), any one otherwise.
unsigned Runtime::pick() {
    if (launch->order > 1) {
        size_t i = size_t(next(random) % ready.size());
        std::swap(ready[i], ready.back());
    }
    unsigned thread = ready.back();
    ready.pop_back();
    return thread;
}

// Lets the threads that `which` says go on.
template <class F>
void release_all(Runtime& runtime, unsigned first, unsigned end, F which) {
    // The list is taken from its end: ascending order wants it descending.
    for (unsigned i = first; i < end; ++i) {
        unsigned thread = runtime.launch->order == 0 ? end - 1 - (i - first) : i;
        if (!which(thread)) continue;
        runtime.threads[thread].wait = Wait::nothing;
        runtime.ready.push_back(thread);
    }
}

void set_fault(Runtime& runtime, const char* text) {
    if (runtime.faulted) return;
    runtime.faulted = true;
    snprintf(runtime.launch->message, sizeof runtime.launch->message, "%s", text);
}

void Runtime::block() {
    unsigned count = launch->threads;
    for (unsigned t = 0; t < count; ++t) threads[t] = Thread{};
    at_barrier = 0;
    scene.begin_block();
    ready.clear();
    release_all(*this, 0, count, [](unsigned) { return true; });
    unsigned ended = 0;
    while (!ready.empty()) {
        unsigned t = pick();
        Thread& thread = threads[t];
        if (thread.fiber == nullptr) {
            thread.fiber = fiber();
            if (thread.fiber == nullptr) return set_fault(*this, "no memory for a thread's stack");
            thread.fiber->thread = t;
        }
        running = thread.fiber;
        threadIdx = {t, 0, 0};
        scene.stack = running->stack;
        switch_context(hub, running->context);
        if (faulted) return;
        if (thread.wait != Wait::ended) continue;
        idle.push_back(thread.fiber);
        thread.fiber = nullptr;
        ++ended;
    }
    if (ended < count) stuck();
}

bool same_place(const Site& a, const Site& b) {
    return a.line == b.line && strcmp(a.what, b.what) == 0 && strcmp(a.file, b.file) == 0;
}

// Whether `other` has come to where `waiting` waits.
bool has_met(const Thread& waiting, const Thread& other) {
    return other.wait == waiting.wait && other.mask == waiting.mask &&
           same_place(waiting.site, other.site);
}

// What a thread is doing, in words. The text lives until the next call but one.
const char* describe(const Thread& thread) {
    static thread_local char texts[2][200];
    static thread_local unsigned turn;
    char* text = texts[turn++ % 2];
    const Site& site = thread.site;
    if (thread.wait == Wait::ended) return "has ended";
    if (thread.wait == Wait::barrier)
        snprintf(text, sizeof texts[0], "waits in %s at %s:%d", site.what, site.file, site.line);
    else
        snprintf(text, sizeof texts[0], "waits in %s with mask %08x at %s:%d", site.what, thread.mask,
                 site.file, site.line);
    return text;
}

// Nobody can go on: says who waits for whom.
void Runtime::stuck() {
    unsigned t = 0;
    while (threads[t].wait == Wait::ended) ++t;
    const Thread& waiting = threads[t];
    bool warp = waiting.wait == Wait::warp;
    unsigned other = warp ? t / WARP * WARP : 0;
    while (other < launch->threads) {
        bool named = !warp || (waiting.mask >> other % WARP & 1) != 0;
        if (named && !has_met(waiting, threads[other])) break;
        ++other;
    }
    const char* late = other < launch->threads ? describe(threads[other]) : "does not exist";
    char text[512];
    snprintf(text, sizeof text, "block %u, thread %u %s for thread %u, which %s", blockIdx.x, t,
             describe(waiting), other, late);
    set_fault(*this, text);
}

// Whether the guard zones around `tensor` are as they were, within `reach` bytes of it.
constexpr uint16_t CANARY = 0x7fa5; // a NaN as f16, bf16 and, twice, as f32
uint8_t canary(const uint8_t* address) {
    return uint8_t(CANARY >> (reinterpret_cast<uintptr_t>(address) % 2 * 8));
}
const uint8_t* broken_canary(const FdGuarded& tensor, size_t reach) {
    const uint8_t* low = tensor.base + page();
    const uint8_t* high = tensor.base + tensor.mapped - page();
    const uint8_t* end = tensor.start + tensor.bytes;
    if (size_t(tensor.start - low) > reach) low = tensor.start - reach;
    if (size_t(high - end) > reach) high = end + reach;
    for (const uint8_t* at = low; at < tensor.start; ++at)
        if (*at != canary(at)) return at;
    for (const uint8_t* at = end; at < high; ++at)
        if (*at != canary(at)) return at;
    return nullptr;
}
void check_zones(Runtime& runtime, size_t reach) {
    for (size_t i = 0; i < runtime.launch->tensor_count; ++i) {
        const FdGuarded& tensor = runtime.launch->tensors[i];
        const uint8_t* at = tensor.writable ? broken_canary(tensor, reach) : nullptr;
        if (at == nullptr) continue;
        char text[256];
        snprintf(text, sizeof text,
                 "block %u: a store outside of the accessors to byte %td of tensor %zu (%zu bytes)",
                 blockIdx.x, at - tensor.start, i, tensor.bytes);
        return set_fault(runtime, text);
    }
}

void Runtime::run() {
    uint32_t blocks = launch->blocks;
    std::vector<uint32_t> shuffled;
    if (launch->order > 1) {
        shuffled.resize(blocks);
        for (uint32_t i = 0; i < blocks; ++i) shuffled[i] = i;
        for (uint32_t i = blocks; i > 1; --i) std::swap(shuffled[i - 1], shuffled[next(random) % i]);
    }
    gridDim = dim3{blocks, 1, 1};
    blockDim = dim3{launch->threads, 1, 1};
    for (uint32_t i = 0; i < blocks && !faulted; ++i) {
        uint32_t b = launch->order == 0 ? i : launch->order == 1 ? blocks - 1 - i : shuffled[i];
        blockIdx = {b, 0, 0};
        block();
        if (!faulted) check_zones(*this, 64);
    }
    if (!faulted) check_zones(*this, SIZE_MAX);
    // Every stack starts anew: after a fault its thread was abandoned, and the next launch may belong
    // to another operating-system thread, whose thread-local variables a suspended function would not
    // find.
    idle = all;
    for (Fiber* fiber : idle) prepare(fiber->context, fiber->stack, fiber_main);
}

// Gives the turn back to the hub until this thread is released.
void yield(Runtime& runtime) { switch_context(runtime.running->context, runtime.hub); }

// Runtimes with their stacks, for the next launch of any thread.
std::mutex pool_lock;
std::vector<Runtime*> pool;

const emulator::Kernel* kernels; // the list's head, zero before any registration runs

} // namespace

// ---- what the built-ins call ------------------------------------------------------------------

namespace emulator {

Kernel::Kernel(const char* name, size_t params, void (*body)(const void*))
    : name(name), params(params), body(body), next(kernels) {
    kernels = this;
}

void fault(const char* format, ...) {
    char detail[400], text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(detail, sizeof detail, format, arguments);
    va_end(arguments);
    snprintf(text, sizeof text, "block %u, thread %u: %s", blockIdx.x, threadIdx.x, detail);
    set_fault(*current, text);
    yield(*current);
    __builtin_unreachable(); // the hub abandons a launch that has faulted
}

unsigned barrier(const Site& site, bool predicate) {
    Runtime& runtime = *current;
    unsigned count = runtime.launch->threads;
    Thread& self = runtime.threads[threadIdx.x];
    self.wait = Wait::barrier;
    self.site = site;
    self.mask = 0xffffffffu;
    self.predicate = predicate;
    if (++runtime.at_barrier == count) {
        unsigned sum = 0;
        for (unsigned t = 0; t < count; ++t) {
            const Thread& other = runtime.threads[t];
            sum += other.predicate;
            if (!same_place(site, other.site))
                fault("%s at %s:%d completes while thread %u %s", site.what, site.file, site.line, t,
                      describe(other));
        }
        for (unsigned t = 0; t < count; ++t) runtime.threads[t].result = sum;
        runtime.at_barrier = 0;
        runtime.scene.passed_barrier();
        release_all(runtime, 0, count, [](unsigned) { return true; });
    }
    yield(runtime);
    return unsigned(self.result);
}

// Joins the collective of `mask`; the last lane computes everybody's result with `complete`.
template <class F>
static uint64_t join(const Site& site, unsigned mask, unsigned from, uint64_t value, bool predicate,
                     bool orders_memory, F complete) {
    Runtime& runtime = *current;
    unsigned first = threadIdx.x / WARP * WARP, self_lane = lane();
    if (!(mask >> self_lane & 1))
        fault("%s at %s:%d: the mask %08x does not name the calling lane %u", site.what, site.file,
              site.line, mask, self_lane);
    if (from >= WARP || !(mask >> from & 1))
        fault("%s at %s:%d: lane %u reads lane %u, which the mask %08x does not name", site.what,
              site.file, site.line, self_lane, from, mask);
    Thread& self = runtime.threads[threadIdx.x];
    self.wait = Wait::warp;
    self.site = site;
    self.mask = mask;
    self.from = from;
    self.value = value;
    self.predicate = predicate;
    bool all = true;
    for (unsigned l = 0; l < WARP && all; ++l) {
        unsigned t = first + l;
        if (mask >> l & 1) all = t < runtime.launch->threads && has_met(self, runtime.threads[t]);
    }
    if (all) {
        Thread* lanes = runtime.threads + first;
        complete(lanes);
        if (orders_memory) runtime.scene.passed_syncwarp(first / WARP);
        release_all(runtime, first, first + WARP,
                    [&](unsigned t) { return (mask >> (t - first) & 1) != 0; });
    }
    yield(runtime);
    return self.result;
}

uint64_t exchange(const Site& site, unsigned mask, uint64_t value, unsigned from) {
    return join(site, mask, from, value, false, false, [mask](Thread* lanes) {
        for (unsigned l = 0; l < WARP; ++l)
            if (mask >> l & 1) lanes[l].result = lanes[lanes[l].from].value;
    });
}

unsigned vote(const Site& site, unsigned mask, bool predicate, bool orders_memory) {
    return unsigned(join(site, mask, lane(), 0, predicate, orders_memory, [mask](Thread* lanes) {
        unsigned ballot = 0;
        for (unsigned l = 0; l < WARP; ++l)
            if ((mask >> l & 1) && lanes[l].predicate) ballot |= 1u << l;
        for (unsigned l = 0; l < WARP; ++l)
            if (mask >> l & 1) lanes[l].result = ballot;
    }));
}

} // namespace emulator

void emulator_touch(const void* address, size_t bytes, bool write) {
    FdLaunch& launch = *current->launch;
    const char* what = write ? "write" : "read";
    const uint8_t* at = static_cast<const uint8_t*>(address);
    if (bytes == 0 || bytes > 16 || (bytes & (bytes - 1)) != 0)
        emulator::fault("a %s of %zu bytes, which no instruction does", what, bytes);
    if (reinterpret_cast<uintptr_t>(at) % bytes != 0)
        emulator::fault("a %s of %zu bytes at %p, which is not aligned", what, bytes, address);
    for (size_t i = 0; i < launch.tensor_count; ++i) {
        const FdGuarded& tensor = launch.tensors[i];
        if (at < tensor.base || at >= tensor.base + tensor.mapped) continue;
        if (at < tensor.start || at + bytes > tensor.start + tensor.bytes)
            emulator::fault("a %s of %zu bytes at byte %td of tensor %zu, which has %zu bytes", what,
                            bytes, at - tensor.start, i, tensor.bytes);
        if (write && !tensor.writable)
            emulator::fault("a write of %zu bytes at byte %td of tensor %zu, which is read only",
                            bytes, at - tensor.start, i);
        uint64_t* counts = write ? launch.traffic.writes : launch.traffic.reads;
        ++counts[__builtin_ctzll(bytes)];
        return;
    }
    emulator::fault("a %s of %zu bytes at %p, in no tensor of this launch", what, bytes, address);
}

// ---- what Rust calls --------------------------------------------------------------------------

extern "C" {

const emulator::Kernel* fused_dropout_emulator_find(const char* name) {
    for (const emulator::Kernel* kernel = kernels; kernel != nullptr; kernel = kernel->next)
        if (strcmp(kernel->name, name) == 0) return kernel;
    return nullptr;
}

// Copies `bytes` bytes at `source` between guard zones, at the same address modulo 128. False without
// memory.
bool fused_dropout_emulator_guard(const uint8_t* source, size_t bytes, bool writable,
                                  FdGuarded* guarded) {
    size_t offset = reinterpret_cast<uintptr_t>(source) % 128;
    // As late as the alignment allows: at most 127 bytes of guard zone, then the inaccessible page.
    size_t inner = (128 + offset + bytes + page() - 1) / page() * page();
    size_t mapped = inner + 2 * page();
    uint8_t* base = map(mapped);
    if (base == nullptr) return false;
    uint8_t* high = base + page() + inner;
    uint8_t* start = high - bytes;
    start -= (reinterpret_cast<uintptr_t>(start) - offset) % 128;
    for (uint8_t* at = base + page(); at < start; ++at) *at = canary(at);
    for (uint8_t* at = start + bytes; at < high; ++at) *at = canary(at);
    if (bytes != 0) memcpy(start, source, bytes);
    mprotect(base, page(), PROT_NONE);
    mprotect(high, page(), PROT_NONE);
    if (!writable) mprotect(base + page(), inner, PROT_READ);
    *guarded = FdGuarded{base, mapped, start, bytes, writable, 0};
    return true;
}

void fused_dropout_emulator_unguard(const FdGuarded* guarded) {
    munmap(guarded->base, guarded->mapped);
}

size_t fused_dropout_emulator_params(const emulator::Kernel* kernel) { return kernel->params; }

// Runs the launch; false if it ended in a fault.
bool fused_dropout_emulator_launch(FdLaunch* launch) {
    Runtime* runtime = nullptr;
    {
        std::lock_guard<std::mutex> guard(pool_lock);
        if (!pool.empty()) {
            runtime = pool.back();
            pool.pop_back();
        }
    }
    if (runtime == nullptr) runtime = new Runtime;
    runtime->launch = launch;
    runtime->faulted = false;
    runtime->random = launch->order;
    runtime->scene.launch = launch;
    runtime->scene.stack_bytes = STACK_BYTES;
    current = runtime;
    emulator::scene = &runtime->scene;
    runtime->run();
    emulator::scene = nullptr;
    current = nullptr;
    bool faulted = runtime->faulted;
    std::lock_guard<std::mutex> guard(pool_lock);
    pool.push_back(runtime);
    return !faulted;
}
}
