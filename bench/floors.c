/* The floors: what this machine allows two processes to do at best, without any library.
 *
 *     floors CLIENT_CPU SERVER_CPU SECONDS MESSAGES CELL...
 *
 * A cell is `NAME:BYTES`:
 * cache_line_ping_pong  one word to and fro, both sides spinning;
 * futex_ping_pong       one word to and fro, both sides asleep in FUTEX_WAIT;
 * spin_echo             the payload is copied into a shared buffer, out of it, into a second one
 *                       and out of that: one hot buffer each way, both sides spinning;
 * memcpy                one process copies a private buffer to another.
 */
#include "bench.h"

#include <linux/futex.h>
#include <stdatomic.h>
#include <sys/syscall.h>

/* Each word has 128 bytes of its own: x86 fetches cache lines in pairs. */
typedef struct {
    _Alignas(128) _Atomic uint32_t request;
    _Alignas(128) _Atomic uint32_t reply;
    _Alignas(128) char end;
} Words;

typedef struct {
    Words *words;
    char *shared_request, *shared_reply, *sent, *received;
    size_t bytes;
    int one_cpu;    /* both sides on one CPU: a spin must yield, or each turn costs a time slice */
} Link;

typedef void (*Turn)(Link *link, uint32_t turn);

static void spin_until(_Atomic uint32_t *word, uint32_t value, int one_cpu) {
    while (atomic_load_explicit(word, memory_order_acquire) != value) {
        if (one_cpu) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
        else __builtin_ia32_pause();
#endif
    }
}

static void futex_until(_Atomic uint32_t *word, uint32_t value) {
    uint32_t seen;
    while ((seen = atomic_load_explicit(word, memory_order_acquire)) != value)
        syscall(SYS_futex, word, FUTEX_WAIT, seen, NULL, NULL, 0);
}

static void futex_set(_Atomic uint32_t *word, uint32_t value) {
    atomic_store_explicit(word, value, memory_order_release);
    syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static void cache_line_client(Link *l, uint32_t turn) {
    atomic_store_explicit(&l->words->request, turn, memory_order_release);
    spin_until(&l->words->reply, turn, l->one_cpu);
}

static void cache_line_server(Link *l, uint32_t turn) {
    spin_until(&l->words->request, turn, l->one_cpu);
    atomic_store_explicit(&l->words->reply, turn, memory_order_release);
}

static void futex_client(Link *l, uint32_t turn) {
    futex_set(&l->words->request, turn);
    futex_until(&l->words->reply, turn);
}

static void futex_server(Link *l, uint32_t turn) {
    futex_until(&l->words->request, turn);
    futex_set(&l->words->reply, turn);
}

static void echo_client(Link *l, uint32_t turn) {
    memcpy(l->shared_request, l->sent, l->bytes);
    atomic_store_explicit(&l->words->request, turn, memory_order_release);
    spin_until(&l->words->reply, turn, l->one_cpu);
    memcpy(l->received, l->shared_reply, l->bytes);
}

static void echo_server(Link *l, uint32_t turn) {
    spin_until(&l->words->request, turn, l->one_cpu);
    memcpy(l->received, l->shared_request, l->bytes);
    memcpy(l->shared_reply, l->sent, l->bytes);
    atomic_store_explicit(&l->words->reply, turn, memory_order_release);
}

static void copy_client(Link *l, uint32_t turn) {
    (void)turn;
    memcpy(l->received, l->sent, l->bytes);
    __asm__ volatile("" : : "r"(l->received) : "memory");
}

static const struct {
    const char *name;
    Turn client, server;
} floors[] = {
    {"cache_line_ping_pong", cache_line_client, cache_line_server},
    {"futex_ping_pong", futex_client, futex_server},
    {"spin_echo", echo_client, echo_server},
    {"memcpy", copy_client, NULL},
};

static int64_t durations[MAX_SAMPLES];

static void measure(const Plan *plan, const char *cell, Turn turn, Link *link) {
    /* The clock costs some 25 ns: short turns are timed several at a time. */
    long batch = link->bytes <= 4096 ? 20 : 1;
    uint32_t n = 0;
    turn(link, ++n);    /* the server is up once this returns */
    int64_t begin = now_ns(), before, now;
    do turn(link, ++n);
    while (!is_warm(plan, n, now_ns() - begin));
    long count = 0;
    begin = now = now_ns();
    do {
        before = now;
        for (long j = 0; j < batch; j++) turn(link, ++n);
        now = now_ns();
        durations[count++] = now - before;
    } while (!is_enough(plan, count, batch, now - begin));
    print_cell(cell, durations, count, batch);
}

static void run(const Plan *plan, const char *cell) {
    char name[32];
    size_t bytes;
    if (sscanf(cell, "%31[a-z_]:%zu", name, &bytes) != 2) {
        fprintf(stderr, "cell '%s'; write NAME:BYTES\n", cell);
        exit(2);
    }
    for (size_t i = 0; i < sizeof floors / sizeof *floors; i++) {
        if (strcmp(name, floors[i].name)) continue;
        Link link = {shared_pages(sizeof(Words)), shared_pages(bytes), shared_pages(bytes),
                     private_pages(bytes, 1), private_pages(bytes, 2), bytes,
                     plan->client_cpu == plan->server_cpu};
        pid_t child = 0;
        if (floors[i].server && !(child = fork_pinned(plan->server_cpu)))
            for (uint32_t turn = 1;; turn++) floors[i].server(&link, turn);
        measure(plan, cell, floors[i].client, &link);
        if (child) {
            kill(child, SIGKILL);
            waitpid(child, NULL, 0);
        }
        munmap(link.words, sizeof(Words));
        char *buffers[] = {link.shared_request, link.shared_reply, link.sent, link.received};
        for (int b = 0; b < 4; b++) munmap(buffers[b], bytes);
        return;
    }
    fprintf(stderr, "cell '%s' names no floor\n", cell);
    exit(2);
}

int main(int argc, char **argv) {
    Plan plan = parse_plan(argc, argv, 1);
    pin(plan.client_cpu);
    for (int i = 5; i < argc; i++) run(&plan, argv[i]);
    return 0;
}
