// Runs a kernel's blocks one after another, each of their threads a fiber.
//
// A fiber runs until it has to wait; which warp runs next, and which of its lanes first, is the
// launch's order. A block whose threads wait for other blocks steps aside, with its shared memory.
#include "scheduler.h"

#include <algorithm>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <memory>
#include <numeric>

#include <sched.h>

dim3 threadIdx, blockIdx, blockDim, gridDim;
void* simt_dynamic_shared;
simt_request* request;
Thread* running;

static const simt_module* module;
static const simt_meeting* performing;
static simt_context scheduler;
static uint64_t random_state;
static sigjmp_buf failed;

// xorshift64*, Vigna 2014, arXiv:1402.6246.
static unsigned random_below(unsigned limit) {
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (random_state * 0x2545F4914F6CDD1Du >> 32) % limit;
}

// In the launch's order, from rising ones.
template <typename T> static void put_in_order(T* values, int n) {
    if (request->order == SIMT_REVERSE) std::reverse(values, values + n);
    if (request->order == SIMT_RANDOM)
        for (int i = n - 1; i > 0; --i) std::swap(values[i], values[random_below(i + 1)]);
}

bool simt_happens_now() {
    return request->order == SIMT_REVERSE || (request->order == SIMT_RANDOM && random_below(2));
}

// --- shared memory ------------------------------------------------------------------------

// Neither a float32, a bfloat16 nor a float16 is a number with these bits, nor is an index small.
static const char poison_bytes[2] = {'\xff', '\x7f'};

static void poison(char* begin, char* end) {
    for (char* byte = begin; byte < end; byte += 2)
        memcpy(byte, poison_bytes, std::min<size_t>(2, end - byte));
}

static bool is_poison(const char* begin, const char* end) {
    for (const char* byte = begin; byte < end; ++byte)
        if (*byte != poison_bytes[(byte - begin) % 2]) return false;
    return true;
}

// Dynamic shared memory; it ends at an inaccessible page, or less than its alignment before.
class DynamicShared {
  public:
    // As portable.cuh has it for CUDA.
    static constexpr size_t alignment = 128;

    explicit DynamicShared(size_t bytes) {
        const size_t page = sysconf(_SC_PAGESIZE), usable = (bytes + page) / page * page;
        mapped_bytes_ = usable + page;
        mapped_ = simt_map(mapped_bytes_);
        page_end_ = mapped_ + usable;
        mprotect(page_end_, page, PROT_NONE);
        begin = page_end_ - (bytes + alignment - 1) / alignment * alignment;
        end_ = begin + bytes;
    }
    DynamicShared(const DynamicShared&) = delete;
    ~DynamicShared() { munmap(mapped_, mapped_bytes_); }

    void poison_all() {
        poison(begin, end_);
        poison(end_, page_end_);
    }
    bool was_overrun() const { return !is_poison(end_, page_end_); }

    char* begin;

  private:
    char* mapped_;
    size_t mapped_bytes_;
    char* end_;       // of what was asked for
    char* page_end_;  // of what can be reached
};

// --- blocks -------------------------------------------------------------------------------

static std::string describe(const simt_meeting& meeting) {
    return std::string(meeting.name) + " in line " + std::to_string(meeting.line);
}

static std::string state_of(const Thread& thread) {
    if (thread.state == Thread::ENDED) return "ended";
    return "wait at " + describe(thread.meeting);
}

// One block of the grid after another, its threads' stacks and shared memory.
class Block {
  public:
    explicit Block(simt_stacks& stacks)
        : threads(request->block), stacks_(stacks), dynamic_(request->shared_bytes) {
        stacks_.need(request->block);
    }

    void start(unsigned number) {
        number_ = number;
        bulk_copies.clear();
        for (unsigned i = 0; i < threads.size(); ++i) {
            Thread& thread = threads[i];
            thread.state = Thread::READY;
            thread.index = {i, 0, 0};
            thread.copies.clear();
            thread.wgmma.clear();
            thread.late_row = nullptr;
            thread.n_groups = thread.n_wgmma_groups = thread.n_wgmma = 0;
            simt_start_at(&thread.context, stacks_.bottom(i), stacks_.top(i), run_thread);
        }
        poison(module->static_begin, module->static_end);
        dynamic_.poison_all();
        go_on();
    }

    // After other blocks ran.
    void resume() {
        std::copy(static_shared_.begin(), static_shared_.end(), module->static_begin);
        for (Thread& thread : threads)
            if (thread.state == Thread::SPINNING) thread.state = Thread::READY;
        go_on();
    }

    void step_aside() { static_shared_.assign(module->static_begin, module->static_end); }

    bool is_done() const { return all_ended_; }

    bool overflows_stack(const void* address) const { return stacks_.has_guard_at(address); }

    [[noreturn]] void report_standstill() const {
        std::string message = "threads wait for what does not come";
        const int n = threads.size();
        for (int first = 0, end; first < n; first = end) {
            const std::string state = state_of(threads[first]);
            for (end = first + 1; end < n && state_of(threads[end]) == state;) ++end;
            message += "; " + std::to_string(first) + " to " + std::to_string(end - 1);
            message += " " + state;
        }
        simt_end(message);
    }

    std::vector<Copy> bulk_copies;
    std::vector<Thread> threads;

  private:
    static void run_thread() {
        module->call_kernel(module->kernel, request->first, request->second);
        running->state = Thread::ENDED;
        simt_switch(&running->context, &scheduler);
    }

    // Until each thread has ended or waits for other blocks.
    void go_on() {
        blockIdx = {number_ % gridDim.x, number_ / gridDim.x % gridDim.y,
                    number_ / gridDim.x / gridDim.y};
        simt_dynamic_shared = dynamic_.begin;
        while (run_some_warp()) {
        }
        const auto is = [](Thread::State state) {
            return [=](const Thread& thread) { return thread.state == state; };
        };
        all_ended_ = std::all_of(threads.begin(), threads.end(), is(Thread::ENDED));
        if (all_ended_)
            check_end();
        else if (std::none_of(threads.begin(), threads.end(), is(Thread::SPINNING)))
            report_standstill();
    }

    bool run_some_warp() {
        const int n_warps = (threads.size() + WARP - 1) / WARP;
        const int start = request->order == SIMT_RANDOM ? random_below(n_warps) : 0;
        for (int i = 0; i < n_warps; ++i) {
            int warp = (start + i) % n_warps;
            if (request->order == SIMT_REVERSE) warp = n_warps - 1 - warp;
            const int first = warp * WARP, end = std::min<int>(first + WARP, threads.size());
            if (run_warp(first, end)) return true;
        }
        return false;
    }

    // Runs each lane that can run until it waits, then frees those that wait for nobody else.
    bool run_warp(int first, int end) {
        int lanes[WARP], n = 0;
        for (int i = first; i < end; ++i)
            if (can_run(threads[i])) lanes[n++] = i;
        if (n == 0) return false;
        put_in_order(lanes, n);
        for (int i = 0; i < n; ++i) {
            running = &threads[lanes[i]];
            threadIdx = running->index;
            simt_switch(&scheduler, &running->context);
            running = nullptr;
        }
        // Those that wait at one meeting are released by the first of them.
        const simt_meeting* tried = nullptr;
        for (int i = first; i < end; ++i) {
            const Thread& thread = threads[i];
            if (thread.state == Thread::TEAM) release_team(thread);
            if (thread.state != Thread::MEETING || (tried && thread.meeting == *tried)) continue;
            tried = &thread.meeting;
            release(i);
        }
        return true;
    }

    static bool can_run(Thread& thread) {
        if (thread.state == Thread::POLLING && thread.is_true(thread)) thread.state = Thread::READY;
        return thread.state == Thread::READY;
    }

    // The threads that this one meets, if all of them are there.
    void release(int thread) {
        const simt_meeting meeting = threads[thread].meeting;
        const int n = meeting.n_threads ? meeting.n_threads : threads.size();
        const int first = thread / n * n;
        if (first + n > (int)threads.size()) return;
        void* arguments[SIMT_MAX_THREADS];
        for (int i = 0; i < n; ++i) {
            const Thread& other = threads[first + i];
            if (other.state != Thread::MEETING || !(other.meeting == meeting)) return;
            arguments[i] = other.argument;
        }
        performing = &meeting;
        if (meeting.perform) meeting.perform(arguments, n);
        performing = nullptr;
        for (int i = 0; i < n; ++i) threads[first + i].state = Thread::READY;
    }

    void release_team(const Thread& one) {
        std::vector<Thread*> team;
        for (Thread& other : threads)
            if (other.state == Thread::TEAM && other.team == one.team) team.push_back(&other);
        const int n = one.meeting.n_threads;
        for (const Thread* other : team)
            if (other->meeting.n_threads != n)
                simt_end("team " + std::to_string(one.team) + " has " + std::to_string(n) +
                         " threads in line " + std::to_string(one.meeting.line) + " and " +
                         std::to_string(other->meeting.n_threads) + " in line " +
                         std::to_string(other->meeting.line));
        if ((int)team.size() < n) return;
        for (Thread* other : team) other->state = Thread::READY;
    }

    void check_end() const {
        for (const Thread& thread : threads)
            if (!thread.wgmma.empty()) simt_end("ended before its wgmma did");
        if (dynamic_.was_overrun()) simt_end("writes past the end of its dynamic shared memory");
        if (!bulk_copies.empty()) simt_end("ended before a bulk copy did");
        for (size_t i = 0; i < threads.size(); ++i) {
            const int expected = threads[i / 128 * 128].n_wgmma;
            if (threads[i].n_wgmma != expected)
                simt_end("threads " + std::to_string(i / 128 * 128) + " and " + std::to_string(i) +
                         " of a group ran " + std::to_string(expected) + " and " +
                         std::to_string(threads[i].n_wgmma) + " wgmma");
        }
    }

    simt_stacks& stacks_;
    DynamicShared dynamic_;
    std::vector<char> static_shared_;  // while others run
    unsigned number_ = 0;
    bool all_ended_ = false;
};

static Block* current;
static bool looks_at_host;  // since the round began

void simt_looks_at_host() { looks_at_host = true; }

// --- the grid -----------------------------------------------------------------------------

// Static, because an error leaves by a jump: what the last launch had is freed by the next.
static std::vector<std::unique_ptr<Block>> blocks;
static std::deque<simt_stacks> stacks;  // kept from launch to launch

static Block* new_block() {
    if (stacks.size() == blocks.size()) stacks.emplace_back();
    blocks.push_back(std::make_unique<Block>(stacks[blocks.size()]));
    return blocks.back().get();
}

static void run_grid() {
    std::vector<unsigned> numbers(gridDim.x * gridDim.y * gridDim.z);
    std::iota(numbers.begin(), numbers.end(), 0);
    put_in_order(numbers.data(), numbers.size());
    std::vector<Block*> waiting;
    for (const unsigned number : numbers) {
        if (!current) current = new_block();
        current->start(number);
        if (current->is_done()) continue;
        current->step_aside();
        waiting.push_back(current);
        current = nullptr;
    }
    // Far more than blocks have to say to each other.
    for (int round = 0; round < 10000 && !waiting.empty(); ++round) {
        if (looks_at_host) {
            round = 0;
            sched_yield();
        }
        looks_at_host = false;
        for (size_t i = 0; i < waiting.size();) {
            current = waiting[i];
            current->resume();
            if (current->is_done()) {
                waiting.erase(waiting.begin() + i);
            } else {
                current->step_aside();
                ++i;
            }
        }
    }
    if (!waiting.empty()) current->report_standstill();
}

bool simt_launch(simt_request* of_python, const simt_module* of_kernel) {
    request = of_python;
    module = of_kernel;
    request->fault_address = request->fault_code = 0;
    if (request->first_bytes != module->first_bytes ||
        request->second_bytes != module->second_bytes) {
        snprintf(request->error, request->error_bytes,
                 "its structs have %u and %u bytes in Python, %u and %u in the kernel",
                 request->first_bytes, request->second_bytes, module->first_bytes,
                 module->second_bytes);
        return false;
    }
    if (request->block < 1 || request->block > SIMT_MAX_THREADS) {
        snprintf(request->error, request->error_bytes,
                 "a block of %u threads; 1 to %d are possible", request->block, SIMT_MAX_THREADS);
        return false;
    }
    gridDim = {request->grid[0], request->grid[1], request->grid[2]};
    blockDim = {request->block, 1, 1};
    random_state = request->seed * 2 + 1;
    running = nullptr;
    performing = nullptr;
    current = nullptr;
    blocks.clear();
    const FaultHandlers handlers;
    const int failure = sigsetjmp(failed, 1);
    if (failure > 1) {
        const void* address = (const void*)request->fault_address;
        const bool is_stack = current && current->overflows_stack(address);
        simt_say_fault(failure, is_stack, module->kernel);
    }
    if (failure) return false;
    run_grid();
    return true;
}

void simt_leave(int signal) { siglongjmp(failed, signal); }

// --- what kernels and the shim's other files call -----------------------------------------

std::string simt_where() {
    const auto text = [](unsigned number) { return std::to_string(number); };
    std::string where = "block (" + text(blockIdx.x) + ", " + text(blockIdx.y) + ", " +
                        text(blockIdx.z) + ")";
    if (running) where += ", thread " + text(running->index.x);
    if (performing) where += ", " + describe(*performing);
    return where;
}

void simt_end(const std::string& message) {
    snprintf(request->error, request->error_bytes, "%s: %s", simt_where().c_str(), message.c_str());
    simt_leave(1);
    abort();
}

void simt_fail(const char* format, ...) {
    char message[300];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    simt_end(message);
}

static void write_late_row() {
    if (running->late_row) memcpy(running->late_row, running->late_values, 16);
    running->late_row = nullptr;
}

void simt_wait(Thread::State state, const char* name, int line) {
    write_late_row();
    running->state = state;
    running->meeting.name = name;
    running->meeting.line = line;
    simt_switch(&running->context, &scheduler);
}

void simt_meet(const simt_meeting& meeting, void* argument) {
    write_late_row();
    running->state = Thread::MEETING;
    running->meeting = meeting;
    running->argument = argument;
    simt_switch(&running->context, &scheduler);
}

std::vector<Copy>& simt_bulk_copies() { return current->bulk_copies; }

std::vector<Thread>& simt_threads() { return current->threads; }
