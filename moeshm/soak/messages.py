"""What a calling process tells the soak: a JSON object a line, each at most a pipe's atomic write.

Times are of time.monotonic, which all processes of a machine share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import ClassVar

import msgspec

#: POSIX lets no other writer, and no kill, cut a write to a pipe that is not longer (pipe(7)).
MOST_BYTES = 4096
_MOST_TEXT = 900


class Order(msgspec.Struct, frozen=True):
    """All that a calling process is told when it starts."""

    role: str
    seed: int
    model: str
    device: str
    layers: tuple[int, ...]
    cases: str
    #: By target, the address of a worker that listens.
    addresses: dict[str, str]
    #: What its own worker is called.
    own: str
    threads: int


class Ready(msgspec.Struct, tag="ready"):
    """Calls begin."""


class Resting(msgspec.Struct, tag="resting"):
    """Nothing is on its way, and every client is closed."""


class Counts(msgspec.Struct, tag="counts"):
    """What came since the last one: by name, how often. Also a sign of life."""

    counts: dict[str, int]


class Late(msgspec.Struct, tag="late"):
    """A call that ended so late after its deadline, the caller's own pauses taken off."""

    what: str
    late_s: float


class Overdue(msgspec.Struct, tag="overdue"):
    """A call that has not ended by now."""

    what: str
    late_s: float


class Unanswered(msgspec.Struct, tag="unanswered"):
    """Nothing came of it in a time in which nothing can have stood still."""

    what: str


class Lost(msgspec.Struct, tag="lost"):
    """A client gave its session up at a call's deadline, as other calls of it may have heard before
    the one that did it."""

    line: str
    deadline: float
    at: float


class Paused(msgspec.Struct, tag="paused"):
    """The process stood still from one time to the other."""

    start: float
    end: float


class Failed(msgspec.Struct, tag="failed"):
    """A call ended with an error that another process must have caused."""

    error: str
    what: str
    #: The client, and the workers that it depends on.
    line: str
    targets: tuple[str, ...]
    #: Its cause lies between the beginning of the last call that had a result, and now.
    since: float
    until: float


class Unexpected(msgspec.Struct, tag="unexpected"):
    """An error that nothing explains."""

    error: str
    what: str
    detail: str


class Wrong(msgspec.Struct, tag="wrong"):
    """A result that is not the reference's."""

    what: str
    difference: str


Message = (
    Ready
    | Resting
    | Counts
    | Late
    | Overdue
    | Unanswered
    | Lost
    | Paused
    | Failed
    | Unexpected
    | Wrong
)


def shortened(text: str) -> str:
    """So much of it that a message may hold two: the beginning and the end.

    Of what JSON writes in several bytes, only what it writes in two stays.
    """
    plain = text.encode("ascii", "replace").decode()
    text = "".join(each if each.isprintable() or each == "\n" else "?" for each in plain)
    if len(text) <= _MOST_TEXT:
        return text
    return f"{text[: _MOST_TEXT // 2]} ... {text[-_MOST_TEXT // 2 :]}"


def send(fd: int, message: Message) -> None:
    """Write a message as a line."""
    line = msgspec.json.encode(message) + b"\n"
    if len(line) > MOST_BYTES:
        raise ValueError(f"a message of {len(line)} bytes; shorten its texts")
    os.write(fd, line)


class Lines:
    """Puts together what comes through a pipe; what a killed process left unfinished is dropped."""

    _decoder: ClassVar[msgspec.json.Decoder[Message]] = msgspec.json.Decoder(Message)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are complete with it."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        yield from map(self._decoder.decode, lines)
