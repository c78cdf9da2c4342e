// What differs between CUDA, HIP and the host: types, shuffles, loads, matrix instructions.
//
// WARP is the number of lanes, passed by whoever compiles: 32, or 64 on gfx9 cards. No header of
// CUDA's or of HIP's fp16 is needed: 16-bit floats are bit patterns here.
#pragma once

#if defined(__HIP__) && !defined(__HIPCC_RTC__)
#include <hip/hip_runtime.h>
#endif

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
// A function that is called: its loops have all registers, whatever its caller needs.
#if defined(MOESHM_SIMT)
#define APART static __attribute__((noinline))
#else
#define APART static __device__ __noinline__
#endif
#define DEVICE_MEMBER __device__ __forceinline__

// A bit for each lane of a warp, as BALLOT gives.
#if WARP == 64
typedef u64 Lanes;
#else
typedef u32 Lanes;
#endif

#if defined(MOESHM_SIMT)
// The host, in tests: simt.h is included by the compiler's command line and has the rest.
#define HAS_MMA (WARP == 32)
#elif defined(__HIP__)
#define HAS_MMA 0
#define SHUFFLE_XOR(value, mask) __shfl_xor(value, mask)
#define SHUFFLE(value, lane) __shfl(value, lane)
#define BALLOT(condition) ((Lanes)__ballot(condition))
#define SYNC_WARP() __builtin_amdgcn_wave_barrier()
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) type name[]
#else
#define HAS_MMA (__CUDA_ARCH__ >= 800)
#define SHUFFLE_XOR(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
#define SHUFFLE(value, lane) __shfl_sync(0xffffffffu, value, lane)
#define BALLOT(condition) __ballot_sync(0xffffffffu, condition)
#define SYNC_WARP() __syncwarp()
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) type name[]
#endif

// The second number of __launch_bounds__, for two blocks of 256 threads on a multiprocessor. HIP's
// counts waves of a SIMD, and for two of them gfx906 spills.
#if defined(__HIP__)
#define TWO_BLOCKS 1
#else
#define TWO_BLOCKS 2
#endif

// --- 16-bit floats ------------------------------------------------------------------------

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

DEVICE float bits_to_float(u32 bits) {
    union {
        u32 bits;
        float value;
    } both;
    both.bits = bits;
    return both.value;
}

DEVICE u32 float_to_bits(float value) {
    union {
        float value;
        u32 bits;
    } both;
    both.value = value;
    return both.bits;
}

DEVICE float widen(float value) { return value; }

DEVICE float widen(bf16 value) { return bits_to_float((u32)value.bits << 16); }

DEVICE float widen(f16 value) {
#if defined(MOESHM_SIMT)
    return simt_f16_to_float(value.bits);
#elif defined(__HIP__)
    union {
        u16 bits;
        _Float16 value;
    } both;
    both.bits = value.bits;
    return (float)both.value;
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
#endif
}

DEVICE void round_to(float& result, float value) { result = value; }

DEVICE void round_to(bf16& result, float value) {
    u32 bits = float_to_bits(value);
    u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    // Rounding could turn a NaN whose payload is in the low half into an infinity.
    result.bits = (u16)(value != value ? (bits >> 16) | 0x40u : rounded);
}

DEVICE void round_to(f16& result, float value) {
#if defined(MOESHM_SIMT)
    result.bits = simt_float_to_f16(value);
#elif defined(__HIP__)
    union {
        u16 bits;
        _Float16 value;
    } both;
    both.value = (_Float16)value;
    result.bits = both.bits;
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#endif
}

// Rounded to nearest, ties to even; NaN stays NaN.
template <typename T> DEVICE T narrow(float value) {
    T result;
    round_to(result, value);
    return result;
}

// --- memory -------------------------------------------------------------------------------

struct __align__(16) vec16 {
    u32 word[4];
};

DEVICE vec16 zero16() { return vec16{{0, 0, 0, 0}}; }

// 16 bytes that nobody reads again soon: weights. They go past L1, so that activations stay there,
// and the other half of their 128-byte line is fetched as well: on an H100, 8 lines at a time read
// so in halves came at 2.95 TB/s, without the hint at 2.77.
DEVICE vec16 load_once(const void* address) {
#if defined(MOESHM_SIMT) || defined(__HIP__)
    return *(const vec16*)address;
#else
#if __CUDA_ARCH__ >= 750
#define LOAD_ONCE "ld.global.nc.L1::no_allocate.L2::128B"
#else
#define LOAD_ONCE "ld.global.nc"
#endif
    vec16 v;
    asm volatile(LOAD_ONCE ".v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(address));
    return v;
#endif
}

// 16 bytes that were written before this kernel, or before a flag that the block has awaited, and
// that other warps read too.
DEVICE vec16 load_cached(const void* address) {
#if defined(MOESHM_SIMT) || defined(__HIP__)
    return *(const vec16*)address;
#else
    vec16 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(address)
                 : "memory");
    return v;
#endif
}

// What this thread wrote is seen by other devices and by the host before what it writes from here
// on.
DEVICE void fence_system() {
#if !defined(MOESHM_SIMT)
    __threadfence_system();
#endif
}

// --- blocks that wait for each other, or for the host -------------------------------------
// CUDA alone: only kernels of which all blocks run at once may do so.

#if defined(MOESHM_SIMT)

DEVICE u32 load_acquire(const u32* address) { return simt_load_acquire(address); }

DEVICE vec16 load_now(const vec16* address) {
    const volatile u64* halves = (const volatile u64*)address;
    const u64 low = halves[0], high = halves[1];
    return vec16{{(u32)low, (u32)(low >> 32), (u32)high, (u32)(high >> 32)}};
}

DEVICE void store_now(vec16* address, const vec16& value) { *address = value; }

DEVICE void wait_for_host() { simt_wait_for_host(); }

DEVICE void wait_for_block() { simt_wait_for_block(); }

DEVICE void fence_device() {}

DEVICE u64 now_ns() { return simt_now_ns(); }

DEVICE void sync_team(int number, int n_threads) { simt_sync_team(number, n_threads); }

#elif !defined(__HIP__)

// What other blocks wrote before they set the word can be read by this thread after this, and by its
// block after a barrier.
DEVICE u32 load_acquire(const u32* address) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

// As they are now; each 8 of the 16 bytes at once.
DEVICE vec16 load_now(const vec16* address) {
    vec16 v;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(address)
                 : "memory");
    return v;
}

DEVICE void store_now(vec16* address, const vec16& value) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address),
                 "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
                 : "memory");
}

// In loops that wait for a word of the host's, or of another block's.
DEVICE void wait_for_host() {}

DEVICE void wait_for_block() {}

// What this thread wrote, and what it has seen, is seen by other blocks before what it writes from
// here on.
DEVICE void fence_device() { __threadfence(); }

// The card's clock, which goes on in steps of up to 1 us.
DEVICE u64 now_ns() {
    u64 value;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
    return value;
}

// A barrier of some warps of the block, from wherever they call it; numbers are 1 to 15.
DEVICE void sync_team(int number, int n_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(n_threads) : "memory");
}

#endif

// --- kernels that overlap -----------------------------------------------------------------

// A kernel that was launched to overlap with the one before it (programmatic dependent launch, CUDA
// programming guide) may not read what that one writes before this returns. Elsewhere the launch
// itself waits, and this does nothing. No kernel that overlaps with another writes a call's ids,
// its weights or experts: these may be read at once. `admit` writes ids, and overlaps with none.
DEVICE void wait_for_previous_kernel() {
#if !defined(MOESHM_SIMT) && !defined(__HIP__)
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#endif
}

// From here on the next kernel may start where there is room.
DEVICE void let_next_kernel_start() {
#if !defined(MOESHM_SIMT) && !defined(__HIP__)
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#endif
}

// --- warps --------------------------------------------------------------------------------

// The sum over the warp, the same bits in every lane.
DEVICE float warp_sum(float value) {
#pragma unroll
    for (int mask = WARP / 2; mask > 0; mask >>= 1) value += SHUFFLE_XOR(value, mask);
    return value;
}

DEVICE int count_lanes(Lanes lanes) {
#if defined(MOESHM_SIMT) || defined(__HIP__)
    return __builtin_popcountll(lanes);
#else
    return __popc(lanes);
#endif
}

// The lowest of `lanes`, which are not empty.
DEVICE int first_lane(Lanes lanes) {
#if defined(MOESHM_SIMT) || defined(__HIP__)
    return __builtin_ctzll(lanes);
#else
    return __ffs(lanes) - 1;
#endif
}
