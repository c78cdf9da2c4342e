// Takes a call's ids and weights from memory that its client may still change, and activations from
// where they are far away, or in another format.
#pragma once

#include "formats.cuh"

// A pair is a token's slot. What the client wrote:
struct Asked {
    const int* ids;        // [n_pairs]: -1 for an empty slot, or below n_ids
    const float* weights;  // [n_pairs]
    const int* slots;      // [n_ids]: by id, the expert's slot, or -1; null where ids are slots
    const void* x;         // [n_values], in x_dtype
    int n_pairs;
    int n_ids;
    int first_pair;        // of all of the call's pairs, the number of the first one here
    int x_dtype;
};

// What kernels read:
struct Admitted {
    int* ids;            // [n_pairs]: slots; -1 for an empty one, and for what is no expert here
    float* weights;      // [n_pairs]
    u32* refused;        // [1]: 1 + the number of any pair whose id is no expert here; else not written
    void* x;             // [n_values], in x_dtype
    long long n_values;  // a multiple of 8; 0 where kernels read x where the client wrote it
    int x_dtype;
};

// `thread`: of all of the grid's.
DEVICE void admit_rows(const Asked& asked, const Admitted& admitted, int thread, int n_threads) {
    for (long long i = (long long)thread * 4; i < admitted.n_values; i += (long long)n_threads * 4)
        store_quad(admitted.x, i, admitted.x_dtype, load_quad(asked.x, i, asked.x_dtype));
}

// The slot of a pair's expert, or -1.
DEVICE int admit_id(const Asked& asked, const Admitted& admitted, int pair) {
    // Once: what was checked is what is used.
    const int id = *(const volatile int*)(asked.ids + pair);
    int slot = -1;
    if (id >= 0 && id < asked.n_ids) slot = asked.slots ? asked.slots[id] : id;
    if (slot < 0 && id != -1) {
        *(volatile u32*)admitted.refused = (u32)(asked.first_pair + pair + 1);
        fence_system();
    }
    return slot;
}

DEVICE void admit_pairs(const Asked& asked, const Admitted& admitted, int thread, int n_threads) {
    for (int pair = thread; pair < asked.n_pairs; pair += n_threads) {
        admitted.weights[pair] = asked.weights[pair];
        admitted.ids[pair] = admit_id(asked, admitted, pair);
    }
}
