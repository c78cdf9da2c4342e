"""What a Python contender of `moeshm bench ring` is: a way to link two processes."""

from __future__ import annotations

import abc
import importlib
import itertools
import os
from collections.abc import Callable
from multiprocessing.context import SpawnContext
from typing import Any, ClassVar, NamedTuple

from .harness import SHM_PREFIX

MODES = ("latency", "throughput")
#: Above this many bytes a view into shared memory, copied into a buffer that is reused, beats
#: the fresh `bytes` object that some libraries also offer; and so does not copying in pyzmq.
VIEW_BYTES = 64 << 10
_numbers = itertools.count()


class Cell(NamedTuple):
    """One thing to measure: a mode and a payload size in bytes."""

    mode: str
    size: int

    @classmethod
    def parse(cls, text: str) -> Cell:
        """`latency:64` as a cell."""
        mode, _, size = text.partition(":")
        if mode not in MODES:
            raise ValueError(f"cell {text!r}; write MODE:BYTES with a mode of {', '.join(MODES)}")
        return cls(mode, int(size))

    def __str__(self) -> str:
        return f"{self.mode}:{self.size}"


class Endpoint(NamedTuple):
    """One side of an open link: send the payload, receive the other's, be done.

    Every `receive` leaves the payload in the receiver's private memory and returns it: what
    arrives in shared memory is copied out, what arrives in a private buffer is left there.
    """

    send: Callable[[], object]
    receive: Callable[[], Any]
    close: Callable[[], object]


class Contender(abc.ABC):
    """Links two processes; subclasses say how."""

    #: The module it needs, imported before anything is measured.
    module: ClassVar[str | None] = None

    def check(self) -> None:
        """ImportError when the contender's library is not installed."""
        if self.module is not None:
            importlib.import_module(self.module)

    def link(self, context: SpawnContext, cell: Cell) -> Any:
        """What both sides open, made by the client before the server starts: here a name."""
        del context, cell
        return f"{SHM_PREFIX}{os.getpid()}-{next(_numbers)}"

    @abc.abstractmethod
    def open(self, link: Any, cell: Cell, payload: bytes, is_client: bool) -> Endpoint:
        """One side of the link; the client opens first and closes last."""


def window(size: int, budget: int, most: int) -> int:
    """How many messages of a size may be on their way, within a budget of bytes; at least 2."""
    return max(2, min(most, budget // size))
