// The activations of a call in another format.
#include "values.cuh"

extern "C" __global__ void __launch_bounds__(256) convert(Call call, Route) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const long long n_values = (long long)call.n_tokens * HIDDEN;
    const long long n_threads = (long long)gridDim.x * blockDim.x;
    const long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (long long i = thread * 4; i < n_values; i += n_threads * 4)
        store_quad(call.out, i, call.out_dtype, load_quad(call.x, i, call.x_dtype));
}
