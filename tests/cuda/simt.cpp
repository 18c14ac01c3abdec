// One thread of the system runs the threads of a grid as fibers.
#include "simt_cpu.h"

#undef threadIdx
#undef blockDim
#undef gridDim

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <mutex>
#include <random>
#include <unordered_set>
#include <vector>

#ifdef FIXMIN_TSAN_FIBERS
#include <sanitizer/tsan_interface.h>
#define TSAN(x) x
#else
#define TSAN(x)
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#define ASAN(x) x
#else
#define ASAN(x)
#endif

namespace fixmin::simt {
namespace {

[[noreturn]] void fail(const char* what, size_t n) {
    std::fprintf(stderr, "simt: %s (%zu threads)\n", what, n);
    std::abort();
}

constexpr size_t stack_bytes = 64 << 10;

struct Fiber;

struct Barrier {
    unsigned expected = 0, arrived = 0, turn = 0;
    char tags[2];  // to TSan, a barrier for each turn: nobody comes after what the next one brings
    const void* site = nullptr;
    Fiber *first = nullptr, *last = nullptr;  // of those that wait
};

struct Warp {
    Barrier barrier;
    int slots[2][32][6];  // of alternate exchanges
};

struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
};

struct Block {
    Index index;
    Barrier barrier;
    std::vector<Warp> warps;
    std::unique_ptr<unsigned char[], Free> shared;
    std::unordered_set<uintptr_t> weights;  // sectors read
};

// What copies lack until they are waited for: nobody may read what they bring before.
struct Copies {
    struct One {
        void* to;
        const void* from;
        unsigned group;
    } pending[64];
    unsigned n = 0, groups = 0;
};

struct Fiber {
    void* stack_pointer = nullptr;
    Index thread;
    Block* block = nullptr;
    Warp* warp = nullptr;
    Fiber* next = nullptr;  // at a barrier
    unsigned lane = 0, turn = 0;
    bool after_previous = false;
    Copies copies;
    std::unique_ptr<char[]> stack;
    void *tsan = nullptr, *asan = nullptr;
};

Fiber root, *self = &root;
Index grid_dim, block_dim;
Barrier of_grid;
std::vector<Fiber*> ready;  // a ring; nothing is allocated while fibers run, which TSan would see
size_t ready_head, n_ready;
unsigned live;
std::mt19937 order;
bool shuffled, counting;
size_t counted;
const std::function<void()>* body;
std::mutex one_grid;

// void simt_switch(void** from, void* to): saves what the ABI says a call keeps.
extern "C" void simt_switch(void** from, void* to);
#if defined(__x86_64__)
__asm__(
    ".pushsection .text\n.type simt_switch,@function\nsimt_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n.size simt_switch,.-simt_switch\n.popsection\n");
constexpr int saved_words = 6, return_word = 6;
#else
#error "fibers are written for x86-64"
#endif

void switch_to(Fiber* to) {
    Fiber* from = self;
    self = to;
    TSAN(__tsan_switch_to_fiber(to->tsan, __tsan_switch_to_fiber_no_sync));
    ASAN(__sanitizer_start_switch_fiber(&from->asan, to->stack.get(), stack_bytes));
    simt_switch(&from->stack_pointer, to->stack_pointer);
    ASAN(__sanitizer_finish_switch_fiber(from->asan, nullptr, nullptr));
}

void make_ready(Fiber* fiber) { ready[(ready_head + n_ready++) % ready.size()] = fiber; }

Fiber* next_ready() {
    if (n_ready == 0) fail("deadlock: threads wait at a barrier that others do not reach", live);
    Fiber*& first = ready[ready_head];
    if (shuffled) std::swap(first, ready[(ready_head + order() % n_ready) % ready.size()]);
    ready_head = (ready_head + 1) % ready.size();
    --n_ready;
    return first;
}

void release(Barrier& barrier) {
    for (Fiber* fiber = barrier.first; fiber; fiber = fiber->next) make_ready(fiber);
    barrier.first = nullptr;
    barrier.arrived = 0;
    ++barrier.turn;
}

void wait(Barrier& barrier, const void* site) {
    if (barrier.arrived == 0) barrier.site = site;
    if (barrier.site != site) fail("threads of a block or warp meet at different barriers", barrier.arrived);
    [[maybe_unused]] char* const tag = barrier.tags + barrier.turn % 2;
    TSAN(__tsan_release(tag));
    if (++barrier.arrived == barrier.expected) {
        release(barrier);
    } else {
        (barrier.first ? barrier.last->next : barrier.first) = self;
        barrier.last = self;
        self->next = nullptr;
        if (Fiber* next = next_ready(); next != self) switch_to(next);
    }
    TSAN(__tsan_acquire(tag));
}

void leave(Barrier& barrier) {  // a thread that ended is waited for no more
    if (--barrier.expected && barrier.arrived == barrier.expected) release(barrier);
}

[[maybe_unused]] char start, end;  // what TSan knows of a launch

void run_fiber() {
    ASAN(__sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr));
    TSAN(__tsan_acquire(&start));
    (*body)();
    if (!self->after_previous) fail("a kernel does not call after_previous()", live);
    if (self->copies.n) fail("a kernel does not wait for its copies", live);
    TSAN(__tsan_release(&end));
    leave(self->block->barrier);
    leave(self->warp->barrier);
    leave(of_grid);
    switch_to(--live ? next_ready() : &root);
    std::abort();
}

std::vector<std::unique_ptr<Fiber>> fibers;

void prepare(Fiber& fiber, Block& block, unsigned thread) {
    fiber.thread = {thread, 0};
    fiber.block = &block;
    fiber.warp = &block.warps[thread / 32];
    fiber.lane = thread % 32;
    fiber.turn = 0;
    fiber.after_previous = false;
    fiber.copies.n = fiber.copies.groups = 0;
    const uintptr_t top = (reinterpret_cast<uintptr_t>(fiber.stack.get()) + stack_bytes) & ~uintptr_t(63);
    void** sp = reinterpret_cast<void**>(top) - 2 - saved_words;
    std::fill(sp, reinterpret_cast<void**>(top), nullptr);
    sp[return_word] = reinterpret_cast<void*>(&run_fiber);
    fiber.stack_pointer = sp;
    make_ready(&fiber);
}

// Blocks first to first + n at once; all others have ended or not begun.
void run_blocks(Block* first, size_t n, unsigned threads, size_t shared_bytes) {
    while (fibers.size() < n * threads) {
        fibers.push_back(std::make_unique<Fiber>());
        fibers.back()->stack.reset(new char[stack_bytes]);
        TSAN(fibers.back()->tsan = __tsan_create_fiber(0));  // one for all grids: making them takes long
    }
    ready.assign(n * threads, nullptr);
    ready_head = n_ready = 0;
    live = of_grid.expected = unsigned(n * threads);
    of_grid.arrived = 0;
    for (size_t i = 0; i < n; ++i) {
        Block& block = first[i];
        block.barrier.expected = threads;
        block.warps.resize(threads / 32);
        for (Warp& warp : block.warps) warp.barrier.expected = 32;
        void* memory = nullptr;
        if (posix_memalign(&memory, 128, std::max<size_t>(shared_bytes, 1))) fail("no memory", 0);
        std::memset(memory, 0xff, shared_bytes);
        block.shared.reset(static_cast<unsigned char*>(memory));
        for (unsigned thread = 0; thread < threads; ++thread) prepare(*fibers[i * threads + thread], block, thread);
    }
    self = &root;
    TSAN(__tsan_release(&start));
    switch_to(next_ready());
}

// Barriers of blocks by number, from 1, in the order in which they are first met.
const void* sites[256];
int left_out = 0;

int number_of(const void* site) {
    int i = 0;
    while (sites[i] && sites[i] != site) ++i;
    if (i + 1 == std::size(sites)) fail("more barriers than can be numbered", size_t(i));
    sites[i] = site;
    return i + 1;
}

}  // namespace

const Index& thread_index() { return self->thread; }
const Index& block_index() { return self->block->index; }
const Index& block_size() { return block_dim; }
const Index& grid_size() { return grid_dim; }
unsigned lane() { return self->lane; }
unsigned char* shared_memory() { return self->block->shared.get(); }
void block_barrier(const void* site) {
    if (number_of(site) != left_out) wait(self->block->barrier, site);
}
void note_after_previous() { self->after_previous = true; }
void note_weights(const void* p) {
    if (counting && self->block->weights.insert(reinterpret_cast<uintptr_t>(p) / 32).second) counted += 32;
}
void count_weights() {
    counting = true;
    counted = 0;
}
size_t weight_bytes() { return counted; }
void copy_later(void* to, const void* from) {
    Copies& copies = self->copies;
    if (copies.n == std::size(copies.pending)) fail("more copies at once than the emulator has room for", copies.n);
    copies.pending[copies.n++] = {to, from, copies.groups};
}
void end_copies() { ++self->copies.groups; }
void wait_for_copies(unsigned but_last_groups) {
    Copies& copies = self->copies;
    unsigned left = 0;
    for (unsigned i = 0; i < copies.n; ++i) {
        const Copies::One one = copies.pending[i];
        if (one.group + but_last_groups < copies.groups)
            std::memcpy(one.to, one.from, 16);
        else
            copies.pending[left++] = one;
    }
    copies.n = left;
}
void warp_barrier(const void* site) { wait(self->warp->barrier, site); }
void grid_barrier(const void* site) {
    if (number_of(site) != left_out) wait(of_grid, site);
}

const int (*exchange(const int* words, unsigned n, const void* site))[6] {
    int (*slots)[6] = self->warp->slots[self->turn++ % 2];
    for (unsigned i = 0; i < n; ++i) slots[self->lane][i] = words[i];
    wait(self->warp->barrier, site);
    return slots;
}

void run(const std::function<void()>& kernel, Index grid, unsigned threads, size_t shared_bytes, bool at_once) {
    if (threads % 32) fail("a block is not whole warps", threads);
    const std::lock_guard lock(one_grid);
    if (const char* number = std::getenv("FIXMIN_SIMT_LEAVE_OUT")) left_out = std::atoi(number);
    const char* seed = std::getenv("FIXMIN_SIMT_SEED");
    shuffled = seed && std::atoi(seed) != 0;
    if (shuffled) order.seed(unsigned(std::atoi(seed)));
    grid_dim = grid;
    block_dim = {threads, 1};
    body = &kernel;
    std::vector<Index> blocks;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y});
    }
    if (shuffled) std::shuffle(blocks.begin(), blocks.end(), order);
    // Blocks of a grid run one after the other, but TSan is not told: they must not need that. So each has memory of
    // its own until all have ended.
    TSAN(root.tsan = __tsan_get_current_fiber());
    std::vector<Block> memory(blocks.size());
    for (size_t i = 0; i < blocks.size(); ++i) memory[i].index = blocks[i];
    const size_t step = at_once ? blocks.size() : 1;
    for (size_t i = 0; i < blocks.size(); i += step) run_blocks(&memory[i], step, threads, shared_bytes);
    TSAN(__tsan_acquire(&end));
}

}  // namespace fixmin::simt
