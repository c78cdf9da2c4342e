"""What one session sends: calls, descriptors and orders, by one thread at a time."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from . import protocol
from ._role import Role
from .descriptors import DESCRIPTOR
from .dtypes import Array, DType
from .errors import RingFull
from .transport import Transport

#: How long a sender leaves a full transport alone before it looks for replies again.
_FULL_PAUSE_S = 0.001

#: Of a call's tokens, rising.
Rows: TypeAlias = npt.NDArray[np.int64]
Drain: TypeAlias = Callable[[], None]
#: The arguments of `Transport.write_call` and `protocol.pack_rows`.
Packable: TypeAlias = tuple[int, int, Array, Array, Array, DType, int, int, Rows | None]


class Outbox:
    """Every method is for who has the role `sending`.

    `drain` takes in the replies that are there: the worker may wait for room for one, and without
    that both would wait. A deadline is of time.monotonic; RingFull: there was no room until then.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.sending = Role()
        #: Orders without an answer that are still to be sent, before any other record if possible.
        #: Anyone may append.
        self.unsent: collections.deque[bytes] = collections.deque()

    def write(self, call: Packable, deadline: float, drain: Drain) -> int:
        """Send a call; how many bytes it took."""
        if self.unsent:
            self.send_unsent(deadline)
        try:
            return self._transport.write_call(*call)
        except RingFull:
            if time.monotonic() > deadline:
                raise
        parts = protocol.pack_rows(*call)
        self._write_parts(parts, protocol.CALL, deadline, drain)
        n_rows, hidden_size = parts[-1].shape
        return protocol.call_bytes(n_rows, call[3].shape[1], hidden_size, call[5])

    def write_at_once(self, call: Packable, deadline: float) -> int:
        """As `write`, without waiting. RingFull: there is no room now."""
        if self.unsent:
            self.send_unsent(deadline)
        return self._transport.write_call(*call)

    def write_descriptor(self, descriptor: bytes, deadline: float, drain: Drain) -> int:
        """As `write`."""
        if self.unsent:
            self.send_unsent(deadline)
        self._transport.finish_by = deadline
        try:
            self._transport.write((descriptor,), DESCRIPTOR, 0, 0.0)
        except RingFull:
            self._write_parts((descriptor,), DESCRIPTOR, deadline, drain)
        return len(descriptor)

    def write_order(self, order: bytes, deadline: float, drain: Drain) -> int:
        """As `write`, after every order that is not answered."""
        # What is to be released first may make room for it at the worker.
        while not self.send_unsent(deadline):
            self._write_parts((self.unsent[0],), protocol.ORDER, deadline, drain)
            self.unsent.popleft()
        self._transport.finish_by = deadline
        self._write_parts((order,), protocol.ORDER, deadline, drain)
        return len(order)

    def send_unsent(self, deadline: float | None) -> bool:
        """Send what there is room for now; True for all."""
        self._transport.finish_by = deadline
        while self.unsent:
            try:
                self._transport.write((self.unsent[0],), protocol.ORDER, 0, 0.0)
            except RingFull:
                return False
            self.unsent.popleft()
        return True

    def _write_parts(self, parts: Sequence[Any], kind: int, deadline: float, drain: Drain) -> None:
        while True:
            drain()
            try:
                self._transport.write(parts, kind, 0, _FULL_PAUSE_S)
                return
            except RingFull:
                if time.monotonic() > deadline:
                    raise
