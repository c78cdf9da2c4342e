// What the shim's own files know of the threads that run.
#pragma once

#include <string>
#include <vector>

#include "fiber.h"
#include "launch.h"
#include "simt.h"

// A copy that was ordered and has not happened.
struct Copy {
    void* to;
    const void* from;  // zeros if null
    unsigned n_bytes;
    int group;                  // of cp.async
    unsigned long long* phase;  // of cp.async.bulk; without bytes, where the thread then arrives
};

// A lane's part of a multiplication by a group of warps that was ordered and has not happened.
struct Wgmma {
    void (*perform)(void* const* arguments, int n_threads);
    int group;
    alignas(8) char argument[48];
};

struct Thread {
    // MEETING waits for `meeting`, TEAM for those of one number, POLLING for `is_true`; SPINNING
    // can go on, but lets others go first.
    enum State { READY, MEETING, TEAM, POLLING, SPINNING, ENDED } state;
    dim3 index;
    simt_context context;
    simt_meeting meeting;  // its name and line also where the thread waits for something else
    void* argument;
    bool (*is_true)(const Thread&);
    int team;
    unsigned parity;
    std::vector<Copy> copies;  // by cp.async, in order
    int n_groups;              // of copies, that were ended
    std::vector<Wgmma> wgmma;
    int n_wgmma_groups;
    int n_wgmma;  // that were ordered
    // Of stmatrix: a row, null or not written yet, and what is to be in it. Nothing says that other
    // lanes see it before they have met again.
    uint16_t* late_row;
    uint16_t late_values[8];
};

extern simt_request* request;
extern Thread* running;  // null while the scheduler runs

// The calling thread waits: it goes on once its state is READY.
void simt_wait(Thread::State state, const char* name, int line);
// Whether what is asynchronous is to happen at once.
bool simt_happens_now();
std::vector<Copy>& simt_bulk_copies();  // of the block, in order
std::vector<Thread>& simt_threads();     // of the block

// A thread looks for something from the host, which takes as long as it takes.
void simt_looks_at_host();

// Ends the launch with this error, after where it happened.
[[noreturn]] void simt_end(const std::string& message);
std::string simt_where();

// --- faults.cpp and the scheduler ---------------------------------------------------------

// While it lives, a signal that says what the launching thread did wrong ends the launch.
class FaultHandlers {
  public:
    FaultHandlers();
    FaultHandlers(const FaultHandlers&) = delete;
    ~FaultHandlers();
};

// To where the launch began, with a signal's number or 1.
void simt_leave(int signal);
void simt_say_fault(int signal, bool is_stack, const void* kernel);
