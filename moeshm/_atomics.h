/* Atomics, pause, futex and clock for the ring: the few things Cython cannot say itself. */
#ifndef MOESHM_ATOMICS_H
#define MOESHM_ATOMICS_H

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* The futex compares the half of a published word that holds the ARMED bit. */
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "moeshm supports little-endian machines only"
#endif
_Static_assert(__atomic_always_lock_free(sizeof(uint64_t), 0),
               "shared words must be lock-free: a lock would live in one process only");

static inline uint64_t moeshm_load_acquire(const uint64_t *word) {
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline uint64_t moeshm_load_relaxed(const uint64_t *word) {
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static inline void moeshm_store_release(uint64_t *word, uint64_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static inline uint64_t moeshm_exchange(uint64_t *word, uint64_t value) {
    return __atomic_exchange_n(word, value, __ATOMIC_ACQ_REL);
}

static inline int moeshm_compare_exchange(uint64_t *word, uint64_t expected, uint64_t desired) {
    return __atomic_compare_exchange_n(word, &expected, desired, 0, __ATOMIC_ACQ_REL,
                                       __ATOMIC_ACQUIRE);
}

static inline void moeshm_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory"); /* `yield` is a no-op on most cores */
#endif
}

/* CLOCK_MONOTONIC in nanoseconds: through the vDSO, no system call. */
static inline int64_t moeshm_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Sleeps while the low half of *word is `seen`, at most timeout_ns. Returns 0 or an errno:
 * EAGAIN (it had changed), ETIMEDOUT, EINTR. Not FUTEX_PRIVATE: the waker is another process. */
static inline int moeshm_futex_wait(uint64_t *word, uint64_t seen, int64_t timeout_ns) {
    struct timespec timeout = {timeout_ns / 1000000000, timeout_ns % 1000000000};
    if (syscall(SYS_futex, (uint32_t *)word, FUTEX_WAIT, (uint32_t)seen, &timeout, NULL, 0) == 0)
        return 0;
    return errno;
}

static inline void moeshm_futex_wake(uint64_t *word) {
    syscall(SYS_futex, (uint32_t *)word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* Whether the socket hung up or the process of the pidfd ended; -1 for either is ignored. */
static inline int moeshm_peer_is_gone(int socket_fd, int pidfd) {
    struct pollfd fds[2] = {{socket_fd, 0, 0}, {pidfd, POLLIN, 0}};
    if (poll(fds, 2, 0) <= 0)
        return 0;
    return (fds[0].revents & (POLLHUP | POLLERR | POLLNVAL)) || (fds[1].revents & POLLIN);
}

/* Counts the forks between the process that loaded the extension and this one, so that an
 * object can tell cheaply that it was opened by a parent. */
static unsigned moeshm_fork_generation;

static void moeshm_count_fork(void) { moeshm_fork_generation++; }

static inline int moeshm_watch_forks(void) {
    return pthread_atfork(NULL, NULL, moeshm_count_fork);
}

#endif
