// A few tokens by matrix instructions, in two launches: decode_mma.cuh has what they do.
#include "decode_mma.cuh"

#if HAS_MMA

extern "C" __global__ void __launch_bounds__(GATE_UP_WARPS * 32, 16 / GATE_UP_WARPS)
    decode_gate_up(Call call, Route) {
    __shared__ Groups groups;
    __shared__ GateUpSums all;
    let_next_kernel_start();
    group_pairs(call, groups);
    gate_up(
        call, groups, this_lane(), blockIdx.x, gridDim.x, all, [] { __syncthreads(); },
        [] { wait_for_previous_kernel(); });
}

// Dynamic shared memory: float32 [DOWN_SPLIT, n_pairs, DOWN_ROWS].
extern "C" __global__ void __launch_bounds__(DOWN_WARPS * 32, 16 / DOWN_WARPS)
    decode_down(Call call, Route) {
    __shared__ Groups groups;
    DYNAMIC_SHARED(float, outputs);
    let_next_kernel_start();
    group_pairs(call, groups);
    // What follows may take it that what came before this kernel has ended.
    down(call, groups, outputs, [] { wait_for_previous_kernel(); });
}

#endif
