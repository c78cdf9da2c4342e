// Asynchronous copies, phases, teams and other blocks; async.h says when copies happen.
#include <algorithm>
#include <ctime>

#include "scheduler.h"

static void check_aligned(const void* shared, const void* global, unsigned n_bytes) {
    if ((uintptr_t)shared % 16 || (uintptr_t)global % 16 || n_bytes % 16)
        simt_fail("copies %u bytes from %p to %p, which are not all multiples of 16", n_bytes,
                  global, shared);
}

// So that what cannot be read is reported where the copy was ordered.
static void touch(const void* begin, unsigned n_bytes) {
    (void)*(const volatile char*)begin;
    (void)*((const volatile char*)begin + n_bytes - 1);
}

static void perform(const Copy& copy) {
    if (copy.n_bytes == 0)
        simt_arrive(copy.phase, 0);
    else if (copy.from)
        memcpy(copy.to, copy.from, copy.n_bytes);
    else
        memset(copy.to, 0, copy.n_bytes);
}

// --- cp.async -----------------------------------------------------------------------------

void simt_copy_async(void* shared, const void* global, bool is_valid) {
    if (!is_valid) global = nullptr;
    check_aligned(shared, global, 16);
    if (global) touch(global, 16);
    const Copy copy = {shared, global, 16, running->n_groups, nullptr};
    if (simt_happens_now())
        perform(copy);
    else
        running->copies.push_back(copy);
}

void simt_commit_copies() { ++running->n_groups; }

void simt_wait_for_copies(int n_newest) {
    std::vector<Copy>& copies = running->copies;
    const auto is_newer = [=](const Copy& copy) {
        return copy.group >= running->n_groups - n_newest;
    };
    const auto end = std::find_if(copies.begin(), copies.end(), is_newer);
    std::for_each(copies.begin(), end, perform);
    copies.erase(copies.begin(), end);
}

// --- mbarrier and cp.async.bulk -----------------------------------------------------------

namespace {

// What the 64 bits of a phase are here; on a GPU nobody may look into them.
struct Phase {
    int32_t n_bytes;  // that are expected and not there yet
    unsigned n_arrivals : 15;
    unsigned n_missing : 15;
    unsigned parity : 1;
    unsigned is_set : 1;
};
static_assert(sizeof(Phase) == 8, "a phase has 64 bits");

}  // namespace

static Phase& at(unsigned long long* phase) {
    Phase& state = *(Phase*)phase;
    if (!state.is_set || state.n_missing > state.n_arrivals)
        simt_fail("uses a phase before its initialisation");
    return state;
}

static void end_if_complete(Phase& phase) {
    if (phase.n_missing || phase.n_bytes) return;
    phase.parity ^= 1;
    phase.n_missing = phase.n_arrivals;
}

void simt_init_phase(unsigned long long* phase, int n_arrivals) {
    *(Phase*)phase = {0, (unsigned)n_arrivals, (unsigned)n_arrivals, 0, 1};
}

void simt_arrive(unsigned long long* phase, unsigned n_bytes) {
    Phase& state = at(phase);
    if (state.n_missing == 0)
        simt_fail("arrives once more than a phase's %u times", state.n_arrivals);
    --state.n_missing;
    state.n_bytes += n_bytes;
    end_if_complete(state);
}

static void perform_bulk(const Copy& copy) {
    perform(copy);
    Phase& state = at(copy.phase);
    state.n_bytes -= copy.n_bytes;
    end_if_complete(state);
}

void simt_arrive_after_copies(unsigned long long* phase) {
    at(phase);
    const Copy arrival = {nullptr, nullptr, 0, running->n_groups, phase};
    if (running->copies.empty() && simt_happens_now())
        perform(arrival);
    else
        running->copies.push_back(arrival);
}

// A thread's copies up to its arrival at this phase, if it has one on its way.
static void perform_until_arrival(std::vector<Copy>& copies, const unsigned long long* phase) {
    const auto is_arrival = [=](const Copy& copy) { return copy.phase == phase; };
    const auto arrival = std::find_if(copies.begin(), copies.end(), is_arrival);
    if (arrival == copies.end()) return;
    std::for_each(copies.begin(), arrival + 1, perform);
    copies.erase(copies.begin(), arrival + 1);
}

// The copies of a phase that somebody waits for happen now.
static bool has_ended(const Thread& thread) {
    unsigned long long* phase = (unsigned long long*)thread.argument;
    if (at(phase).parity != thread.parity) return true;
    std::vector<Copy>& copies = simt_bulk_copies();
    const auto is_other = [=](const Copy& copy) { return copy.phase != phase; };
    const auto mine = std::stable_partition(copies.begin(), copies.end(), is_other);
    std::for_each(mine, copies.end(), perform_bulk);
    copies.erase(mine, copies.end());
    for (Thread& other : simt_threads()) perform_until_arrival(other.copies, phase);
    return at(phase).parity != thread.parity;
}

void simt_wait_for_phase(unsigned long long* phase, unsigned parity, int line) {
    running->argument = phase;
    running->parity = parity;
    running->is_true = has_ended;
    simt_wait(Thread::POLLING, "wait_for_phase", line);
}

void simt_copy_bulk(void* shared, const void* global, unsigned n_bytes, unsigned long long* phase) {
    check_aligned(shared, global, n_bytes);
    if (n_bytes == 0) return;
    touch(global, n_bytes);
    at(phase);
    const Copy copy = {shared, global, n_bytes, 0, phase};
    if (simt_happens_now())
        perform_bulk(copy);
    else
        simt_bulk_copies().push_back(copy);
}

// --- others -------------------------------------------------------------------------------

void simt_sync_team(int number, int n_threads, int line) {
    if (number < 1 || number > 15 || n_threads % 32)
        simt_fail("team %d of %d threads: numbers are 1 to 15, threads multiples of 32", number,
                  n_threads);
    running->team = number;
    running->meeting.n_threads = n_threads;
    simt_wait(Thread::TEAM, "sync_team", line);
}

uint32_t simt_load_acquire(const uint32_t* address, int line) {
    simt_wait(Thread::SPINNING, "load_acquire", line);
    return *address;
}

void simt_wait_for_block(int line) { simt_wait(Thread::SPINNING, "wait_for_block", line); }

void simt_wait_for_host(int line) {
    simt_looks_at_host();
    simt_wait(Thread::SPINNING, "wait_for_host", line);
}

uint64_t simt_now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}
