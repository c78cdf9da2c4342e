// How a launch gets from Python, which calls `simt_run_KERNEL` of a module, to the scheduler.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Who runs first: the lowest thread and block, the highest, or whom chance says.
enum { SIMT_FORWARD = 0, SIMT_REVERSE = 1, SIMT_RANDOM = 2 };

#define SIMT_MAX_THREADS 1024

// What Python says. A kernel has two arguments, structs by value.
struct simt_request {
    const void* first;
    const void* second;
    uint32_t first_bytes;
    uint32_t second_bytes;
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

// What the module knows of a kernel.
struct simt_module {
    void (*call_kernel)(const void* kernel, const void* first, const void* second);
    const void* kernel;
    uint32_t first_bytes;
    uint32_t second_bytes;
    char* static_begin;  // its static shared memory
    char* static_end;
};

// True when all blocks ran to their ends.
bool simt_launch(simt_request* request, const simt_module* module);

#if defined(SIMT_MODULE)

// The linker defines them where there is any shared memory.
extern char __start_simt_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_simt_shared[] __attribute__((weak, visibility("hidden")));

template <typename First, typename Second>
static void simt_call_kernel(const void* kernel, const void* first, const void* second) {
    ((void (*)(First, Second))kernel)(*(const First*)first, *(const Second*)second);
}

template <typename First, typename Second>
static bool simt_run(void (*kernel)(First, Second), simt_request* request) {
    const simt_module module = {simt_call_kernel<First, Second>, (const void*)kernel,
                                sizeof(First), sizeof(Second), __start_simt_shared,
                                __stop_simt_shared};
    return simt_launch(request, &module);
}

// Before each kernel: what Python calls for it.
#define SIMT_KERNEL(name, First, Second)                                         \
    extern "C" void name(First, Second);                                         \
    extern "C" __attribute__((visibility("default"))) bool simt_run_##name(      \
        simt_request* request) {                                                 \
        return simt_run(name, request);                                          \
    }

#endif
