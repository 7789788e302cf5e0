// What kernels need of a device. The only file that asks whose device it is.
//
// Compilers: nvrtc or nvcc for NVIDIA; hiprtc, hipcc, or clang without ROCm (-nogpuinc -nogpulib) for AMD. Nothing of the system is
// included, as run-time compilers have no headers.
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef unsigned long long u64;

#if defined(SINTER_HOST)
// Tests run kernels on a CPU, as those of AMD's GPUs are.
#include "lanes.h"
#define SINTER_AMD 1
#elif defined(__CUDACC__)
#define SINTER_NVIDIA 1
#elif defined(__AMDGCN__) || defined(__HIP__)
#define SINTER_AMD 1
#else
#error "no device that these kernels know"
#endif

#if SINTER_AMD && !defined(__global__)
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#endif

// Functions are inlined: arguments and shapes are constants of each kernel.
#if !defined(DEVICE)
#define DEVICE __device__ __attribute__((always_inline)) inline
#endif

// A kernel of blocks of `threads` threads, called `name`, of which at least `blocks` share a multiprocessor of NVIDIA's.
#if SINTER_NVIDIA
#define KERNEL(name, threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks) name
#elif !defined(KERNEL)
#define KERNEL(name, threads, blocks) \
    extern "C" __global__ __attribute__((amdgpu_flat_work_group_size(threads, threads))) void name
#endif

// Lanes that run in step.
#if SINTER_AMD && defined(__GFX9__)
constexpr int WARP = 64;
#else
constexpr int WARP = 32;
#endif

#if SINTER_NVIDIA
DEVICE int thread() { return threadIdx.x; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
#else
DEVICE int thread() { return __builtin_amdgcn_workitem_id_x(); }
DEVICE int block_x() { return __builtin_amdgcn_workgroup_id_x(); }
DEVICE int block_y() { return __builtin_amdgcn_workgroup_id_y(); }
DEVICE int block_z() { return __builtin_amdgcn_workgroup_id_z(); }
#endif

DEVICE int lane() { return thread() % WARP; }
DEVICE int warp() { return thread() / WARP; }

// All threads of the block are here, and what they wrote is seen.
DEVICE void barrier() {
#if SINTER_NVIDIA
    __syncthreads();
#else
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
#endif
}

// What the lanes of the warp wrote to shared memory is seen by them.
DEVICE void warp_barrier() {
#if SINTER_NVIDIA
    __syncwarp();
#else
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
    __builtin_amdgcn_wave_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
#endif
}

// Nothing loaded before is kept in registers for what comes after.
DEVICE void forget_loads() { asm volatile("" ::: "memory"); }

// Nothing is known of a value from here on.
DEVICE void forget(u32& x) {
#if SINTER_AMD && !SINTER_HOST
    asm volatile("" : "+v"(x));
#else
    asm volatile("" : "+r"(x));
#endif
}

// The next kernel may be made ready from now on, though it has to wait for this one.
DEVICE void let_next_start() {
#if SINTER_NVIDIA && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// All kernels before this one are done, and what they wrote is seen. Until then a kernel may touch weights alone.
DEVICE void wait_for_previous() {
#if SINTER_NVIDIA && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#elif SINTER_HOST
    lanes_previous_is_done();
#endif
}

// The value that lane `lane() ^ mask` has.
DEVICE u32 exchange(u32 value, int mask) {
#if SINTER_NVIDIA
    return __shfl_xor_sync(0xffffffffu, value, mask);
#else
    return __builtin_amdgcn_ds_bpermute((lane() ^ mask) << 2, value);
#endif
}

// Whether it is so for any lane of the warp, all of which come here.
DEVICE bool any_of_warp(bool x) {
#if SINTER_NVIDIA
    return __any_sync(0xffffffffu, x);
#elif defined(__GFX9__)
    return __builtin_amdgcn_ballot_w64(x) != 0;
#else
    return __builtin_amdgcn_ballot_w32(x) != 0;
#endif
}

DEVICE u32 bits_of(float x) {
#if SINTER_NVIDIA
    return __float_as_uint(x);
#else
    return __builtin_bit_cast(u32, x);
#endif
}

DEVICE float float_of(u32 bits) {
#if SINTER_NVIDIA
    return __uint_as_float(bits);
#else
    return __builtin_bit_cast(float, bits);
#endif
}

DEVICE float exchange(float value, int mask) { return float_of(exchange(bits_of(value), mask)); }
DEVICE int exchange(int value, int mask) { return (int)exchange((u32)value, mask); }

// `sum` plus four products of signed bytes.
DEVICE int dot4(u32 a, u32 b, int sum) {
#if SINTER_NVIDIA
    return __dp4a((int)a, (int)b, sum);
#elif defined(__gfx906__) || defined(__gfx908__) || defined(__gfx90a__) || defined(__gfx940__) || \
    defined(__gfx941__) || defined(__gfx942__) || defined(__gfx950__) || defined(__gfx1011__) || \
    defined(__gfx1012__) || defined(__gfx1030__) || defined(__gfx1031__) || defined(__gfx1032__) || \
    defined(__gfx1034__) || defined(__gfx1035__) || defined(__gfx1036__)
    return __builtin_amdgcn_sdot4((int)a, (int)b, sum, false);
#elif defined(__GFX11__) || defined(__GFX12__)
    return __builtin_amdgcn_sudot4(true, (int)a, true, (int)b, sum, false);
#else
    for (int i = 0; i < 32; i += 8) sum += (int)(i8)(a >> i) * (int)(i8)(b >> i);
    return sum;
#endif
}

// Byte `i` of the result is byte `index[i]`, of 0 to 7, of `high:low`.
DEVICE u32 pick_bytes(u32 low, u32 high, u32 index) {
#if SINTER_NVIDIA
    const u32 pairs = (index | index >> 4) & 0x00ff00ff;
    return __byte_perm(low, high, pairs | pairs >> 8);
#else
    return __builtin_amdgcn_perm(high, low, index);
#endif
}

DEVICE float half_to_float(u16 bits) {
#if SINTER_NVIDIA
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#else
    return (float)__builtin_bit_cast(_Float16, bits);
#endif
}

DEVICE u16 float_to_half(float x) {
#if SINTER_NVIDIA
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    return __builtin_bit_cast(u16, (_Float16)x);
#endif
}

// Two halves in a word: both the nearest to `x`; differences; and products, to which others are added, rounded once where a device can.
#if SINTER_NVIDIA
DEVICE u32 two_halves(float x) {
    u32 bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %1;" : "=r"(bits) : "f"(x));
    return bits;
}
DEVICE u32 differences(u32 a, u32 b) {
    u32 bits;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(bits) : "r"(a), "r"(b));
    return bits;
}
DEVICE u32 fused_halves(u32 a, u32 b, u32 c) {
    u32 bits;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(bits) : "r"(a), "r"(b), "r"(c));
    return bits;
}
#else
typedef _Float16 Half2 __attribute__((ext_vector_type(2)));
DEVICE u32 two_halves(float x) { return 0x10001u * float_to_half(x); }
DEVICE u32 differences(u32 a, u32 b) { return __builtin_bit_cast(u32, __builtin_bit_cast(Half2, a) - __builtin_bit_cast(Half2, b)); }
DEVICE u32 fused_halves(u32 a, u32 b, u32 c) {
    return __builtin_bit_cast(u32, __builtin_bit_cast(Half2, a) * __builtin_bit_cast(Half2, b) + __builtin_bit_cast(Half2, c));
}
#endif

// Elements that are stored as one or the other.
struct AsFloat {
    typedef float Element;
    static DEVICE void put(float* to, float x) { *to = x; }
};
struct AsHalf {
    typedef u16 Element;
    static DEVICE void put(u16* to, float x) { *to = float_to_half(x); }
};

#if SINTER_NVIDIA
DEVICE float exponential(float x) { return expf(x); }
// 2 to the power of `x`, to 2e-7.
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float square_root(float x) { return sqrtf(x); }
DEVICE float rounded(float x) { return roundf(x); }
DEVICE double rounded(double x) { return rint(x); }
DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
#else
DEVICE float exponential(float x) { return __builtin_expf(x); }
DEVICE float power_of_two(float x) { return __builtin_amdgcn_exp2f(x); }
DEVICE float square_root(float x) { return __builtin_sqrtf(x); }
DEVICE float rounded(float x) { return __builtin_roundf(x); }
DEVICE double rounded(double x) { return __builtin_rint(x); }
DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#endif
DEVICE float largest(float a, float b) { return a > b ? a : b; }
DEVICE u32 larger(u32 a, u32 b) { return a > b ? a : b; }
DEVICE constexpr int least(int a, int b) { return a < b ? a : b; }
// Without its sign, which zero may have too.
DEVICE float magnitude(float x) { return float_of(bits_of(x) & 0x7fffffff); }

#define INFINITE (float_of(0x7f800000u))

// Sixteen bytes, at an address that is a multiple of as many.
struct alignas(16) Words {
    u32 x[4];
};
struct alignas(8) Pair {
    u32 x[2];
};

// Sixteen bytes of a weight, which this step reads once.
DEVICE Words load_once(const void* from) {
#if SINTER_NVIDIA
    Words w;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x[0]), "=r"(w.x[1]), "=r"(w.x[2]), "=r"(w.x[3])
                 : "l"(from));
    return w;
#else
    return *(const Words*)from;
#endif
}

// The same of eight.
DEVICE Pair load_once_pair(const void* from) {
#if SINTER_NVIDIA
    Pair w;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0, %1}, [%2];" : "=r"(w.x[0]), "=r"(w.x[1]) : "l"(from));
    return w;
#else
    return *(const Pair*)from;
#endif
}

// A value that the host writes before each step. On AMD a plain load of it may become a scalar load, whose cache keeps what was
// there in the step before when a graph is replayed; this one goes past it.
DEVICE i32 load_step(const i32* from) {
#if SINTER_NVIDIA
    return *(const volatile i32*)from;
#else
    return __hip_atomic_load(from, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
#endif
}

// The same, held to `0..below`, as what is followed must be.
DEVICE i32 load_index(const i32* from, i32 below) {
    const i32 i = load_step(from);
    return i < 0 ? 0 : i >= below ? below - 1 : i;
}

// The lanes of a warp multiply 16 rows by 16 others, of `K` bytes each, 16 or 32, or of 16 halves: on a matrix unit where there is one.
// Each lane has a share of the left rows and of the right ones, of which it does not matter which columns it has, as both have the same,
// and `SUMS` of the products. A share is loaded from shared memory, of rows a stride apart or whose vectors of 16 bytes lie at
// `at(row, vector)`.
constexpr int SUMS = 16 * 16 / WARP;
#if SINTER_AMD
typedef int Int2 __attribute__((ext_vector_type(2)));
typedef int Int4 __attribute__((ext_vector_type(4)));
typedef int Int8 __attribute__((ext_vector_type(8)));
typedef float Float4 __attribute__((ext_vector_type(4)));
typedef float Float8 __attribute__((ext_vector_type(8)));
typedef _Float16 Half4 __attribute__((ext_vector_type(4)));
typedef _Float16 Half8 __attribute__((ext_vector_type(8)));
typedef _Float16 Half16 __attribute__((ext_vector_type(16)));
typedef short Short4 __attribute__((ext_vector_type(4)));
typedef short Short8 __attribute__((ext_vector_type(8)));
typedef short Short16 __attribute__((ext_vector_type(16)));
#endif
#if SINTER_AMD && (defined(__gfx908__) || defined(__gfx90a__))
#define SINTER_MFMA 16
#elif SINTER_AMD && (defined(__gfx940__) || defined(__gfx941__) || defined(__gfx942__) || defined(__gfx950__))
#define SINTER_MFMA 32
#endif

#if SINTER_NVIDIA || defined(__GFX11__) || defined(__GFX12__) || defined(SINTER_MFMA)
// Whether the left rows of a tile stay in registers beside its sums, or are loaded again; and of how many squares the right rows are there
// at once.
#if defined(__GFX11__) || defined(__GFX12__)
constexpr bool LEFT_STAYS = false;
#else
constexpr bool LEFT_STAYS = true;
#endif
constexpr int SQUARES_AT_ONCE = 8;

// A share of left or of right rows, which differ on NVIDIA alone.
template <int K, bool IS_LEFT>
struct Share {
#if SINTER_NVIDIA
    // Of eight rows each, of the left: 16 columns, those of the other rows, then 16 more columns of both; of the right: 16 columns, 16 more, then
    // those of the other rows.
    u32 x[K / 8];
    static DEVICE int row() { return IS_LEFT ? lane() % 16 : lane() % 8 + lane() / (K / 2) % 2 * 8; }
    static DEVICE int vector() { return K != 32 ? 0 : IS_LEFT ? lane() / 16 : lane() / 8 % 2; }
    DEVICE void load(const u8* rows, int stride) { load_matrices(rows + row() * stride + vector() * 16); }
    template <class At>
    DEVICE void load(const At& at) {
        load_matrices(at(row(), vector()));
    }
    DEVICE void load_matrices(const u8* from) {
        const u32 at = (u32)__cvta_generic_to_shared(from);
        if constexpr (K == 32) {
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                         : "r"(at)
                         : "memory");
        } else {
            asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(at) : "memory");
        }
    }
#elif defined(__GFX11__)
    // A whole row, which two lanes have.
    Int4 x[K / 16];
    DEVICE void load(const u8* rows, int stride) {
        for (int i = 0; i < K / 16; i++) x[i] = *(const Int4*)(rows + lane() % 16 * stride + 16 * i);
    }
    template <class At>
    DEVICE void load(const At& at) {
        for (int i = 0; i < K / 16; i++) x[i] = *(const Int4*)at(lane() % 16, i);
    }
#elif defined(__GFX12__)
    Int2 x[K / 16];
    DEVICE void load(const u8* rows, int stride) {
        for (int i = 0; i < K / 16; i++) x[i] = *(const Int2*)(rows + lane() % 16 * stride + 16 * i + lane() / 16 * 8);
    }
    template <class At>
    DEVICE void load(const At& at) {
        for (int i = 0; i < K / 16; i++) x[i] = *(const Int2*)(at(lane() % 16, i) + lane() / 16 * 8);
    }
#elif SINTER_MFMA == 16
    i32 x[K / 16];
    DEVICE void load(const u8* rows, int stride) {
        for (int i = 0; i < K / 16; i++) x[i] = *(const i32*)(rows + lane() % 16 * stride + 16 * i + lane() / 16 * 4);
    }
    template <class At>
    DEVICE void load(const At& at) {
        for (int i = 0; i < K / 16; i++) x[i] = *(const i32*)(at(lane() % 16, i) + lane() / 16 * 4);
    }
#else
    // The unit takes 32 columns; half of the lanes have none of 16.
    u64 x;
    DEVICE void load(const u8* rows, int stride) {
        x = K == 32 || lane() < 32 ? *(const u64*)(rows + lane() % 16 * stride + lane() / 16 * 8) : 0;
    }
    template <class At>
    DEVICE void load(const At& at) {
        x = K == 32 || lane() < 32 ? *(const u64*)(at(lane() % 16, lane() / 32) + lane() / 16 % 2 * 8) : 0;
    }
#endif
};
template <int K>
using Left = Share<K, true>;
template <int K>
using Right = Share<K, false>;
#else
// No matrix unit: a lane has whole rows, which take four to eight times the registers.
constexpr bool LEFT_STAYS = false;
constexpr int SQUARES_AT_ONCE = 1;
constexpr int LEFT_ROWS = WARP == 32 ? 2 : 1;
template <int K>
struct Left {
    u32 x[LEFT_ROWS][K / 4];
    DEVICE void load(const u8* rows, int stride) {
        for (int r = 0; r < LEFT_ROWS; r++) {
            for (int i = 0; i < K / 4; i++) x[r][i] = *(const u32*)(rows + (lane() / 4 + 8 * r) * stride + 4 * i);
        }
    }
    template <class At>
    DEVICE void load(const At& at) {
        for (int r = 0; r < LEFT_ROWS; r++) {
            for (int i = 0; i < K / 4; i++) x[r][i] = *(const u32*)(at(lane() / 4 + 8 * r, i / 4) + i % 4 * 4);
        }
    }
};
template <int K>
struct Right {
    u32 x[4][K / 4];
    DEVICE void load(const u8* rows, int stride) {
        for (int r = 0; r < 4; r++) {
            for (int i = 0; i < K / 4; i++) x[r][i] = *(const u32*)(rows + (lane() % 4 + 4 * r) * stride + 4 * i);
        }
    }
    template <class At>
    DEVICE void load(const At& at) {
        for (int r = 0; r < 4; r++) {
            for (int i = 0; i < K / 4; i++) x[r][i] = *(const u32*)(at(lane() % 4 + 4 * r, i / 4) + i % 4 * 4);
        }
    }
};

// `sum` plus the products of two halves.
DEVICE float dot2(u32 a, u32 b, float sum) {
#if defined(__gfx900__) && !SINTER_HOST
    asm("v_mad_mix_f32 %0, %1, %2, %0 op_sel_hi:[1,1,0]\n\tv_mad_mix_f32 %0, %1, %2, %0 op_sel:[1,1,0] op_sel_hi:[1,1,0]"
        : "+v"(sum)
        : "v"(a), "v"(b));
    return sum;
#elif defined(__gfx900__) || defined(__gfx902__) || defined(__gfx904__) || defined(__gfx909__) || defined(__gfx90c__) || defined(__gfx1010__)
    sum = fused(half_to_float((u16)a), half_to_float((u16)b), sum);
    return fused(half_to_float((u16)(a >> 16)), half_to_float((u16)(b >> 16)), sum);
#else
    return __builtin_amdgcn_fdot2(__builtin_bit_cast(Half2, a), __builtin_bit_cast(Half2, b), sum, false);
#endif
}
#endif

// Neighbouring lanes that share left rows, how many left rows the sums of a lane are of, and which of those sum `i` is of.
#if SINTER_NVIDIA
constexpr int LANES_OF_LEFT = 4, LEFT_OF_LANE = 2;
DEVICE constexpr int left_of_sum(int i) { return i / 2 % 2; }
#elif defined(__GFX11__) || defined(__GFX12__) || defined(SINTER_MFMA)
constexpr int LANES_OF_LEFT = 16, LEFT_OF_LANE = SUMS;
DEVICE constexpr int left_of_sum(int i) { return i; }
#else
constexpr int LANES_OF_LEFT = 4, LEFT_OF_LANE = LEFT_ROWS;
DEVICE constexpr int left_of_sum(int i) { return i / 4; }
#endif

// The left and the right row of a lane's sum `i`.
DEVICE int left_row(int i) {
#if SINTER_NVIDIA
    return lane() / 4 + i / 2 % 2 * 8;
#elif defined(__GFX11__)
    return 2 * i + lane() / 16;
#elif defined(__GFX12__)
    return lane() / 16 * 8 + i;
#elif defined(SINTER_MFMA)
    return lane() / 16 * 4 + i;
#else
    return lane() / 4 + i / 4 * 8;
#endif
}
DEVICE int right_row(int i) {
#if SINTER_NVIDIA
    return i / 4 * 8 + lane() % 4 * 2 + i % 2;
#elif defined(__GFX11__) || defined(__GFX12__) || defined(SINTER_MFMA)
    return lane() % 16;
#else
    return lane() % 4 + i % 4 * 4;
#endif
}

// The lane's sums, as floats.
template <int K>
DEVICE void multiply_rows(const Left<K>& a, const Right<K>& b, float (&sums)[SUMS]) {
#if SINTER_NVIDIA
    // Sums begin at a float that has a unit for its last bit, so that they are floats already.
    constexpr u32 BEGIN = 0x4b400000;
    for (int half = 0; half < 2; half++) {
        u32 d[4];
        if constexpr (K == 32) {
            asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
                : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[2 * half]), "r"(b.x[2 * half + 1]), "r"(BEGIN));
        } else {
            asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
                : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                : "r"(a.x[0]), "r"(a.x[1]), "r"(b.x[half]), "r"(BEGIN));
        }
        for (int i = 0; i < 4; i++) sums[4 * half + i] = float_of(d[i]) - float_of(BEGIN);
    }
#elif defined(__GFX11__)
    Int8 d = {};
    for (int i = 0; i < K / 16; i++) d = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32(true, a.x[i], true, b.x[i], d, false);
    for (int i = 0; i < SUMS; i++) sums[i] = (float)d[i];
#elif defined(__GFX12__)
    Int8 d = {};
    for (int i = 0; i < K / 16; i++) d = __builtin_amdgcn_wmma_i32_16x16x16_iu8_w32_gfx12(true, a.x[i], true, b.x[i], d, false);
    for (int i = 0; i < SUMS; i++) sums[i] = (float)d[i];
#elif defined(SINTER_MFMA)
    Int4 d = {};
#if SINTER_MFMA == 16
    for (int i = 0; i < K / 16; i++) d = __builtin_amdgcn_mfma_i32_16x16x16i8(a.x[i], b.x[i], d, 0, 0, 0);
#else
    d = __builtin_amdgcn_mfma_i32_16x16x32_i8(a.x, b.x, d, 0, 0, 0);
#endif
    for (int i = 0; i < SUMS; i++) sums[i] = (float)d[i];
#else
    for (int i = 0; i < SUMS; i++) {
        int dot = 0;
        for (int k = 0; k < K / 4; k++) dot = dot4(a.x[i / 4][k], b.x[i % 4][k], dot);
        sums[i] = (float)dot;
    }
#endif
}

#if SINTER_NVIDIA || SINTER_HOST
// The lanes of a warp multiply 16 rows by 8 others, of 32 bytes each. Lane `4 g + t` has two words of rows `g` (`a[0]`, `a[2]`)
// and `g + 8` of the left, and of right row `g`, of whichever columns, as all rows of a `t` have the same; and of the products those of
// left row `g + i / 2 * 8` and right row `2 t + i % 2`.
DEVICE void multiply_eight(const u32 (&a)[4], const u32 (&b)[2], float (&sums)[4]) {
    // Sums begin at a float that has a unit for its last bit, so that they are floats already.
    constexpr u32 BEGIN = 0x4b400000;
    u32 d[4];
#if SINTER_NVIDIA
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(BEGIN));
#else
    for (int i = 0; i < 4; i++) d[i] = BEGIN;
    lanes_multiply_eight(a, b, d);
#endif
    for (int i = 0; i < 4; i++) sums[i] = float_of(d[i]) - float_of(BEGIN);
}
#endif

// Adds the products of rows of 16 halves to the lane's sums.
DEVICE void multiply_halves(const Left<32>& a, const Right<32>& b, float (&sums)[SUMS]) {
#if SINTER_NVIDIA
    for (int half = 0; half < 2; half++) {
        float* d = sums + 4 * half;
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[2 * half]), "r"(b.x[2 * half + 1]));
    }
#elif defined(__GFX11__) || defined(__GFX12__)
    Float8 d;
    for (int i = 0; i < SUMS; i++) d[i] = sums[i];
#if defined(__GFX11__)
    d = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(__builtin_bit_cast(Half16, a), __builtin_bit_cast(Half16, b), d);
#else
    d = __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(__builtin_bit_cast(Half8, a), __builtin_bit_cast(Half8, b), d);
#endif
    for (int i = 0; i < SUMS; i++) sums[i] = d[i];
#elif defined(SINTER_MFMA)
    Float4 d;
    for (int i = 0; i < SUMS; i++) d[i] = sums[i];
    d = __builtin_amdgcn_mfma_f32_16x16x16f16(__builtin_bit_cast(Half4, a), __builtin_bit_cast(Half4, b), d, 0, 0, 0);
    for (int i = 0; i < SUMS; i++) sums[i] = d[i];
#else
#pragma unroll
    for (int k = 0; k < 8; k++) {
#pragma unroll
        for (int i = 0; i < SUMS; i++) sums[i] = dot2(a.x[i / 4][k], b.x[i % 4][k], sums[i]);
    }
#if !SINTER_HOST
    // Else compilers leave a sum for where it is known to be wanted, and until then keep all that it is made of.
    for (int i = 0; i < SUMS; i++) asm volatile("" : "+v"(sums[i]));
#endif
#endif
}

// The same of numbers that have a float's exponent and seven bits after it.
DEVICE void multiply_bfloats(const Left<32>& a, const Right<32>& b, float (&sums)[SUMS]) {
#if SINTER_NVIDIA
    for (int half = 0; half < 2; half++) {
        float* d = sums + 4 * half;
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[2 * half]), "r"(b.x[2 * half + 1]));
    }
#elif defined(__GFX11__) || defined(__GFX12__)
    Float8 d;
    for (int i = 0; i < SUMS; i++) d[i] = sums[i];
#if defined(__GFX11__)
    d = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32(__builtin_bit_cast(Short16, a), __builtin_bit_cast(Short16, b), d);
#else
    d = __builtin_amdgcn_wmma_f32_16x16x16_bf16_w32_gfx12(__builtin_bit_cast(Short8, a), __builtin_bit_cast(Short8, b), d);
#endif
    for (int i = 0; i < SUMS; i++) sums[i] = d[i];
#elif defined(SINTER_MFMA)
    Float4 d;
    for (int i = 0; i < SUMS; i++) d[i] = sums[i];
    const Short4 x = __builtin_bit_cast(Short4, a), w = __builtin_bit_cast(Short4, b);
#if defined(__gfx908__)
    // Its unit has another shape for these.
    for (int k = 0; k < 4; k++) {
        d = __builtin_amdgcn_mfma_f32_16x16x4f32(float_of((u32)(u16)x[k] << 16), float_of((u32)(u16)w[k] << 16), d, 0, 0, 0);
    }
#else
    d = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(x, w, d, 0, 0, 0);
#endif
    for (int i = 0; i < SUMS; i++) sums[i] = d[i];
#else
    for (int k = 0; k < 8; k++) {
        for (int i = 0; i < SUMS; i++) {
            const u32 left = a.x[i / 4][k], right = b.x[i % 4][k];
            sums[i] = fused(float_of(left << 16), float_of(right << 16), sums[i]);
            sums[i] = fused(float_of(left & 0xffff0000), float_of(right & 0xffff0000), sums[i]);
        }
    }
#endif
}

// As `multiply_halves`, of halves of any size: the matrix units of gfx908 and gfx90a take those below 2^-14 for zeros, and there floats are multiplied.
DEVICE void multiply_any_halves(const Left<32>& a, const Right<32>& b, float (&sums)[SUMS]) {
#if defined(SINTER_MFMA) && SINTER_MFMA == 16
    const Half4 x = __builtin_bit_cast(Half4, a), w = __builtin_bit_cast(Half4, b);
    Float4 d;
    for (int i = 0; i < SUMS; i++) d[i] = sums[i];
    for (int k = 0; k < 4; k++) d = __builtin_amdgcn_mfma_f32_16x16x4f32((float)x[k], (float)w[k], d, 0, 0, 0);
    for (int i = 0; i < SUMS; i++) sums[i] = d[i];
#else
    multiply_halves(a, b, sums);
#endif
}

// Sixteen bytes on their way to shared memory: there from `finish` and `wait_for_copies` on. Where registers hold them, the next waits for those.
struct Copy {
#if SINTER_NVIDIA
    static constexpr bool IS_HELD = false;
    DEVICE void begin(u8* to, const u8* from) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
    }
    DEVICE void finish(u8*) {}
#elif SINTER_LATE_COPIES
    static constexpr bool IS_HELD = false;
    DEVICE void begin(u8* to, const u8* from) { lanes_begin_copy(to, from); }
    DEVICE void finish(u8*) {}
#else
    static constexpr bool IS_HELD = true;
    // A vector: what is copied as a struct stays in memory.
    Int4 held;
    DEVICE void begin(u8*, const u8* from) { held = *(const Int4*)from; }
    DEVICE void finish(u8* to) { *(Int4*)to = held; }
#endif
};

// What was begun since the last call is a step's.
DEVICE void end_step_of_copies() {
#if SINTER_NVIDIA
    asm volatile("cp.async.commit_group;" ::: "memory");
#elif SINTER_LATE_COPIES
    lanes_end_step_of_copies();
#endif
}

// The thread's copies of all steps are there, but for the last `LATER`.
template <int LATER>
DEVICE void wait_for_copies() {
#if SINTER_NVIDIA
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
#elif SINTER_LATE_COPIES
    lanes_wait_for_copies(LATER);
#endif
}
