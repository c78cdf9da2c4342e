// The weighted sum of what the experts gave for each token, in the order of its slots.
//
// Macro: PARTIAL, the format of Call.partial, float or WEIGHT.
#include "values.cuh"

#define QUADS (HIDDEN / 4)
// Outputs that are loaded together.
#define AHEAD 4

extern "C" __global__ void __launch_bounds__(256) combine(Call call, Route) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const long long n_tasks = (long long)call.n_tokens * QUADS;
    const long long n_threads = (long long)gridDim.x * blockDim.x;
    const PARTIAL* partial = (const PARTIAL*)call.partial;
    for (long long task = (long long)blockIdx.x * blockDim.x + threadIdx.x; task < n_tasks;
         task += n_threads) {
        const long long token = task / QUADS;
        const int h = (int)(task % QUADS) * 4;
        Quad sum = zero_quad();
        for (int slot = 0; slot < call.top_k; slot += AHEAD) {
            Quad outputs[AHEAD];
            bool is_there[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const long long pair = token * call.top_k + slot + i;
                is_there[i] = slot + i < call.top_k && call.ids[pair] >= 0;
                if (is_there[i]) outputs[i] = load_quad(partial + pair * HIDDEN + h);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                if (!is_there[i]) continue;
                const float weight = call.weights[token * call.top_k + slot + i];
#pragma unroll
                for (int part = 0; part < 4; ++part)
                    sum.value[part] += weight * outputs[i].value[part];
            }
        }
        store_quad(call.out, token * HIDDEN + h, call.out_dtype, sum);
    }
}
