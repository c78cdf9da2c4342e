from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from "_atomics.h" nogil:
    int64_t MOESHM_GIVE_WAY_NS
    uint64_t moeshm_load_acquire(const uint64_t *word)
    uint64_t moeshm_load_relaxed(const uint64_t *word)
    void moeshm_store_release(uint64_t *word, uint64_t value)
    uint64_t moeshm_exchange(uint64_t *word, uint64_t value)
    bint moeshm_compare_exchange(uint64_t *word, uint64_t expected, uint64_t desired)
    void moeshm_clear_bits(uint64_t *word, uint64_t bits)
    uint32_t moeshm_load_word(const uint32_t *word)
    void moeshm_store_word(uint32_t *word, uint32_t value)
    bint moeshm_replace_word(uint32_t *word, uint32_t seen, uint32_t value)
    void moeshm_pause()
    void moeshm_give_way()
    int64_t moeshm_now_ns()
    int moeshm_futex_wait(uint64_t *word, uint64_t seen, int64_t timeout_ns)
    void moeshm_futex_wake(uint64_t *word)
    void moeshm_copy(char *to, const char *source, size_t size)
    bint moeshm_peer_is_gone(int socket_fd, int pidfd)
    unsigned moeshm_fork_generation
    int moeshm_watch_forks()
