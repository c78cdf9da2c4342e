/* The protocol that moeshm re-thinks (Luce-Org/lucebox pull requests #312 and #388), in C.
 *
 *     three_pipes FLAVOUR CLIENT_CPU SERVER_CPU SECONDS MESSAGES CELL...
 *
 * A parent talks to its child by three pipes: a line of text per call, the request's payload, and
 * an int32 status that the reply's payload follows. FLAVOUR `pipe` sends both payloads through
 * the pipes; `shared` puts them into one shared buffer, where the reply overwrites the request,
 * and leaves the pipes the command and the status. One call is in flight; every read and write
 * blocks; the pipes have their default capacity, as there.
 *
 * A cell is `REQUEST_BYTES:REPLY_BYTES`, or `trace:FILE`: the calls of a file, a line of
 * `REQUEST_BYTES REPLY_BYTES` each, once in their order, as one duration. The child copies the
 * request into private memory and answers from private memory; the parent does the same, so each
 * payload is written and read on both sides.
 */
#include "bench.h"

typedef struct {
    FILE *commands;
    int payload, status;
    char *shared;    /* NULL: payloads go through the pipes */
    char *sent, *received;
    size_t request_bytes, reply_bytes;
} Parent;

typedef struct {
    FILE *commands;
    int payload, status;
    char *shared;
    char *sent, *received;
} Child;

static void write_exact(int fd, const void *data, size_t bytes) {
    const char *at = data;
    while (bytes) {
        ssize_t n = write(fd, at, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) die("write");
        at += n;
        bytes -= (size_t)n;
    }
}

static void read_exact(int fd, void *data, size_t bytes) {
    char *at = data;
    while (bytes) {
        ssize_t n = read(fd, at, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) die("read");
        at += n;
        bytes -= (size_t)n;
    }
}

static void call(Parent *p) {
    int32_t status;
    if (p->shared) memcpy(p->shared, p->sent, p->request_bytes);
    fprintf(p->commands, "moe 0 %zu %zu\n", p->request_bytes, p->reply_bytes);
    fflush(p->commands);
    if (!p->shared) write_exact(p->payload, p->sent, p->request_bytes);
    read_exact(p->status, &status, sizeof status);
    if (status) {
        fprintf(stderr, "the child answered status %d\n", status);
        exit(1);
    }
    if (p->shared) memcpy(p->received, p->shared, p->reply_bytes);
    else read_exact(p->status, p->received, p->reply_bytes);
}

static void serve(Child *c) {
    char line[256];
    int layer;
    size_t request_bytes, reply_bytes;
    while (fgets(line, sizeof line, c->commands)) {
        int32_t status =
            sscanf(line, "moe %d %zu %zu", &layer, &request_bytes, &reply_bytes) == 3 ? 0 : -1;
        if (status) {
            write_exact(c->status, &status, sizeof status);
            continue;
        }
        if (c->shared) memcpy(c->received, c->shared, request_bytes);
        else read_exact(c->payload, c->received, request_bytes);
        if (c->shared) memcpy(c->shared, c->sent, reply_bytes);
        write_exact(c->status, &status, sizeof status);
        if (!c->shared) write_exact(c->status, c->sent, reply_bytes);
    }
    _exit(0);
}

/* Makes the pipes, starts the child; the parent's ends are in `p`. */
static pid_t start(const Plan *plan, Parent *p, int is_shared, size_t capacity) {
    int commands[2], payload[2], status[2];
    if (pipe(commands) || pipe(payload) || pipe(status)) die("pipe");
    p->shared = is_shared ? shared_pages(capacity) : NULL;
    pid_t child = fork_pinned(plan->server_cpu);
    if (child == 0) {
        close(commands[1]), close(payload[1]), close(status[0]);
        Child c = {fdopen(commands[0], "r"), payload[0], status[1], p->shared,
                   private_pages(capacity, 3), private_pages(capacity, 4)};
        serve(&c);
    }
    close(commands[0]), close(payload[0]), close(status[1]);
    p->commands = fdopen(commands[1], "w");
    p->payload = payload[1];
    p->status = status[0];
    p->sent = private_pages(capacity, 1);
    p->received = private_pages(capacity, 2);
    return child;
}

#define WARM_UP_CALLS 16

static int64_t durations[MAX_SAMPLES];

static void measure(const Plan *plan, Parent *p, const char *cell) {
    long calls = 0, count = 0;
    int64_t begin = now_ns(), before, now;
    do call(p);
    while (!is_warm(plan, ++calls, now_ns() - begin));
    begin = now = now_ns();
    do {
        before = now;
        call(p);
        now = now_ns();
        durations[count++] = now - before;
    } while (!is_enough(plan, count, 1, now - begin));
    print_cell(cell, durations, count, 1);
}

typedef struct {
    size_t request_bytes, reply_bytes;
} Call;

static const char TRACE[] = "trace:";

/* The calls of a cell, and how many. */
static Call *read_calls(const char *cell, long *count) {
    Call one, *calls = NULL;
    long room = 0;
    *count = 0;
    if (strncmp(cell, TRACE, strlen(TRACE))) {
        if (sscanf(cell, "%zu:%zu", &one.request_bytes, &one.reply_bytes) != 2) {
            fprintf(stderr, "cell '%s'; write REQUEST_BYTES:REPLY_BYTES\n", cell);
            exit(2);
        }
        if (!(calls = malloc(sizeof one))) die("malloc");
        calls[(*count)++] = one;
        return calls;
    }
    FILE *file = fopen(cell + strlen(TRACE), "r");
    if (!file) die(cell);
    while (fscanf(file, "%zu %zu", &one.request_bytes, &one.reply_bytes) == 2) {
        if (*count == room) {
            room = room ? 2 * room : 1024;
            if (!(calls = realloc(calls, (size_t)room * sizeof one))) die("realloc");
        }
        calls[(*count)++] = one;
    }
    if (!*count || !feof(file)) {
        fprintf(stderr, "cell '%s'; write lines of REQUEST_BYTES REPLY_BYTES\n", cell);
        exit(2);
    }
    fclose(file);
    return calls;
}

static int64_t run_calls(Parent *p, const Call *calls, long count) {
    int64_t begin = now_ns();
    for (long i = 0; i < count; i++) {
        p->request_bytes = calls[i].request_bytes;
        p->reply_bytes = calls[i].reply_bytes;
        call(p);
    }
    return now_ns() - begin;
}

/* A few calls go first, uncounted. */
static void replay(Parent *p, const char *cell, const Call *calls, long count) {
    run_calls(p, calls, count < WARM_UP_CALLS ? count : WARM_UP_CALLS);
    durations[0] = run_calls(p, calls, count);
    print_cell(cell, durations, 1, count);
}

int main(int argc, char **argv) {
    Plan plan = parse_plan(argc, argv, 2);
    int is_shared = !strcmp(argv[1], "shared");
    if (!is_shared && strcmp(argv[1], "pipe")) {
        fprintf(stderr, "flavour '%s'; choose pipe or shared\n", argv[1]);
        return 2;
    }
    size_t capacity = 4096;
    long count;
    for (int i = 6; i < argc; i++) {
        Call *calls = read_calls(argv[i], &count);
        for (long j = 0; j < count; j++) {
            if (calls[j].request_bytes > capacity) capacity = calls[j].request_bytes;
            if (calls[j].reply_bytes > capacity) capacity = calls[j].reply_bytes;
        }
        free(calls);
    }
    pin(plan.client_cpu);
    Parent p = {0};
    pid_t child = start(&plan, &p, is_shared, capacity);
    for (int i = 6; i < argc; i++) {
        Call *calls = read_calls(argv[i], &count);
        if (strncmp(argv[i], TRACE, strlen(TRACE))) {
            p.request_bytes = calls[0].request_bytes;
            p.reply_bytes = calls[0].reply_bytes;
            measure(&plan, &p, argv[i]);
        } else {
            replay(&p, argv[i], calls, count);
        }
        free(calls);
    }
    fclose(p.commands);
    waitpid(child, NULL, 0);
    return 0;
}
