"""What one calling process notes of its calls: counts, errors, deadlines, pauses.

Threads tell it of every call, and it tells the soak; `tick` is called ten times a second.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy.typing as npt

from ..backends import Backend, Ids, Weights
from ..errors import (
    ClientClosed,
    DeadlineExceeded,
    MoeshmError,
    ProtocolError,
    SessionError,
    WorkerDied,
)
from . import messages
from .messages import (
    Failed,
    Late,
    Lost,
    Message,
    Overdue,
    Paused,
    Unanswered,
    Unexpected,
    Wrong,
    shortened,
)
from .pool import Case

TICK_S = 0.1
#: A tick that comes so long after the last one tells of a process that stood still: stopped, or
#: without a CPU. No call could end meanwhile.
PAUSE_S = 0.25
#: Later than this after its deadline, a call counts as late, and as one that hangs.
LATE_S, HANG_S = 0.020, 5.0
#: No process is stopped for nearly so long, and no call is so large (pool.py), so that one may end
#: by such a deadline only where nobody noticed that the worker was lost, or a reply was.
LONG_S = 60.0
#: An error may come so much before its deadline: clocks are read one after the other.
_EARLY_S = 0.001

#: What a call, or the opening of a client, may end with when another process is lost.
_LOSSES = WorkerDied, SessionError

_Result = TypeVar("_Result")


@dataclass(eq=False)
class Line:
    """One client, as far as its errors are to be explained."""

    name: str
    #: The workers that it reaches.
    targets: tuple[str, ...]
    #: When the last call began that a worker answered.
    answered: float = field(default_factory=time.monotonic)
    #: True once it is being closed by this process.
    is_closed: bool = False
    #: Of an offload, what its parts ended with: nothing else may make its calls fail.
    losses: Losses | None = None


class Losses:
    """The errors that parts of an offload's calls ended with, by their words, as it may hand them
    on. Any thread may use it."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def note(self, error: MoeshmError, at: float) -> None:
        """A part ended with it."""
        self._last[str(error)] = at

    def has(self, error: MoeshmError, since: float) -> bool:
        """Whether a part ended with the same since then."""
        return self._last.get(str(error), -math.inf) >= since


@dataclass(eq=False)
class Call:
    """What for people, and until when it must end."""

    what: str
    line: Line
    began: float
    deadline: float
    #: `Line.answered` at its beginning.
    answered: float
    #: When it was asked last to go on; between, its caller did other things.
    asked: float
    #: The thread that asked.
    thread: int = 0
    #: Whether this process computed some of it.
    is_own_work: bool = False
    is_overdue: bool = False


class OwnWork:
    """A backend that knows when it computed: what an engine does itself is nobody's delay."""

    def __init__(self, backend: Backend, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = backend.name
        self._clock = clock
        self.layers = backend.layers
        self._backend = backend
        #: By thread, when it computed, and since when it does.
        self._spans: dict[int, list[tuple[float, float]]] = {}
        self._since: dict[int, float] = {}

    def ffn(
        self,
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
    ) -> None:
        """As `Backend.ffn`."""
        thread = threading.get_ident()
        self._since[thread] = start = self._clock()
        try:
            self._backend.ffn(layer, hidden_states, topk_ids, topk_weights, out)
        finally:
            self._spans.setdefault(thread, []).append((start, self._clock()))
            del self._since[thread]

    def take(self) -> list[tuple[float, float]]:
        """When this thread computed since it asked last."""
        return self._spans.pop(threading.get_ident(), [])

    def until_now(self, thread: int) -> list[tuple[float, float]]:
        """When another thread computed since it asked last; it may do so still."""
        since = self._since.get(thread)
        spans = list(self._spans.get(thread, ()))
        return spans if since is None else [*spans, (since, self._clock())]


class Books:
    """`tell`: sends a message to the soak. Any thread may use it."""

    def __init__(
        self,
        tell: Callable[[Message], None],
        own_work: OwnWork | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._own_work = own_work
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._open: set[Call] = set()
        #: Over and not yet looked at: when it was asked, its end, and when this process computed.
        self._over: deque[tuple[Call, float, float, list[tuple[float, float]]]] = deque()
        self._pauses: deque[tuple[float, float]] = deque(maxlen=200)
        self._ticked = self._clock()

    def count(self, what: str, n: int = 1) -> None:
        """So many more of it."""
        with self._lock:
            self._counts[what] += n

    def begin(self, line: Line, what: str, timeout_s: float) -> Call:
        """A call begins, which is to end within the timeout."""
        now = self._clock()
        return Call(what, line, now, now + timeout_s, line.answered, now)

    def attempt(
        self,
        call: Call,
        run: Callable[[], _Result],
        allowed: tuple[type[MoeshmError], ...] = (),
    ) -> _Result | None:
        """All of the call or a part, like its submit: what that returns, or None after an error,
        which is noted, as a None that it returns is. `allowed`: errors that it is meant to end
        with."""
        if self._own_work is not None:
            self._own_work.take()
        call.asked, call.thread = self._clock(), threading.get_ident()
        with self._lock:
            self._open.add(call)
        try:
            result = run()
            if result is None:
                self.wrong(call, "None instead of a result")
            return result
        except allowed as error:
            self.count(f"meant: {type(error).__name__}")
        except MoeshmError as error:
            self._note_error(call, error)
        except Exception as error:  # whatever it is, it is a finding
            self._unexpected(call, error, traceback.format_exc())
        finally:
            self._end(call)
        return None

    def do(self, call: Call, run: Callable[[], object]) -> None:
        """As `attempt`, of what has no result."""

        def done() -> bool:
            run()
            return True

        self.attempt(call, done)

    def part(
        self,
        call: Call,
        run: Callable[[], _Result],
        losses: Losses,
        is_answer: bool = True,
    ) -> _Result:
        """What one worker does of another call, which goes on by itself if that fails: the error is
        raised, but must have its cause, too. `is_answer`: a result tells that the worker lives."""
        try:
            result = run()
        except MoeshmError as error:
            losses.note(error, self._clock())
            self._judge(call, error)
            raise
        if is_answer:
            call.line.answered = max(call.line.answered, call.began)
        return result

    def _end(self, call: Call) -> None:
        spans = [] if self._own_work is None else self._own_work.take()
        call.is_own_work |= bool(spans)
        now = self._clock()
        with self._lock:
            self._open.discard(call)
            self._over.append((call, call.asked, now, spans))
        if spans and now > call.deadline:
            # A fallback or another worker took over: the session may be given up unseen.
            self._tell(Lost(call.line.name, call.deadline, now))

    def sent(self, call: Call) -> None:
        """A `submit` returned. With a fallback it may have given the session up at the deadline,
        which nobody is told before the result is asked for, if it ever is."""
        now = self._clock()
        if now > call.deadline:
            self._tell(Lost(call.line.name, call.deadline, now))

    def check(self, call: Call, case: Case, result: Any) -> None:
        """Hold the result of a call that is over against the reference."""
        self.count("checked")
        if not (call.is_own_work or case.is_empty):
            # A worker computed it: the session was whole when the call began.
            call.line.answered = max(call.line.answered, call.began)
        difference = case.difference(result)
        if difference:
            by = "its caller, in part or whole" if call.is_own_work else "workers alone"
            self.wrong(call, f"{case}, computed by {by}: {difference}")

    def wrong(self, call: Call, difference: str) -> None:
        """A result that must not be."""
        self._tell(Wrong(shortened(call.what), shortened(difference)))

    def unanswered(self, call: Call, why: str) -> None:
        """A hang: nothing came of a call in all its time."""
        self._tell(Unanswered(shortened(f"{call.what}: {why}")))

    def tick(self) -> None:
        """Look at what is over and what is not, and send the counts."""
        now = self._clock()
        if now - self._ticked > PAUSE_S:
            self._pauses.append((self._ticked, now))
            self._tell(Paused(self._ticked, now))
        self._ticked = now
        with self._lock:
            over = [self._over.popleft() for _ in range(len(self._over))]
            still = [call for call in self._open if not call.is_overdue]
            counts, self._counts = dict(self._counts), Counter()
        for call, asked, ended, spans in over:
            late_s = self._late_s(call, asked, ended, spans)
            if late_s > LATE_S:
                self._tell(Late(shortened(call.what), late_s))
        for call in still:
            own_work = self._own_work
            spans = [] if own_work is None else own_work.until_now(call.thread)
            late_s = self._late_s(call, call.asked, now, spans)
            if late_s > HANG_S:
                call.is_overdue = True
                self._tell(Overdue(shortened(call.what), late_s))
        self._tell(messages.Counts(counts))

    def _late_s(
        self, call: Call, asked: float, ended: float, spans: list[tuple[float, float]]
    ) -> float:
        due = max(call.deadline, asked)
        if ended - due <= LATE_S:
            return 0.0
        return ended - due - _covered([*self._pauses, *spans], due, ended)

    def _note_error(self, call: Call, error: MoeshmError) -> None:
        self.count(f"error: {type(error).__name__}")
        self._judge(call, error)

    def _judge(self, call: Call, error: MoeshmError) -> None:
        """Tell what the error must have come of, or that it may not be."""
        now, line = self._clock(), call.line
        # To open a client may also take too long.
        may_be_late = isinstance(error, DeadlineExceeded | SessionError)
        if may_be_late and now >= call.deadline - _EARLY_S:
            self._tell(Lost(line.name, call.deadline, now))
            if isinstance(error, DeadlineExceeded) and call.deadline - call.began >= LONG_S:
                self.unanswered(call, f"{error}")
        elif isinstance(error, ClientClosed) and line.is_closed:
            pass
        elif line.losses is not None and isinstance(error, WorkerDied):
            # Its part was judged by what happened to that worker.
            if not line.losses.has(error, call.began):
                self._unexpected(call, error, "none of its parts ended so")
        elif isinstance(error, _LOSSES) and not isinstance(error, ProtocolError):
            what, name = shortened(f"{call.what}: {error}"), type(error).__name__
            self._tell(Failed(name, what, line.name, line.targets, call.answered, now))
        else:
            self._unexpected(call, error, "")

    def _unexpected(self, call: Call, error: Exception, trace: str) -> None:
        late_s = self._clock() - call.deadline
        when = f"{abs(late_s):.3f} s {'after' if late_s >= 0 else 'before'} its deadline"
        detail = f"{error} ({when}) {trace}"
        self._tell(Unexpected(type(error).__name__, shortened(call.what), shortened(detail)))


def _covered(spans: list[tuple[float, float]], start: float, end: float) -> float:
    """Seconds from start to end that lie in at least one of the spans."""
    total, at = 0.0, start
    for first, last in sorted(spans):
        inside_s = min(last, end) - max(first, at)
        if inside_s > 0:
            total += inside_s
            at = min(last, end)
    return total
