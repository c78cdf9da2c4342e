// What a GPU does meanwhile: asynchronous copies, phases, barriers of some warps, other blocks.
//
// A copy may happen at any time between its order and its end. Here the launch's order says when:
// "forward" as late as can be, so that a missing wait shows as old data; "reverse" at once, so that
// a copy over what is still being read shows; a random order now and then.
#pragma once

// --- cp.async -----------------------------------------------------------------------------

// 16 bytes, zeros if not `is_valid`.
void simt_copy_async(void* shared, const void* global, bool is_valid);
// Ends a group of copies.
void simt_commit_copies();
// This thread's copies are there but for the newest groups.
void simt_wait_for_copies(int n_newest);

// --- mbarrier and cp.async.bulk -----------------------------------------------------------

// A phase ends when `n_arrivals` have arrived and as many bytes as they expected were copied.
void simt_init_phase(unsigned long long* phase, int n_arrivals);
void simt_arrive(unsigned long long* phase, unsigned n_bytes);
// cp.async.mbarrier.arrive.noinc: once this thread's copies so far have happened.
void simt_arrive_after_copies(unsigned long long* phase);
// Until the phase of that parity has ended; the first has parity 0.
void simt_wait_for_phase(unsigned long long* phase, unsigned parity, int line = __builtin_LINE());
void simt_copy_bulk(void* shared, const void* global, unsigned n_bytes, unsigned long long* phase);

// --- others -------------------------------------------------------------------------------

// bar.sync: waits for `n_threads` of the block, from wherever they call it.
void simt_sync_team(int number, int n_threads, int line = __builtin_LINE());

// For loops that wait for another block: these let all others run first.
uint32_t simt_load_acquire(const uint32_t* address, int line = __builtin_LINE());
void simt_wait_for_block(int line = __builtin_LINE());
// The same for the host, for as long as it takes.
void simt_wait_for_host(int line = __builtin_LINE());
uint64_t simt_now_ns();
