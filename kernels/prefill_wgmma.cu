// Many tokens by wgmma, sm_90a: a grouped matrix product over Route's tiles.
//
// Weights are the instruction's rows and pairs its columns, of which it has any multiple of 16: an
// expert's pairs are cut into tiles of about the same size, and next to nothing is multiplied in
// vain. A tile is 256 rows of weights times up to TILE_ROWS pairs. Two warpgroups multiply: each
// has 128 of the rows and all pairs. Another fills the stages of a ring: one of its warps brings
// weights, three bring pairs.
//
// Macros: TILE_ROWS, a multiple of 16 up to 144; STAGES. Block: 384 threads. Dynamic shared memory:
// STAGES of (256 + TILE_ROWS) * 128 bytes, `Shared`, and 1024 bytes to align.
#define WEIGHT_ROWS 256

#include "bulk.cuh"
#include "matrix.cuh"
#include "tasks.cuh"
#include "wgmma.cuh"

#define THREADS 384
#define MULTIPLYING_WARPS 8
#define FIRST_PAIR_THREAD (MULTIPLYING_WARPS * 32 + 32)
#define PAIR_THREADS (THREADS - FIRST_PAIR_THREAD)
// Rows of pairs that these fill at once, 16 bytes each.
#define ROWS_AT_ONCE (PAIR_THREADS / 8)
#define WEIGHT_BYTES (WEIGHT_ROWS * 128)
#define STAGE_BYTES (WEIGHT_BYTES + TILE_ROWS * 128)

struct Shared {
    // By multiplying warp: outputs of 16 pairs, while they change from columns to rows.
    vec16 turning[MULTIPLYING_WARPS][2][32];
    Task tasks[MAX_TASKS];
    Phase full[STAGES];
    Phase empty[STAGES];
};

static_assert(sizeof(Shared) <= 10 << 10, "choice.py grants 11 KiB with those to align");
static_assert(TILE_ROWS % 16 == 0 && TILE_ROWS <= 144, "tiles that wgmma.cuh has instructions for");

// In the ring, from task to task.
struct Position {
    int stage;
    u32 parity;  // of the phase in which the stage becomes full
};

DEVICE void advance(Position& at) {
    if (++at.stage < STAGES) return;
    at.stage = 0;
    at.parity ^= 1;
}

// Calls `work(task)` for each task of this block. All its threads take part, each in its role.
template <typename Part, typename Work>
DEVICE void for_each_task(const Route& route, Shared& shared, Work work) {
    const int n_tasks = *route.n_tiles * n_strips<Part>();
    for (int first = blockIdx.x; first < n_tasks; first += MAX_TASKS * gridDim.x) {
        const int n = n_listed(first, n_tasks);
        list_tasks<Part>(route, first, n, threadIdx.x, shared.tasks);
        sync_team(1, THREADS);
        for (int i = 0; i < n; ++i) work(shared.tasks[i]);
        // All have read the list.
        sync_team(1, THREADS);
    }
}

// --- filling stages -----------------------------------------------------------------------

// The 64 rows of weights that a lane brings, in outputs from the tile's first on. Of gate and up, a
// warpgroup has 64 rows each.
DEVICE int first_output(GateUp, int lane) { return lane / 2 * 64; }

DEVICE int first_output(Down, int lane) { return lane * 64; }

DEVICE const WEIGHT* matrix_of(GateUp, const Expert& expert, int lane) {
    return lane % 2 == 0 ? expert.gate : expert.up;
}

DEVICE const WEIGHT* matrix_of(Down, const Expert& expert, int) { return expert.down; }

// One warp, of which four lanes copy, each 64 rows.
template <typename Part>
DEVICE void bring_weights(const Call& call, const Route& route, char* stages, Shared& shared) {
    const int lane = threadIdx.x % 32;
    Position at = {0, 0};
    for_each_task<Part>(route, shared, [&](const Task& task) {
        const int row = task.first_output + first_output(Part(), lane);
        const bool is_there = lane < 4 && row < Part::N_WEIGHT_ROWS;
        const u32 n_bytes = count_lanes(BALLOT(is_there)) * WEIGHTS_64;
        const WEIGHT* from = matrix_of(Part(), expert_at(call.experts[task.slot]), lane) +
                             weight_index(row, 0, Part::K);
        for (int k = 0; k < Part::K; k += K_STEP) {
            wait_for_phase(&shared.empty[at.stage], at.parity ^ 1);
            if (lane == 0) arrive_expecting(&shared.full[at.stage], n_bytes);
            SYNC_WARP();
            if (is_there)
                copy_bulk(stages + at.stage * STAGE_BYTES + lane * WEIGHTS_64,
                          from + weight_distance(k), WEIGHTS_64, &shared.full[at.stage]);
            advance(at);
        }
    });
}

// Three warps: eight lanes a row of 128 bytes, in which chunk c of 16 is at c ^ row % 8. Rows that
// nobody stores stay as they are: each pair's sums are its own.
template <typename Part>
DEVICE void bring_pairs(const Call& call, const Route& route, char* stages, Shared& shared) {
    constexpr int n_turns = (TILE_ROWS + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    static_assert(n_turns <= 16, "a lane keeps two rows");
    const int lane = threadIdx.x % 32, chunk = lane % 8;
    // Of a turn, this warp has four rows from here on.
    const int warp_row = (threadIdx.x - FIRST_PAIR_THREAD) / 32 * 4;
    // Its place in a stage's even turns and in odd ones: 12 rows are 4 more, modulo 8.
    static_assert(ROWS_AT_ONCE == 12, "places alternate");
    const int turn_row = warp_row + lane / 8;
    const int places[2] = {turn_row * 128 + (chunk ^ turn_row % 8) * 16,
                           turn_row * 128 + (chunk ^ (turn_row + 4) % 8) * 16};
    const WEIGHT* values = pair_values(Part(), call) + chunk * 8;
    Position at = {0, 0};
    for_each_task<Part>(route, shared, [&](const Task& task) {
        // Where the warp's rows are, of eight turns in each of its lanes: registers are few.
        int rows[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = (i * 8 + lane / 4) * ROWS_AT_ONCE + warp_row + lane % 4;
            rows[i] = row < task.n_rows
                          ? pair_row(Part(), call, route.pairs[task.first + row])
                          : -1;
        }
        for (int k = 0; k < Part::K; k += K_STEP) {
            wait_for_phase(&shared.empty[at.stage], at.parity ^ 1);
            char* stage = stages + at.stage * STAGE_BYTES + WEIGHT_BYTES;
            const bool is_in_row = Part::N_VALUES == Part::K || k + chunk * 8 < Part::N_VALUES;
            const WEIGHT* from = values + (is_in_row ? k : 0);
#pragma unroll
            for (int turn = 0; turn < n_turns; ++turn) {
                const int pair = SHUFFLE(rows[turn / 8], turn % 8 * 4 + lane / 8);
                if (pair >= 0)
                    copy_async(stage + turn * ROWS_AT_ONCE * 128 + places[turn % 2],
                               from + (long long)pair * Part::N_VALUES, is_in_row);
            }
            arrive_after_copies(&shared.full[at.stage]);
            advance(at);
        }
    });
}

// --- multiplying --------------------------------------------------------------------------

// Outputs of 16 rows of weights, of which this lane has two, for two adjacent pairs.
template <typename Part> struct Outputs;

template <> struct Outputs<GateUp> {
    static constexpr int PARTS = 1;
    float gate_bias[2], up_bias[2];

    DEVICE_MEMBER Outputs(const Expert& expert, int output) {
#if HAS_BIAS
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int unit = output + i * 8;
            gate_bias[i] = unit < INNER ? expert.gate_bias[unit] : 0;
            up_bias[i] = unit < INNER ? expert.up_bias[unit] : 0;
        }
#endif
    }

    // The sums are those of gate and of up.
    template <int N>
    DEVICE_MEMBER float operator()(const Call& call, const float (&sums)[2][N], int, int i) const {
#if HAS_BIAS
        return activate(call, sums[0][i] + gate_bias[i / 2 % 2], sums[1][i] + up_bias[i / 2 % 2]);
#else
        return activate(call, sums[0][i], sums[1][i]);
#endif
    }
};

template <> struct Outputs<Down> {
    static constexpr int PARTS = 2;
    float bias[2];

    DEVICE_MEMBER Outputs(const Expert& expert, int output) {
#if HAS_BIAS
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = output + i * 8;
            bias[i] = row < HIDDEN ? expert.down_bias[row] : 0;
        }
#endif
    }

    template <int N>
    DEVICE_MEMBER float operator()(const Call&, const float (&sums)[2][N], int part, int i) const {
#if HAS_BIAS
        return sums[part][i] + bias[i / 2 % 2];
#else
        return sums[part][i];
#endif
    }
};

DEVICE WEIGHT* output_rows(GateUp, const Call& call) { return (WEIGHT*)call.inner; }

DEVICE WEIGHT* output_rows(Down, const Call& call) { return (WEIGHT*)call.partial; }

// Stores what a warp has of a tile, 16 pairs at a time: a lane has outputs of several pairs, and
// through shared memory becomes one that has 8 of one pair. `pairs[i]` is the pair of its row in
// the i-th 16, or -1.
template <typename Part, int N>
DEVICE void store_tile(const Call& call, const Task& task, vec16 (&turning)[2][32],
                       const float (&sums)[2][N / 2], const int (&pairs)[N / 16]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128;
    // Its place for store_turned, and for what it reads then; their order keeps banks apart.
    const int token = lane / 16 * 8 + lane % 8, eight = lane / 8 % 2;
    const int to = token * 2 + (eight ^ token / 4 % 2), from = lane ^ lane / 8 % 2;
    const Expert expert = expert_at(call.experts[task.slot]);
#pragma unroll
    for (int part = 0; part < Outputs<Part>::PARTS; ++part) {
        const int output =
            task.first_output + (group * Outputs<Part>::PARTS + part) * 64 + warp * 16;
        const Outputs<Part> value(expert, output + lane / 4);
        WEIGHT* rows = output_rows(Part(), call) + output + lane % 2 * 8;
        const bool is_there = output + lane % 2 * 8 < Part::N_OUTPUTS;
#pragma unroll
        for (int i = 0; i < N / 16; ++i) {
            u32 both[4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                both[j] = pack<WEIGHT>(value(call, sums, part, i * 8 + j * 2),
                                       value(call, sums, part, i * 8 + j * 2 + 1));
            vec16* turned = turning[i % 2];
            store_turned(turned + to, both);
            SYNC_WARP();
            const vec16 outputs = turned[from];
            if (is_there && pairs[i] >= 0)
                *(vec16*)(rows + (long long)pairs[i] * Part::N_OUTPUTS) = outputs;
        }
        SYNC_WARP();
    }
}

// A task of at most N pairs.
template <typename Part, int N>
DEVICE void multiply_tile(const Call& call, const Route& route, char* stages, Shared& shared,
                          const Task& task, Position& at) {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sums[2][N / 2] = {};
    Phase* before = 0;
    for (int k = 0; k < Part::K; k += K_STEP) {
        wait_for_phase(&shared.full[at.stage], at.parity);
        show_to_matrix_unit();
        const char* stage = stages + at.stage * STAGE_BYTES;
        begin_multiplying();
#pragma unroll
        for (int i = 0; i < K_STEP / 16; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                multiply_64_16<N, WEIGHT>(sums[half], stage + (group * 2 + half) * WEIGHTS_64,
                                          stage + WEIGHT_BYTES, i);
        commit_multiplying();
        // The next multiplication starts before this one ends.
        wait_for_multiplying<1>();
        if (before && lane == 0) arrive(before);
        before = &shared.empty[at.stage];
        advance(at);
    }
    int pairs[N / 16];
#pragma unroll
    for (int i = 0; i < N / 16; ++i) {
        const int row = i * 16 + lane / 2;
        pairs[i] = row < task.n_rows ? route.pairs[task.first + row] : -1;
    }
    wait_for_sums(sums[0]);
    wait_for_sums(sums[1]);
    if (lane == 0) arrive(before);
    store_tile<Part, N>(call, task, shared.turning[warp], sums, pairs);
}

// By the smallest N that takes the task.
template <typename Part, int N>
DEVICE void multiply_any(const Call& call, const Route& route, char* stages, Shared& shared,
                         const Task& task, Position& at) {
    if constexpr (N < TILE_ROWS) {
        if (task.n_rows > N)
            return multiply_any<Part, N + 16>(call, route, stages, shared, task, at);
    }
    multiply_tile<Part, N>(call, route, stages, shared, task, at);
}

// --- kernels ------------------------------------------------------------------------------

template <typename Part> DEVICE void prefill(const Call& call, const Route& route, char* memory) {
    char* stages = memory + (1024 - (u64)memory % 1024) % 1024;
    Shared& shared = *(Shared*)(stages + STAGES * STAGE_BYTES);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            init_phase(&shared.full[i], PAIR_THREADS + 1);
            init_phase(&shared.empty[i], MULTIPLYING_WARPS);
        }
        publish_phases();
    }
    __syncthreads();
    // Together as many as all threads start with, 168 each; that they do, tests/compile checks.
    if (threadIdx.x >= MULTIPLYING_WARPS * 32) {
        give_registers<40>();
        if (threadIdx.x < FIRST_PAIR_THREAD)
            bring_weights<Part>(call, route, stages, shared);
        else
            bring_pairs<Part>(call, route, stages, shared);
        return;
    }
    take_registers<232>();
    Position at = {0, 0};
    for_each_task<Part>(route, shared, [&](const Task& task) {
        multiply_any<Part, 16>(call, route, stages, shared, task, at);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill_gate_up(Call call, Route route) {
    DYNAMIC_SHARED(char, memory);
    wait_for_previous_kernel();
    let_next_kernel_start();
    prefill<GateUp>(call, route, memory);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill_down(Call call, Route route) {
    DYNAMIC_SHARED(char, memory);
    wait_for_previous_kernel();
    let_next_kernel_start();
    prefill<Down>(call, route, memory);
}
