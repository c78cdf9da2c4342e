"""How calls and replies travel: one file a transport, all of them with this interface.

Both carry the same records in the same order, so nothing above knows which one it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..dtypes import Array, DType
from ..protocol import Message, Outgoing


class Transport(Protocol):
    """One side's end of a session's data path, both ways.

    One thread may send while another receives. Errors are the ring's: RingFull and RingEmpty at
    the timeout, RingClosed when the other side closed, PeerDied when its process is gone (a stream
    cannot tell the two apart, and raises PeerDied), Corrupt when it sent something impossible;
    `timeout_s` None waits for ever, 0 does not wait.
    """

    name: str
    #: Most bytes of one record, each way.
    send_capacity: int
    receive_capacity: int
    #: Bytes that may be on their way before a sender waits.
    buffer_bytes: int
    #: Of time.monotonic: when what is sent is of no more use, set by who sends. A record that has
    #: left in part by then takes the session with it, unless its sender was interrupted: then who
    #: sends next sends the rest first. None for no such time.
    finish_by: float | None

    def write(
        self, parts: Sequence[Any], type: int, flags: int = 0, timeout_s: float | None = None
    ) -> None:
        """Send one record made of the given buffers, one after the other."""
        ...

    def write_call(
        self,
        call_id: int,
        layer: int,
        hidden_states: Array,
        topk_ids: Array,
        topk_weights: Array,
        dtype: DType,
        deadline_ns: int,
        view: int = 0,
        rows: npt.NDArray[np.int64] | None = None,
    ) -> int:
        """Send what `protocol.pack_rows` packs, if there is room now; its length."""
        ...

    def reserve(
        self, size: int, type: int, flags: int = 0, timeout_s: float | None = None
    ) -> Outgoing:
        """Room for a record of `size` bytes, sent by its `commit`."""
        ...

    @property
    def has_unread(self) -> bool:
        """Records were taken in as room was waited for, and lie in this process's own memory."""
        ...

    @property
    def is_closed(self) -> bool:
        """This end is."""
        ...

    def acquire(self, timeout_s: float | None = None) -> Message:
        """The next record; `release` it."""
        ...

    def memory(self) -> list[memoryview]:
        """What the records of both ways lie in, each part mapped twice in a row; none if that is
        private. It stays mapped while these views of it are in use."""
        ...

    def close(self) -> None:
        """Close this end; again does nothing."""
        ...
