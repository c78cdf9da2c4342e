"""Types of the extension; the behaviour is documented in `_ring.pyx`."""

import builtins
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, final

import numpy.typing as npt

if sys.version_info >= (3, 12):
    from collections.abc import Buffer
else:
    from typing_extensions import Buffer

MAX_OUTSTANDING: int
MAX_CAPACITY: int
HEADER_BYTES: int

class _RingEnd:
    @property
    def capacity(self) -> int: ...
    @property
    def name(self) -> str | None: ...
    @property
    def epoch(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def peer_closed(self) -> bool: ...
    @property
    def outstanding(self) -> int: ...
    @property
    def spin_us(self) -> float: ...
    @spin_us.setter
    def spin_us(self, value: float) -> None: ...
    def counters(self) -> dict[str, int]: ...
    def fileno(self) -> int: ...
    def memory(self) -> memoryview: ...
    def watch(self, socket_fd: int = -1, pidfd: int = -1) -> None: ...
    def close(self) -> None: ...

@final
class Reservation:
    @property
    def sequence(self) -> int: ...
    def commit(self) -> None: ...
    def abort(self) -> None: ...
    def array(
        self, dtype: npt.DTypeLike, shape: tuple[int, ...], offset: int = 0
    ) -> npt.NDArray[Any]: ...
    def __len__(self) -> int: ...
    def __enter__(self) -> memoryview: ...
    def __exit__(
        self,
        kind: builtins.type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Record:
    @property
    def type(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def sequence(self) -> int: ...
    def release(self) -> None: ...
    def copy_to(self, destination: Buffer | npt.NDArray[Any], offset: int = 0) -> None: ...
    def array(
        self, dtype: npt.DTypeLike, shape: tuple[int, ...], offset: int = 0
    ) -> npt.NDArray[Any]: ...
    def __len__(self) -> int: ...
    def __enter__(self) -> Record: ...
    def __exit__(
        self,
        kind: builtins.type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class RingProducer(_RingEnd):
    @classmethod
    def create(
        cls,
        name: str | None,
        capacity: int,
        *,
        epoch: int = 0,
        spin_us: float | None = None,
        first_position: int = 0,
    ) -> RingProducer: ...
    @classmethod
    def attach(
        cls, source: str | int, *, epoch: int | None = None, spin_us: float | None = None
    ) -> RingProducer: ...
    def reserve(
        self, size: int, type: int = 0, flags: int = 0, timeout_s: float | None = None
    ) -> Reservation: ...
    def write(
        self,
        parts: Sequence[Buffer | npt.NDArray[Any]],
        type: int = 0,
        flags: int = 0,
        timeout_s: float | None = None,
    ) -> None: ...
    def __enter__(self) -> RingProducer: ...
    def __exit__(
        self,
        kind: builtins.type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

class RingConsumer(_RingEnd):
    @classmethod
    def create(
        cls,
        name: str | None,
        capacity: int,
        *,
        epoch: int = 0,
        spin_us: float | None = None,
        first_position: int = 0,
    ) -> RingConsumer: ...
    @classmethod
    def attach(
        cls, source: str | int, *, epoch: int | None = None, spin_us: float | None = None
    ) -> RingConsumer: ...
    def acquire(self, timeout_s: float | None = None) -> Record: ...
    def __enter__(self) -> RingConsumer: ...
    def __exit__(
        self,
        kind: builtins.type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
