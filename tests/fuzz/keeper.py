"""What a target keeps between executions, as it takes long to make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Closes(Protocol):
    """Has something to let go of."""

    def close(self) -> None:
        """Let go of it."""
        ...


_Kept = TypeVar("_Kept", bound=Closes)


class Keeper(Generic[_Kept]):
    """Makes a thing when it is first asked for it, and anew after it was closed."""

    def __init__(self, make: Callable[[], _Kept]) -> None:
        self._make = make
        self._kept: _Kept | None = None

    def __call__(self) -> _Kept:
        """The thing."""
        if self._kept is None:
            self._kept = self._make()
        return self._kept

    def close(self) -> None:
        """Close the thing, if there is one."""
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.close()
