// Many tokens by mma.sync, sm_80 and later: a grouped matrix product over Route's tiles.
//
// Eight warps share a tile, two along its pairs and four along its 128 rows of weights. Macros:
// TILE_ROWS (32, 64 or 128). Block: 256 threads. Dynamic shared memory: 3 stages of
// (TILE_ROWS + 128) * 128 bytes, and 1024 bytes for the list of tasks.
#define WEIGHT_ROWS 128
#define STAGES 3
#define AHEAD 2

#include "tile.cuh"

#if HAS_MMA

#define WARP_ROWS (TILE_ROWS / 2)
#define WARP_COLUMNS 32

// The warp's part of one stage: 64 of k, four instructions deep.
DEVICE void multiply_stage(float sums[WARP_ROWS / 16][WARP_COLUMNS / 8][4], const char* stage,
                           int row, int column) {
    const int lane = threadIdx.x % 32;
    // Of ldmatrix's four tiles, the upper and lower rows come first for A, both parts of k for B.
    const char* a_row = stage + (row + lane % 16) * 128;
    const char* b_row = stage + (TILE_ROWS + column + lane / 16 * 8 + lane % 8) * 128;
#pragma unroll
    for (int k = 0; k < K_STEP / 16; ++k) {
        const int a_chunk = (2 * k + lane / 16) ^ lane % 8;
        const int b_chunk = (2 * k + lane / 8 % 2) ^ lane % 8;
        u32 b[WARP_COLUMNS / 16][4];
#pragma unroll
        for (int j = 0; j < WARP_COLUMNS / 16; ++j)
            load_tiles(b[j], b_row + j * 16 * 128 + b_chunk * 16);
#pragma unroll
        for (int i = 0; i < WARP_ROWS / 16; ++i) {
            u32 a[4];
            load_tiles(a, a_row + i * 16 * 128 + a_chunk * 16);
#pragma unroll
            for (int j = 0; j < WARP_COLUMNS / 8; ++j)
                multiply_16_8_16<WEIGHT>(sums[i][j], a, b[j / 2] + j % 2 * 2);
        }
    }
}

template <typename Part> DEVICE void prefill(const Call& call, const Route& route, char* stages) {
    const int warp = threadIdx.x / 32;
    const int row = warp % 2 * WARP_ROWS, column = warp / 2 * WARP_COLUMNS;
    for_each_task<Part>(
        call, route, stages, [&](Loader<Part>& loader, int stage, const Task& task) {
            float sums[WARP_ROWS / 16][WARP_COLUMNS / 8][4] = {};
            for (int k = 0; k < Part::K; k += K_STEP) {
                wait_for_copies<AHEAD - 1>();
                // The stage is there for all, and all have read the one that is filled next.
                __syncthreads();
                load_next(loader, call, route, stages);
                if (row < task.n_rows)
                    multiply_stage(sums, stages + stage * STAGE_BYTES, row, column);
                stage = stage_after(stage);
            }
#pragma unroll
            for (int i = 0; i < WARP_ROWS / 16; ++i)
                store_rows<Part, WARP_COLUMNS>(call, route, task, row + i * 16, column, sums[i][0]);
            return stage;
        });
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) prefill_gate_up(Call call, Route route) {
    DYNAMIC_SHARED(char, stages);
    wait_for_previous_kernel();
    let_next_kernel_start();
    prefill<GateUp>(call, route, stages);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) prefill_down(Call call, Route route) {
    DYNAMIC_SHARED(char, stages);
    wait_for_previous_kernel();
    let_next_kernel_start();
    prefill<Down>(call, route, stages);
}

#endif
