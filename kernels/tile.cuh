// What the prefill kernels by matrix instructions share: which tile of which expert is next, how
// it comes into shared memory, and where the sums go.
//
// A tile is TILE_ROWS pairs of one expert times WEIGHT_ROWS rows of its weights. A stage has 64 of
// k of both: first the pairs' rows, then the weights', 128 bytes each, in which chunk c of 16 bytes
// is at c ^ row % 8. That is the 128-byte swizzle of the PTX manual, and ldmatrix reads it without
// bank conflicts.
//
// The fragments of mma and of wgmma give a lane columns 2 * quad and 2 * quad + 1 of every 8. So
// every 32 rows of weights are in an order in which a lane's sums are adjacent outputs, and gate
// and up of a unit meet in one lane: nothing has to be exchanged before it is stored.
//
// The includer defines WEIGHT_ROWS, STAGES and AHEAD, the stages that are on their way.
#pragma once

#include "ffn.cuh"
#include "matrix.cuh"

#if HAS_MMA

#define THREADS 256
#define K_STEP 64
#define STAGE_BYTES ((TILE_ROWS + WEIGHT_ROWS) * 128)
// Tasks that a block looks up at once.
#define MAX_TASKS 64
// Rows of a stage that the block's threads fill at once, 16 bytes each.
#define ROWS_AT_ONCE (THREADS / 8)

struct GateUp {
    static constexpr int K = HIDDEN_PADDED;        // length of the weights' rows
    static constexpr int N_VALUES = HIDDEN;        // length of the pairs' rows
    static constexpr int N_OUTPUTS = INNER;        // of a pair
    static constexpr int OUTPUTS_OF_32 = 16;       // that 32 rows of weights give
    static constexpr int N_WEIGHT_ROWS = INNER;    // in memory, counted in outputs
};

struct Down {
    static constexpr int K = INNER;
    static constexpr int N_VALUES = INNER;
    static constexpr int N_OUTPUTS = HIDDEN;
    static constexpr int OUTPUTS_OF_32 = 32;
    static constexpr int N_WEIGHT_ROWS = HIDDEN_PADDED;
};

// --- tasks --------------------------------------------------------------------------------

struct Task {
    int slot;          // of the expert
    int first;         // in Route.pairs
    int n_rows;        // pairs
    int first_output;  // unit, or row of down_proj
};

template <typename Part> DEVICE constexpr int tile_outputs() {
    return WEIGHT_ROWS / 32 * Part::OUTPUTS_OF_32;
}

// Tiles along the outputs.
template <typename Part> DEVICE constexpr int n_strips() {
    return (Part::N_OUTPUTS + tile_outputs<Part>() - 1) / tile_outputs<Part>();
}

// The tasks of an expert follow each other, and all of its pairs (or 8 tiles of them) use one strip
// of weights before the next: blocks that run together then share both in L2, and weights come
// from memory once.
template <typename Part> DEVICE Task find_task(const Route& route, int index) {
    constexpr int strips = n_strips<Part>(), most_tiles = 8;
    // Some tile of the same expert, since every tile has as many tasks.
    const int tile = index / strips;
    const int slot = route.tiles[2 * tile];
    const int begin = route.begin[slot], n_pairs = route.begin[slot + 1] - begin;
    const int first_tile = tile - (route.tiles[2 * tile + 1] - begin) / TILE_ROWS;
    const int n_tiles = (n_pairs + TILE_ROWS - 1) / TILE_ROWS;
    const int within = index - first_tile * strips;
    const int skipped = within / (most_tiles * strips) * most_tiles;
    const int together = n_tiles - skipped < most_tiles ? n_tiles - skipped : most_tiles;
    const int rest = within - skipped * strips;
    const int row = (skipped + rest % together) * TILE_ROWS;
    const int n_rows = n_pairs - row < TILE_ROWS ? n_pairs - row : TILE_ROWS;
    return Task{slot, begin + row, n_rows, rest / together * tile_outputs<Part>()};
}

// Writes this block's tasks from `first` on, the next gridDim.x later; returns how many.
template <typename Part>
DEVICE int list_tasks(const Route& route, int first, int n_tasks, Task tasks[MAX_TASKS]) {
    const int n_left = (n_tasks - first + gridDim.x - 1) / gridDim.x;
    const int n_listed = n_left < MAX_TASKS ? n_left : MAX_TASKS;
    const int i = threadIdx.x;
    if (i < n_listed) tasks[i] = find_task<Part>(route, first + i * gridDim.x);
    __syncthreads();
    return n_listed;
}

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

DEVICE const WEIGHT* pair_row(GateUp, const Call& call, int pair) {
    return (const WEIGHT*)call.x + (long long)(pair / call.top_k) * HIDDEN;
}

DEVICE const WEIGHT* pair_row(Down, const Call& call, int pair) {
    return (const WEIGHT*)call.inner + (long long)pair * INNER;
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
                pair_row(Part(), call, route.pairs[task.first + row]) + this_chunk() * 8;
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
            copy_async(to, weights + (long long)i * Part::OUTPUTS_OF_32 * Part::K, true);
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
        const int n_listed = list_tasks<Part>(route, first, n_tasks, tasks);
        Loader<Part> loader = {tasks, n_listed};
        for (int i = 0; i < AHEAD; ++i) load_next(loader, call, route, stages);
        int stage = 0;
        for (int i = 0; i < n_listed; ++i) stage = multiply(loader, stage, tasks[i]);
        // The list and the stages are free again.
        __syncthreads();
    }
}

#endif
