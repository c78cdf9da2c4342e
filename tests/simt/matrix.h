// The matrix instructions of sm_80 and sm_90, as the host computes them.
//
// Layouts are those of the PTX manual, "Matrix Fragments for mma.m16n8k16" and "Register Fragments
// for wgmma.mma_async.m64nNk16". Products are exact and summed in double, then rounded to float32.
#pragma once

#if WARP == 32

// --- mma and ldmatrix ---------------------------------------------------------------------

// C += A B with A [16, 16], B [16, columns] and C [16, columns], row-major; columns is a multiple
// of 8.
void simt_multiply(float* c, const float* a, const float* b, int columns);

template <typename Widen> struct simt_mma {
    float* c;
    const uint32_t* a;
    const uint32_t* b;
    Widen widen;
};

template <typename Widen> void simt_perform_mma(void* const* arguments, int) {
    simt_mma<Widen>** lanes = (simt_mma<Widen>**)arguments;
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const simt_mma<Widen>& mine = *lanes[lane];
        const int group = lane / 4, quad = lane % 4;
        for (int i = 0; i < 8; ++i) {
            const uint16_t bits = mine.a[i / 2] >> (i % 2 * 16);
            a[group + i / 2 % 2 * 8][quad * 2 + i % 2 + i / 4 * 8] = mine.widen(bits);
        }
        for (int i = 0; i < 4; ++i) {
            const uint16_t bits = mine.b[i / 2] >> (i % 2 * 16);
            b[quad * 2 + i % 2 + i / 2 * 8][group] = mine.widen(bits);
            c[group + i / 2 * 8][quad * 2 + i % 2] = mine.c[i];
        }
    }
    simt_multiply(&c[0][0], &a[0][0], &b[0][0], 8);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
            lanes[lane]->c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

template <typename Widen>
void simt_mma_m16n8k16(float c[4], const uint32_t a[4], const uint32_t b[2], Widen widen,
                       int line = __builtin_LINE()) {
    simt_mma<Widen> argument = {c, a, b, widen};
    simt_meet({"mma", line, 32, simt_perform_mma<Widen>}, &argument);
}

// Each lane gives the address of a row of 16 bytes.
void simt_ldmatrix_x4(uint32_t r[4], const void* shared, int line = __builtin_LINE());
void simt_stmatrix_x4_trans(void* shared, const uint32_t r[4], int line = __builtin_LINE());

// --- wgmma --------------------------------------------------------------------------------

// Of a tile with rows of 64 values of 16 bits, in the 128-byte swizzle: eight values lie where
// their chunk's number is XORed with the row's, modulo 8.
static inline const uint16_t* simt_swizzled_128(const void* tile, int row, int k) {
    return (const uint16_t*)tile + row * 64 + (((k / 8) ^ (row % 8)) * 8 + k % 8);
}

// The same tile in two times 32 values of every 8 rows, in the 64-byte swizzle.
static inline const uint16_t* simt_swizzled_64(const void* tile, int row, int k) {
    const uint16_t* const block = (const uint16_t*)tile + row / 8 * 512 + k / 32 * 256;
    return block + row % 8 * 32 + ((k / 8 ^ row / 2) % 4 * 8 + k % 8);
}

template <typename Widen> struct simt_wgmma {
    float* acc;
    const void* a_tile;  // this warp's 16 rows
    const void* b_tile;
    int k_chunk;
    Widen widen;
};

template <int N, typename Widen> void simt_perform_wgmma(void* const* arguments, int) {
    simt_wgmma<Widen>** lanes = (simt_wgmma<Widen>**)arguments;
    const simt_wgmma<Widen>& first = *lanes[0];
    for (int lane = 1; lane < 32; ++lane)
        if (lanes[lane]->a_tile != first.a_tile || lanes[lane]->b_tile != first.b_tile ||
            lanes[lane]->k_chunk != first.k_chunk)
            simt_fail("lanes 0 and %d of a warp give different tiles", lane);
    static float a[16][16], b[16][N], c[16][N];
    for (int i = 0; i < 16; ++i) {
        const int k = first.k_chunk * 16 + i;
        for (int row = 0; row < 16; ++row)
            a[row][i] = first.widen(*simt_swizzled_64(first.a_tile, row, k));
        for (int column = 0; column < N; ++column)
            b[i][column] = first.widen(*simt_swizzled_128(first.b_tile, column, k));
    }
    const auto at = [](int lane, int i) -> float& {
        return c[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2];
    };
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < N / 2; ++i) at(lane, i) = lanes[lane]->acc[i];
    simt_multiply(&c[0][0], &a[0][0], &b[0][0], N);
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < N / 2; ++i) lanes[lane]->acc[i] = at(lane, i);
}

void simt_order_wgmma(void (*perform)(void* const* arguments, int n_threads), const void* argument,
                      unsigned n_bytes, int line);

// D [64, N] += A [64, 16] B [16, N] by a group of 4 warps, which happens like a copy at any time
// until the wait for its group. Both tiles are K-major, A in the 64-byte swizzle and B in that of
// 128 bytes; `k_chunk`, 0 to 3, says which 16 of their 64 k. Each warp takes its 16 rows when it
// arrives: on a GPU too, the instruction is no barrier between the four.
template <int N, typename Widen>
void simt_wgmma_m64k16(float* acc, const void* a_tile, const void* b_tile, int k_chunk, Widen widen,
                       int line = __builtin_LINE()) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256, "wgmma has 8 to 256 columns");
    if ((uintptr_t)a_tile % 1024 || (uintptr_t)b_tile % 1024)
        simt_fail("a tile of wgmma does not start at a multiple of 1024 bytes");
    if (k_chunk < 0 || k_chunk > 3) simt_fail("k_chunk is %d, and 0 to 3 in a tile", k_chunk);
    const uint16_t* rows = (const uint16_t*)a_tile + threadIdx.x / 32 % 4 * 16 * 64;
    const simt_wgmma<Widen> argument = {acc, rows, b_tile, k_chunk, widen};
    simt_order_wgmma(simt_perform_wgmma<N, Widen>, &argument, sizeof argument, line);
}

// Ends a group of multiplications.
void simt_commit_wgmma();
// All multiplications of this warp have happened but those of the newest groups.
void simt_wait_for_wgmma(int n_newest, int line = __builtin_LINE());

#endif
