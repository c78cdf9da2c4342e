// A block groups the pairs of a small call by expert, and adds up what each token's gave, in shared
// memory: no kernel goes before or after.
#pragma once

#include "ffn.cuh"

// 128 tokens with 8 slots each.
#define MAX_PAIRS 1024
// Calls to a layer with more slots go another way.
#define MAX_SLOTS 1024
// An expert with more pairs is visited more than once.
#define VISIT_PAIRS 32

struct Groups {
    int n_active;              // visits: experts with pairs, as they first appear
    int begin[MAX_PAIRS + 1];  // a visit's pairs are pairs[begin[i]] to pairs[begin[i + 1]]
    u64 expert[MAX_PAIRS];     // where each visit's expert is
    short pairs[MAX_PAIRS];    // of an expert with one visit in any order, else in rising order
    short id[MAX_PAIRS];
    short rank[MAX_PAIRS];     // where each pair is among those of its expert
    int first[MAX_SLOTS];      // the first pair of each slot's expert
    u32 is_first[MAX_PAIRS / 32];
};

// A single token with at most 32 slots: each for itself, so that what waits for the weights is
// short. An expert that is named twice is read twice.
DEVICE void group_one_token(const Call& call, Groups& groups) {
    const int pair = threadIdx.x;
    u64 expert = 0;
    if (pair < call.top_k) {
        const int id = call.ids[pair];
        groups.id[pair] = (short)id;
        if (id >= 0) expert = call.experts[id];
    }
    if (pair == 0) groups.begin[0] = 0;
    __syncthreads();
    if (pair < call.top_k) {
        int before = 0, all = 0;
        for (int other = 0; other < call.top_k; ++other) {
            all += groups.id[other] >= 0;
            before += groups.id[other] >= 0 && other < pair;
        }
        if (pair == 0) groups.n_active = all;
        if (groups.id[pair] >= 0) {
            groups.expert[before] = expert;
            groups.pairs[before] = (short)pair;
            groups.begin[before + 1] = before + 1;
        }
    }
    __syncthreads();
}

// How many experts appear before that pair does.
DEVICE int experts_before(const Groups& groups, int pair) {
    int count = __popc(groups.is_first[pair / 32] & ((1u << pair % 32) - 1));
    for (int word = 0; word < pair / 32; ++word) count += __popc(groups.is_first[word]);
    return count;
}

// begin[i + 1], so far the number of expert i's pairs, becomes the sum up to there: one warp.
DEVICE void sum_counts(Groups& groups) {
    const int lane = threadIdx.x;
    int total = 0;
    for (int base = 0; base < groups.n_active; base += WARP) {
        int sum = base + lane < groups.n_active ? groups.begin[base + lane + 1] : 0;
        for (int distance = 1; distance < WARP; distance *= 2) {
            const int below = SHUFFLE(sum, lane - distance >= 0 ? lane - distance : lane);
            if (lane >= distance) sum += below;
        }
        sum += total;
        if (base + lane < groups.n_active) groups.begin[base + lane + 1] = sum;
        total = SHUFFLE(sum, WARP - 1);
    }
}

// Puts each pair into its place by its rank.
DEVICE void place_pairs(Groups& groups, int n_pairs) {
    const int begin = threadIdx.x, step = blockDim.x;
    for (int pair = begin; pair < n_pairs; pair += step) {
        if (groups.id[pair] < 0) continue;
        const int active = experts_before(groups, groups.first[groups.id[pair]]);
        groups.pairs[groups.begin[active] + groups.rank[pair]] = (short)pair;
    }
    __syncthreads();
}

// Puts each expert's pairs into rising order. Every block groups them for itself, and they came in
// whatever order: of an expert with several visits one block may take the first and another the
// second, which must not both have a pair, nor both leave it to the other.
DEVICE void sort_pairs(Groups& groups, int n_pairs) {
    const int begin = threadIdx.x, step = blockDim.x;
    for (int pair = begin; pair < n_pairs; pair += step) {
        if (groups.id[pair] < 0) continue;
        const int active = experts_before(groups, groups.first[groups.id[pair]]);
        int rank = 0;
        for (int i = groups.begin[active]; i < groups.begin[active + 1]; ++i)
            rank += groups.pairs[i] < pair;
        groups.rank[pair] = (short)rank;
    }
    __syncthreads();
    place_pairs(groups, n_pairs);
}

// Cuts visits with too many pairs, from the last on: one thread.
DEVICE void split_visits(Groups& groups) {
    int n_visits = 0;
    for (int i = 0; i < groups.n_active; ++i)
        n_visits += (groups.begin[i + 1] - groups.begin[i] + VISIT_PAIRS - 1) / VISIT_PAIRS;
    int to = n_visits;
    groups.begin[to] = groups.begin[groups.n_active];
    for (int i = groups.n_active - 1; i >= 0; --i) {
        const u64 expert = groups.expert[i];
        const int begin = groups.begin[i], n_pairs = groups.begin[i + 1] - begin;
        for (int done = (n_pairs - 1) / VISIT_PAIRS * VISIT_PAIRS; done >= 0; done -= VISIT_PAIRS) {
            groups.expert[--to] = expert;
            groups.begin[to] = begin + done;
        }
    }
    groups.n_active = n_visits;
}

// Every thread of the block calls it; what it wrote may be read when it returns.
DEVICE void group_pairs(const Call& call, Groups& groups) {
    if (call.n_tokens == 1 && call.top_k <= 32) return group_one_token(call, groups);
    const int n_pairs = call.n_tokens * call.top_k;
    const int begin = threadIdx.x, step = blockDim.x;
    __shared__ int is_any_long;
    for (int pair = begin; pair < n_pairs; pair += step) {
        groups.id[pair] = (short)call.ids[pair];
        groups.begin[pair + 1] = 0;
    }
    for (int slot = begin; slot < call.n_slots; slot += step) groups.first[slot] = MAX_PAIRS;
    for (int word = begin; word < MAX_PAIRS / 32; word += step) groups.is_first[word] = 0;
    if (begin == 0) groups.begin[0] = groups.n_active = is_any_long = 0;
    __syncthreads();
    for (int pair = begin; pair < n_pairs; pair += step)
        if (groups.id[pair] >= 0) atomicMin(&groups.first[groups.id[pair]], pair);
    __syncthreads();
    for (int pair = begin; pair < n_pairs; pair += step)
        if (groups.id[pair] >= 0 && groups.first[groups.id[pair]] == pair) {
            atomicOr(&groups.is_first[pair / 32], 1u << pair % 32);
            atomicAdd(&groups.n_active, 1);
        }
    __syncthreads();
    for (int pair = begin; pair < n_pairs; pair += step) {
        if (groups.id[pair] < 0) continue;
        const int first = groups.first[groups.id[pair]], active = experts_before(groups, first);
        if (first == pair) groups.expert[active] = call.experts[groups.id[pair]];
        groups.rank[pair] = (short)atomicAdd(&groups.begin[active + 1], 1);
        if (groups.rank[pair] >= VISIT_PAIRS) is_any_long = 1;
    }
    __syncthreads();
    if (begin < WARP) sum_counts(groups);
    __syncthreads();
    place_pairs(groups, n_pairs);
    if (!is_any_long) return;
    sort_pairs(groups, n_pairs);
    if (begin == 0) split_visits(groups);
    __syncthreads();
}

// What a block of decode_down has of ROWS rows from `first_row` on, [SPLIT, n_pairs, ROWS], becomes
// the weighted sum over each token's slots, in their order.
template <int ROWS, int SPLIT>
DEVICE void combine_rows(const Call& call, const Groups& groups, const float* outputs,
                         int first_row) {
    const int n_pairs = call.n_tokens * call.top_k;
    for (int i = threadIdx.x; i < call.n_tokens * ROWS; i += blockDim.x) {
        const int token = i / ROWS, row = i % ROWS, h = first_row + row;
        if (h >= HIDDEN) continue;
        float sum = 0;
        for (int pair = token * call.top_k; pair < (token + 1) * call.top_k; ++pair) {
            if (groups.id[pair] < 0) continue;
            float output = 0;
#pragma unroll
            for (int split = 0; split < SPLIT; ++split)
                output += outputs[(split * n_pairs + pair) * ROWS + row];
#if HAS_BIAS
            output += expert_at(call.experts[groups.id[pair]]).down_bias[h];
#endif
            sum += call.weights[pair] * output;
        }
        store_float(call.out, (long long)token * HIDDEN + h, call.out_dtype, sum);
    }
}
