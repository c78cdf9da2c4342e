// What a kernel finds in CUDA's place when it is compiled for the host, where every thread of a
// block is a fiber: the language, barriers, shuffles, atomics, arithmetic.
#pragma once

#include <stdint.h>
#include <string.h>

// All that kernels have of <cmath>, which takes longer to read than most of them to be compiled.
extern "C" {
float erff(float) noexcept;
float expf(float) noexcept;
float tanhf(float) noexcept;
}

#define __global__ __attribute__((visibility("default")))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block runs at a time, so its shared memory can be static. In a section of its own, so that
// it can be poisoned between blocks; `used`, so that the compiler does not take it for zeros.
#define __shared__ static __attribute__((section("simt_shared"), used))
#define DYNAMIC_SHARED(type, name) type* const name = (type*)simt_dynamic_shared

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

// Of the thread that runs now.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
extern void* simt_dynamic_shared;

// Ends the launch with this error.
[[noreturn]] void simt_fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// --- meetings -----------------------------------------------------------------------------

// What threads wait at until all have arrived. `perform` is then called once with the arguments of
// all, in the order of the threads; null if to meet is all there is to do.
struct simt_meeting {
    const char* name;
    int line;
    int n_threads;  // neighbours, from a multiple of it on; 0 for the whole block
    void (*perform)(void* const* arguments, int n_threads);

    bool operator==(const simt_meeting& other) const {
        return line == other.line && n_threads == other.n_threads && perform == other.perform;
    }
};

void simt_meet(const simt_meeting& meeting, void* argument);

static inline void __syncthreads(int line = __builtin_LINE()) {
    simt_meet({"__syncthreads", line, 0, nullptr}, nullptr);
}

static inline void SYNC_WARP(int line = __builtin_LINE()) {
    simt_meet({"SYNC_WARP", line, WARP, nullptr}, nullptr);
}

template <typename T> struct simt_shuffled {
    T value;
    int from;
    bool is_xor;
};

template <typename T> void simt_perform_shuffle(void* const* arguments, int n_threads) {
    simt_shuffled<T>** lanes = (simt_shuffled<T>**)arguments;
    T values[WARP];
    for (int lane = 0; lane < n_threads; ++lane) values[lane] = lanes[lane]->value;
    for (int lane = 0; lane < n_threads; ++lane) {
        const int from = lanes[lane]->is_xor ? lane ^ lanes[lane]->from : lanes[lane]->from;
        if (from < 0 || from >= n_threads)
            simt_fail("lane %d wants the value of lane %d, of %d", lane, from, n_threads);
        lanes[lane]->value = values[from];
    }
}

template <typename T> T SHUFFLE_XOR(T value, int mask, int line = __builtin_LINE()) {
    simt_shuffled<T> shuffled = {value, mask, true};
    simt_meet({"SHUFFLE_XOR", line, WARP, simt_perform_shuffle<T>}, &shuffled);
    return shuffled.value;
}

template <typename T> T SHUFFLE(T value, int lane, int line = __builtin_LINE()) {
    simt_shuffled<T> shuffled = {value, lane, false};
    simt_meet({"SHUFFLE", line, WARP, simt_perform_shuffle<T>}, &shuffled);
    return shuffled.value;
}

static inline void simt_perform_ballot(void* const* arguments, int n_threads) {
    uint64_t bits = 0;
    for (int lane = 0; lane < n_threads; ++lane) bits |= *(uint64_t*)arguments[lane] << lane;
    for (int lane = 0; lane < n_threads; ++lane) *(uint64_t*)arguments[lane] = bits;
}

// A bit for each lane.
static inline uint64_t BALLOT(bool condition, int line = __builtin_LINE()) {
    uint64_t bits = condition;
    simt_meet({"BALLOT", line, WARP, simt_perform_ballot}, &bits);
    return bits;
}

// --- arithmetic ---------------------------------------------------------------------------

// Nothing else runs between two meetings, so that what is atomic on a GPU is plain here. Integers
// only: sums of floats would depend on who comes first.
#define SIMT_ATOMIC(name, result)                                         \
    template <typename T> T name(T* address, decltype(T(1) << 1) value) { \
        const T old = *address;                                           \
        *address = result;                                                \
        return old;                                                       \
    }
SIMT_ATOMIC(atomicAdd, old + value)
SIMT_ATOMIC(atomicMin, old < value ? old : value)
SIMT_ATOMIC(atomicMax, old > value ? old : value)
SIMT_ATOMIC(atomicOr, old | value)
#undef SIMT_ATOMIC

static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __ffs(int bits) { return __builtin_ffs(bits); }
static inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }

#define SIMT_MIN_MAX(type)                                           \
    static inline type min(type a, type b) { return b < a ? b : a; } \
    static inline type max(type a, type b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX

float simt_f16_to_float(uint16_t bits);
// Rounded to nearest, ties to even; NaN stays NaN.
uint16_t simt_float_to_f16(float value);

#include "async.h"
#include "matrix.h"
