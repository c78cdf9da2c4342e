"""The soak's own books: faults, what callers tell, and whether each error has its cause."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from ..worker import REPLY_TIMEOUT_S
from .messages import (
    Counts,
    Failed,
    Late,
    Lost,
    Message,
    Overdue,
    Paused,
    Unanswered,
    Unexpected,
    Wrong,
)

#: What is told of the time before a failure.
_RECENT_S = 5.0
#: An error may be told of before its cause: another thread, or another process, tells of that.
PATIENCE_S = 3.0
#: A signal takes its time to arrive, and so does its consequence.
_AFTER_S = 0.1
#: Descriptions of failures that are kept; counts go on.
_MOST_FAILURES = 50
#: Causes that were over for so long are forgotten, as no client is open for so long: it is closed
#: when all comes to rest (director.py).
_MEMORY_S, _FORGET_EVERY = 3600.0, 10_000


class Cause(msgspec.Struct):
    """What may make calls fail that depend on `target`, from one time to another."""

    target: str
    start: float
    #: None while it lasts.
    end: float | None


class Recent(NamedTuple):
    at: float
    text: str


class Ledger:
    """Adds up. Used by one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self.faults: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.wrong_results = self.deadline_misses = self.hangs = self.unexpected = 0
        #: Of the latest call of all.
        self.latest_s = 0.0
        self.leaks: list[str] = []
        #: What went wrong, in words, with what was done before.
        self.failures: list[str] = []
        self._causes: dict[str, list[Cause]] = {}
        self._n_causes = 0
        self._recent: deque[Recent] = deque(maxlen=400)
        #: Errors that are not explained yet, and when each was told.
        self._open: deque[tuple[float, str, Failed]] = deque()

    @property
    def n_faults(self) -> int:
        """Of all kinds."""
        return self.faults.total()

    def fault(self, kind: str, target: str) -> Cause:
        """One is being injected now; it may make calls fail until its `end` is set."""
        self.faults[kind] += 1
        return self.cause(target, f"{kind}: {target}", self._clock(), None)

    def note(self, text: str) -> None:
        """Something that may matter for what fails next."""
        self._recent.append(Recent(self._clock(), text))

    def cause(self, target: str, text: str, start: float, end: float | None) -> Cause:
        """Something that explains errors, and may be no fault."""
        if text:
            self.note(text)
        cause = Cause(target, start, end)
        self._causes.setdefault(target, []).append(cause)
        self._n_causes += 1
        if self._n_causes % _FORGET_EVERY == 0:
            self._forget()
        return cause

    def _forget(self) -> None:
        oldest = self._clock() - _MEMORY_S
        for target, causes in list(self._causes.items()):
            causes[:] = [cause for cause in causes if cause.end is None or cause.end > oldest]
            if not causes:
                del self._causes[target]

    def told(self, caller: str, message: Message) -> None:
        """What a caller says."""
        if isinstance(message, Counts):
            self.counts.update(message.counts)
        elif isinstance(message, Late):
            self.deadline_misses += 1
            self.latest_s = max(self.latest_s, message.late_s)
        elif isinstance(message, Overdue):
            self.hang(
                caller, f"{message.what} has not ended {message.late_s:.1f} s after its deadline"
            )
        elif isinstance(message, Unanswered):
            self.hang(caller, message.what)
        elif isinstance(message, Lost):
            self.cause(message.line, "", message.deadline, message.at)
        elif isinstance(message, Paused):
            self.cause(caller, "", message.start, message.end)
        elif isinstance(message, Failed):
            self._open.append((self._clock(), caller, message))
        elif isinstance(message, Unexpected):
            self.unexpected += 1
            self.failure(f"{caller}: {message.error} in {message.what}: {message.detail}")
        elif isinstance(message, Wrong):
            self.wrong_results += 1
            self.failure(f"{caller}: wrong result of {message.what}: {message.difference}")

    def hang(self, caller: str, text: str) -> None:
        """Something did not end."""
        self.hangs += 1
        self.failure(f"{caller}: {text}")

    def leak(self, text: str) -> None:
        """Something is left that should be gone."""
        self.leaks.append(text)
        self.failure(f"leak: {text}")

    def settle(self, is_end: bool = False) -> None:
        """Find the causes of errors that were told of some time ago; at the end, of all."""
        while self._open and (is_end or self._open[0][0] + PATIENCE_S < self._clock()):
            _, caller, failed = self._open.popleft()
            if not self._explains(caller, failed):
                self.unexpected += 1
                self.failure(
                    f"{caller}: {failed.error} without a cause since the last answer, "
                    f"{failed.until - failed.since:.3f} s before: {failed.what}"
                )

    def failure(self, text: str) -> None:
        """Keep a description, with what was injected in the last seconds."""
        now = self._clock()
        recent = [
            f"  {each.at - now:+.3f} s: {each.text}"
            for each in self._recent
            if each.at > now - _RECENT_S
        ]
        if len(self.failures) < _MOST_FAILURES:
            head = f"after {now - self._start:.1f} s, {text}\n in the {_RECENT_S:g} s before:"
            self.failures.append("\n".join([head, *(recent or ["  nothing"])]))

    def _explains(self, caller: str, failed: Failed) -> bool:
        """Whether something happened to whom the call depends on, since its client was well."""
        return any(
            cause.start <= failed.until
            and (cause.end is None or cause.end + _AFTER_S >= failed.since)
            for target in (*failed.targets, failed.line)
            for cause in reversed(self._causes.get(target, ()))
        ) or self._was_given_up(caller, failed)

    def _was_given_up(self, caller: str, failed: Failed) -> bool:
        """Whether its own process stood still for so long since then that the worker may have ended
        a handshake, or a session whose replies nobody took."""
        least_s = REPLY_TIMEOUT_S if failed.error == "WorkerDied" else 0.0
        pauses = self._causes.get(caller, ())
        return any(
            pause.start <= failed.until
            and (pause.end is None or pause.end + _AFTER_S >= failed.since)
            and (failed.until if pause.end is None else pause.end) - pause.start >= least_s
            for pause in pauses
        )
