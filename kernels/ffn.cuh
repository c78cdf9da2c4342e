// What every kernel of the experts agrees on: a call, an expert's memory, the activation.
//
// Passed by whoever compiles, so that loops unroll and modules are few, one a layer shape:
//   WEIGHT       bf16, f16 or float: the format of the weights
//   HIDDEN       hidden_size, a multiple of 8
//   INNER        intermediate_size, padded with zeros to a multiple of 64
//   ACTIVATION   moeshm.layers.Activation: 0 swiglu, 1 geglu, 2 geglu_tanh, 3 swiglu_clamped
//   HAS_BIAS     0 or 1
#pragma once

#include "formats.cuh"

// Rows of gate_proj and up_proj, and columns of down_proj's rows, are that long in memory.
#define HIDDEN_PADDED ((HIDDEN + 63) / 64 * 64)

// One call, by value. A pair is a token's slot: pair = token * top_k + slot.
struct Call {
    const void* x;         // [n_tokens, HIDDEN], in x_dtype
    const int* ids;        // [n_tokens, top_k]: slots of `experts`; -1 for none
    const float* weights;  // [n_tokens, top_k]; where the id is -1, anything
    void* out;             // [n_tokens, HIDDEN], in out_dtype
    const u64* experts;    // by slot: where its block is
    void* inner;           // [n_pairs, INNER]: activation(gate, up); float32 or WEIGHT
    void* partial;         // [n_pairs, HIDDEN]: the experts' outputs, unweighted; prefill only
    int n_tokens;
    int top_k;
    int n_slots;           // ids are below it
    int x_dtype;
    int out_dtype;
    float alpha;           // of swiglu_clamped
    float limit;
};

// Where the pairs of each expert are, written by the kernel `route`.
struct Route {
    int* begin;    // [n_slots + 1]: an expert's pairs are those from begin[slot] to begin[slot + 1]
    int* pairs;    // [n_pairs]: each in rising order; those without an expert are nowhere
    int* n_tiles;  // [1]
    int* tiles;    // [max_tiles, 2]: an expert's slot, and where in `pairs` its tile starts
};

// Weights of 16 bits lie in tiles of 64 rows and 64 columns, one behind the other along the
// columns, as wgmma reads them from shared memory: a tile is one copy. In it, every 8 rows are two
// blocks of 32 columns, 512 bytes, which a warp reads at once as a part of a fragment of mma: on an
// H100, row by row the same weights came at 2.8 TB/s, so at 3.0. In a block, the four times 8
// values of a row change places as in the 64-byte swizzle of the PTX manual.
#define IS_TILED (sizeof(WEIGHT) == 2)
#define TILE_WEIGHTS (64 * 64)
#define BLOCK_WEIGHTS (8 * 32)

// How far it is to column `distance`, a multiple of 32, of the same row.
DEVICE long long weight_distance(int distance) {
    if (!IS_TILED) return distance;
    return (long long)(distance / 64) * TILE_WEIGHTS + distance / 32 % 2 * BLOCK_WEIGHTS;
}

// Where in a matrix with rows of n_columns the value (row, k) is. The 7 behind it are its row's
// next, if k is a multiple of 8. What rows i and j give adds up if i is a multiple of 8 and j below
// its lowest bit, and so do columns from 32 on.
DEVICE long long weight_index(int row, int k, int n_columns) {
    if (!IS_TILED) return (long long)row * n_columns + k;
    const int place = (k / 8 ^ row / 2) % 4;
    return (long long)(row / 64) * 64 * n_columns + row % 64 / 8 * 2 * BLOCK_WEIGHTS +
           weight_distance(k / 32 * 32) + row % 8 * 32 + place * 8 + k % 8;
}

// An expert's block, each part 16-byte aligned: gate_proj [INNER, HIDDEN_PADDED], up_proj the same,
// down_proj [HIDDEN_PADDED, INNER], all WEIGHT, padded with zeros and laid out by weight_index;
// with HAS_BIAS then gate_bias [INNER], up_bias [INNER], down_bias [HIDDEN_PADDED] as float32.
struct Expert {
    const WEIGHT* gate;
    const WEIGHT* up;
    const WEIGHT* down;
    const float* gate_bias;
    const float* up_bias;
    const float* down_bias;
};

DEVICE Expert expert_at(u64 address) {
    const u64 matrix = (u64)INNER * HIDDEN_PADDED;
    Expert expert;
    expert.gate = (const WEIGHT*)address;
    expert.up = expert.gate + matrix;
    expert.down = expert.up + matrix;
    expert.gate_bias = (const float*)(expert.down + matrix);
    expert.up_bias = expert.gate_bias + INNER;
    expert.down_bias = expert.up_bias + INNER;
    return expert;
}

// By CUDA's fast functions: a few units in the last place off, far below what float32 sums lose,
// and without the exact division's branches, which a prefill kernel waits for.
DEVICE float sigmoid(float value) {
#if defined(MOESHM_SIMT) || defined(__HIP__)
    return 1.0f / (1.0f + expf(-value));
#else
    return __fdividef(1.0f, 1.0f + __expf(-value));
#endif
}

// `gate` and `up` with their biases; the formulas and their sources are in moeshm/layers.py.
DEVICE float activate(const Call& call, float gate, float up) {
#if ACTIVATION == 0
    return gate * sigmoid(gate) * up;
#elif ACTIVATION == 1
    return 0.5f * gate * (1.0f + erff(gate * 0.70710678118654752f)) * up;
#elif ACTIVATION == 2
    float cubic = 0.79788456080286536f * (gate + 0.044715f * gate * gate * gate);
    return 0.5f * gate * (1.0f + tanhf(cubic)) * up;
#else
    // Written so that NaN passes through.
    gate = gate > call.limit ? call.limit : gate;
    up = up > call.limit ? call.limit : up < -call.limit ? -call.limit : up;
    return gate * sigmoid(call.alpha * gate) * (up + 1.0f);
#endif
}
