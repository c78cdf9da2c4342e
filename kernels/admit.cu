// Takes a call's ids and weights from memory that its client may still change.
#include "portable.cuh"

// A pair is a token's slot. What the client wrote:
struct Asked {
    const int* ids;        // [n_pairs]: -1 for an empty slot, or below n_ids
    const float* weights;  // [n_pairs]
    const int* slots;      // [n_ids]: by id, the expert's slot, or -1; null where ids are slots
    int n_pairs;
    int n_ids;
    int first_pair;        // of all of the call's pairs, the number of the first one here
};

// What kernels read:
struct Admitted {
    int* ids;        // [n_pairs]: slots; -1 for an empty one, and for what is no expert here
    float* weights;  // [n_pairs]
    u32* refused;    // [1]: 1 + the number of any pair whose id is no expert here; else not written
};

extern "C" __global__ void __launch_bounds__(256) admit(Asked asked, Admitted admitted) {
    const int n_threads = gridDim.x * blockDim.x;
    for (int pair = blockIdx.x * blockDim.x + threadIdx.x; pair < asked.n_pairs;
         pair += n_threads) {
        // Once: what was checked is what is used.
        const int id = *(const volatile int*)(asked.ids + pair);
        admitted.weights[pair] = asked.weights[pair];
        int slot = -1;
        if (id >= 0 && id < asked.n_ids) slot = asked.slots ? asked.slots[id] : id;
        admitted.ids[pair] = slot;
        if (slot < 0 && id != -1) {
            *(volatile u32*)admitted.refused = (u32)(asked.first_pair + pair + 1);
            fence_system();
        }
    }
}
