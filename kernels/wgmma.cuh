// The matrix instruction of four warps together, sm_90a: 64 x N x 16, both operands in shared
// memory, in rows of 128 bytes with the 128-byte swizzle of the PTX manual ("Asynchronous
// Warpgroup Level Matrix Instructions"). Tiles begin at multiples of 1024 bytes.
//
// Warp w of the four has rows 16 w to 16 w + 15 of the sums, as fragments of mma.m16n8k16, one
// every 8 columns.
#pragma once

#include "portable.cuh"

#if defined(MOESHM_SIMT)

template <int N, typename T>
DEVICE void multiply_64_16(float (&sums)[N / 2], const char* a, const char* b, int k) {
    simt_wgmma_m64k16<N>(sums, a, b, k, [](u16 bits) { return widen(T{bits}); });
}

DEVICE void begin_multiplying() {}

DEVICE void commit_multiplying() { simt_commit_wgmma(); }

template <int N> DEVICE void wait_for_multiplying() { simt_wait_for_wgmma(N); }

template <int N> DEVICE void wait_for_sums(float (&)[N]) { simt_wait_for_wgmma(0); }

DEVICE void show_to_matrix_unit() {}

#else

// %0, ... for the sums, and their constraints.
#define TEN(d)                                                                                     \
    ", %" #d "0, %" #d "1, %" #d "2, %" #d "3, %" #d "4, %" #d "5, %" #d "6, %" #d "7, %" #d "8"   \
    ", %" #d "9"
#define NAMES_10 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9"
#define NAMES_32 NAMES_10 TEN(1) TEN(2) ", %30, %31"
#define NAMES_60 NAMES_10 TEN(1) TEN(2) TEN(3) TEN(4) TEN(5)
#define NAMES_64 NAMES_60 ", %60, %61, %62, %63"
#define NAMES_120 NAMES_60 TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)
#define NAMES_128 NAMES_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUMS_16(i) SUMS_4(i), SUMS_4(i + 4), SUMS_4(i + 8), SUMS_4(i + 12)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define SUMS_128(i) SUMS_64(i), SUMS_64(i + 64)

// The sums are added to: the predicate is true; operands are neither negated nor transposed.
#define MULTIPLY_64(n, format, names, a_name, b_name, ...)                                         \
    asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." format "." format               \
                 " {" names "}, " a_name ", " b_name ", add, 1, 1, 0, 0;\n}"                       \
                 : __VA_ARGS__                                                                     \
                 : "l"(a), "l"(b))

#define MULTIPLY_ANY(type, format)                                                                 \
    DEVICE void multiply(type, float (&sums)[32], u64 a, u64 b) {                                  \
        MULTIPLY_64(64, format, NAMES_32, "%32", "%33", SUMS_32(0));                               \
    }                                                                                              \
    DEVICE void multiply(type, float (&sums)[64], u64 a, u64 b) {                                  \
        MULTIPLY_64(128, format, NAMES_64, "%64", "%65", SUMS_64(0));                              \
    }                                                                                              \
    DEVICE void multiply(type, float (&sums)[128], u64 a, u64 b) {                                 \
        MULTIPLY_64(256, format, NAMES_128, "%128", "%129", SUMS_128(0));                          \
    }

MULTIPLY_ANY(bf16, "bf16")
MULTIPLY_ANY(f16, "f16")

#undef MULTIPLY_ANY
#undef MULTIPLY_64

// The manual's "Matrix Descriptor": addresses and strides in units of 16 bytes, 1024 bytes from
// 8 rows to the next 8, swizzle mode 1 (128 bytes).
DEVICE u64 describe(const char* tile) {
    const u64 address = __cvta_generic_to_shared(tile);
    return (address & 0x3ffff) >> 4 | 1ull << 16 | (1024ull >> 4) << 32 | 1ull << 62;
}

// Adds to the sums the product of 64 rows at `a` and N rows at `b`, of the 16 of k at 16 * k. Runs
// on while the caller does other things.
template <int N, typename T>
DEVICE void multiply_64_16(float (&sums)[N / 2], const char* a, const char* b, int k) {
    // 32 bytes further in each row: the hardware swizzles the whole address.
    multiply(T(), sums, describe(a) + 2 * k, describe(b) + 2 * k);
}

// Before the first of a batch of multiplications, and after its last.
DEVICE void begin_multiplying() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void commit_multiplying() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All batches but the newest N are done: what they read may be overwritten.
template <int N> DEVICE void wait_for_multiplying() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// All batches are done; the compiler must not use the sums earlier.
template <int N> DEVICE void wait_for_sums(float (&sums)[N]) {
    wait_for_multiplying<0>();
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// What this thread has seen in shared memory, copied there by whomever, wgmma shall see too.
DEVICE void show_to_matrix_unit() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#endif
