"""Who waits for a reply, and what becomes of it."""

from __future__ import annotations

from typing import Protocol

import msgspec

from .errors import CallError, DeadlineExceeded
from .protocol import Message, Reply

#: A worker says itself when a deadline passed, and the session goes on. One that has not said so
#: by then is given up.
GRACE_S = 0.006


def too_late(timeout_s: float) -> DeadlineExceeded:
    """Why a session is given up at a deadline."""
    return DeadlineExceeded(
        f"no answer within {timeout_s:g} s from the worker; the session is given up: allow more "
        "time (timeout_s), or look at the worker"
    )


def another(error: CallError) -> CallError:
    """The same error once more: one that is raised again keeps the frames of every time."""
    return type(error)(str(error))


class Receiver(Protocol):
    """Who a reply is for."""

    #: Of time.monotonic.
    deadline: float

    @property
    def is_done(self) -> bool:
        """It needs no reply any more."""
        ...

    def take(self, reply: Reply, record: Message) -> None:
        """Copy the rows out of the record; ProtocolError when they are not what was asked for."""
        ...

    def fail(self, error: CallError) -> None:
        """There will be no rows."""
        ...


class Answer(msgspec.Struct, frozen=True, gc=False):
    """The end of a call: what the worker said was wrong with it, or None; when it had left and
    when the reply came (ns of time.perf_counter); the worker's time; and lengths."""

    error: CallError | None
    sent_ns: int
    arrived_ns: int
    compute_ns: int
    bytes_out: int
    bytes_in: int


class Awaited(Protocol):
    """What a thread waits for."""

    @property
    def is_done(self) -> bool: ...


class Nobody:
    """Receives for a call that was given up."""

    deadline = 0.0
    is_done = False

    def take(self, reply: Reply, record: Message) -> None:
        """As `Receiver.take`."""

    def fail(self, error: CallError) -> None:
        """As `Receiver.fail`."""
