// `admit.cuh` in a launch of its own.
#include "admit.cuh"

extern "C" __global__ void __launch_bounds__(256) admit(Asked asked, Admitted admitted) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x, n_threads = gridDim.x * blockDim.x;
    // Pairs begin with the grid's last threads, which have no values if there are threads for all.
    admit_pairs(asked, admitted, n_threads - 1 - thread, n_threads);
    admit_rows(asked, admitted, thread, n_threads);
}
