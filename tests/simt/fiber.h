// Fibers: stacks of their own on one thread, switched by hand.
//
// On x86-64 a switch saves the six registers that a called function must keep, which takes a few
// nanoseconds; elsewhere ucontext does it, with two system calls.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__x86_64__)

typedef void* simt_context;

// Saves where the caller is in `from`, and goes on at `to`.
extern "C" void simt_switch(simt_context* from, simt_context* to);
asm(R"(
.text
.type simt_switch, @function
simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch, . - simt_switch
)");

// `main` never returns; `top` is a multiple of 16.
static inline void simt_start_at(simt_context* context, char*, char* top, void (*main)()) {
    void** stack = (void**)top;
    *--stack = nullptr;  // where `main` would return to
    *--stack = (void*)main;
    *context = stack - 6;
}

#else

#include <ucontext.h>

typedef ucontext_t simt_context;

static inline void simt_switch(simt_context* from, simt_context* to) { swapcontext(from, to); }

static inline void simt_start_at(simt_context* context, char* bottom, char* top, void (*main)()) {
    getcontext(context);
    context->uc_stack.ss_sp = bottom;
    context->uc_stack.ss_size = top - bottom;
    context->uc_link = nullptr;
    makecontext(context, main, 0);
}

#endif

// Pages of zeros.
static inline char* simt_map(size_t bytes) {
    void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) abort();
    return (char*)mapped;
}

// Stacks with an inaccessible page below each.
class simt_stacks {
  public:
    static constexpr size_t bytes = 128 << 10;

    char* bottom(int index) const { return first_ + index * stride_ + page_; }

    // Shifted from stack to stack: at equal offsets in their pages, the hot ends of all would
    // share a few sets of the cache.
    char* top(int index) const { return bottom(index) + bytes - index % 16 * 192; }

    bool has_guard_at(const void* address) const {
        const size_t offset = (const char*)address - first_;
        return offset < count_ * stride_ && offset % stride_ < page_;
    }

    void need(size_t count) {
        if (count <= count_) return;
        if (first_) munmap(first_, count_ * stride_);
        first_ = simt_map(count * stride_);
        count_ = count;
        for (size_t i = 0; i < count; ++i) mprotect(first_ + i * stride_, page_, PROT_NONE);
    }

  private:
    const size_t page_ = sysconf(_SC_PAGESIZE);
    const size_t stride_ = page_ + bytes;
    char* first_ = nullptr;
    size_t count_ = 0;
};
