"""Types of the extension; the behaviour is documented in `_role.pyx`."""

from types import TracebackType
from typing import final

@final
class Role:
    @property
    def owner(self) -> int: ...
    @property
    def is_taken(self) -> bool: ...
    def tried(self, deadline: float = 0.0) -> _Taking: ...
    def taken(self, deadline: float) -> _Taking: ...

@final
class _Taking:
    def __enter__(self) -> bool: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

@final
class Monitor:
    def __enter__(self) -> None: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
    def wait(self, timeout_s: float) -> bool: ...
    def notify_all(self) -> None: ...

@final
class Bell:
    def ring(self) -> None: ...
    def wait(self, timeout_s: float) -> bool: ...
