// Arrays of a call into a slab, and its output from there; a flag says when all of it is done.
//
// One end of each copy may be the host's memory or another GPU's: many loads are on their way
// before the first store. Several launches may run at a time, each for a slot of its own.
#include "portable.cuh"

#define THREADS 256
// Vectors that a thread loads together.
#define AHEAD 8

// The codes of moeshm.dtypes.DType.
enum { F32 = 0, F16 = 1, BF16 = 2 };

// What `give` and `exchange` copy. Arrays start at multiples of 16 bytes, but for the caller's ids
// and weights.
struct Given {
    const void* hidden_states;  // n_bytes of the caller's
    const void* topk_ids;       // [n_pairs], of ids_bytes each
    const void* topk_weights;   // [n_pairs], in weights_dtype
    void* slab_hidden_states;
    int* slab_topk_ids;
    float* slab_topk_weights;
    long long n_bytes;  // a multiple of 16
    int n_pairs;
    int ids_bytes;  // 4 or 8
    int weights_dtype;
};

// What `take` and `await_and_take` copy; both start at multiples of 16 bytes.
struct Taken {
    const void* slab_out;
    void* out;
    const u32* done;    // of the same call as the signal's flag; for kernels that await it
    long long n_bytes;  // a multiple of 16
};

// What `exchange` does once its arrays are given.
struct Answer {
    const void* slab_out;  // as many bytes as hidden states, at a multiple of 16 as `out` is
    void* out;
    u32* given;
    const u32* done;
    u32* taken;
    u32 value;  // of all three
};

struct Signal {
    u32* flag;
    u32* n_done;  // blocks that have copied their part; 0 before a launch and after it
    u32 value;    // what the flag is set to
};

DEVICE long long thread_of_grid() { return (long long)blockIdx.x * THREADS + threadIdx.x; }

DEVICE long long threads_of_grid() { return (long long)gridDim.x * THREADS; }

DEVICE void copy(void* to, const void* source, long long n_bytes) {
    const long long n_vectors = n_bytes / 16, n_threads = threads_of_grid();
    for (long long first = thread_of_grid(); first < n_vectors; first += n_threads * AHEAD) {
        vec16 loaded[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const long long index = first + i * n_threads;
            if (index < n_vectors) loaded[i] = load_cached((const vec16*)source + index);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const long long index = first + i * n_threads;
            if (index < n_vectors) ((vec16*)to)[index] = loaded[i];
        }
    }
}

// Numbers that int32 cannot hold become one that no worker has an expert for.
DEVICE int load_id(const void* ids, long long pair, int ids_bytes) {
    if (ids_bytes == 4) return ((const int*)ids)[pair];
    const long long id = ((const long long*)ids)[pair];
    return id == (int)id ? (int)id : 0x7fffffff;
}

DEVICE float load_weight(const void* weights, long long pair, int dtype) {
    if (dtype == BF16) return widen(((const bf16*)weights)[pair]);
    if (dtype == F16) return widen(((const f16*)weights)[pair]);
    return ((const float*)weights)[pair];
}

// Begins with the grid's last threads: where there are more threads than vectors, these have none.
DEVICE void copy_pairs(const Given& given) {
    const long long n_threads = threads_of_grid();
    for (long long pair = n_threads - 1 - thread_of_grid(); pair < given.n_pairs;
         pair += n_threads) {
        const int id = load_id(given.topk_ids, pair, given.ids_bytes);
        const float weight = load_weight(given.topk_weights, pair, given.weights_dtype);
        given.slab_topk_ids[pair] = id;
        given.slab_topk_weights[pair] = weight;
    }
}

// Until the flag has reached the value, as numbers that wrap. What was written before it was set can
// be read afterwards by the whole block.
DEVICE void await_flag(const u32* flag, u32 value) {
    if (threadIdx.x == 0) {
        while ((int)(*(const volatile u32*)flag - value) < 0) {
        }
        fence_system();
    }
    __syncthreads();
}

// By the only block. Its fence stands for what all of its threads wrote before they met.
DEVICE void set_flag(u32* flag, u32 value) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    fence_system();
    *(volatile u32*)flag = value;
}

// As `set_flag`, by the last of the grid's blocks that comes here.
DEVICE void finish(const Signal& signal) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    fence_system();
    if (gridDim.x > 1) {
        if (atomicAdd(signal.n_done, 1u) != gridDim.x - 1) return;
        // Before the flag: who sees that may launch the next.
        *signal.n_done = 0;
        fence_system();
    }
    *(volatile u32*)signal.flag = signal.value;
}

extern "C" __global__ void __launch_bounds__(THREADS) give(Given given, Signal signal) {
    copy_pairs(given);
    copy(given.slab_hidden_states, given.hidden_states, given.n_bytes);
    finish(signal);
}

extern "C" __global__ void __launch_bounds__(THREADS) take(Taken taken, Signal signal) {
    copy(taken.out, taken.slab_out, taken.n_bytes);
    finish(signal);
}

// Kernels that wait, in the place of the stream: what comes behind a wait of that begins some 10 us
// after the flag was set. On an H200, 13.7 us from `done` to `taken`, and 2.5 to the answer of a
// kernel that was there. Only where whoever sets `done` needs nothing of this GPU.

// Ahead of `take`, for outputs that need many blocks.
extern "C" __global__ void __launch_bounds__(THREADS) await_done(Taken taken, Signal signal) {
    await_flag(taken.done, signal.value);
}

extern "C" __global__ void __launch_bounds__(THREADS) await_and_take(Taken taken, Signal signal) {
    await_flag(taken.done, signal.value);
    copy(taken.out, taken.slab_out, taken.n_bytes);
    finish(signal);
}

// `give` and `await_and_take` by one block, for calls that are small both ways: one launch less for
// the host, and nothing between the two on the stream. Whoever launches it has told the worker.
extern "C" __global__ void __launch_bounds__(THREADS) exchange(Given given, Answer answer) {
    copy_pairs(given);
    copy(given.slab_hidden_states, given.hidden_states, given.n_bytes);
    set_flag(answer.given, answer.value);
    await_flag(answer.done, answer.value);
    copy(answer.out, answer.slab_out, given.n_bytes);
    set_flag(answer.taken, answer.value);
}
