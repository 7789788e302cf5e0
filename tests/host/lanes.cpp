// Runs the blocks of kernels that were compiled with lanes.h, one after another, each lane as a fiber.
//
// A lane runs until it waits for others, in an order that a seed permutes: so what is missing a barrier reads what is not there yet.
// What blocks share begins as ones in each of them. A lane that reads one which is not there, an exchange that a part of a warp of 32
// leaves out (NVIDIA's warps must be whole; AMD's may be parts), and a barrier that not all come to end the process, with a line that says
// where.
#include "lanes.h"

#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if __has_feature(address_sanitizer)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define WITH_ASAN 1
#endif

#if !defined(__x86_64__)
#error "lanes are switched on x86-64"
#endif

LanesNow lanes_now;

namespace {

enum State { READY, EXCHANGES, AT_BARRIER, DONE };

struct Lane {
    void* stack_pointer;
    char* stack;
    size_t stack_bytes;
    void* fake_stack;
    State state;
    int from;
    unsigned given, taken;
};

constexpr int MOST = 1024;
// What a lane that shows something comes for, and how much it may be.
constexpr int ALL = -1, SHOWN = 64;
constexpr size_t STACK = 128 << 10, GUARD = 4 << 10;

Lane lanes[MOST], host;
Lane* current = &host;
int threads, wave;
// Lanes that run, by warp; lanes at the barrier, and done, of the block.
int ready[MOST], at_barrier, done;
// Lanes that may go on, in a ring.
int ring[MOST], ring_first, ring_count;
int order[MOST];
bool depth_first;
uint64_t state_of_random;
// What lanes show, twice: while some still look, others show the next.
char shown[2][MOST * SHOWN];
bool shows_second[MOST];
const LanesKernel* kernel;
const char* kernel_name = "";
void** arguments;

struct Region {
    void* at;
    size_t bytes;
};
Region held[64];
int held_count;
bool is_holding;

uint64_t random_bits() {
    uint64_t x = state_of_random += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

[[noreturn]] void fail(const char* format, ...) {
    fprintf(stderr, "lanes: %s, block (%d, %d, %d): ", kernel_name, lanes_now.block[0], lanes_now.block[1], lanes_now.block[2]);
    va_list rest;
    va_start(rest, format);
    vfprintf(stderr, format, rest);
    va_end(rest);
    fputc('\n', stderr);
    abort();
}

void shuffle() {
    for (int i = threads - 1; i > 0; i--) {
        const int j = (int)(random_bits() % (uint64_t)(i + 1)), other = order[j];
        order[j] = order[i], order[i] = other;
    }
}

void push(int lane) {
    if (depth_first) {
        ring_first = (ring_first + MOST - 1) % MOST;
        ring[ring_first] = lane;
    } else {
        ring[(ring_first + ring_count) % MOST] = lane;
    }
    ring_count++;
    lanes[lane].state = READY;
    ready[lane / wave]++;
}

extern "C" void lanes_switch(void** save, void* to);
asm(R"(
.text
.type lanes_switch, @function
lanes_switch:
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
.size lanes_switch, . - lanes_switch
)");

void go(Lane* to) {
    Lane* from = current;
    current = to;
    lanes_now.thread = (int)(to - lanes);
#if WITH_ASAN
    __sanitizer_start_switch_fiber(from->state == DONE ? nullptr : &from->fake_stack, to->stack, to->stack_bytes);
#endif
    lanes_switch(&from->stack_pointer, to->stack_pointer);
#if WITH_ASAN
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

// Lets the lanes of a warp that exchange have what they came for, as none runs.
void exchange_in(int warp) {
    const int first = warp * wave, last = first + wave < threads ? first + wave : threads;
    int count = 0;
    for (int i = first; i < last; i++) count += lanes[i].state == EXCHANGES;
    if (count == 0) return;
    if (wave == 32 && count != wave) fail("%d lanes of warp %d come to an exchange", count, warp);
    for (int i = first; i < last; i++) {
        if (lanes[i].state != EXCHANGES) continue;
        if (lanes[i].from == ALL && count == wave) continue;
        const int from = first + lanes[i].from;
        if (lanes[i].from < 0 || from >= last || lanes[from].state != EXCHANGES) {
            fail("thread %d reads lane %d of its warp, which is not there", i, lanes[i].from);
        }
        lanes[i].taken = lanes[from].given;
    }
    // Each warp in an order of its own.
    const int turn = (int)(random_bits() % (uint64_t)(last - first)), flip = (int)(random_bits() % 2);
    for (int n = 0; n < last - first; n++) {
        const int i = first + (turn + (flip ? n : last - first - 1 - n)) % (last - first);
        if (lanes[i].state == EXCHANGES) push(i);
    }
}

// Goes on with another lane, as this one waits or is done.
void wait_in(State state) {
    current->state = state;
    const int warp = lanes_now.thread / wave;
    at_barrier += state == AT_BARRIER;
    done += state == DONE;
    if (--ready[warp] == 0) exchange_in(warp);
    if (ring_count == 0) {
        if (done == threads) return go(&host);
        if (at_barrier != threads) fail("%d of %d threads come to a barrier, %d are done", at_barrier, threads, done);
        at_barrier = 0;
        shuffle();
        for (int i = 0; i < threads; i++) push(order[i]);
    }
    const int next = ring[ring_first];
    ring_first = (ring_first + 1) % MOST, ring_count--;
    if (&lanes[next] != current) go(&lanes[next]);
}

void begin() {
#if WITH_ASAN
    __sanitizer_finish_switch_fiber(nullptr, host.stack ? nullptr : (const void**)&host.stack,
                                    host.stack ? nullptr : &host.stack_bytes);
#endif
    kernel->call(arguments);
    wait_in(DONE);
    fail("a lane that was done goes on");
}

void make_stacks() {
    if (lanes[0].stack) return;
    char* all = (char*)mmap(nullptr, MOST * (STACK + GUARD), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) fail("there is no memory for stacks");
    for (int i = 0; i < MOST; i++) {
        lanes[i].stack = all + (size_t)i * (STACK + GUARD) + GUARD, lanes[i].stack_bytes = STACK;
        mprotect(lanes[i].stack, STACK, PROT_READ | PROT_WRITE);
    }
}

void hold(bool yes) {
    is_holding = yes;
#if WITH_ASAN
    for (int i = 0; i < held_count; i++) {
        if (yes) {
            __asan_poison_memory_region(held[i].at, held[i].bytes);
        } else {
            __asan_unpoison_memory_region(held[i].at, held[i].bytes);
        }
    }
#endif
}

// Guards between variables are there to be written, too; so it is not the library's.
__attribute__((no_sanitize("address"))) void fill(void* at, size_t bytes) {
    asm volatile("rep stosb" : "+D"(at), "+c"(bytes) : "a"(0xff) : "memory");
}

void run_block() {
    ring_first = ring_count = at_barrier = done = 0;
    memset(ready, 0, sizeof ready);
    memset(shows_second, 0, sizeof shows_second);
    depth_first = random_bits() % 2;
    for (int i = 0; i < threads; i++) order[i] = i;
    shuffle();
    for (int i = 0; i < threads; i++) {
        void** top = (void**)(lanes[i].stack + STACK);
        *--top = nullptr;
        *--top = (void*)begin;
        for (int r = 0; r < 6; r++) *--top = nullptr;
        lanes[i].stack_pointer = top, lanes[i].fake_stack = nullptr;
        push(order[i]);
    }
    const int first = ring[ring_first];
    ring_first = (ring_first + 1) % MOST, ring_count--;
    go(&lanes[first]);
}

struct Module {
    void* library;
    void* shared;
    size_t shared_bytes;
};

// Where the variables of blocks lie in a library.
void find_shared(const char* path, Module* module) {
    const int file = open(path, O_RDONLY);
    struct link_map* map = nullptr;
    if (file < 0 || dlinfo(module->library, RTLD_DI_LINKMAP, &map) != 0) fail("%s cannot be read", path);
    const off_t bytes = lseek(file, 0, SEEK_END);
    const char* elf = (const char*)mmap(nullptr, (size_t)bytes, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    const Elf64_Ehdr* header = (const Elf64_Ehdr*)elf;
    const Elf64_Shdr* sections = (const Elf64_Shdr*)(elf + header->e_shoff);
    const char* names = elf + sections[header->e_shstrndx].sh_offset;
    for (int i = 0; i < header->e_shnum; i++) {
        if (strcmp(names + sections[i].sh_name, ".lanes.shared") != 0) continue;
        module->shared = (char*)map->l_addr + sections[i].sh_addr, module->shared_bytes = sections[i].sh_size;
    }
    munmap((void*)elf, (size_t)bytes);
}

}  // namespace

extern "C" {

void lanes_barrier() { wait_in(AT_BARRIER); }

unsigned lanes_permute(int from, unsigned value) {
    Lane* self = current;
    self->from = from, self->given = value;
    wait_in(EXCHANGES);
    return self->taken;
}

const void* lanes_show(const void* mine, int bytes) {
    if (bytes > SHOWN) fail("a lane shows %d bytes", bytes);
    const int thread = lanes_now.thread;
    char* all = shown[shows_second[thread] = !shows_second[thread]] + thread / wave * wave * SHOWN;
    memcpy(all + thread % wave * bytes, mine, (size_t)bytes);
    current->from = ALL;
    wait_in(EXCHANGES);
    return all;
}

void lanes_previous_is_done() {
    if (is_holding) hold(false);
}

// A library of kernels, or null.
void* lanes_open(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "lanes: %s\n", dlerror());
        return nullptr;
    }
    Module* module = new Module{library, nullptr, 0};
    find_shared(path, module);
    return module;
}

void lanes_close(void* module) {
    dlclose(((Module*)module)->library);
    delete (Module*)module;
}

const LanesKernel* lanes_find(void* module, const char* name) {
    char symbol[256];
    snprintf(symbol, sizeof symbol, "lanes_kernel_%s", name);
    return (const LanesKernel*)dlsym(((Module*)module)->library, symbol);
}

// What no lane of the next launch may touch until lanes_previous_is_done.
void lanes_hold(void* at, size_t bytes) {
    if (held_count == 64) fail("too much is held");
    held[held_count++] = {at, bytes};
}

// Whoever launches sees to it that nobody else does.
void lanes_launch(void* module, const LanesKernel* what, const char* name, void** with, const unsigned* grid, unsigned block, int of_wave,
                  uint64_t seed) {
    const Module* m = (const Module*)module;
    if (block > MOST) fail("blocks of %u threads", block);
    make_stacks();
    kernel = what, kernel_name = name, arguments = with, threads = (int)block, wave = of_wave;
    state_of_random = seed, host.stack = nullptr;
    for (unsigned z = 0; z < grid[2]; z++) {
        for (unsigned y = 0; y < grid[1]; y++) {
            for (unsigned x = 0; x < grid[0]; x++) {
                lanes_now.block[0] = (int)x, lanes_now.block[1] = (int)y, lanes_now.block[2] = (int)z;
                if (m->shared) fill(m->shared, m->shared_bytes);
                hold(true);
                run_block();
                hold(false);
            }
        }
    }
    held_count = 0;
}
}
