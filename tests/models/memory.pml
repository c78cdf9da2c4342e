/* Shared memory as threads on several CPUs see it. Included by the models; docs/model.md has the
 * reasons and the limits.
 *
 * A store waits in its thread's buffer until it reaches memory; who loads sees memory and its own
 * buffer.
 *
 * -DTSO   x86: the buffer is a queue; an exchange or compare-exchange waits until it is empty.
 * -DWEAK  C11's release and acquire on a CPU like ARMv8:
 *         - stores reach memory in any order, a release after all stores before it;
 *         - an exchange loads at once and keeps other stores from its location, but its own store
 *           waits as others do, and the thread goes on;
 *         - a load may have been done at any time since the thread's last acquire, and a plain
 *           load may be done as late as the thread's next release.
 *
 * The includer defines THREADS, of which the first LOADERS load; LOCATIONS, of which the first
 * SYNCS are the atomic ones and the rest hold data. A second store to a location waits until the
 * first reached memory.
 */
#define NONE 255
/* The tests look whether a run came here. */
#define SLEEPS 1
#define WAKES 2
#define LOSES 3     /* its compare-exchange failed */
#define TOLD 4      /* that the other end is closed or dead */
#define LOOKED 5    /* and saw the other end closed when it was armed */
#define DRAINS 6    /* sees a last word after the other end closed */
#define ENDS 7      /* closed by another thread of its own */
#define REBASES 8   /* or follows */
#define reached(what) assert(what)

#define bit_of(location) (1 << (location))
#define own_store(thread, location) waiting[(thread) * LOCATIONS + (location)]

byte mem[LOCATIONS];
byte waiting[THREADS * LOCATIONS] = NONE;   /* stores in the buffers */
byte asleep_on[THREADS] = NONE;             /* the location whose futex a thread sleeps on */
bit woke_for_nothing[LOADERS];              /* may happen once: by a signal, or a late waker */
hidden byte _i;

#if defined(TSO)

chan queue[THREADS] = [4] of { byte };      /* the order of the stores that wait */
#define is_drained(thread) (len(queue[thread]) == 0)
#define buffered(thread) 0
#define finish_loads(thread) skip
#define acquire(thread) skip

inline put(thread, location, value, _after) {
    own_store(thread, location) = (value);
    queue[thread]!location
}

inline reach_memory(thread, location) {
    queue[thread]?location;
    mem[location] = own_store(thread, location);
    own_store(thread, location) = NONE
}

proctype Buffer(byte thread) {
    byte location;
end:
    do
    :: atomic { nempty(queue[thread]) -> reach_memory(thread, location); location = 0 }
    od
}

#elif defined(WEAK)

short buffer[THREADS];                      /* the locations of the stores that wait, as bits */
short wait_for[THREADS * SYNCS];            /* those that must reach memory before this one */
byte exchanger[SYNCS] = NONE;               /* the thread that has loaded it and is to store it */
byte earlier[LOADERS * LOCATIONS];          /* memory at the thread's last acquire */
short under_way[THREADS];                   /* the locations of plain loads that may be done yet */

#define is_drained(thread) (buffer[thread] == 0)
#define buffered(thread) buffer[thread]
#define early(thread, location) earlier[(thread) * LOCATIONS + (location)]
/* Only evaluated for atomic locations; `%` keeps the index of others inside. */
#define after_of(thread, location) wait_for[(thread) * SYNCS + (location) % SYNCS]
#define exchanger_of(location) exchanger[(location) % SYNCS]

#define finish_loads(thread) under_way[thread] = 0

inline acquire(thread) {
    d_step {
        if
        :: thread < LOADERS ->
            _i = 0;
            do
            :: _i < LOCATIONS -> early((thread) % LOADERS, _i) = mem[_i]; _i++
            :: else -> break
            od
        :: else
        fi
    }
}

inline put(thread, location, value, after) {
    if :: location < SYNCS -> after_of(thread, location) = after :: else fi;
    own_store(thread, location) = (value);
    buffer[thread] = buffer[thread] | bit_of(location)
}

#define may_reach_memory(thread, location) \
    (own_store(thread, location) != NONE && (location >= SYNCS || \
     (after_of(thread, location) == 0 && \
      (exchanger_of(location) == NONE || exchanger_of(location) == thread))))

inline reach_memory(thread, location) {
    d_step {
        mem[location] = own_store(thread, location);
        own_store(thread, location) = NONE;
        buffer[thread] = buffer[thread] & ~bit_of(location);
        _i = 0;
        do
        :: _i < SYNCS ->
            wait_for[(thread) * SYNCS + _i] = wait_for[(thread) * SYNCS + _i] & ~bit_of(location);
            _i++
        :: else -> break
        od;
        if :: location < SYNCS -> exchanger_of(location) = NONE :: else fi;
        /* Who still loads it may get what was there or what comes. */
        assert(((under_way[0] | under_way[1]) & bit_of(location)) == 0)
    }
}

proctype Buffer(byte thread) {
end:
    do
    :: atomic { may_reach_memory(thread, 0) -> reach_memory(thread, 0) }
    :: atomic { may_reach_memory(thread, 1) -> reach_memory(thread, 1) }
    :: atomic { may_reach_memory(thread, 2) -> reach_memory(thread, 2) }
    :: atomic { may_reach_memory(thread, 3) -> reach_memory(thread, 3) }
    :: atomic { may_reach_memory(thread, 4) -> reach_memory(thread, 4) }
    :: atomic { may_reach_memory(thread, 5) -> reach_memory(thread, 5) }
#if LOCATIONS > 6
    :: atomic { may_reach_memory(thread, 6) -> reach_memory(thread, 6) }
    :: atomic { may_reach_memory(thread, 7) -> reach_memory(thread, 7) }
#endif
#if LOCATIONS > 8
    :: atomic { may_reach_memory(thread, 8) -> reach_memory(thread, 8) }
    :: atomic { may_reach_memory(thread, 9) -> reach_memory(thread, 9) }
#endif
    od
}

#else
#error "compile with -DTSO or -DWEAK"
#endif

/* --- what threads do ----------------------------------------------------------------- */

inline store(thread, location, value) {
    atomic { own_store(thread, location) == NONE -> put(thread, location, value, 0) }
}

inline store_release(thread, location, value) {
    atomic {
        own_store(thread, location) == NONE ->
        put(thread, location, value, buffered(thread));
        finish_loads(thread)
    }
}

inline load(thread, location, into) {
    atomic {
        if
        :: own_store(thread, location) != NONE -> into = own_store(thread, location)
#ifdef WEAK
        :: own_store(thread, location) == NONE && early(thread, location) != mem[location] ->
            into = early(thread, location)
#endif
        :: own_store(thread, location) == NONE -> into = mem[location];
#ifdef WEAK
            early(thread, location) = into;     /* no load after this one sees an older value */
#endif
        fi;
#ifdef WEAK
        if
        :: location >= SYNCS -> under_way[thread] = under_way[thread] | bit_of(location)
        :: else
        fi
#endif
    }
}

inline load_acquire(thread, location, into) {
    atomic {
        if
        :: own_store(thread, location) != NONE -> into = own_store(thread, location)
#ifdef WEAK
        :: own_store(thread, location) == NONE && early(thread, location) != mem[location] ->
            into = early(thread, location)
#endif
        :: own_store(thread, location) == NONE -> into = mem[location]; acquire(thread)
        fi
    }
}

/* Acquire-release, or relaxed: `acquires` and `releases` are constants. */
inline exchange_as(thread, location, value, old, acquires, releases) {
    atomic {
#ifdef TSO
        is_drained(thread) -> old = mem[location]; mem[location] = (value)
#else
        own_store(thread, location) == NONE && exchanger_of(location) == NONE ->
        old = mem[location];
        exchanger_of(location) = thread;
        if
        :: releases -> put(thread, location, value, buffered(thread)); finish_loads(thread)
        :: !(releases) -> put(thread, location, value, 0)
        fi;
        if :: acquires -> acquire(thread) :: !(acquires) fi
#endif
    }
}

inline compare_exchange_as(thread, location, expected, value, done, acquires) {
    atomic {
#ifdef TSO
        is_drained(thread) ->
        done = (mem[location] == (expected));
        if :: done -> mem[location] = value :: else fi
#else
        own_store(thread, location) == NONE &&
        (mem[location] != (expected) || exchanger_of(location) == NONE) ->
        done = (mem[location] == (expected));
        if
        :: done ->
            exchanger_of(location) = thread;
            put(thread, location, value, buffered(thread));
            finish_loads(thread)
        :: else
        fi;
        if :: acquires -> acquire(thread) :: !(acquires) fi
#endif
    }
}

/* Acquire-release. */
inline fetch_and(thread, location, bits) {
    atomic {
#ifdef TSO
        is_drained(thread) -> mem[location] = mem[location] & (bits)
#else
        own_store(thread, location) == NONE && exchanger_of(location) == NONE ->
        exchanger_of(location) = thread;
        put(thread, location, mem[location] & (bits), buffered(thread));
        finish_loads(thread);
        acquire(thread)
#endif
    }
}

/* The kernel compares and goes to sleep in one step as wakers see it, with a barrier before. */
inline futex_wait(thread, location, value) {
    atomic {
        is_drained(thread) ->
        if
        :: mem[location] == (value) -> asleep_on[thread] = location; reached(SLEEPS)
        /* As nobody sees it asleep, it is the same whether it wakes for nothing now or later. */
        :: mem[location] == (value) && !woke_for_nothing[thread] -> woke_for_nothing[thread] = 1
        :: mem[location] != (value)
        fi
    };
    atomic {
        if
        :: asleep_on[thread] == NONE
#ifdef SLICE
        :: timeout -> asleep_on[thread] = NONE
#endif
        fi;
        acquire(thread)
    }
}

/* The kernel looks for sleepers after a barrier: the waker's stores are seen by who is not woken. */
inline futex_wake(thread, location) {
    atomic {
#ifndef BROKEN_WAKE_WITHOUT_BARRIER
        is_drained(thread) ->
#endif
        d_step {
            _i = 0;
            do
            :: _i < THREADS ->
                if :: asleep_on[_i] == (location) -> asleep_on[_i] = NONE :: else fi;
                _i++
            :: else -> break
            od
        }
    }
}
