// Small kernels, right and wrong ones, that show what the shim does; tests/unit/simt runs them.
// `call.n_tokens` chooses where a kernel has more than one way to go.

#define KERNEL extern "C" __global__ void

// --- barriers and shuffles ----------------------------------------------------------------

KERNEL shuffles(Call call, Route) {
    int* const out = (int*)call.out + threadIdx.x * 2;
    out[0] = SHUFFLE_XOR((int)threadIdx.x, call.n_tokens);
    out[1] = SHUFFLE((int)threadIdx.x, (threadIdx.x + 1) % WARP);
}

KERNEL ballots(Call call, Route) {
    ((u64*)call.out)[threadIdx.x] = BALLOT(call.ids[threadIdx.x] > 0);
}

// The sum of the block's values, in every thread.
KERNEL sums(Call call, Route) {
    __shared__ float totals[256 / WARP];
    const float total = warp_sum(((const float*)call.x)[threadIdx.x]);
    if (threadIdx.x % WARP == 0) totals[threadIdx.x / WARP] = total;
    __syncthreads();
    float sum = 0;
    for (int warp = 0; warp < 256 / WARP; ++warp) sum += totals[warp];
    ((float*)call.out)[threadIdx.x] = sum;
}

// Each thread adds up what its opposite writes in four rounds. Of the two barriers, those whose
// bits are set in n_tokens are there.
KERNEL rounds(Call call, Route) {
    __shared__ int values[128];
    int sum = 0;
    for (int round = 0; round < 4; ++round) {
        values[threadIdx.x] = round * 1000 + threadIdx.x;
        if (call.n_tokens & 1) __syncthreads();
        sum += values[127 - threadIdx.x];
        if (call.n_tokens & 2) __syncthreads();
    }
    ((int*)call.out)[threadIdx.x] = sum;
}

KERNEL barriers(Call call, Route) {
    for (int i = 0; i < call.n_tokens; ++i) __syncthreads();
}

KERNEL barrier_of_some(Call call, Route) {
    if (threadIdx.x < 40) __syncthreads();
}

KERNEL two_barriers(Call, Route) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}

KERNEL two_shuffles(Call call, Route) {
    int value = threadIdx.x;
    if (threadIdx.x % WARP < WARP / 2)
        value = SHUFFLE_XOR(value, 1);
    else
        value = SHUFFLE_XOR(value, 1);
    ((int*)call.out)[threadIdx.x] = value;
}

KERNEL far_shuffle(Call call, Route) {
    ((int*)call.out)[threadIdx.x] = SHUFFLE((int)threadIdx.x, WARP);
}

KERNEL counts(Call call, Route) {
    __shared__ int n, lowest, highest;
    if (threadIdx.x == 0) n = 0, lowest = 1000, highest = -1000;
    __syncthreads();
    atomicAdd(&n, 1);
    atomicMin(&lowest, call.ids[threadIdx.x]);
    atomicMax(&highest, call.ids[threadIdx.x]);
    __syncthreads();
    int* const out = (int*)call.out;
    if (threadIdx.x == 0) out[0] = n, out[1] = lowest, out[2] = highest;
}

// When this thread came, of all of the grid.
KERNEL arrivals(Call call, Route) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    ((int*)call.out)[block * blockDim.x + threadIdx.x] = atomicAdd((int*)call.inner, 1);
}

// --- memory -------------------------------------------------------------------------------

// What was in shared memory before this block wrote to it.
KERNEL leftovers(Call call, Route) {
    __shared__ float fixed[32];
    DYNAMIC_SHARED(float, dynamic);
    float* const out = (float*)call.out + blockIdx.x * 64 + threadIdx.x;
    out[0] = fixed[threadIdx.x];
    out[32] = dynamic[threadIdx.x];
    fixed[threadIdx.x] = dynamic[threadIdx.x] = 1;
}

KERNEL reads(Call call, Route) {
    ((float*)call.out)[threadIdx.x] = ((const float*)call.x)[threadIdx.x];
}

KERNEL misaligned(Call call, Route) {
    *(vec16*)call.out = *(const vec16*)((const char*)call.x + 4);
}

KERNEL beyond_array(Call call, Route) {
    __shared__ int values[8];
    values[call.n_tokens] = 1;
}

KERNEL beyond_dynamic(Call call, Route) {
    DYNAMIC_SHARED(char, values);
    values[call.n_tokens] = 1;
}

KERNEL divides(Call call, Route) { *(int*)call.out = call.top_k / call.n_tokens; }

KERNEL much_stack(Call call, Route) {
    volatile char values[200 << 10];
    values[call.n_tokens] = 1;
}

KERNEL sums_from_nothing(Call call, Route) {
    float sum;
    for (int i = 0; i < call.n_tokens; ++i) sum += 1;
    *(float*)call.out = sum;
}

// --- asynchronous copies ------------------------------------------------------------------

// Two groups of 16 bytes, then a third that has zeros; waits for all but n_tokens.
KERNEL copies(Call call, Route) {
    __shared__ __align__(16) float values[12];
    const float* const x = (const float*)call.x;
    if (threadIdx.x == 0) {
        simt_copy_async(values, x, true);
        simt_commit_copies();
        simt_copy_async(values + 4, x + 4, true);
        simt_commit_copies();
        simt_copy_async(values + 8, 0, false);
        simt_commit_copies();
        simt_wait_for_copies(call.n_tokens);
    }
    __syncthreads();
    if (threadIdx.x < 12) ((float*)call.out)[threadIdx.x] = values[threadIdx.x];
}

KERNEL misaligned_copy(Call call, Route) {
    __shared__ __align__(16) float values[8];
    simt_copy_async(values, (const float*)call.x + 1, true);
}

// A warp orders copies into two stages of 64 bytes, in halves; two warps add up what is there.
// n_tokens & 1: the producer waits until a stage is empty; & 2: the consumers until it is full.
KERNEL stages(Call call, Route) {
    __shared__ __align__(16) float values[2][16];
    __shared__ u64 full[2], empty[2];
    if (threadIdx.x == 0)
        for (int stage = 0; stage < 2; ++stage) {
            simt_init_phase(&full[stage], 1);
            simt_init_phase(&empty[stage], 64);
        }
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < 8; ++i) {
        const int stage = i % 2, parity = i / 2 % 2;
        if (threadIdx.x >= 64) {
            const float* const x = (const float*)call.x + i * 16;
            if (call.n_tokens & 1) simt_wait_for_phase(&empty[stage], parity ^ 1);
            if (threadIdx.x == 64) simt_arrive(&full[stage], 64);
            SYNC_WARP();
            if (threadIdx.x == 65) simt_copy_bulk(values[stage], x, 32, &full[stage]);
            SYNC_WARP();
            if (threadIdx.x == 66) simt_copy_bulk(values[stage] + 8, x + 8, 32, &full[stage]);
        } else {
            if (call.n_tokens & 2) simt_wait_for_phase(&full[stage], parity);
            sum += values[stage][threadIdx.x % 16];
            if (call.n_tokens & 1) simt_arrive(&empty[stage], 0);
        }
    }
    if (threadIdx.x < 64) ((float*)call.out)[threadIdx.x] = sum;
    // The last copies have to end.
    for (int stage = 0; stage < 2; ++stage) simt_wait_for_phase(&full[stage], 1);
}

// A warp copies 16 bytes a lane and arrives after them, another adds up what is there then.
// n_tokens & 1: it waits for that.
KERNEL arrives_after_copies(Call call, Route) {
    __shared__ __align__(16) float values[2][32][4];
    __shared__ u64 full[2];
    if (threadIdx.x == 0)
        for (int stage = 0; stage < 2; ++stage) simt_init_phase(&full[stage], 32);
    __syncthreads();
    const int lane = threadIdx.x % 32;
    float sum = 0;
    for (int stage = 0; stage < 2; ++stage)
        if (threadIdx.x >= 32) {
            const float* const x = (const float*)call.x + stage * 128 + lane * 4;
            simt_copy_async(values[stage][lane], x, true);
            simt_arrive_after_copies(&full[stage]);
        } else {
            if (call.n_tokens & 1) simt_wait_for_phase(&full[stage], 0);
            for (int i = 0; i < 4; ++i) sum += values[stage][31 - lane][i];
        }
    if (threadIdx.x < 32) ((float*)call.out)[lane] = sum;
    for (int stage = 0; stage < 2; ++stage) simt_wait_for_phase(&full[stage], 0);
}

KERNEL copy_at_the_end(Call call, Route) {
    __shared__ __align__(16) float values[4];
    __shared__ u64 phase;
    simt_init_phase(&phase, 1);
    simt_arrive(&phase, 16);
    simt_copy_bulk(values, call.x, 16, &phase);
}

KERNEL phase_of_nothing(Call, Route) {
    __shared__ u64 phase;
    simt_arrive(&phase, 0);
}

// --- teams and grids ----------------------------------------------------------------------

// Two teams of two warps, each with its own number of rounds.
KERNEL teams(Call call, Route) {
    __shared__ int values[128];
    const int team = threadIdx.x / 64;
    int sum = 0;
    for (int round = 0; round < 3 + team; ++round) {
        values[threadIdx.x] = round;
        simt_sync_team(1 + team, 64);
        sum += values[threadIdx.x ^ 63];
        simt_sync_team(1 + team, call.n_tokens);
    }
    ((int*)call.out)[threadIdx.x] = sum;
}

// Each block writes its number and waits for all; then each adds up the numbers.
KERNEL waits_for_grid(Call call, Route) {
    __shared__ int mine;
    u32* const n_arrived = (u32*)call.inner;
    int* const numbers = (int*)call.partial;
    if (threadIdx.x == 0) {
        mine = numbers[blockIdx.x] = blockIdx.x;
        atomicAdd(n_arrived, 1);
        while (simt_load_acquire(n_arrived) < (u32)call.n_tokens) {
        }
    }
    __syncthreads();
    int sum = mine * 100;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += numbers[i];
    ((int*)call.out)[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// --- matrix instructions ------------------------------------------------------------------

KERNEL widens(Call call, Route) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    ((float*)call.out)[i] = widen(f16{(u16)i});
}

KERNEL narrows(Call call, Route) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < call.n_tokens) ((u16*)call.out)[i] = narrow<f16>(((const float*)call.x)[i]).bits;
}

#if WARP == 32

// C [16, 8] += A [16, 16] B^T with B [8, 16], in f16; the fragments as the PTX manual has them.
KERNEL multiplies(Call call, Route) {
    const u16* const a = (const u16*)call.x;
    const u16* const b = a + 16 * 16;
    const int group = threadIdx.x / 4, quad = threadIdx.x % 4;
    u32 of_a[4], of_b[2];
    for (int i = 0; i < 4; ++i)
        of_a[i] = *(const u32*)&a[(group + i % 2 * 8) * 16 + quad * 2 + i / 2 * 8];
    for (int i = 0; i < 2; ++i) of_b[i] = *(const u32*)&b[group * 16 + quad * 2 + i * 8];
    float* const c = (float*)call.out;
    float of_c[4];
    for (int i = 0; i < 4; ++i) of_c[i] = c[(group + i / 2 * 8) * 8 + quad * 2 + i % 2];
    simt_mma_m16n8k16(of_c, of_a, of_b, [](u16 bits) { return widen(f16{bits}); });
    for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + quad * 2 + i % 2] = of_c[i];
}

// Word j of each lane, of the four 8 x 8 tiles in 32 rows of 8 values.
KERNEL loads_tiles(Call call, Route) {
    __shared__ __align__(16) u16 rows[32][8];
    memcpy(rows[threadIdx.x], (const u16*)call.x + threadIdx.x * 8, 16);
    SYNC_WARP();
    u32 words[4];
    simt_ldmatrix_x4(words, rows[threadIdx.x]);
    for (int j = 0; j < 4; ++j) ((u32*)call.out)[threadIdx.x * 4 + j] = words[j];
}

// The same back, transposed: the words are each lane's, tile by tile. n_tokens & 1: lanes meet before
// they read what is there.
KERNEL stores_tiles(Call call, Route) {
    __shared__ __align__(16) u16 rows[32][8];
    u32 words[4];
    for (int j = 0; j < 4; ++j) words[j] = ((const u32*)call.x)[threadIdx.x * 4 + j];
    simt_stmatrix_x4_trans(rows[threadIdx.x], words);
    if (call.n_tokens & 1) SYNC_WARP();
    memcpy((u16*)call.out + threadIdx.x * 8, rows[threadIdx.x], 16);
}

// D [64, N] += A [64, 64] B^T with B [N, 64], in f16. n_tokens & 1: D is read after a wait; & 2: A
// is overwritten after one.
template <int N> DEVICE void multiply_by_group(const Call& call) {
    DYNAMIC_SHARED(char, dynamic);
    u16* const a = (u16*)(((u64)dynamic + 1023) / 1024 * 1024);
    u16* const b = a + 64 * 64;
    const u16* const x = (const u16*)call.x;
    // By the PTX manual, the bits 4 to 5 or 4 to 6 of an address are XORed with those from bit 7
    // on.
    for (int i = threadIdx.x; i < (64 + N) * 64; i += 128) {
        const int row = i / 64, k = i % 64;
        int at = row * 128 + k * 2;
        if (row < 64) at = row / 8 * 1024 + k / 32 * 512 + row % 8 * 64 + k % 32 * 2;
        at ^= at >> 7 << 4 & (row < 64 ? 3 : 7) << 4;
        a[at / 2] = x[i];
    }
    __syncthreads();
    float sums[N / 2] = {};
    for (int chunk = 0; chunk < 4; ++chunk)
        simt_wgmma_m64k16<N>(sums, a, b, chunk, [](u16 bits) { return widen(f16{bits}); });
    simt_commit_wgmma();
    if (call.n_tokens & 2) simt_wait_for_wgmma(0);
    __syncthreads();
    for (int i = threadIdx.x; i < 64 * 64; i += 128) a[i] = 0;
    if (call.n_tokens & 1) simt_wait_for_wgmma(0);
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, quad = threadIdx.x % 4;
    for (int i = 0; i < N / 2; ++i) {
        const int row = warp * 16 + group + i / 2 % 2 * 8, column = i / 4 * 8 + quad * 2 + i % 2;
        ((float*)call.out)[row * N + column] = sums[i];
    }
    simt_wait_for_wgmma(0);
}

KERNEL multiplies_by_group_8(Call call, Route) { multiply_by_group<8>(call); }
KERNEL multiplies_by_group_64(Call call, Route) { multiply_by_group<64>(call); }
KERNEL multiplies_by_group_256(Call call, Route) { multiply_by_group<256>(call); }

KERNEL multiplies_by_some(Call call, Route) {
    DYNAMIC_SHARED(char, dynamic);
    const char* const tile = (const char*)(((u64)dynamic + 1023) / 1024 * 1024) + call.n_tokens;
    float sums[4] = {};
    if (threadIdx.x < 96)
        simt_wgmma_m64k16<8>(sums, tile, tile, 0, [](u16 bits) { return widen(f16{bits}); });
    simt_commit_wgmma();
    simt_wait_for_wgmma(0);
}

#endif
