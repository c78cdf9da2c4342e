// The matrix instructions of sm_80 and later, and copies into shared memory that run meanwhile.
//
// Fragments as in the PTX manual, "Matrix Fragments for mma.m16n8k16": with group = lane / 4 and
// quad = lane % 4, a lane holds of A the rows group and group + 8, of B the column group, of C the
// columns 2 * quad and 2 * quad + 1. Which k is which does not matter as long as A and B agree.
#pragma once

#include "portable.cuh"

#if HAS_MMA

#if defined(MOESHM_SIMT)

template <typename T> DEVICE void multiply_16_8_16(float c[4], const u32 a[4], const u32 b[2]) {
    simt_mma_m16n8k16(c, a, b, [](u16 bits) { return widen(T{bits}); });
}

#else

#define MULTIPLY(format)                                                                           \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." format "." format ".f32 "                         \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

DEVICE void multiply(bf16, float c[4], const u32 a[4], const u32 b[2]) { MULTIPLY("bf16"); }

DEVICE void multiply(f16, float c[4], const u32 a[4], const u32 b[2]) { MULTIPLY("f16"); }

#undef MULTIPLY

// C += A B, 16 x 8 x 16, summed in float32.
template <typename T> DEVICE void multiply_16_8_16(float c[4], const u32 a[4], const u32 b[2]) {
    multiply(T(), c, a, b);
}

#endif

#if defined(MOESHM_SIMT)
template <typename T> DEVICE u32 pack(T, float low, float high) {
    return (u32)narrow<T>(low).bits | (u32)narrow<T>(high).bits << 16;
}
#else
DEVICE u32 pack(bf16, float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

DEVICE u32 pack(f16, float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
#endif

// Two float32 as two 16-bit floats, the first in the low half; in one instruction.
template <typename T> DEVICE u32 pack(float low, float high) { return pack(T(), low, high); }

// Four 8 x 8 tiles of 16-bit values from shared memory; lane i gives the address of row i % 8 of
// tile i / 8, and gets of tile j, in r[j], the two values 2 * (lane % 4) of row lane / 4.
DEVICE void load_tiles(u32 r[4], const void* shared) {
#if defined(MOESHM_SIMT)
    simt_ldmatrix_x4(r, shared);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((u32)__cvta_generic_to_shared(shared))
                 : "memory");
#endif
}

// The other way round, and each tile transposed: of tile j, a lane has in r[j] the two values
// 2 * (lane % 4) of row lane / 4, which become column lane / 4. From sm_90 on.
DEVICE void store_turned(void* shared, const u32 r[4]) {
#if defined(MOESHM_SIMT)
    simt_stmatrix_x4_trans(shared, r);
#else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     (u32)__cvta_generic_to_shared(shared)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#endif
}

// 16 bytes into shared memory, zeros if not `is_valid`; there after `wait_for_copies`. L2 fetches
// what is next to them: on an H100 that made a prefill of 1024 tokens 3 % faster.
DEVICE void copy_async(void* shared, const void* global, bool is_valid) {
#if defined(MOESHM_SIMT)
    simt_copy_async(shared, global, is_valid);
#else
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(
                     (u32)__cvta_generic_to_shared(shared)),
                 "l"(global), "r"(is_valid ? 16 : 0)
                 : "memory");
#endif
}

// Ends a group of copies.
DEVICE void commit_copies() {
#if defined(MOESHM_SIMT)
    simt_commit_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// This thread's copies are there but for the newest N groups.
template <int N> DEVICE void wait_for_copies() {
#if defined(MOESHM_SIMT)
    simt_wait_for_copies(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

#endif
