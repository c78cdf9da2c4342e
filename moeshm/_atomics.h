/* Atomics, pause, futex and clock for the ring: the few things Cython cannot say itself. */
#ifndef MOESHM_ATOMICS_H
#define MOESHM_ATOMICS_H

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

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

static inline void moeshm_clear_bits(uint64_t *word, uint64_t bits) {
    __atomic_fetch_and(word, ~bits, __ATOMIC_ACQ_REL);
}

/* Words that GPUs set and read, too. */
static inline uint32_t moeshm_load_word(const uint32_t *word) {
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static inline void moeshm_store_word(uint32_t *word, uint32_t value) {
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

/* Unless the word has changed, whether it is the host or a device that did it: their stores take the
 * cache line that this holds. */
static inline int moeshm_replace_word(uint32_t *word, uint32_t seen, uint32_t value) {
    return __atomic_compare_exchange_n(word, &seen, value, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
}

static inline void moeshm_pause(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory"); /* `yield` is a no-op on most cores */
#endif
}

/* How long a thread spins before it lets another one that is ready have its CPU, and again: a thread
 * that was just woken may have been put behind it, and would wait there until its time is over. */
#define MOESHM_GIVE_WAY_NS 20000

static inline void moeshm_give_way(void) {
    sched_yield();
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

/* From this size on a copy leaves the caches anyway, and writing past them spares the other CPU's
 * lines from being fetched only to be overwritten. Measured between two processes on an AMD EPYC,
 * there and back: 16 MiB in 3.5 ms instead of 6.2; 4 MiB in 0.75 ms instead of 0.62 where the two
 * CPUs share a cache, and instead of 2.2 where they do not; 1 MiB in 0.18 ms instead of 0.09. */
#define MOESHM_STREAM_BYTES (4u << 20)

static inline void moeshm_copy(char *to, const char *from, size_t size) {
#ifdef __SSE2__
    if (size >= MOESHM_STREAM_BYTES) {
        size_t head = -(uintptr_t)to & 63, bulk = (size - head) & ~(size_t)63;
        memcpy(to, from, head);
        to += head;
        from += head;
        for (const char *end = from + bulk; from < end; from += 64, to += 64) {
            __m128i a = _mm_loadu_si128((const __m128i *)from);
            __m128i b = _mm_loadu_si128((const __m128i *)(from + 16));
            __m128i c = _mm_loadu_si128((const __m128i *)(from + 32));
            __m128i d = _mm_loadu_si128((const __m128i *)(from + 48));
            _mm_stream_si128((__m128i *)to, a);
            _mm_stream_si128((__m128i *)(to + 16), b);
            _mm_stream_si128((__m128i *)(to + 32), c);
            _mm_stream_si128((__m128i *)(to + 48), d);
        }
        _mm_sfence(); /* such stores are not ordered with those that publish them */
        memcpy(to, from, size - head - bulk);
        return;
    }
#endif
    memcpy(to, from, size);
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
