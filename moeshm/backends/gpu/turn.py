"""Whose turn it is to use a device's stream."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Protocol


class Yielding(Protocol):
    """What has the whole device for as long as nobody else wants it."""

    def yield_device(self) -> None:
        """Begin nothing more, and end after what was begun; returns at once."""
        ...


class Turn:
    """A lock: who has it uses the device's stream, and finds it free of a resident kernel.

    `with turn.kept:` is for whoever asks that kernel itself.
    """

    def __init__(self) -> None:
        self.kept = threading.Lock()
        #: What has the device between turns, if something has.
        self.resident: Yielding | None = None

    def __enter__(self) -> None:
        self.kept.acquire()
        if self.resident is None:
            return
        try:
            self.resident.yield_device()
        except BaseException:
            self.kept.release()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kept.release()
