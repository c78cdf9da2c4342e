// Many tokens by wgmma, sm_90a: a grouped matrix product over Route's tiles.
//
// Two warpgroups share a tile of 128 pairs: each has 64 of them and all rows of weights. Where an
// expert has at most 64 pairs left, each has all of these and half of the weights. Pairs are the
// instruction's rows, and weights its columns, so that a lane has outputs side by side.
//
// Macros: TILE_ROWS (64 or 128), WEIGHT_ROWS (256; or 128, of which two blocks fit a
// multiprocessor). Block: 256 threads. Dynamic shared memory: STAGES of
// (TILE_ROWS + WEIGHT_ROWS) * 128 bytes, 1024 bytes for the list of tasks, and 1024 to align.
#define STAGES (WEIGHT_ROWS == 256 ? 4 : 3)
// With one block a multiprocessor, a warpgroup starts the next multiplication before its last one
// ends; of two blocks, one multiplies while the other waits.
#define BLOCKS (WEIGHT_ROWS == 256 ? 1 : 2)
#define MULTIPLYING (BLOCKS == 1 ? 1 : 0)
#define AHEAD (STAGES - 1 - MULTIPLYING)

#include "tile.cuh"
#include "wgmma.cuh"

template <typename Part, int COLUMNS>
DEVICE int multiply_task(const Call& call, const Route& route, char* stages, Loader<Part>& loader,
                         int stage, const Task& task) {
    const int group = threadIdx.x / 128;
    const int row = COLUMNS == WEIGHT_ROWS ? group * 64 : 0;
    const int column = COLUMNS == WEIGHT_ROWS ? 0 : group * COLUMNS;
    float sums[COLUMNS / 2] = {};
    for (int k = 0; k < Part::K; k += K_STEP) {
        wait_for_copies<AHEAD - 1>();
        show_to_matrix_unit();
        if (MULTIPLYING == 0) wait_for_multiplying<0>();
        // The stage is there for all, and all have read the one that is filled next.
        __syncthreads();
        const char* from = stages + stage * STAGE_BYTES;
        begin_multiplying();
#pragma unroll
        for (int i = 0; i < K_STEP / 16; ++i)
            multiply_64_16<COLUMNS, WEIGHT>(sums, from + row * 128,
                                            from + (TILE_ROWS + column) * 128, i);
        commit_multiplying();
        load_next(loader, call, route, stages);
        if (MULTIPLYING == 1) wait_for_multiplying<1>();
        stage = stage_after(stage);
    }
    wait_for_sums(sums);
    store_rows<Part, COLUMNS>(call, route, task, row + threadIdx.x % 128 / 32 * 16, column, sums);
    return stage;
}

template <typename Part> DEVICE void prefill(const Call& call, const Route& route, char* shared) {
    char* stages = shared + (1024 - (u64)shared % 1024) % 1024;
    for_each_task<Part>(
        call, route, stages, [&](Loader<Part>& loader, int stage, const Task& task) {
            if (TILE_ROWS > 64 && task.n_rows > 64)
                return multiply_task<Part, WEIGHT_ROWS>(call, route, stages, loader, stage, task);
            return multiply_task<Part, WEIGHT_ROWS / 2>(call, route, stages, loader, stage, task);
        });
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    prefill_gate_up(Call call, Route route) {
    DYNAMIC_SHARED(char, shared);
    wait_for_previous_kernel();
    let_next_kernel_start();
    prefill<GateUp>(call, route, shared);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    prefill_down(Call call, Route route) {
    DYNAMIC_SHARED(char, shared);
    wait_for_previous_kernel();
    let_next_kernel_start();
    prefill<Down>(call, route, shared);
}
