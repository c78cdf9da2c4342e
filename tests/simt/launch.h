// How a launch gets from Python, which calls `simt_run` of a module, to the scheduler.
#pragma once

#include <cstddef>
#include <cstdint>

// Who runs first: the lowest thread and block, the highest, or whom chance says.
enum { SIMT_FORWARD = 0, SIMT_REVERSE = 1, SIMT_RANDOM = 2 };

#define SIMT_MAX_THREADS 1024

// What Python says.
struct simt_request {
    const void* kernel;
    const void* call;
    const void* route;
    uint32_t call_bytes;
    uint32_t route_bytes;
    uint32_t grid[3];
    uint32_t block;
    uint64_t shared_bytes;
    uint64_t seed;
    int32_t order;
    uint32_t error_bytes;
    char* error;             // out: what went wrong, ended by a zero
    uint64_t fault_address;  // out: where memory could not be reached, or 0
    uint64_t fault_code;     // out: the instruction, from the start of the module's file, or 0
};

// What the module knows.
struct simt_module {
    void (*call_kernel)(const void* kernel, const void* call, const void* route);
    uint32_t call_bytes;
    uint32_t route_bytes;
    char* static_begin;  // its static shared memory
    char* static_end;
};

// True when all blocks ran to their ends.
bool simt_launch(simt_request* request, const simt_module* module);

#if defined(SIMT_MODULE)

// The linker defines them where there is any shared memory.
extern char __start_simt_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_simt_shared[] __attribute__((weak, visibility("hidden")));

static void simt_call_kernel(const void* kernel, const void* call, const void* route) {
    ((void (*)(Call, Route))kernel)(*(const Call*)call, *(const Route*)route);
}

extern "C" __attribute__((visibility("default"))) bool simt_run(simt_request* request) {
    const simt_module module = {simt_call_kernel, sizeof(Call), sizeof(Route), __start_simt_shared,
                                __stop_simt_shared};
    return simt_launch(request, &module);
}

#endif
