"""What ring.pml is run with, and what each run must find."""

from __future__ import annotations

from dataclasses import dataclass, field

MEMORIES = ("TSO", "WEAK")

# The numbers that memory.pml gives to what a run can come by.
SLEEPS, WAKES, LOSES, TOLD, LOOKED, DRAINS, ENDS, REBASES = range(1, 9)

ASSERTION = "assertion violated"
ASLEEP = "invalid end state"
NO_END = "non-progress cycle"


@dataclass(frozen=True)
class Case:
    """A model's switches; the error it must end with, if any; what it must come by, if none."""

    name: str
    defines: tuple[str, ...]
    #: By memory, the start of the error's text; where a memory is missing, there is none.
    errors: dict[str, str] = field(default_factory=dict)
    #: What both ends come by, the producer and the consumer.
    producer: frozenset[int] = frozenset()
    consumer: frozenset[int] = frozenset()
    progress: bool = False
    memories: tuple[str, ...] = MEMORIES

    def __str__(self) -> str:
        return self.name


def _case(
    name: str,
    switches: str,
    producer: set[int] | None = None,
    consumer: set[int] | None = None,
    *,
    progress: bool = False,
    memories: tuple[str, ...] = MEMORIES,
) -> Case:
    return Case(
        name,
        tuple(switches.split()),
        producer=frozenset(producer or ()),
        consumer=frozenset(consumer or ()),
        progress=progress,
        memories=memories,
    )


def _broken(
    name: str, switches: str, tso: str | None, weak: str | None, *, progress: bool = False
) -> Case:
    errors = {"TSO": tso, "WEAK": weak}
    found = {memory: error for memory, error in errors.items() if error is not None}
    return Case(name, tuple(switches.split()), found, progress=progress)


_PARKS = {SLEEPS, WAKES, LOSES}

SOUND = [
    _case("traffic", "RECORDS=3", _PARKS, _PARKS),
    _case("rebase", "RECORDS=3 HOT=1", _PARKS | {REBASES}, _PARKS | {REBASES}),
    _case(
        "rebase_in_a_larger_area",
        "RECORDS=4 AREA=3 HOT=1",
        {REBASES},
        {REBASES},
        memories=("TSO",),
    ),
    _case(
        "rebase_aborted_then_closed",
        "RECORDS=2 HOT=1 ABORTS PRODUCER_CLOSES",
        {REBASES},
        {REBASES, TOLD, LOOKED, DRAINS},
    ),
    _case(
        "producer_closes",
        "RECORDS=2 PRODUCER_CLOSES",
        {WAKES},
        {SLEEPS, LOSES, TOLD, LOOKED, DRAINS},
    ),
    _case(
        "consumer_closes",
        "RECORDS=2 AREA=1 CONSUMER_CLOSES",
        _PARKS | {TOLD, LOOKED, DRAINS},
        {WAKES},
    ),
    _case(
        "both_close",
        "RECORDS=2 AREA=1 PRODUCER_CLOSES CONSUMER_CLOSES",
        {TOLD, LOOKED, DRAINS},
        {TOLD, LOOKED, DRAINS},
    ),
    _case(
        "producer_dies",
        "RECORDS=1 AREA=1 DIES=PRODUCER SLICE",
        set(),
        {SLEEPS, DRAINS, TOLD},
    ),
    _case(
        "consumer_dies",
        "RECORDS=2 AREA=1 DIES=CONSUMER SLICE",
        {SLEEPS, DRAINS, TOLD},
        set(),
    ),
    # close() by another thread.
    _case(
        "producer_is_closed",
        "RECORDS=2 AREA=1 PRODUCER_IS_CLOSED",
        {SLEEPS, ENDS},
        {TOLD},
    ),
    _case(
        "consumer_is_closed",
        "RECORDS=1 AREA=1 CONSUMER_IS_CLOSED",
        set(),
        {SLEEPS, ENDS},
    ),
    # Every execution ends, so nobody is woken again and again for nothing.
    _case("traffic_ends", "RECORDS=2 AREA=1", progress=True),
    _case(
        "closing_ends",
        "RECORDS=2 AREA=1 PRODUCER_CLOSES CONSUMER_CLOSES",
        progress=True,
        memories=("TSO",),
    ),
]

_CLOSES = "RECORDS=3 PRODUCER_CLOSES "

BROKEN = [
    _broken("plain_publish", "RECORDS=3 BROKEN_PLAIN_PUBLISH", ASLEEP, ASLEEP),
    _broken("separate_flag", "RECORDS=3 BROKEN_SEPARATE_FLAG", ASLEEP, ASLEEP),
    _broken("wake_first", "RECORDS=3 BROKEN_WAKE_FIRST", ASLEEP, ASLEEP),
    _broken("wake_without_barrier", "RECORDS=3 BROKEN_WAKE_WITHOUT_BARRIER", None, ASLEEP),
    _broken("plain_arm", "RECORDS=3 BROKEN_PLAIN_ARM", ASLEEP, ASLEEP),
    _broken("relaxed_arm", _CLOSES + "BROKEN_RELAXED_ARM", None, ASLEEP),
    _broken("relaxed_publish", "RECORDS=3 BROKEN_RELAXED_PUBLISH", None, ASSERTION),
    _broken("relaxed_load", "RECORDS=3 BROKEN_RELAXED_LOAD", None, ASSERTION),
    _broken("relaxed_free", "RECORDS=3 BROKEN_RELAXED_FREE", None, ASSERTION),
    _broken("free_first", "RECORDS=3 BROKEN_FREE_FIRST", ASSERTION, ASSERTION),
    _broken("no_look_when_armed", _CLOSES + "BROKEN_NO_LOOK", ASLEEP, ASLEEP),
    _broken("no_republish", _CLOSES + "BROKEN_NO_REPUBLISH", ASLEEP, ASLEEP),
    _broken("state_last", _CLOSES + "BROKEN_STATE_LAST", ASLEEP, ASLEEP),
    _broken("relaxed_state", _CLOSES + "BROKEN_RELAXED_STATE", None, ASSERTION),
    _broken("no_drain", _CLOSES + "BROKEN_NO_DRAIN", ASSERTION, ASSERTION),
    _broken("rebase_unasked", "RECORDS=3 HOT=1 BROKEN_REBASE_UNASKED", ASSERTION, ASSERTION),
    _broken("never_sleeps", "RECORDS=3 BROKEN_NEVER_SLEEPS", NO_END, NO_END, progress=True),
    _broken("dead_and_no_slice", "RECORDS=2 AREA=1 DIES=PRODUCER", ASLEEP, ASLEEP),
    _broken(
        "leaves_armed",
        "RECORDS=2 AREA=1 PRODUCER_IS_CLOSED BROKEN_LEAVES_ARMED",
        ASLEEP,
        ASLEEP,
    ),
]
