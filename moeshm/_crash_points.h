/* Crash points: steps of a ring's end at which a test may have its own process killed or stopped.
 *
 * Nothing at all but in a build with MOESHM_CRASHPOINTS=1 (setup.py), which tools/crash_matrix.sh
 * makes; docs/crashes.md says how it is used. Each extension module that includes this has a plan
 * of its own, which tests set through ctypes. */
#ifndef MOESHM_CRASH_POINTS_H
#define MOESHM_CRASH_POINTS_H

#ifndef MOESHM_CRASHPOINTS

#define moeshm_crash_point(step, own) ((void)0)

#else

#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* In the order of the code. Of both ends, each at its own: the second half of a plan's counts is
 * the consumer's. */
#define MOESHM_STEPS(X)                                                                          \
    X(RESERVE, reserve)               /* before room is made */                                  \
    X(ROOM_MADE, room_made)                                                                      \
    X(HEADER_WRITTEN, header_written) /* and not yet held */                                     \
    X(RESERVED, reserved)                                                                        \
    X(ACQUIRE, acquire)               /* before the other's word is looked at */                 \
    X(RECORD_FOUND, record_found)                                                                \
    X(HEADER_CHECKED, header_checked) /* and not yet held */                                     \
    X(ACQUIRED, acquired)                                                                        \
    X(ABORT, abort)                                                                              \
    X(ABORTED, aborted)                                                                          \
    X(FINISH, finish)                 /* the payload is written, or read */                      \
    X(MARKED_DONE, marked_done)                                                                  \
    X(PUBLISH, publish)               /* before the word is exchanged */                         \
    X(PUBLISHED, published)                                                                      \
    X(WAKE, wake)                     /* the other was armed; before it is woken */              \
    X(WOKEN, woken)                                                                              \
    X(WAIT, wait)                     /* before spinning */                                      \
    X(ARM, arm)                       /* before the compare-exchange */                          \
    X(ARMED, armed)                                                                              \
    X(SLEEP, sleep)                   /* before FUTEX_WAIT */                                    \
    X(SLEPT, slept)                                                                              \
    X(CLOSE, close)                                                                              \
    X(STATE_STORED, state_stored)     /* CLOSED, and not yet published again */                  \
    X(CLOSE_PUBLISHED, close_published)                                                          \
    X(CLOSED, closed)                 /* before the memory is let go of */

#define MOESHM_STEP_NUMBER(name, text) MOESHM_AT_##name,
enum { MOESHM_STEPS(MOESHM_STEP_NUMBER) MOESHM_N_STEPS };

/* Steps of either end, then those that tests name themselves. */
#define MOESHM_MAX_POINTS 256

/* In memory that the test shares with the process, so that it outlives it. */
struct moeshm_crash_plan {
    int32_t point;     /* which one fires; -1 for none */
    int32_t signal;    /* sent to the thread that reaches it; 0 only tells */
    uint64_t nth;      /* at which reaching, from 1 on */
    int32_t notify_fd; /* told by a byte, before the signal */
    int32_t has_fired;
    uint64_t counts[MOESHM_MAX_POINTS];
};

#define MOESHM_EXPORTED __attribute__((used, visibility("default")))

/* Unused while it is NULL. */
MOESHM_EXPORTED struct moeshm_crash_plan *moeshm_crash_plan;

#define MOESHM_STEP_NAME(name, text) #text,
MOESHM_EXPORTED const char *const moeshm_crash_steps[] = {MOESHM_STEPS(MOESHM_STEP_NAME) NULL};

MOESHM_EXPORTED void moeshm_crash_reach(int point) {
    struct moeshm_crash_plan *plan = moeshm_crash_plan;
    if (!plan)
        return;
    uint64_t count = __atomic_add_fetch(&plan->counts[point], 1, __ATOMIC_RELAXED);
    if (point != plan->point || count != plan->nth)
        return;
    __atomic_store_n(&plan->has_fired, 1, __ATOMIC_RELEASE);
    if (write(plan->notify_fd, "!", 1) != 1)
        _exit(99);
    /* To this very thread, which then goes no step further. */
    if (plan->signal)
        syscall(SYS_tgkill, getpid(), (pid_t)syscall(SYS_gettid), plan->signal);
}

/* A producer's word lies at 256 of the control page, a consumer's at 512 (_mapping.pxd). */
static inline void moeshm_crash_point(int step, const void *own) {
    moeshm_crash_reach(step + ((uintptr_t)own % 4096 == 256 ? 0 : MOESHM_N_STEPS));
}

#endif
#endif
