// What a kernel does wrong and the processor notices, as errors of its launch.
#include <dlfcn.h>
#include <pthread.h>
#include <ucontext.h>

#include <csignal>
#include <cstdio>

#include "scheduler.h"

static const int n_signals = 4;
static const int signals[n_signals] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
static struct sigaction old_actions[n_signals];
// Handlers have a stack of their own, because a fiber's may be what is used up.
static stack_t old_stack;
static char stack[1 << 16];
static pthread_t launcher;

static void restore_actions() {
    for (int i = 0; i < n_signals; ++i) sigaction(signals[i], &old_actions[i], nullptr);
}

static void on_fault(int signal, siginfo_t* info, void* context) {
    // What another thread did comes again, for whom it concerns.
    if (!pthread_equal(pthread_self(), launcher)) return restore_actions();
    if (signal == SIGSEGV || signal == SIGBUS) request->fault_address = (uint64_t)info->si_addr;
#if defined(__x86_64__)
    request->fault_code = ((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
#else
    (void)context;
#endif
    simt_leave(signal);
}

FaultHandlers::FaultHandlers() {
    launcher = pthread_self();
    stack_t mine = {};
    mine.ss_sp = stack;
    mine.ss_size = sizeof stack;
    sigaltstack(&mine, &old_stack);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < n_signals; ++i) sigaction(signals[i], &action, &old_actions[i]);
}

FaultHandlers::~FaultHandlers() {
    restore_actions();
    sigaltstack(&old_stack, nullptr);
}

static const char* meaning(int signal, bool is_stack) {
    if (is_stack) return "uses more stack than a thread has";
    if (signal == SIGILL) return "uses an address that is not aligned, or an index out of bounds";
    if (signal == SIGFPE) return "divides an integer by zero";
    return "touches memory that it cannot reach";
}

// Where the file that this is in was loaded, or null.
static void* start_of_file(const void* code) {
    Dl_info info;
    return dladdr(code, &info) ? info.dli_fbase : nullptr;
}

void simt_say_fault(int signal, bool is_stack, const void* kernel) {
    snprintf(request->error, request->error_bytes, "%s: %s", simt_where().c_str(),
             meaning(signal, is_stack));
    const void* start = start_of_file(kernel);
    if (start != start_of_file((const void*)request->fault_code))
        request->fault_code = 0;
    else
        request->fault_code -= (uint64_t)start;
}
