"""Types of the extension; the behaviour is documented in `_stream.pyx`."""

import collections
import socket
from collections.abc import Callable, Sequence
from typing import Any

from ._role import Role
from .errors import PeerDied, RingClosed
from .transport.stream import StreamMessage

MAX_RECORD_BYTES: int
STALL_S: float

class StreamEnd:
    finish_by: float | None
    @property
    def _socket(self) -> socket.socket: ...
    @property
    def _reading(self) -> Role: ...
    @property
    def _inbox(self) -> collections.deque[StreamMessage]: ...
    @property
    def _inbox_bytes(self) -> int: ...
    def __init__(
        self,
        sock: socket.socket,
        epoch: int,
        max_bytes: int,
        message: Callable[[], StreamMessage],
    ) -> None: ...
    @property
    def has_unread(self) -> bool: ...
    @property
    def is_closed(self) -> bool: ...
    def close(self) -> None: ...
    def acquire(self, timeout_s: float | None = None) -> StreamMessage: ...
    def write(
        self, parts: Sequence[Any], type: int, flags: int = 0, timeout_s: float | None = None
    ) -> None: ...
    def _gone(self) -> RingClosed | PeerDied: ...
    def _read(self, until: float) -> bool: ...

def check_sendable(size: int) -> None: ...
