// What of matrix.h needs no template, and 16-bit floats.
#include "scheduler.h"

#if WARP == 32

void simt_multiply(float* c, const float* a, const float* b, int columns) {
    for (int row = 0; row < 16; ++row)
        for (int first = 0; first < columns; first += 8) {
            float* const result = c + row * columns + first;
            double sums[8];
            for (int i = 0; i < 8; ++i) sums[i] = result[i];
            for (int k = 0; k < 16; ++k)
                for (int i = 0; i < 8; ++i)
                    sums[i] += (double)a[row * 16 + k] * b[k * columns + first + i];
            for (int i = 0; i < 8; ++i) result[i] = (float)sums[i];
        }
}

// The row that a lane read, and where its results go.
struct Row {
    uint32_t words[4];
    uint32_t* result;
};

static void perform_ldmatrix(void* const* arguments, int) {
    Row** rows = (Row**)arguments;
    for (int lane = 0; lane < 32; ++lane)
        for (int tile = 0; tile < 4; ++tile)
            rows[lane]->result[tile] = rows[tile * 8 + lane / 4]->words[lane % 4];
}

void simt_ldmatrix_x4(uint32_t r[4], const void* shared, int line) {
    if ((uintptr_t)shared % 16) simt_fail("ldmatrix reads a row that is not aligned to 16 bytes");
    Row row;
    memcpy(row.words, shared, 16);
    row.result = r;
    simt_meet({"ldmatrix", line, 32, perform_ldmatrix}, &row);
}

struct Fragments {
    uint16_t* row;
    uint32_t words[4];
    Thread* thread;
};

// Until the lanes meet again, rows are NaN.
static void perform_stmatrix(void* const* arguments, int) {
    Fragments** lanes = (Fragments**)arguments;
    for (int tile = 0; tile < 4; ++tile)
        for (int row = 0; row < 8; ++row) {
            const Fragments& to = *lanes[tile * 8 + row];
            memset(to.row, 0xff, 16);
            to.thread->late_row = to.row;
            for (int i = 0; i < 8; ++i)
                to.thread->late_values[i] =
                    lanes[i * 4 + row / 2]->words[tile] >> (row % 2 * 16);
        }
}

void simt_stmatrix_x4_trans(void* shared, const uint32_t r[4], int line) {
    if ((uintptr_t)shared % 16) simt_fail("stmatrix writes a row that is not aligned to 16 bytes");
    Fragments mine = {(uint16_t*)shared, {r[0], r[1], r[2], r[3]}, running};
    simt_meet({"stmatrix", line, 32, perform_stmatrix}, &mine);
}

// --- wgmma --------------------------------------------------------------------------------

// Those of the warp whose group is older than `end`, in order.
static void perform_wgmma(Thread** lanes, int end) {
    for (int lane = 1; lane < 32; ++lane)
        if (lanes[lane]->wgmma.size() != lanes[0]->wgmma.size() ||
            lanes[lane]->n_wgmma_groups != lanes[0]->n_wgmma_groups)
            simt_fail("lanes 0 and %d of a warp do not have the same under way", lane);
    size_t n = 0;
    for (; n < lanes[0]->wgmma.size() && lanes[0]->wgmma[n].group < end; ++n) {
        void* arguments[32];
        for (int lane = 0; lane < 32; ++lane) arguments[lane] = lanes[lane]->wgmma[n].argument;
        lanes[0]->wgmma[n].perform(arguments, 32);
    }
    for (int lane = 0; lane < 32; ++lane) {
        std::vector<Wgmma>& mine = lanes[lane]->wgmma;
        mine.erase(mine.begin(), mine.begin() + n);
    }
}

static void perform_order(void* const* arguments, int) {
    Thread** lanes = (Thread**)arguments;
    if (simt_happens_now()) perform_wgmma(lanes, lanes[0]->n_wgmma_groups + 1);
}

void simt_order_wgmma(void (*perform)(void* const* arguments, int n_threads), const void* argument,
                      unsigned n_bytes, int line) {
    Wgmma wgmma = {perform, running->n_wgmma_groups, {}};
    if (n_bytes > sizeof wgmma.argument) simt_fail("Widen has too many captures");
    memcpy(wgmma.argument, argument, n_bytes);
    running->wgmma.push_back(wgmma);
    ++running->n_wgmma;
    simt_meet({"wgmma", line, 32, perform_order}, running);
}

void simt_commit_wgmma() { ++running->n_wgmma_groups; }

struct WaitForWgmma {
    Thread* thread;
    int n_newest;
};

static void perform_wait(void* const* arguments, int) {
    Thread* lanes[32];
    for (int lane = 0; lane < 32; ++lane) lanes[lane] = ((WaitForWgmma*)arguments[lane])->thread;
    perform_wgmma(lanes, lanes[0]->n_wgmma_groups - ((WaitForWgmma*)arguments[0])->n_newest);
}

void simt_wait_for_wgmma(int n_newest, int line) {
    WaitForWgmma argument = {running, n_newest};
    simt_meet({"wait_for_wgmma", line, 32, perform_wait}, &argument);
}

#endif

// --- 16-bit floats ------------------------------------------------------------------------

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

float simt_f16_to_float(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16;
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    // Subnormals are multiples of 2^-24.
    if (exponent == 0) return float_of(sign | bits_of(fraction * 0x1p-24f));
    if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
    return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

uint16_t simt_float_to_f16(float value) {
    const uint16_t sign = bits_of(value) >> 16 & 0x8000;
    const uint32_t bits = bits_of(value) & 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00 | (bits >> 13 & 0x3ff);
    // 65520 is the first that rounds to infinity.
    if (bits >= 0x477ff000) return sign | 0x7c00;
    // Below 2^-14 the float16 are 2^-24 apart, like the float32 from 0.5 on.
    if (bits < 0x38800000) return sign | (bits_of(float_of(bits) + 0.5f) - bits_of(0.5f));
    return sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}
