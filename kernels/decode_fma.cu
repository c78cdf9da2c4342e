// A few tokens, without matrix instructions: every format of weights and activations, any card.
//
// The time goes into reading weights, each once: a warp loads several steps of a few rows together
// and uses them for all pairs of a visit. What keeps memory busy meanwhile is the other warps.
#include "group.cuh"
#include "values.cuh"

#define THREADS 256
#define WARPS (THREADS / WARP)
// Rows of weights that a warp has at once, and pairs whose sums it has.
#define ROWS 4
#define PAIRS 4
#define GROUPS (VISIT_PAIRS / PAIRS)
// Rows that a block of decode_down owns.
#define DOWN_ROWS 8

// How a row of K values is read, 16 bytes a lane and step.
template <int K> struct Steps {
    static constexpr int values = WARP * VALUES;
    static constexpr int all = (K + values - 1) / values;
    // Steps that are loaded together: so many that memory stays busy, and that the weights, which
    // the compiler widens ahead of their use, fit into registers. Few are empty in the last batch.
    static constexpr int batch = VALUES > 4 ? 2 : all % 4 != 0 && all % 3 == 0 ? 3 : 4;
};

// Where this lane is in the step.
template <int K> DEVICE int position(int step) {
    return step * Steps<K>::values + threadIdx.x % WARP * VALUES;
}

template <int K> DEVICE bool is_in_row(int position) {
    return K % (Steps<K>::values * Steps<K>::batch) == 0 || position < K;
}

// Each lane has N sums; it gets the sum over all lanes of the one whose number is its own modulo
// ROWS * PAIRS.
template <int N> DEVICE float sum_across_lanes(const float (&sums)[N]) {
    if constexpr (N > 1) {
        const bool is_upper = threadIdx.x & (N / 2);
        float halves[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float kept = is_upper ? sums[i + N / 2] : sums[i];
            const float given = is_upper ? sums[i] : sums[i + N / 2];
            halves[i] = kept + SHUFFLE_XOR(given, N / 2);
        }
        return sum_across_lanes(halves);
    } else {
        float total = sums[0];
#pragma unroll
        for (int mask = ROWS * PAIRS; mask < WARP; mask *= 2) total += SHUFFLE_XOR(total, mask);
        return total;
    }
}

// What the rows of weights give with `n` rows of `x`, whose numbers are in `x_rows`, over a batch
// of steps from `first` on; lane row * PAIRS + pair gets the sum of these two.
template <int K, typename X>
DEVICE float multiply_batch(const vec16 weights[ROWS][Steps<K>::batch], int first, const X* x,
                            const short* x_rows, int n) {
    float sums[ROWS * PAIRS];
#pragma unroll
    for (int i = 0; i < ROWS * PAIRS; ++i) sums[i] = 0;
#pragma unroll
    for (int step = 0; step < Steps<K>::batch; ++step)
#pragma unroll
        for (int part = 0; part < VALUES / 4; ++part) {
            const int k = position<K>(first + step) + part * 4;
            Quad row[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) row[i] = unpack_weights(weights[i][step], part);
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair) {
                if (pair < n) {
                    Quad value = zero_quad();
                    if (is_in_row<K>(k)) value = load_quad(x + (long long)x_rows[pair] * K + k);
#pragma unroll
                    for (int i = 0; i < ROWS; ++i)
#pragma unroll
                        for (int j = 0; j < 4; ++j)
                            sums[i * PAIRS + pair] += row[i].value[j] * value.value[j];
                }
            }
        }
    return sum_across_lanes(sums);
}

// As `multiply_batch` over whole rows, of which this lane's first values are at `rows`, and any
// number of pairs, PAIRS of them a group: calls `add(group, sum, is_first)` for each group and
// batch of steps. `before_use` is called when the first weights are on their way, and before `x` is
// read.
template <int K, typename X, typename Wait, typename Add>
DEVICE void multiply_rows(const WEIGHT* const rows[ROWS], const X* x, const short* x_rows, int n,
                          Wait before_use, Add add) {
#pragma unroll 1
    for (int first = 0; first < Steps<K>::all; first += Steps<K>::batch) {
        vec16 weights[ROWS][Steps<K>::batch];
#pragma unroll
        for (int step = 0; step < Steps<K>::batch; ++step) {
            const int k = position<K>(first + step);
#pragma unroll
            for (int row = 0; row < ROWS; ++row)
                weights[row][step] =
                    is_in_row<K>(k) ? load_once(rows[row] + weight_distance(k - position<K>(0)))
                                    : zero16();
        }
        before_use();
#pragma unroll 1
        for (int group = 0; group * PAIRS < n; ++group) {
            const int done = group * PAIRS;
            add(group, multiply_batch<K>(weights, first, x, x_rows + done, n - done), first == 0);
        }
    }
}

// What the lanes of a warp have for each group of pairs.
typedef float WarpSums[GROUPS][WARP];

// A warp's task is two units of a visit: their rows of gate_proj, then of up_proj.
template <typename X>
DEVICE void gate_up(const Call& call, const Groups& groups, const short* tokens, WarpSums& sums) {
    const int lane = threadIdx.x % WARP;
    for (int task = blockIdx.x * WARPS + threadIdx.x / WARP; task < groups.n_active * (INNER / 2);
         task += gridDim.x * WARPS) {
        const int visit = task / (INNER / 2), unit = task % (INNER / 2) * 2;
        const int first = groups.begin[visit], n = groups.begin[visit + 1] - first;
        const Expert expert = expert_at(groups.expert[visit]);
        const long long row = weight_index(unit, position<HIDDEN>(0), HIDDEN_PADDED);
        const long long next_row = weight_index(unit + 1, position<HIDDEN>(0), HIDDEN_PADDED);
        const WEIGHT* const rows[ROWS] = {expert.gate + row, expert.gate + next_row,
                                          expert.up + row, expert.up + next_row};
        multiply_rows<HIDDEN>(rows, (const X*)call.x, tokens + first, n, [] {},
                              [&](int group, float sum, bool is_first) {
                                  sums[group][lane] = is_first ? sum : sums[group][lane] + sum;
                              });
        const int mine = unit + lane / PAIRS % 2;
        for (int group = 0; group * PAIRS < n; ++group) {
            // The lanes that have the gate's sums get the up's.
            float gate_sum = sums[group][lane], up_sum = SHUFFLE_XOR(gate_sum, 2 * PAIRS);
            const int pair = group * PAIRS + lane % PAIRS;
            if (lane >= 2 * PAIRS || pair >= n) continue;
#if HAS_BIAS
            gate_sum += expert.gate_bias[mine];
            up_sum += expert.up_bias[mine];
#endif
            ((float*)call.inner)[(long long)groups.pairs[first + pair] * INNER + mine] =
                activate(call, gate_sum, up_sum);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, TWO_BLOCKS) decode_gate_up(Call call, Route) {
    __shared__ Groups groups;
    __shared__ short tokens[MAX_PAIRS];
    __shared__ WarpSums all_sums[WARPS];
    WarpSums& sums = all_sums[threadIdx.x / WARP];
    wait_for_previous_kernel();
    let_next_kernel_start();
    group_pairs(call, groups);
    if (groups.n_active == 0) return;
    for (int i = threadIdx.x; i < groups.begin[groups.n_active]; i += THREADS)
        tokens[i] = (short)(groups.pairs[i] / call.top_k);
    __syncthreads();
    if (call.x_dtype == F32)
        gate_up<float>(call, groups, tokens, sums);
    else if (call.x_dtype == F16)
        gate_up<f16>(call, groups, tokens, sums);
    else
        gate_up<bf16>(call, groups, tokens, sums);
}

// A block owns DOWN_ROWS rows of every expert's down_proj; a warp's task is ROWS of these, of one
// visit.
// Dynamic shared memory: float32 [n_pairs, DOWN_ROWS].
extern "C" __global__ void __launch_bounds__(THREADS, TWO_BLOCKS) decode_down(Call call, Route) {
    __shared__ Groups groups;
    DYNAMIC_SHARED(float, outputs);
    group_pairs(call, groups);
    const int lane = threadIdx.x % WARP;
    bool has_waited = false;
    const auto wait = [&] {
        if (!has_waited) wait_for_previous_kernel();
        has_waited = true;
    };
    for (int first_row = blockIdx.x * DOWN_ROWS; first_row < HIDDEN;
         first_row += gridDim.x * DOWN_ROWS) {
        for (int task = threadIdx.x / WARP; task < groups.n_active * (DOWN_ROWS / ROWS);
             task += WARPS) {
            const int visit = task / (DOWN_ROWS / ROWS), part = task % (DOWN_ROWS / ROWS) * ROWS;
            const short* pairs = groups.pairs + groups.begin[visit];
            const int n = groups.begin[visit + 1] - groups.begin[visit];
            const WEIGHT* rows[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
                rows[i] = expert_at(groups.expert[visit]).down +
                          weight_index(first_row + part + i, position<INNER>(0), INNER);
            multiply_rows<INNER>(rows, (const float*)call.inner, pairs, n, wait,
                                 [&](int group, float sum, bool is_first) {
                                     const int pair = group * PAIRS + lane % PAIRS;
                                     if (lane >= ROWS * PAIRS || pair >= n) return;
                                     float& output =
                                         outputs[pairs[pair] * DOWN_ROWS + part + lane / PAIRS];
                                     output = is_first ? sum : output + sum;
                                 });
        }
        __syncthreads();
        combine_rows<DOWN_ROWS, 1>(call, groups, outputs, first_row);
        __syncthreads();
    }
    wait();
}
