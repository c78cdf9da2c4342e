// Many tokens by mma.sync, sm_80 and later: a grouped matrix product over Route's tiles.
//
// A stage has 64 of k of a tile: first the pairs' rows, then the weights', 128 bytes each, in which
// chunk c of 16 bytes is at c ^ row % 8: ldmatrix reads that without bank conflicts.
//
// The fragments of mma give a lane columns 2 * quad and 2 * quad + 1 of every 8. So every 32 rows
// of weights are in an order in which a lane's sums are adjacent outputs, and gate and up of a unit
// meet in one lane: nothing has to be exchanged before it is stored.
//
// Eight warps share a tile, two along its pairs and four along its 128 rows of weights. Macros:
// TILE_ROWS (32, 64 or 128). Block: 256 threads. Dynamic shared memory: 3 stages of
// (TILE_ROWS + 128) * 128 bytes, and 1024 bytes for the list of tasks.
#define WEIGHT_ROWS 128
#define STAGES 3
// Of them, those that are on their way.
#define AHEAD 2

#include "matrix.cuh"
#include "tasks.cuh"

#if HAS_MMA

#define THREADS 256
#define STAGE_BYTES ((TILE_ROWS + WEIGHT_ROWS) * 128)
// Rows of a stage that the block's threads fill at once, 16 bytes each.
#define ROWS_AT_ONCE (THREADS / 8)

// --- loading ------------------------------------------------------------------------------

// Of a stage's rows, this thread copies 16 bytes of every 32nd: eight lanes together a whole one,
// which is in all banks of shared memory.
DEVICE int this_row() { return threadIdx.x / 8; }

DEVICE int this_chunk() { return threadIdx.x % 8; }

// Of 32 rows of weights as they are in memory (with gate and up: 16 of each), where the stage has
// the one that this thread copies. A warp's four are adjacent: two times 256 bytes.
DEVICE int stage_row(GateUp) {
    const int unit = this_row() % 16, is_up = this_row() / 16;
    return unit / 2 % 2 * 16 + is_up * 8 + unit / 4 * 2 + unit % 2;
}

DEVICE int stage_row(Down) {
    return this_row() / 2 % 4 * 8 + this_row() / 8 * 2 + this_row() % 2;
}

// What this thread copies first of a tile's weights.
DEVICE const WEIGHT* first_weights(GateUp, const Expert& expert, int first_output) {
    const WEIGHT* matrix = this_row() / 16 ? expert.up : expert.gate;
    return matrix + weight_index(first_output + this_row() % 16, this_chunk() * 8, GateUp::K);
}

DEVICE const WEIGHT* first_weights(Down, const Expert& expert, int first_output) {
    return expert.down + weight_index(first_output + this_row(), this_chunk() * 8, Down::K);
}

// Where the next stage's copies come from, across the tasks of a list.
template <typename Part> struct Loader {
    const Task* tasks;
    int n_tasks;
    int task;
    int k;
    int stage;
    const WEIGHT* weights;                       // the first that this thread copies
    int n_outputs;                               // from this tile's first on
    const WEIGHT* rows[TILE_ROWS / ROWS_AT_ONCE];  // of pairs; null where there is none
};

template <typename Part>
DEVICE void begin_task(Loader<Part>& loader, const Call& call, const Route& route) {
    const Task task = loader.tasks[loader.task];
    const Expert expert = expert_at(call.experts[task.slot]);
    loader.weights = first_weights(Part(), expert, task.first_output);
    loader.n_outputs = Part::N_WEIGHT_ROWS - task.first_output;
#pragma unroll
    for (int i = 0; i < TILE_ROWS / ROWS_AT_ONCE; ++i) {
        const int row = this_row() + i * ROWS_AT_ONCE;
        loader.rows[i] = 0;
        if (row < task.n_rows)
            loader.rows[i] =
                pair_values(Part(), call) + this_chunk() * 8 +
                (long long)pair_row(Part(), call, route.pairs[task.first + row]) * Part::N_VALUES;
    }
}

// Rows that nobody stores stay as they are: each pair's sums are its own, as are each output's.
template <typename Part> DEVICE void copy_stage(const Loader<Part>& loader, char* stage) {
    static_assert(ROWS_AT_ONCE == 32, "the order of the weights' rows repeats");
    constexpr bool are_whole = Part::N_WEIGHT_ROWS % tile_outputs<Part>() == 0;
    const int k = loader.k;
    char* to = stage + this_row() * 128 + (this_chunk() ^ this_row() % 8) * 16;
    const bool is_in_row = Part::N_VALUES == Part::K || k + this_chunk() * 8 < Part::N_VALUES;
#pragma unroll
    for (int i = 0; i < TILE_ROWS / ROWS_AT_ONCE; ++i, to += ROWS_AT_ONCE * 128)
        if (loader.rows[i]) copy_async(to, loader.rows[i] + (is_in_row ? k : 0), is_in_row);
    const WEIGHT* weights = loader.weights + weight_distance(k);
    const int row = TILE_ROWS + stage_row(Part());
    to = stage + row * 128 + (this_chunk() ^ row % 8) * 16;
#pragma unroll
    for (int i = 0; i < WEIGHT_ROWS / ROWS_AT_ONCE; ++i, to += ROWS_AT_ONCE * 128)
        if (are_whole || i * Part::OUTPUTS_OF_32 < loader.n_outputs)
            copy_async(to, weights + weight_index(i * Part::OUTPUTS_OF_32, 0, Part::K), true);
}

DEVICE int stage_after(int stage) { return stage + 1 == STAGES ? 0 : stage + 1; }

// Starts the next stage's copies, if there is one; always ends a group of them. All threads call
// it together.
template <typename Part>
DEVICE void load_next(Loader<Part>& loader, const Call& call, const Route& route, char* stages) {
    if (loader.task < loader.n_tasks) {
        if (loader.k == 0) begin_task(loader, call, route);
        copy_stage(loader, stages + loader.stage * STAGE_BYTES);
        loader.stage = stage_after(loader.stage);
        loader.k += K_STEP;
        if (loader.k == Part::K) {
            loader.k = 0;
            ++loader.task;
        }
    }
    commit_copies();
}

// --- storing ------------------------------------------------------------------------------

struct __align__(8) vec8 {
    u32 word[2];
};

// Stores what a lane has of one pair from 32 rows of weights: sums[4 * i + e] is the fragment's
// column 8 * i + 2 * quad + e. `output` is the first of the 32 rows'.
DEVICE void store_sums(GateUp, const Call& call, const Task& task, int pair, int output,
                       const float* sums) {
    const int unit = output + threadIdx.x % 4 * 4;
    if (unit >= INNER) return;
    float inner[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float gate = sums[i / 2 * 8 + i % 2], up = sums[i / 2 * 8 + 4 + i % 2];
#if HAS_BIAS
        const Expert expert = expert_at(call.experts[task.slot]);
        gate += expert.gate_bias[unit + i];
        up += expert.up_bias[unit + i];
#endif
        inner[i] = activate(call, gate, up);
    }
    *(vec8*)((WEIGHT*)call.inner + (long long)pair * INNER + unit) =
        vec8{{pack<WEIGHT>(inner[0], inner[1]), pack<WEIGHT>(inner[2], inner[3])}};
}

DEVICE void store_sums(Down, const Call& call, const Task& task, int pair, int output,
                       const float* sums) {
    const int row = output + threadIdx.x % 4 * 8;
    if (row >= HIDDEN) return;
    vec16 rounded;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float low = sums[i * 4], high = sums[i * 4 + 1];
#if HAS_BIAS
        const Expert expert = expert_at(call.experts[task.slot]);
        low += expert.down_bias[row + 2 * i];
        high += expert.down_bias[row + 2 * i + 1];
#endif
        rounded.word[i] = pack<WEIGHT>(low, high);
    }
    *(vec16*)((WEIGHT*)call.partial + (long long)pair * HIDDEN + row) = rounded;
}

// Stores what a warp has of 16 rows of a tile, from `row` on, and of N columns, from `column` on,
// in fragments of 8 columns.
template <typename Part, int N>
DEVICE void store_rows(const Call& call, const Route& route, const Task& task, int row, int column,
                       const float* sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int at = row + threadIdx.x % 32 / 4 + half * 8;
        if (at >= task.n_rows) continue;
        const int pair = route.pairs[task.first + at];
#pragma unroll
        for (int i = 0; i < N / 32; ++i)
            store_sums(Part(), call, task, pair,
                       task.first_output + (column / 32 + i) * Part::OUTPUTS_OF_32,
                       sums + i * 16 + half * 2);
    }
}

// --- the loop over tasks ------------------------------------------------------------------

// Calls `multiply(loader, stage, task)` for each task of this block; `stage` is the first that
// is the task's, and it returns the one after its last.
template <typename Part, typename Multiply>
DEVICE void for_each_task(const Call& call, const Route& route, char* stages, Multiply multiply) {
    Task* tasks = (Task*)(stages + STAGES * STAGE_BYTES);
    const int n_tasks = *route.n_tiles * n_strips<Part>();
    for (int first = blockIdx.x; first < n_tasks; first += MAX_TASKS * gridDim.x) {
        const int n = n_listed(first, n_tasks);
        list_tasks<Part>(route, first, n, threadIdx.x, tasks);
        __syncthreads();
        Loader<Part> loader = {tasks, n};
        for (int i = 0; i < AHEAD; ++i) load_next(loader, call, route, stages);
        int stage = 0;
        for (int i = 0; i < n; ++i) stage = multiply(loader, stage, tasks[i]);
        // The list and the stages are free again.
        __syncthreads();
    }
}

// --- multiplying --------------------------------------------------------------------------

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
