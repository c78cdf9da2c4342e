/* What both C programs share: clock, pinning, exact reads and writes, and the output format. */
#ifndef MOESHM_BENCH_H
#define MOESHM_BENCH_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_SAMPLES 20000

typedef struct {
    int client_cpu, server_cpu;
    double seconds;    /* how long one cell is measured */
    long messages;     /* exact number of messages of a cell; 0: as many as fit in `seconds` */
} Plan;

static void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void pin(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set)) die("sched_setaffinity");
}

/* The four arguments after `first - 1` words: CLIENT_CPU SERVER_CPU SECONDS MESSAGES. */
static Plan parse_plan(int argc, char **argv, int first) {
    if (argc < first + 5) {
        fprintf(stderr, "usage: %s ... CLIENT_CPU SERVER_CPU SECONDS MESSAGES CELL...\n", argv[0]);
        exit(2);
    }
    return (Plan){atoi(argv[first]), atoi(argv[first + 1]), atof(argv[first + 2]),
                  atol(argv[first + 3])};
}

/* Shared pages, touched, so that no measured access faults. */
static void *shared_pages(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) die("mmap");
    memset(p, 0, bytes);
    return p;
}

static char *private_pages(size_t bytes, int fill) {
    char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) die("mmap");
    memset(p, fill, bytes);
    return p;
}

/* A child pinned to its CPU that cannot outlive its parent; 0 in the child. */
static pid_t fork_pinned(int cpu) {
    pid_t parent = getpid(), child = fork();
    if (child < 0) die("fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent) _exit(1);
        pin(cpu);
    }
    return child;
}

/* Uncounted turns come first: they fault pages in and warm caches. */
static int is_warm(const Plan *plan, long turns, int64_t elapsed_ns) {
    if (plan->messages) return turns > plan->messages / 10;
    return turns >= 1000 || (double)elapsed_ns > plan->seconds * 1e8;
}

/* After `count` durations of `batch` turns each: enough for the plan? At least 10, unless told. */
static int is_enough(const Plan *plan, long count, long batch, int64_t elapsed_ns) {
    if (count == MAX_SAMPLES) return 1;
    if (plan->messages) return count * batch >= plan->messages;
    return count >= 10 && (double)elapsed_ns > plan->seconds * 1e9;
}

/* One line of JSON per cell; each duration covers `batch` messages. */
static void print_cell(const char *cell, const int64_t *durations, long count, long batch) {
    printf("{\"cell\":\"%s\",\"messages_per_duration\":%ld,\"durations_ns\":[", cell, batch);
    for (long i = 0; i < count; i++) printf(i ? ",%lld" : "%lld", (long long)durations[i]);
    printf("]}\n");
    fflush(stdout);
}

#endif
