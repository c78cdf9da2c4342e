"""Who waits for a reply, and what becomes of it."""

from __future__ import annotations

from typing import Protocol

import msgspec

from .errors import CallError, DeadlineExceeded
from .protocol import Message, Reply

#: A worker says itself when a deadline passed, and the session goes on. One that has not said so
#: by then is given up.
GRACE_S = 0.006


def too_late(timeout_s: float, is_held_up: bool = False) -> DeadlineExceeded:
    """What a call gets at its deadline; `is_held_up`: by earlier calls, and the session goes on."""
    if is_held_up:
        return DeadlineExceeded(
            f"no answer within {timeout_s:g} s from the worker, which has earlier calls of this "
            "client with more time: allow more (timeout_s), or make such calls by another client"
        )
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
    def whole(self) -> object:
        """What its caller waits for: itself, or what it is a part of."""
        ...

    @property
    def is_in_turn(self) -> bool:
        """Whether what was sent later is answered later; orders are carried out beside calls."""
        ...

    @property
    def is_done(self) -> bool:
        """It needs no reply any more."""
        ...

    def take(self, reply: Reply, record: Message) -> None:
        """Copy the rows out of the record; ProtocolError when they are not what was asked for.

        Again, with the same reply, where a signal's handler interrupted it.
        """
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
    """Receives what nobody will ask for, or what its caller finds without being told."""

    __slots__ = ("deadline", "is_in_turn")
    is_done = False

    def __init__(self, deadline: float, is_in_turn: bool = True) -> None:
        self.deadline = deadline
        self.is_in_turn = is_in_turn

    @property
    def whole(self) -> object:
        """As `Receiver.whole`."""
        return self

    def take(self, reply: Reply, record: Message) -> None:
        """As `Receiver.take`."""

    def fail(self, error: CallError) -> None:
        """As `Receiver.fail`."""
