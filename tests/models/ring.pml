/* The ring of moeshm/_end.pyx and moeshm/_ring.pyx: publish, park, wake, close, rebase.
 *
 * What holds in every run: a record is read as it was written, in order; nothing is overwritten
 * that is not freed; no word is taken for a corrupt one; whoever is told that the other end closed
 * has seen all that it published; and nobody sleeps for ever, without the 25 ms slice.
 *
 * -DAREA, -DRECORDS    the data area, in records, and how many are sent
 * -DHOT                rebase when the ring is empty and this much of the area was used
 * -DABORTS             the producer takes a reservation back, once
 * -DPRODUCER_CLOSES, -DCONSUMER_CLOSES     that end closes itself, at any time
 * -DPRODUCER_IS_CLOSED, -DCONSUMER_IS_CLOSED   another thread of that end closes it, at any time;
 *                      the other end may stop without closing
 * -DDIES=PRODUCER, -DDIES=CONSUMER     that end's process is killed, at any time
 * -DSLICE              a sleep ends by itself when nothing else can happen
 * -DBROKEN_...         the code with one mistake
 *
 * The numbers in [brackets] are those of the table in docs/model.md.
 */
#ifndef AREA
#define AREA 2
#endif

#define PRODUCER 0
#define CONSUMER 1
#if defined(PRODUCER_IS_CLOSED) || defined(CONSUMER_IS_CLOSED)
#define THREADS 4
#else
#define THREADS 2
#endif
#define LOADERS 2
#define closer_of(end) ((end) + 2)

#define word_of(end) (end)
#define state_of(end) (2 + (end))
#define peer_of(end) (1 - (end))
#define SYNCS 4
#define header_at(offset) (4 + 2 * (offset))
#define payload_at(offset) (5 + 2 * (offset))
#ifdef BROKEN_SEPARATE_FLAG
#define flag_of(end) (4 + 2 * AREA + (end))
#define LOCATIONS (6 + 2 * AREA)
#else
#define LOCATIONS (4 + 2 * AREA)
#endif

#include "memory.pml"

/* A word: position << 2 | REBASED | ARMED. (In bytes, a position's lowest six bits are free.) */
#define ARMED 1
#define REBASED 2
#define CLOSED 1
#define position_in(word) ((word) >> 2)
#define less_armed(word) ((word) & 254)

/* The consumer reads until it is told that no more will come. */
#if defined(PRODUCER_CLOSES) || defined(PRODUCER_IS_CLOSED) || defined(CONSUMER_IS_CLOSED) \
    || defined(DIES)
#define READS_ON
#endif

#define CHANGED 1
#define PEER_GONE 2
#define AGAIN 4
#define OWN_CLOSED 5

/* Of an end, for both of its threads; they have the GIL when they use it. */
byte published[2];
byte rebased[2];
bit is_closed[2];

bit is_held[AREA];      /* written and not yet freed: what the producer must leave alone */

#if defined(PRODUCER_IS_CLOSED) || defined(CONSUMER_IS_CLOSED)
bit gil[2];
inline take_gil(thread, end) { atomic { !gil[end] -> gil[end] = 1; acquire(thread) } }
inline drop_gil(thread, end) {
    atomic { is_drained(thread) -> finish_loads(thread); gil[end] = 0 }
}
#else
#define take_gil(thread, end) skip
#define drop_gil(thread, end) skip
#endif

#ifdef DIES
bit is_dead[2];
proctype Killer() { is_dead[DIES] = 1 }
#define unless_dead(end) unless { is_dead[end] }
#else
#define unless_dead(end)
#endif

/* --- RingEnd ------------------------------------------------------------------------- */

#ifdef BROKEN_RELAXED_PUBLISH
#define publish_releases(end) ((end) != PRODUCER)
#elif defined(BROKEN_RELAXED_FREE)
#define publish_releases(end) ((end) != CONSUMER)
#else
#define publish_releases(end) true
#endif

/* _publish; `old` is a variable of the caller's. */
inline publish(thread, end, old) {
#if defined(BROKEN_PLAIN_PUBLISH)
    load(thread, word_of(end), old);
    store(thread, word_of(end), published[end] << 2 | rebased[end]);
    if :: old & ARMED -> futex_wake(thread, word_of(end)) :: else fi
#elif defined(BROKEN_SEPARATE_FLAG)
    store_release(thread, word_of(end), published[end] << 2 | rebased[end]);
    load_acquire(thread, flag_of(end), old);
    if
    :: old -> store(thread, flag_of(end), 0); futex_wake(thread, flag_of(end))
    :: else
    fi
#elif defined(BROKEN_WAKE_FIRST)
    load_acquire(thread, word_of(end), old);
    if :: old & ARMED -> futex_wake(thread, word_of(end)) :: else fi;
    exchange_as(thread, word_of(end), published[end] << 2 | rebased[end], old, true, true)
#else
    exchange_as(thread, word_of(end), published[end] << 2 | rebased[end], old,
                true, publish_releases(end));                               /* [1] */
    if
    :: old & ARMED -> reached(WAKES); futex_wake(thread, word_of(end))      /* [2] */
    :: else
    fi
#endif
}

/* _load_peer */
inline load_peer(thread, end, peer, seen) {
#ifdef BROKEN_RELAXED_LOAD
    load(thread, word_of(peer_of(end)), seen);
#else
    load_acquire(thread, word_of(peer_of(end)), seen);                      /* [3] */
#endif
    seen = less_armed(seen);
    assert(position_in(seen) >= peer && position_in(seen) - peer <= AREA);  /* [4] */
    peer = position_in(seen)
}

/* _wait_slice; the spinning, which repeats its first two loads, is left out. */
inline wait_slice(thread, end, seen, word, state, outcome) {
    outcome = AGAIN;
    load_acquire(thread, word_of(peer_of(end)), word);                      /* [5] */
    if
    :: less_armed(word) != seen -> outcome = CHANGED
    :: else ->
        load_acquire(thread, state_of(peer_of(end)), state);                /* [6] */
        if
        :: state == CLOSED -> outcome = PEER_GONE
        :: else -> arm(thread, end, seen, word, state, outcome)
        fi
    fi
}

inline arm(thread, end, seen, word, state, outcome) {
    state = 1;      /* whether it is armed */
#if defined(BROKEN_SEPARATE_FLAG)
    store_release(thread, flag_of(peer_of(end)), 1);
    load_acquire(thread, word_of(peer_of(end)), word);
    if :: less_armed(word) != seen -> state = 0 :: else fi;
#else
    if
#if defined(BROKEN_PLAIN_ARM)
    :: !(word & ARMED) -> store(thread, word_of(peer_of(end)), word | ARMED)
#elif defined(BROKEN_RELAXED_ARM)
    :: !(word & ARMED) ->
        compare_exchange_as(thread, word_of(peer_of(end)), word, word | ARMED, state, false)
#else
    :: !(word & ARMED) ->
        compare_exchange_as(thread, word_of(peer_of(end)), word, word | ARMED, state,
                            true)                                           /* [7] */
#endif
    :: else
    fi;
#endif
    if
    :: !state -> reached(LOSES)
    :: else ->
        state = 0;
#ifndef BROKEN_NO_LOOK
        load_acquire(thread, state_of(peer_of(end)), state);                /* [8] */
#endif
        if
        :: state == CLOSED -> reached(LOOKED); outcome = PEER_GONE
        :: else -> park(thread, end, seen, word, state, outcome)
        fi
    fi;
    state = 0
}

inline park(thread, end, seen, word, state, outcome) {
#if defined(PRODUCER_IS_CLOSED) || defined(CONSUMER_IS_CLOSED)
    load_acquire(thread, state_of(end), state);                             /* [9] */
#endif
    if
    :: state == CLOSED
    :: else ->
#if defined(BROKEN_NEVER_SLEEPS)
#elif defined(BROKEN_SEPARATE_FLAG)
        futex_wait(thread, flag_of(peer_of(end)), 1);
#else
        futex_wait(thread, word_of(peer_of(end)), word | ARMED);            /* [10] */
#endif
        load_acquire(thread, word_of(peer_of(end)), word);                  /* [11] */
        if :: less_armed(word) != seen -> outcome = CHANGED :: else fi
    fi
}

/* _wait and _drain; PEER_GONE: the other end is closed, and all it sent was seen. */
inline wait(thread, end, seen, word, state, outcome) {
    do
    :: drop_gil(thread, end);                                               /* [32] */
        wait_slice(thread, end, seen, word, state, outcome);
        take_gil(thread, end);
        if
        :: is_closed[end] -> reached(ENDS); outcome = OWN_CLOSED; break     /* [12] */
        :: else
        fi;
#ifdef DIES
        if
        :: outcome == AGAIN && is_dead[peer_of(end)] && is_drained(peer_of(end)) ->
            acquire(thread); outcome = PEER_GONE                            /* [31] */
        :: else
        fi;
#endif
        if
        :: outcome == CHANGED -> break
        :: outcome == PEER_GONE ->
#ifndef BROKEN_NO_DRAIN
            load_acquire(thread, word_of(peer_of(end)), word);              /* [13] */
            if
            :: less_armed(word) != seen -> reached(DRAINS); outcome = CHANGED
            :: else -> reached(TOLD)
            fi;
#endif
            break
        :: else
        fi
    od;
    word = 0
}

/* close and _end; the caller has the GIL. */
inline close(thread, end, old) {
    is_closed[end] = 1;
#if defined(BROKEN_NO_REPUBLISH)
    store_release(thread, state_of(end), CLOSED);
#elif defined(BROKEN_STATE_LAST)
    publish(thread, end, old);
    store_release(thread, state_of(end), CLOSED);
#elif defined(BROKEN_RELAXED_STATE)
    store(thread, state_of(end), CLOSED);
    publish(thread, end, old);
#else
    store_release(thread, state_of(end), CLOSED);                           /* [14] */
    publish(thread, end, old);                                              /* [15] */
#endif
#ifndef BROKEN_LEAVES_ARMED
    fetch_and(thread, word_of(peer_of(end)), 254);                          /* [16] */
#endif
    futex_wake(thread, word_of(peer_of(end)));                              /* [17] */
    old = 0
}

#if THREADS > 2
proctype Closer(byte end) {
    byte old;
    take_gil(closer_of(end), end);
    if :: !is_closed[end] -> close(closer_of(end), end, old) :: else fi;
    drop_gil(closer_of(end), end)
}
#endif

/* --- RingProducer -------------------------------------------------------------------- */

/* _check_peer */
inline check_peer() {
    load_peer(PRODUCER, PRODUCER, peer, seen);
    assert(!(seen & REBASED) && peer <= published[PRODUCER])                /* [18] */
}

/* _make_room; OWN_CLOSED or PEER_GONE instead of room. */
inline make_room() {
    outcome = CHANGED;
#ifdef HOT
    if
    :: offset && offset + 1 > HOT ->
#ifndef BROKEN_REBASE_UNASKED
        check_peer();                                                       /* [19] */
        if
        :: peer == next ->
            reached(REBASES);
            offset = 0;
            rebased[PRODUCER] = rebased[PRODUCER] ^ REBASED
        :: else
        fi
#else
        offset = 0; rebased[PRODUCER] = rebased[PRODUCER] ^ REBASED
#endif
    :: else
    fi;
#endif
    do
    :: next - peer + 1 <= AREA -> break                                     /* [20] */
    :: else ->
        check_peer();
        if
        :: next - peer + 1 <= AREA -> break
        :: else -> wait(PRODUCER, PRODUCER, seen, word, state, outcome)
        fi;
        if :: outcome != CHANGED -> break :: else fi
    od;
    if
    :: outcome == CHANGED ->
        load(PRODUCER, state_of(CONSUMER), state);                          /* [21] */
        if :: state == CLOSED -> outcome = PEER_GONE; state = 0 :: else fi
    :: else
    fi
}

proctype Producer() {
    byte next, peer, seen, offset, word, state, outcome;
#ifdef ABORTS
    bit has_aborted;
#endif
    { do
#ifdef PRODUCER_CLOSES
    :: next == RECORDS -> close(PRODUCER, PRODUCER, word); break
    :: next < RECORDS -> close(PRODUCER, PRODUCER, word); break
#else
    :: next == RECORDS -> break
#endif
#ifdef CONSUMER_IS_CLOSED
    :: next < RECORDS -> break
#endif
    :: next < RECORDS ->
        take_gil(PRODUCER, PRODUCER);
        if
        :: is_closed[PRODUCER] -> drop_gil(PRODUCER, PRODUCER); break
        :: else
        fi;
        make_room();
        if
        :: outcome != CHANGED -> drop_gil(PRODUCER, PRODUCER); break
        :: else
        fi;
        assert(!is_held[offset]);
        store(PRODUCER, header_at(offset), next + 1);                       /* [22] */
#ifdef ABORTS
        if
        :: !has_aborted -> has_aborted = 1
        :: true ->
#endif
        is_held[offset] = 1;
        store(PRODUCER, payload_at(offset), next + 101);                    /* [23] */
        next++;
        offset = (offset + 1) % AREA;                                       /* [24] */
        published[PRODUCER] = next;                                         /* [25] */
        publish(PRODUCER, PRODUCER, word);
#ifdef ABORTS
        fi;
#endif
        word = 0;
        drop_gil(PRODUCER, PRODUCER)
    od } unless_dead(PRODUCER)
}

/* --- RingConsumer -------------------------------------------------------------------- */

/* _has_record: then `peer` has moved on. */
inline look_for_record() {
    if
    :: peer != next
    :: else ->
        word = seen;
        load_peer(CONSUMER, CONSUMER, peer, seen);                          /* [26] */
        if
        :: (word ^ seen) & REBASED -> reached(REBASES); offset = 0          /* [27] */
        :: else
        fi;
        word = 0
    fi
}

inline read_payload(at, number) {
    load(CONSUMER, payload_at(at), word);                                   /* [29] */
    assert(word == number + 100);
    word = 0
}

/* _release and _finish of the record `number` at `at`. */
inline free(at, number) {
    is_held[at] = 0;
    published[CONSUMER] = number;                                           /* [30] */
    publish(CONSUMER, CONSUMER, word);
    word = 0
}

proctype Consumer() {
    byte next, peer, seen, offset, word, state, outcome, at;
    { do
#ifdef CONSUMER_CLOSES
    :: close(CONSUMER, CONSUMER, word); break
#endif
#ifdef PRODUCER_IS_CLOSED
    :: break
#endif
#ifndef READS_ON
    :: next == RECORDS -> break
    :: next < RECORDS ->
#else
    :: true ->
#endif
        take_gil(CONSUMER, CONSUMER);
        outcome = CHANGED;
        if
        :: is_closed[CONSUMER] -> outcome = OWN_CLOSED
        :: else
        fi;
        do
        :: outcome != CHANGED -> break
        :: else ->
            look_for_record();
            if
            :: peer != next -> break
            :: else -> wait(CONSUMER, CONSUMER, seen, word, state, outcome)
            fi
        od;
        if
        :: outcome != CHANGED ->
#ifdef DIES
            assert(outcome != PEER_GONE || next == position_in(mem[word_of(PRODUCER)]));
#else
            assert(outcome != PEER_GONE || next == published[PRODUCER]);
#endif
            drop_gil(CONSUMER, CONSUMER);
            break
        :: else
        fi;
        load(CONSUMER, header_at(offset), word);                            /* [28] */
        assert(word == next + 1);
        word = 0;
        next++;
        at = offset;
        offset = (offset + 1) % AREA;
        drop_gil(CONSUMER, CONSUMER);
#ifndef BROKEN_FREE_FIRST
        read_payload(at, next);
#endif
        take_gil(CONSUMER, CONSUMER);
        if
        :: !is_closed[CONSUMER] -> free(at, next)
        :: else
        fi;
#ifdef BROKEN_FREE_FIRST
        read_payload(at, next);
#endif
        at = 0;
        drop_gil(CONSUMER, CONSUMER)
    od } unless_dead(CONSUMER)
}

init {
    atomic {
        run Buffer(PRODUCER);
        run Buffer(CONSUMER);
#ifdef PRODUCER_IS_CLOSED
        run Buffer(closer_of(PRODUCER));
        run Closer(PRODUCER);
#endif
#ifdef CONSUMER_IS_CLOSED
        run Buffer(closer_of(CONSUMER));
        run Closer(CONSUMER);
#endif
#ifdef DIES
        run Killer();
#endif
        run Producer();
        run Consumer()
    }
}
