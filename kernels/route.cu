// Sorts the pairs of a call by expert, and cuts each expert's list into tiles.
//
// Every block counts all pairs, which is cheap, and puts a part of them into their places: blocks
// need not wait for each other. A call has at most 65536 pairs. Macro: TILE_ROWS, pairs of a tile.
#include "ffn.cuh"

#define THREADS 512
#define WARPS (THREADS / WARP)
// Slots that are counted at a time, two for each thread; a layer with more is counted again.
#define WINDOW (THREADS * 2)
// Ids that a thread loads together.
#define AHEAD 16

struct Counts {
    // Of each warp of this block, two slots a word: even ones in the low half. A half is full only
    // when a call has 65536 pairs on one slot; then the other half is not used.
    u32 own[WARPS][WINDOW / 2];
    int before[WINDOW];  // of the blocks before this one
    int after[WINDOW];
};

// The pairs that this block, and this warp, puts into their places.
struct Share {
    int block_first, block_end;
    int first, end;
};

DEVICE Share share_of(int n_pairs) {
    const int n_warps = gridDim.x * WARPS;
    const int size = (n_pairs + n_warps - 1) / n_warps;
    const int block_first = blockIdx.x * WARPS * size;
    const int first = block_first + threadIdx.x / WARP * size;
    return Share{min(block_first, n_pairs), min(block_first + WARPS * size, n_pairs),
                 min(first, n_pairs), min(first + size, n_pairs)};
}

// Calls `add` with the slots from `window` on of the pairs from `first` to `end`, which `n_threads`
// threads share; this one is the `thread`th.
template <typename Add>
DEVICE void for_each_slot(const int* ids, int first, int end, int thread, int n_threads, int window,
                          Add add) {
    for (int start = first + thread; start < end; start += n_threads * AHEAD) {
        int slots[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int pair = start + i * n_threads;
            slots[i] = pair < end ? ids[pair] - window : -1;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (slots[i] >= 0 && slots[i] < WINDOW) add(slots[i]);
    }
}

DEVICE void count(const Call& call, const Share& share, int window, Counts& counts) {
    for (int warp = 0; warp < WARPS; ++warp) counts.own[warp][threadIdx.x] = 0;
    for (int i = threadIdx.x; i < WINDOW; i += THREADS) counts.before[i] = counts.after[i] = 0;
    __syncthreads();
    const int n_pairs = call.n_tokens * call.top_k, thread = threadIdx.x;
    for_each_slot(call.ids, 0, share.block_first, thread, THREADS, window,
                  [&](int slot) { atomicAdd(&counts.before[slot], 1); });
    for_each_slot(call.ids, share.block_end, n_pairs, thread, THREADS, window,
                  [&](int slot) { atomicAdd(&counts.after[slot], 1); });
    for_each_slot(call.ids, share.first, share.end, thread % WARP, WARP, window, [&](int slot) {
        atomicAdd(&counts.own[thread / WARP][slot / 2], 1u << slot % 2 * 16);
    });
    __syncthreads();
}

// Makes of each warp's count the sum of those of the warps before it; the sums of both slots of
// this thread's word.
DEVICE void sum_warps(Counts& counts, int sums[2]) {
    u32 before = 0;
    sums[0] = sums[1] = 0;
    for (int warp = 0; warp < WARPS; ++warp) {
        const u32 word = counts.own[warp][threadIdx.x];
        counts.own[warp][threadIdx.x] = before;
        before += word;
        sums[0] += word & 0xffff;
        sums[1] += word >> 16;
    }
}

// The sum of `value` over the threads before this one; `total` is that of all.
DEVICE int sum_before(int value, int scratch[WARPS], int& total) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int sum = value;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const int other = SHUFFLE(sum, (lane - distance) & (WARP - 1));
        if (lane >= distance) sum += other;
    }
    __syncthreads();
    if (lane == WARP - 1) scratch[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int i = 0; i < WARPS; ++i) {
        if (i < warp) before += scratch[i];
        total += scratch[i];
    }
    return before + sum - value;
}

// Writes the tiles of an expert, of which the blocks take turns.
DEVICE void write_tiles(const Route& route, int slot, int begin, int n_pairs, int first_tile) {
    for (int i = blockIdx.x; i * TILE_ROWS < n_pairs; i += gridDim.x) {
        route.tiles[(first_tile + i) * 2] = slot;
        route.tiles[(first_tile + i) * 2 + 1] = begin + i * TILE_ROWS;
    }
}

// In rising order: a warp goes through its pairs a lane each, and lanes that have the same slot
// take their places after one another.
DEVICE void place(const Call& call, const Route& route, const Share& share, int window,
                  const int starts[WINDOW], Counts& counts) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int n_slots = min(call.n_slots - window, WINDOW);
    for (int first = share.first; first < share.end; first += WARP) {
        const int pair = first + lane;
        const int slot = pair < share.end ? call.ids[pair] - window : -1;
        const bool is_here = slot >= 0 && slot < WINDOW;
        Lanes same = BALLOT(is_here);
        for (int bit = 1; bit < n_slots; bit *= 2) {
            const bool is_set = slot & bit;
            const Lanes set = BALLOT(is_set);
            same &= is_set ? set : ~set;
        }
        const int leader = is_here ? first_lane(same) : lane;
        const int shift = slot % 2 * 16;
        u32 word = 0;
        if (is_here && lane == leader)
            word = atomicAdd(&counts.own[warp][slot / 2], (u32)count_lanes(same) << shift);
        word = SHUFFLE(word, leader);
        if (!is_here) continue;
        const int rank = count_lanes(same & (((Lanes)1 << lane) - 1));
        route.pairs[starts[slot] + (word >> shift & 0xffff) + rank] = pair;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) route(Call call, Route route) {
    __shared__ Counts counts;
    __shared__ int scratch[WARPS];
    wait_for_previous_kernel();
    let_next_kernel_start();
    const Share share = share_of(call.n_tokens * call.top_k);
    int n_pairs = 0, n_tiles = 0;
    for (int window = 0; window < call.n_slots; window += WINDOW) {
        count(call, share, window, counts);
        int sums[2];
        sum_warps(counts, sums);
        const int at = threadIdx.x * 2;
        for (int i = 0; i < 2; ++i) sums[i] += counts.before[at + i] + counts.after[at + i];
        const int tiles[2] = {(sums[0] + TILE_ROWS - 1) / TILE_ROWS,
                              (sums[1] + TILE_ROWS - 1) / TILE_ROWS};
        int new_pairs, new_tiles;
        int begin = n_pairs + sum_before(sums[0] + sums[1], scratch, new_pairs);
        int tile = n_tiles + sum_before(tiles[0] + tiles[1], scratch, new_tiles);
        for (int i = 0; i < 2; ++i) {
            if (blockIdx.x == 0 && window + at + i < call.n_slots)
                route.begin[window + at + i] = begin;
            write_tiles(route, window + at + i, begin, sums[i], tile);
            // From here on where this block's pairs of the slot start.
            counts.before[at + i] += begin;
            begin += sums[i];
            tile += tiles[i];
        }
        n_pairs += new_pairs;
        n_tiles += new_tiles;
        __syncthreads();
        place(call, route, share, window, counts.before, counts);
        __syncthreads();
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        route.begin[call.n_slots] = n_pairs;
        *route.n_tiles = n_tiles;
    }
}
