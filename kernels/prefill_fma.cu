// Many tokens, without matrix instructions: every format of weights and activations, any card.
//
// A block multiplies a tile of pairs of one expert with 128 rows of its weights, slice by slice of
// k: both lie in shared memory as float32, and each thread has a patch of sums in registers. The
// next slice is on its way to registers meanwhile. Macro: TILE_ROWS, pairs of a tile: 16, 32 or 64.
#include "values.cuh"

#define THREADS 256
// Rows of weights, in two halves: of each a thread has 4 in its patch.
#define COLUMNS 128
#define HALF (COLUMNS / 2)
#define PATCH_PAIRS (TILE_ROWS / 16)
// Of k: four times 16 bytes of a row of weights, which lie together in memory.
#define SLICE (4 * VALUES)
// What a thread loads of a slice: 16 bytes of weights, and 4 values of activations.
#define WEIGHT_LOADS (COLUMNS * 4 / THREADS)
#define X_LOADS ((TILE_ROWS * SLICE / 4 + THREADS - 1) / THREADS)

struct __align__(16) Slice {
    float x[SLICE][TILE_ROWS];
    float weights[SLICE][COLUMNS];
};

typedef float Patch[PATCH_PAIRS][2][4];

// Where this thread reads.
struct Sources {
    const WEIGHT* weights[WEIGHT_LOADS];  // null for a row that does not exist
    int x_row[X_LOADS];                   // or -1
};

struct Loaded {
    vec16 weights[WEIGHT_LOADS];
    Quad x[X_LOADS];
};

struct Position {
    int row, k;
};

DEVICE Position weight_position(int load) {
    const int number = threadIdx.x + load * THREADS;
    return Position{number / 4, number % 4 * VALUES};
}

DEVICE Position x_position(int load) {
    const int number = threadIdx.x + load * THREADS;
    return Position{number / (SLICE / 4), number % (SLICE / 4) * 4};
}

// Rows change places with others of the slice depending on k, so that the threads of a warp, which
// write several k of several rows, meet in no bank. Four successive rows stay together.
DEVICE int weight_place(int row, int k) { return row ^ (k / VALUES * 8); }

DEVICE int x_place(int row, int k) { return row ^ (k / 4 * (128 / SLICE) & (TILE_ROWS - 1)); }

// A slice from `k` on, a multiple of SLICE, of rows of `x` that are K long.
template <int K>
DEVICE void load(Loaded& loaded, const Sources& sources, const void* x, int x_dtype, int k) {
#pragma unroll
    for (int i = 0; i < WEIGHT_LOADS; ++i)
        loaded.weights[i] =
            sources.weights[i] ? load_cached(sources.weights[i] + weight_distance(k)) : zero16();
#pragma unroll
    for (int i = 0; i < X_LOADS; ++i) {
        const int x_k = k + x_position(i).k;
        const bool is_there = sources.x_row[i] >= 0 && x_k < K;
        loaded.x[i] = is_there ? load_quad(x, (long long)sources.x_row[i] * K + x_k, x_dtype)
                               : zero_quad();
    }
}

DEVICE void store(Slice& slice, const Loaded& loaded) {
#pragma unroll
    for (int i = 0; i < WEIGHT_LOADS; ++i) {
        const Position at = weight_position(i);
#pragma unroll
        for (int part = 0; part < VALUES / 4; ++part) {
            const Quad quad = unpack_weights(loaded.weights[i], part);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                slice.weights[at.k + part * 4 + j][weight_place(at.row, at.k)] = quad.value[j];
        }
    }
#pragma unroll
    for (int i = 0; i < X_LOADS; ++i) {
        const Position at = x_position(i);
        if (at.row >= TILE_ROWS) continue;
#pragma unroll
        for (int j = 0; j < 4; ++j)
            slice.x[at.k + j][x_place(at.row, at.k)] = loaded.x[i].value[j];
    }
}

DEVICE void multiply_slice(Patch& sums, const Slice& slice) {
    const int column = threadIdx.x % 16 * 4, pair = threadIdx.x / 16 * PATCH_PAIRS;
#pragma unroll 16
    for (int k = 0; k < SLICE; ++k) {
        float x[4];
        if constexpr (PATCH_PAIRS == 4) {
            const Quad quad = load_quad(&slice.x[k][x_place(pair, k)]);
            for (int i = 0; i < 4; ++i) x[i] = quad.value[i];
        } else {
            for (int i = 0; i < PATCH_PAIRS; ++i) x[i] = slice.x[k][x_place(pair + i, k)];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Quad quad = load_quad(&slice.weights[k][weight_place(half * HALF + column, k)]);
#pragma unroll
            for (int i = 0; i < PATCH_PAIRS; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sums[i][half][j] += x[i] * quad.value[j];
        }
    }
}

template <int K>
DEVICE void multiply(Patch& sums, Slice& slice, const Sources& sources, const void* x,
                     int x_dtype) {
#pragma unroll
    for (int i = 0; i < PATCH_PAIRS; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i][j / 4][j % 4] = 0;
    Loaded loaded;
    load<K>(loaded, sources, x, x_dtype, 0);
    for (int k = 0; k < K; k += SLICE) {
        // All have read the slice before.
        __syncthreads();
        store(slice, loaded);
        __syncthreads();
        if (k + SLICE < K) load<K>(loaded, sources, x, x_dtype, k + SLICE);
        multiply_slice(sums, slice);
    }
}

// A tile's expert, and its pairs in shared memory, -1 where there are none.
DEVICE Expert open_tile(const Call& call, const Route& route, int tile, int pairs[TILE_ROWS]) {
    const int slot = route.tiles[tile * 2], begin = route.tiles[tile * 2 + 1];
    const int end = route.begin[slot + 1];
    // The tile before has been used.
    __syncthreads();
    for (int i = threadIdx.x; i < TILE_ROWS; i += THREADS)
        pairs[i] = begin + i < end ? route.pairs[begin + i] : -1;
    __syncthreads();
    return expert_at(call.experts[slot]);
}

// Calls `use(pair, sums)` with what this thread has for each pair of its patch.
template <typename Use>
DEVICE void for_each_pair(const int pairs[TILE_ROWS], const Patch& sums, Use use) {
#pragma unroll
    for (int i = 0; i < PATCH_PAIRS; ++i) {
        const int pair = pairs[threadIdx.x / 16 * PATCH_PAIRS + i];
        if (pair >= 0) use((long long)pair, sums[i]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, TWO_BLOCKS)
    prefill_gate_up(Call call, Route route) {
    __shared__ Slice slice;
    __shared__ int pairs[TILE_ROWS];
    wait_for_previous_kernel();
    let_next_kernel_start();
    // One half is gate_proj's rows, the other up_proj's.
    const int per_tile = INNER / HALF, n_tasks = *route.n_tiles * per_tile;
    for (int task = blockIdx.x; task < n_tasks; task += gridDim.x) {
        const Expert expert = open_tile(call, route, task / per_tile, pairs);
        const int first = task % per_tile * HALF, unit = first + threadIdx.x % 16 * 4;
        Sources sources;
#pragma unroll
        for (int i = 0; i < WEIGHT_LOADS; ++i) {
            const Position at = weight_position(i);
            sources.weights[i] = (at.row < HALF ? expert.gate : expert.up) +
                                 weight_index(first + at.row % HALF, at.k, HIDDEN_PADDED);
        }
#pragma unroll
        for (int i = 0; i < X_LOADS; ++i) {
            const int row = x_position(i).row;
            const int pair = row < TILE_ROWS ? pairs[row] : -1;
            sources.x_row[i] = pair < 0 ? -1 : pair / call.top_k;
        }
        Patch sums;
        multiply<HIDDEN>(sums, slice, sources, call.x, call.x_dtype);
        for_each_pair(pairs, sums, [&](long long pair, const float both[2][4]) {
            Quad inner;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float gate = both[0][j], up = both[1][j];
#if HAS_BIAS
                gate += expert.gate_bias[unit + j], up += expert.up_bias[unit + j];
#endif
                inner.value[j] = activate(call, gate, up);
            }
            store_quad(call.inner, pair * INNER + unit, F32, inner);
        });
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, TWO_BLOCKS)
    prefill_down(Call call, Route route) {
    __shared__ Slice slice;
    __shared__ int pairs[TILE_ROWS];
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int per_tile = (HIDDEN + COLUMNS - 1) / COLUMNS, n_tasks = *route.n_tiles * per_tile;
    for (int task = blockIdx.x; task < n_tasks; task += gridDim.x) {
        const Expert expert = open_tile(call, route, task / per_tile, pairs);
        const int first = task % per_tile * COLUMNS;
        Sources sources;
#pragma unroll
        for (int i = 0; i < WEIGHT_LOADS; ++i) {
            const Position at = weight_position(i);
            const int h = first + at.row;
            sources.weights[i] = h < HIDDEN ? expert.down + weight_index(h, at.k, INNER) : 0;
        }
#pragma unroll
        for (int i = 0; i < X_LOADS; ++i) {
            const int row = x_position(i).row;
            sources.x_row[i] = row < TILE_ROWS ? pairs[row] : -1;
        }
        Patch sums;
        multiply<INNER>(sums, slice, sources, call.inner, F32);
        for_each_pair(pairs, sums, [&](long long pair, const float both[2][4]) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int h = first + half * HALF + threadIdx.x % 16 * 4;
                if (h >= HIDDEN) continue;
                Quad output;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    output.value[j] = both[half][j];
#if HAS_BIAS
                    output.value[j] += expert.down_bias[h + j];
#endif
                }
                store_quad(call.partial, pair * HIDDEN + h, F32, output);
            }
        });
    }
}
