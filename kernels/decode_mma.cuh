// A few tokens by matrix instructions, sm_80 and later. The time goes into reading weights: each
// warp keeps the next ones on their way while it multiplies the last, across tasks and experts.
//
// A fragment's rows 0 to 7 and 8 to 15 are two times 8 rows of weights, its columns 8 pairs of one
// expert. Macros: GATE_UP_WARPS, 4 or more, of a team that shares rows of gate_proj and up_proj;
// DOWN_WARPS, of a block that multiplies by down_proj; DOWN_SPLIT, how many of them share a row of it
// (a divisor of DOWN_WARPS); DOWN_ROWS, 8 or 16, that a block owns.
#pragma once

#include "group.cuh"
#include "matrix.cuh"

#if HAS_MMA

// Of k, that a warp multiplies at once: a tile of weights is as wide, and two blocks of 8 rows.
#define CHUNK 64
// Chunks that are loaded together; another such batch is on its way meanwhile.
#define BATCH 2
// Fragments of 8 pairs that a visit has.
#define COLUMNS (VISIT_PAIRS / 8)

struct Chunk {
    vec16 low[2];   // of a row in 0 to 7: 8 values of each half
    vec16 high[2];  // of the row 8 below
};

struct Lane {
    int index;
    int warp;
    int row;   // of the fragment's A and B
    int quad;  // which 8 values of each half of a chunk
};

DEVICE Lane this_lane() {
    const int lane = threadIdx.x % 32;
    return Lane{lane, (int)threadIdx.x / 32, lane / 4, lane % 4};
}

// `low` and `high` point to the first block of 8 rows; `high` may be null. The caller's `stride`
// chunks lie between two of the batch, of which those below `n_chunks` exist.
DEVICE void load_batch(Chunk chunks[BATCH], const WEIGHT* low, const WEIGHT* high, int first,
                       int stride, int n_chunks) {
    const Lane lane = this_lane();
    static_assert(CHUNK == 64, "a chunk is as wide as a tile");
    const int in_block = (int)weight_index(lane.row, lane.quad * 8, 0);
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
        const int chunk = first + i * stride;
        const bool is_there = chunk < n_chunks;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const long long at = (long long)chunk * TILE_WEIGHTS + half * BLOCK_WEIGHTS + in_block;
            chunks[i].low[half] = is_there ? load_once(low + at) : zero16();
            chunks[i].high[half] = is_there && high ? load_once(high + at) : zero16();
        }
    }
}

// Adds to the sums of one fragment what a batch gives. `x` points to this lane's part of its
// column's first chunk, and is null where there is no pair; nothing is read from `n_values` on.
DEVICE void multiply_batch(float sums[4], const Chunk chunks[BATCH], const WEIGHT* x, int first,
                           int stride, int n_values) {
    vec16 columns[BATCH][2];
    const int offset = this_lane().quad * 8;
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int k = (first + i * stride) * CHUNK + half * 32;
            const bool is_there = x && k + offset < n_values;
            columns[i][half] = is_there ? load_cached(x + k) : zero16();
        }
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int part = 0; part < 4; part += 2) {
                const vec16& low = chunks[i].low[half];
                const vec16& high = chunks[i].high[half];
                const vec16& column = columns[i][half];
                const u32 a[4] = {low.word[part], high.word[part], low.word[part + 1],
                                  high.word[part + 1]};
                const u32 b[2] = {column.word[part], column.word[part + 1]};
                multiply_16_8_16<WEIGHT>(sums, a, b);
            }
}

// Calls `load(batch, i)` and then `use(batch, i)` for each i below n, loading one ahead.
// `before_use` is called once, when the first is on its way.
template <typename Load, typename Wait, typename Use>
DEVICE void stream(int n, Load load, Wait before_use, Use use) {
    Chunk even[BATCH], odd[BATCH];
    if (n > 0) load(even, 0);
    before_use();
    for (int i = 0; i < n; i += 2) {
        if (i + 1 < n) load(odd, i + 1);
        use(even, i);
        if (i + 1 >= n) break;
        if (i + 2 < n) load(even, i + 2);
        use(odd, i + 1);
    }
}

// The pair in a column of a visit, or -1.
DEVICE int pair_of_column(const Groups& groups, int visit, int column) {
    const int position = groups.begin[visit] + column;
    return position < groups.begin[visit + 1] ? groups.pairs[position] : -1;
}

DEVICE int n_fragments(const Groups& groups, int visit) {
    return (groups.begin[visit + 1] - groups.begin[visit] + 7) / 8;
}

// --- gate and up --------------------------------------------------------------------------

#define GATE_UP_CHUNKS (HIDDEN_PADDED / CHUNK)
// Batches of each warp: its chunks alternate with those of the others.
#define GATE_UP_BATCHES ((GATE_UP_CHUNKS + GATE_UP_WARPS * BATCH - 1) / (GATE_UP_WARPS * BATCH))
#define GATE_UP_TILES (INNER / 8)

typedef float GateUpSums[COLUMNS][GATE_UP_WARPS][4][32];

// A task is 8 units of a visit: 8 rows of gate_proj and the same of up_proj, so that both of a
// unit meet in one lane. `sums` are this warp's; the team's are added in the order of its warps.
template <typename Sync>
DEVICE void finish_gate_up(const Call& call, const Groups& groups, const Lane& lane, int visit,
                           int tile, const float sums[COLUMNS][4], GateUpSums& all, Sync sync) {
    const int n = n_fragments(groups, visit);
    // The task before has been read.
    sync();
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column)
        if (column < n)
#pragma unroll
            for (int i = 0; i < 4; ++i) all[column][lane.warp][i][lane.index] = sums[column][i];
    sync();
    // One warp a fragment.
    static_assert(COLUMNS <= GATE_UP_WARPS, "a warp finishes one fragment");
    if (lane.warp >= n) return;
    float total[4] = {0, 0, 0, 0};
#pragma unroll
    for (int warp = 0; warp < GATE_UP_WARPS; ++warp)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[i] += all[lane.warp][warp][i][lane.index];
    const int unit = tile * 8 + lane.row;
#if HAS_BIAS
    const Expert expert = expert_at(groups.expert[visit]);
    const float gate_bias = expert.gate_bias[unit], up_bias = expert.up_bias[unit];
#else
    const float gate_bias = 0, up_bias = 0;
#endif
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int pair = pair_of_column(groups, visit, lane.warp * 8 + lane.quad * 2 + i);
        if (pair >= 0)
            ((WEIGHT*)call.inner)[(long long)pair * INNER + unit] =
                narrow<WEIGHT>(activate(call, total[i] + gate_bias, total[2 + i] + up_bias));
    }
}

// By a team of GATE_UP_WARPS warps, which `sync` holds together: every `step`th task from `first`
// on. `lane.warp` is of the team. `before_use` is called by each thread before activations are read.
template <typename Sync, typename Wait>
DEVICE void gate_up(const Call& call, const Groups& groups, const Lane& lane, int first_task,
                    int step, GateUpSums& all, Sync sync, Wait before_use) {
    const int n_left = groups.n_active * GATE_UP_TILES - first_task;
    const int n_tasks = n_left > 0 ? (n_left + step - 1) / step : 0;
    float sums[COLUMNS][4] = {};
    stream(
        n_tasks * GATE_UP_BATCHES,
        [&](Chunk* batch, int i) {
            const int task = first_task + i / GATE_UP_BATCHES * step;
            const Expert expert = expert_at(groups.expert[task / GATE_UP_TILES]);
            const long long row = weight_index(task % GATE_UP_TILES * 8, 0, HIDDEN_PADDED);
            const int first = i % GATE_UP_BATCHES * BATCH * GATE_UP_WARPS + lane.warp;
            load_batch(batch, expert.gate + row, expert.up + row, first, GATE_UP_WARPS,
                       GATE_UP_CHUNKS);
        },
        before_use,
        [&](Chunk* batch, int i) {
            const int task = first_task + i / GATE_UP_BATCHES * step;
            const int visit = task / GATE_UP_TILES, n = n_fragments(groups, visit);
            const int first = i % GATE_UP_BATCHES * BATCH * GATE_UP_WARPS + lane.warp;
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) {
                if (column >= n) break;
                const int pair = pair_of_column(groups, visit, column * 8 + lane.row);
                const WEIGHT* x = (const WEIGHT*)call.x;
                x = pair < 0 ? 0 : x + (long long)(pair / call.top_k) * HIDDEN + lane.quad * 8;
                multiply_batch(sums[column], batch, x, first, GATE_UP_WARPS, HIDDEN);
            }
            if (i % GATE_UP_BATCHES < GATE_UP_BATCHES - 1) return;
            finish_gate_up(call, groups, lane, visit, task % GATE_UP_TILES, sums, all, sync);
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
                for (int part = 0; part < 4; ++part) sums[column][part] = 0;
        });
}

// --- down ---------------------------------------------------------------------------------

#define DOWN_CHUNKS (INNER / CHUNK)
#define DOWN_BATCHES ((DOWN_CHUNKS + DOWN_SPLIT * BATCH - 1) / (DOWN_SPLIT * BATCH))
#define DOWN_TEAMS (DOWN_WARPS / DOWN_SPLIT)

// By a block of DOWN_WARPS warps, which owns DOWN_ROWS rows of every expert's down_proj. Its teams of
// DOWN_SPLIT warps share out the visits, and a team's warps the row. `outputs`: shared memory,
// [DOWN_SPLIT, n_pairs, DOWN_ROWS], what each warp has for each pair. `before_use` is called once by
// each thread, before what gate and up gave is read, also where there is nothing to read.
template <typename Wait>
DEVICE void down(const Call& call, const Groups& groups, float* outputs, Wait before_use) {
    const Lane lane = this_lane();
    const int team = lane.warp / DOWN_SPLIT, split = lane.warp % DOWN_SPLIT;
    const int n_pairs = call.n_tokens * call.top_k;
    const int n_left = groups.n_active - team;
    const int n_visits = n_left > 0 ? (n_left + DOWN_TEAMS - 1) / DOWN_TEAMS : 0;
    bool has_waited = false;
    const auto wait = [&] {
        if (!has_waited) before_use();
        has_waited = true;
    };
    for (int tile = blockIdx.x; tile < (HIDDEN + DOWN_ROWS - 1) / DOWN_ROWS; tile += gridDim.x) {
        const long long row = weight_index(tile * DOWN_ROWS, 0, INNER);
        float sums[COLUMNS][4] = {};
        stream(
            n_visits * DOWN_BATCHES,
            [&](Chunk* batch, int i) {
                const int visit = team + i / DOWN_BATCHES * DOWN_TEAMS;
                const int first = i % DOWN_BATCHES * BATCH * DOWN_SPLIT + split;
                const WEIGHT* low = expert_at(groups.expert[visit]).down + row;
                load_batch(batch, low, DOWN_ROWS > 8 ? low + weight_index(8, 0, INNER) : 0, first,
                           DOWN_SPLIT, DOWN_CHUNKS);
            },
            wait,
            [&](Chunk* batch, int i) {
                const int visit = team + i / DOWN_BATCHES * DOWN_TEAMS;
                const int n = n_fragments(groups, visit);
                const int first = i % DOWN_BATCHES * BATCH * DOWN_SPLIT + split;
                const bool is_done = i % DOWN_BATCHES == DOWN_BATCHES - 1;
#pragma unroll
                for (int column = 0; column < COLUMNS; ++column) {
                    if (column >= n) break;
                    const int pair = pair_of_column(groups, visit, column * 8 + lane.row);
                    const WEIGHT* inner = (const WEIGHT*)call.inner;
                    inner = pair < 0 ? 0 : inner + (long long)pair * INNER + lane.quad * 8;
                    multiply_batch(sums[column], batch, inner, first, DOWN_SPLIT, INNER);
                    if (!is_done) continue;
#pragma unroll
                    for (int part = 0; part < 4; ++part) {
                        const int to =
                            pair_of_column(groups, visit, column * 8 + lane.quad * 2 + part % 2);
                        const int at = lane.row + part / 2 * 8;
                        if (to >= 0 && at < DOWN_ROWS)
                            outputs[(split * n_pairs + to) * DOWN_ROWS + at] = sums[column][part];
                        sums[column][part] = 0;
                    }
                }
            });
        __syncthreads();
        combine_rows<DOWN_ROWS, DOWN_SPLIT>(call, groups, outputs, tile * DOWN_ROWS);
        __syncthreads();
    }
    wait();
}

#endif
