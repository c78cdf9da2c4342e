// The matrix instruction of four warps together, sm_90a: 64 x N x 16, both operands in shared
// memory, where they begin at multiples of 1024 bytes. PTX manual, "Asynchronous Warpgroup Level
// Matrix Instructions".
//
// A is 64 rows of weights and 64 of k, a tile of ffn.cuh, whose 64-byte swizzle is the hardware's.
// B is N pairs and 64 of k, in rows of 128 bytes with the 128-byte swizzle. Warp w of the four has
// rows 16 w to 16 w + 15 of the sums, as fragments of mma.m16n8k16, one every 8 columns.
#pragma once

#include "portable.cuh"

// Bytes of A.
#define WEIGHTS_64 (64 * 64 * 2)

#if defined(MOESHM_SIMT)

template <int N, typename T>
DEVICE void multiply_64_16(float (&sums)[N / 2], const char* weights, const char* pairs, int k) {
    simt_wgmma_m64k16<N>(sums, weights, pairs, k, [](u16 bits) { return widen(T{bits}); });
}

DEVICE void begin_multiplying() {}

DEVICE void commit_multiplying() { simt_commit_wgmma(); }

template <int N> DEVICE void wait_for_multiplying() { simt_wait_for_wgmma(N); }

template <int N> DEVICE void wait_for_sums(float (&)[N]) { simt_wait_for_wgmma(0); }

DEVICE void show_to_matrix_unit() {}

template <int N> DEVICE void give_registers() {}

template <int N> DEVICE void take_registers() {}

#else

// %0, %1, ... for the sums, and their constraints.
#define NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_24 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_32 NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_40 NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_48 NAMES_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_56 NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define NAMES_64 NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_72 NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define SUMS_8(i)                                                                                  \
    "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]),     \
        "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define SUMS_16 SUMS_8(0), SUMS_8(8)
#define SUMS_24 SUMS_16, SUMS_8(16)
#define SUMS_32 SUMS_24, SUMS_8(24)
#define SUMS_40 SUMS_32, SUMS_8(32)
#define SUMS_48 SUMS_40, SUMS_8(40)
#define SUMS_56 SUMS_48, SUMS_8(48)
#define SUMS_64 SUMS_56, SUMS_8(56)
#define SUMS_72 SUMS_64, SUMS_8(64)

// Of one format and N: the sums are added to, the predicate is true; operands are neither negated
// nor transposed.
#define MULTIPLY_64(type, format, n, n_sums, a_name, b_name, ...)                                  \
    DEVICE void multiply(type, float (&sums)[n_sums], u64 a, u64 b) {                              \
        asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                               \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." format "." format           \
                     " {" NAMES_##n_sums "}, " a_name ", " b_name ", add, 1, 1, 0, 0;\n}"          \
                     : __VA_ARGS__                                                                 \
                     : "l"(a), "l"(b));                                                            \
    }

#define MULTIPLY_ANY(type, format)                                                                 \
    MULTIPLY_64(type, format, 16, 8, "%8", "%9", SUMS_8(0))                                        \
    MULTIPLY_64(type, format, 32, 16, "%16", "%17", SUMS_16)                                       \
    MULTIPLY_64(type, format, 48, 24, "%24", "%25", SUMS_24)                                       \
    MULTIPLY_64(type, format, 64, 32, "%32", "%33", SUMS_32)                                       \
    MULTIPLY_64(type, format, 80, 40, "%40", "%41", SUMS_40)                                       \
    MULTIPLY_64(type, format, 96, 48, "%48", "%49", SUMS_48)                                       \
    MULTIPLY_64(type, format, 112, 56, "%56", "%57", SUMS_56)                                      \
    MULTIPLY_64(type, format, 128, 64, "%64", "%65", SUMS_64)                                      \
    MULTIPLY_64(type, format, 144, 72, "%72", "%73", SUMS_72)

MULTIPLY_ANY(bf16, "bf16")
MULTIPLY_ANY(f16, "f16")

#undef MULTIPLY_ANY
#undef MULTIPLY_64

// The manual's "Matrix Descriptor": addresses and strides in units of 16 bytes, 1024 bytes from
// 8 rows to the next 8; swizzle mode 1 is that of 128 bytes, 2 that of 64.
DEVICE u64 describe(const char* tile, u64 swizzle) {
    const u64 address = __cvta_generic_to_shared(tile);
    return (address & 0x3ffff) >> 4 | 1ull << 16 | (1024ull >> 4) << 32 | swizzle << 62;
}

// Adds to the sums the product of 64 rows of weights and N pairs, of the 16 of k at 16 * k. Runs on
// while the caller does other things.
template <int N, typename T>
DEVICE void multiply_64_16(float (&sums)[N / 2], const char* weights, const char* pairs, int k) {
    // 32 bytes further in each row, or in the next block: the hardware swizzles the whole address.
    multiply(T(), sums, describe(weights, 2) + k / 2 * 32 + k % 2 * 2, describe(pairs, 1) + 2 * k);
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

// The four warps of a group have N registers a thread from here on, fewer or more than before.
template <int N> DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

#endif
