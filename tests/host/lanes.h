// What kernels take of a compiler for AMD's GPUs, for a CPU: so tests run the kernels as they are. Each lane is a fiber (lanes.cpp).
//
// kernels/device.h includes this where SINTER_HOST is defined, and then believes that it is compiled for the GPU that the other macros
// name, as __gfx1100__ and __GFX11__. A builtin that it uses from now on has to be added here.
#pragma once

#define __global__
#define __device__
// To inline all takes a compiler four times as long.
#define DEVICE inline
#define KERNEL(name, threads, blocks) void kernel_##name
// In a section of its own, which is filled with ones before each block. As its name is no identifier, AddressSanitizer guards what
// lies there.
#define __shared__ static __attribute__((section(".lanes.shared")))

extern "C" {
// The lane that runs.
struct LanesNow {
    int thread, block[3];
};
extern LanesNow lanes_now;
void lanes_barrier();
// The value that lane `from` of the warp gives.
unsigned lanes_permute(int from, unsigned value);
void lanes_previous_is_done();
// Shows what this lane has to all of its warp, all of which come here; the first of what they show, `bytes` apart.
const void* lanes_show(const void* mine, int bytes);
}

static inline int __builtin_amdgcn_workitem_id_x() { return lanes_now.thread; }
static inline int __builtin_amdgcn_workgroup_id_x() { return lanes_now.block[0]; }
static inline int __builtin_amdgcn_workgroup_id_y() { return lanes_now.block[1]; }
static inline int __builtin_amdgcn_workgroup_id_z() { return lanes_now.block[2]; }
static inline void __builtin_amdgcn_fence(int, const char*) {}
static inline void __builtin_amdgcn_s_barrier() { lanes_barrier(); }
static inline void __builtin_amdgcn_wave_barrier() { lanes_show("", 1); }
static inline int __builtin_amdgcn_ds_bpermute(int address, int value) {
    return (int)lanes_permute(address >> 2, (unsigned)value);
}

#if !defined(__GFX9__)
// Copies to shared memory as NVIDIA's GPUs make them, as late as they may be: until it is waited for, there is no number where one goes.
#define SINTER_LATE_COPIES 1
struct LanesCopies {
    struct {
        unsigned char* to;
        const unsigned char* from;
        unsigned step;
    } copies[64];
    unsigned count, step;
};
static LanesCopies lanes_copies[1024];
static inline void lanes_begin_copy(unsigned char* to, const unsigned char* from) {
    LanesCopies& own = lanes_copies[lanes_now.thread];
    if (own.count == sizeof own.copies / sizeof *own.copies) __builtin_trap();
    own.copies[own.count++] = {to, from, own.step};
    for (int i = 0; i < 16; i++) to[i] = 0xff;
}
static inline void lanes_end_step_of_copies() { lanes_copies[lanes_now.thread].step++; }
static inline void lanes_wait_for_copies(int later) {
    LanesCopies& own = lanes_copies[lanes_now.thread];
    unsigned kept = 0;
    for (unsigned i = 0; i < own.count; i++) {
        const auto copy = own.copies[i];
        if (copy.step + later >= own.step) {
            own.copies[kept++] = copy;
        } else {
            for (int b = 0; b < 16; b++) copy.to[b] = copy.from[b];
        }
    }
    own.count = kept;
}
#endif

static inline float __builtin_amdgcn_exp2f(float x) { return __builtin_exp2f(x); }

// A bit for each lane of the warp.
static inline unsigned long long lanes_ballot(bool mine, int lanes) {
    const bool* all = (const bool*)lanes_show(&mine, sizeof mine);
    unsigned long long ballot = 0;
    for (int i = 0; i < lanes; i++) ballot |= (unsigned long long)all[i] << i;
    return ballot;
}
static inline unsigned __builtin_amdgcn_ballot_w32(bool mine) { return (unsigned)lanes_ballot(mine, 32); }
static inline unsigned long long __builtin_amdgcn_ballot_w64(bool mine) { return lanes_ballot(mine, 64); }

// Four products of bytes, signed or not, and `sum`, which wraps.
static inline int lanes_dot4(bool a_is_signed, int a, bool b_is_signed, int b, int sum) {
    unsigned total = (unsigned)sum;
    for (int i = 0; i < 32; i += 8) {
        const int x = a_is_signed ? (signed char)(a >> i) : (unsigned char)(a >> i);
        const int y = b_is_signed ? (signed char)(b >> i) : (unsigned char)(b >> i);
        total += (unsigned)(x * y);
    }
    return (int)total;
}
static inline int __builtin_amdgcn_sdot4(int a, int b, int sum, bool) { return lanes_dot4(true, a, true, b, sum); }
static inline int __builtin_amdgcn_sudot4(bool a_is_signed, int a, bool b_is_signed, int b, int sum, bool) {
    return lanes_dot4(a_is_signed, a, b_is_signed, b, sum);
}

// Two products of halves, and `sum`.
typedef _Float16 LanesHalf2 __attribute__((ext_vector_type(2)));
static inline float __builtin_amdgcn_fdot2(LanesHalf2 a, LanesHalf2 b, float sum, bool) {
    return (float)a[0] * (float)b[0] + (float)a[1] * (float)b[1] + sum;
}

// V_PERM_B32: selectors 0 to 3 are bytes of `low`, 4 to 7 of `high`, 8 to 11 a sign of one of the four halves, 12 is zeros, others ones.
static inline unsigned __builtin_amdgcn_perm(unsigned high, unsigned low, unsigned selectors) {
    const unsigned long long both = (unsigned long long)high << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 32; i += 8) {
        const unsigned s = selectors >> i & 255;
        const unsigned byte = s < 8    ? (unsigned)(both >> (8 * s)) & 255
                              : s < 12 ? (both >> (16 * (s - 8) + 15) & 1) * 255
                                       : (s == 12 ? 0 : 255);
        result |= byte << i;
    }
    return result;
}

// Matrix units, as the ISAs of RDNA 3 and 4 and CDNA lay out what a lane has: row or column `lane % 16`, and of its `K` bytes those from
// `first` on. Of the result it has column `lane % 16`, and the rows that `row_of` says.
typedef int LanesInt2 __attribute__((ext_vector_type(2)));
typedef int LanesInt4 __attribute__((ext_vector_type(4)));
typedef int LanesInt8 __attribute__((ext_vector_type(8)));

template <class Share, class Sums, class RowOf>
static inline Sums lanes_matrix(bool a_is_signed, Share a, bool b_is_signed, Share b, Sums sums, int lanes_of_row, RowOf row_of) {
    struct Both {
        signed char a[sizeof(Share)], b[sizeof(Share)];
    } both;
    __builtin_memcpy(both.a, &a, sizeof a);
    __builtin_memcpy(both.b, &b, sizeof b);
    const Both* all = (const Both*)lanes_show(&both, sizeof both);
    for (unsigned i = 0; i < sizeof(Sums) / 4; i++) {
        int sum = sums[i];
        for (int part = 0; part < lanes_of_row; part++) {
            const Both &left = all[row_of((int)i) + 16 * part], &right = all[lanes_now.thread % 16 + 16 * part];
            for (unsigned k = 0; k < sizeof(Share); k++) {
                sum += (a_is_signed ? left.a[k] : (unsigned char)left.a[k]) * (b_is_signed ? right.b[k] : (unsigned char)right.b[k]);
            }
        }
        sums[i] = sum;
    }
    return sums;
}
static inline LanesInt8 __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(bool a_is_signed, LanesInt4 a, bool b_is_signed, LanesInt4 b,
                                                                   LanesInt8 sums, bool) {
    const int lane = lanes_now.thread % 32;
    return lanes_matrix(a_is_signed, a, b_is_signed, b, sums, 1, [=](int i) { return 2 * i + lane / 16; });
}
static inline LanesInt8 __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32_gfx12(bool a_is_signed, LanesInt2 a, bool b_is_signed, LanesInt2 b,
                                                                         LanesInt8 sums, bool) {
    const int lane = lanes_now.thread % 32;
    return lanes_matrix(a_is_signed, a, b_is_signed, b, sums, 2, [=](int i) { return lane / 16 * 8 + i; });
}
static inline LanesInt4 __builtin_amdgcn_mfma_i32_16x16x16i8(int a, int b, LanesInt4 sums, int, int, int) {
    const int lane = lanes_now.thread % 64;
    return lanes_matrix(true, a, true, b, sums, 4, [=](int i) { return lane / 16 * 4 + i; });
}
static inline LanesInt4 __builtin_amdgcn_mfma_i32_16x16x32_i8(long a, long b, LanesInt4 sums, int, int, int) {
    const int lane = lanes_now.thread % 64;
    return lanes_matrix(true, a, true, b, sums, 4, [=](int i) { return lane / 16 * 4 + i; });
}

// NVIDIA's mma.m16n8k32 of signed bytes, for `multiply_eight` of device.h, which says what a lane has.
static inline void lanes_multiply_eight(const unsigned (&a)[4], const unsigned (&b)[2], unsigned (&sums)[4]) {
    struct Both {
        unsigned a[4], b[2];
    } both = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    const Both* all = (const Both*)lanes_show(&both, sizeof both);
    const int lane = lanes_now.thread % 32;
    for (int i = 0; i < 4; i++) {
        for (int t = 0; t < 4; t++) {
            const Both &left = all[lane / 4 * 4 + t], &right = all[(lane % 4 * 2 + i % 2) * 4 + t];
            for (int word = 0; word < 2; word++) sums[i] = (unsigned)lanes_dot4(true, (int)left.a[2 * word + i / 2], true, (int)right.b[word], (int)sums[i]);
        }
    }
}

// The same of halves, of which sums are floats.
typedef float LanesFloat4 __attribute__((ext_vector_type(4)));
typedef float LanesFloat8 __attribute__((ext_vector_type(8)));
typedef _Float16 LanesHalf4 __attribute__((ext_vector_type(4)));
typedef _Float16 LanesHalf8 __attribute__((ext_vector_type(8)));
typedef _Float16 LanesHalf16 __attribute__((ext_vector_type(16)));

typedef short LanesShort4 __attribute__((ext_vector_type(4)));
typedef short LanesShort8 __attribute__((ext_vector_type(8)));
typedef short LanesShort16 __attribute__((ext_vector_type(16)));

// What a number of a share is: floats and halves are themselves, 16 bits otherwise the upper half of a float.
static inline float lanes_number(float x) { return x; }
static inline float lanes_number(_Float16 x) { return (float)x; }
static inline float lanes_number(short x) { return __builtin_bit_cast(float, (unsigned)(unsigned short)x << 16); }

template <class Number, class Share, class Sums, class RowOf>
static inline Sums lanes_matrix_of(const Share& a, const Share& b, Sums sums, int lanes_of_row, RowOf row_of) {
    constexpr unsigned COUNT = sizeof(Share) / sizeof(Number);
    struct Both {
        Number a[COUNT], b[COUNT];
    } both;
    __builtin_memcpy(both.a, &a, sizeof a);
    __builtin_memcpy(both.b, &b, sizeof b);
    const Both* all = (const Both*)lanes_show(&both, sizeof both);
    for (unsigned i = 0; i < sizeof(Sums) / 4; i++) {
        float sum = sums[i];
        for (int part = 0; part < lanes_of_row; part++) {
            const Both &left = all[row_of((int)i) + 16 * part], &right = all[lanes_now.thread % 16 + 16 * part];
            for (unsigned k = 0; k < COUNT; k++) sum += lanes_number(left.a[k]) * lanes_number(right.b[k]);
        }
        sums[i] = sum;
    }
    return sums;
}
template <class Number, class Share>
static inline LanesFloat8 lanes_wmma(const Share& a, const Share& b, LanesFloat8 sums) {
    const int lane = lanes_now.thread % 32;
    return lanes_matrix_of<Number>(a, b, sums, 1, [=](int i) { return 2 * i + lane / 16; });
}
template <class Number, class Share>
static inline LanesFloat8 lanes_wmma_gfx12(const Share& a, const Share& b, LanesFloat8 sums) {
    const int lane = lanes_now.thread % 32;
    return lanes_matrix_of<Number>(a, b, sums, 2, [=](int i) { return lane / 16 * 8 + i; });
}
template <class Number, class Share>
static inline LanesFloat4 lanes_mfma(const Share& a, const Share& b, LanesFloat4 sums) {
    const int lane = lanes_now.thread % 64;
    return lanes_matrix_of<Number>(a, b, sums, 4, [=](int i) { return lane / 16 * 4 + i; });
}
static inline LanesFloat8 __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(const LanesHalf16& a, const LanesHalf16& b, LanesFloat8 sums) {
    return lanes_wmma<_Float16>(a, b, sums);
}
static inline LanesFloat8 __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(const LanesShort16& a, const LanesShort16& b, LanesFloat8 sums) {
    return lanes_wmma<short>(a, b, sums);
}
static inline LanesFloat8 __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(const LanesHalf8& a, const LanesHalf8& b, LanesFloat8 sums) {
    return lanes_wmma_gfx12<_Float16>(a, b, sums);
}
static inline LanesFloat8 __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(const LanesShort8& a, const LanesShort8& b, LanesFloat8 sums) {
    return lanes_wmma_gfx12<short>(a, b, sums);
}
// That of gfx908 and gfx90a takes halves below 2^-14 for zeros.
static inline LanesFloat4 __builtin_amdgcn_mfma_f32_16x16x16f16(LanesHalf4 a, LanesHalf4 b, LanesFloat4 sums, int, int, int) {
#if defined(__gfx908__) || defined(__gfx90a__)
    for (int i = 0; i < 4; i++) {
        if (__builtin_fabsf((float)a[i]) < 0x1p-14f) a[i] = 0;
        if (__builtin_fabsf((float)b[i]) < 0x1p-14f) b[i] = 0;
    }
#endif
    return lanes_mfma<_Float16>(a, b, sums);
}
static inline LanesFloat4 __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(const LanesShort4& a, const LanesShort4& b, LanesFloat4 sums, int, int, int) {
    return lanes_mfma<short>(a, b, sums);
}
static inline LanesFloat4 __builtin_amdgcn_mfma_f32_16x16x4f32(float a, float b, LanesFloat4 sums, int, int, int) {
    return lanes_mfma<float>(a, b, sums);
}

#define __HIP_MEMORY_SCOPE_AGENT 4
#define __hip_atomic_load(from, order, scope) __atomic_load_n(from, order)

// A kernel, as it is called with addresses of its arguments. Those that are addresses themselves are marked.
extern "C" struct LanesKernel {
    void (*call)(void** arguments);
    int count;
    bool is_address[64];
};

template <int... I>
struct LanesIndices {};
template <class, int... I>
using LanesIndicesOf = LanesIndices<I...>;
template <class T>
constexpr bool lanes_is_address = false;
template <class T>
constexpr bool lanes_is_address<T*> = true;

template <class... A>
struct LanesCall {
    template <void (*FUNCTION)(A...), int... I>
    static void at(void** arguments, LanesIndices<I...>) {
        FUNCTION(*(A*)arguments[I]...);
    }
    template <void (*FUNCTION)(A...)>
    static void call(void** arguments) {
        at<FUNCTION>(arguments, __make_integer_seq<LanesIndicesOf, int, sizeof...(A)>());
    }
    template <void (*FUNCTION)(A...)>
    static constexpr LanesKernel kernel() {
        return {call<FUNCTION>, sizeof...(A), {lanes_is_address<A>...}};
    }
};
template <class... A>
LanesCall<A...> lanes_call_of(void (*)(A...));

// Makes a kernel one that lanes_find finds by a name.
#define LANES_EXPORT(name, function)                                                        \
    extern "C" __attribute__((visibility("default"))) const LanesKernel lanes_kernel_##name = \
        decltype(lanes_call_of(function))::kernel<function>();
