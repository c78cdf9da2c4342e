// What the prefill kernels by matrix instructions share: which tile of which expert is next.
//
// A tile is up to TILE_ROWS pairs of one expert times WEIGHT_ROWS rows of its weights, both defined
// by the includer, or by who compiles it.
#pragma once

#include "ffn.cuh"

// Of k, in one stage.
#define K_STEP 64
// Tasks that a block looks up at once.
#define MAX_TASKS 64

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
    // Of about the same size, a multiple of 16.
    const int size = ((n_pairs + n_tiles - 1) / n_tiles + 15) / 16 * 16;
    const int row = (skipped + rest % together) * size;
    const int n_rows = n_pairs - row < size ? n_pairs - row : size;
    return Task{slot, begin + row, n_rows, rest / together * tile_outputs<Part>()};
}

// How many of this block's tasks are listed together from `first` on, each gridDim.x after the
// last.
DEVICE int n_listed(int first, int n_tasks) {
    const int n_left = (n_tasks - first + gridDim.x - 1) / gridDim.x;
    return n_left < MAX_TASKS ? n_left : MAX_TASKS;
}

// Writes one of them by each of MAX_TASKS threads, of which this is the `thread`th.
template <typename Part>
DEVICE void list_tasks(const Route& route, int first, int n, int thread, Task* tasks) {
    if (thread < n) tasks[thread] = find_task<Part>(route, first + thread * gridDim.x);
}

// The values that are multiplied, and which of their rows is a pair's.
DEVICE const WEIGHT* pair_values(GateUp, const Call& call) { return (const WEIGHT*)call.x; }

DEVICE const WEIGHT* pair_values(Down, const Call& call) { return (const WEIGHT*)call.inner; }

DEVICE int pair_row(GateUp, const Call& call, int pair) { return pair / call.top_k; }

DEVICE int pair_row(Down, const Call&, int pair) { return pair; }
