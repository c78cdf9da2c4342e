"""What tests give a backend that computes in steps."""

from __future__ import annotations

from collections.abc import Callable


class NeverDue:
    """As `BetweenSteps`: nobody waits."""

    def is_due(self) -> bool:
        """As `BetweenSteps.is_due`."""
        return False

    def __call__(self) -> None:
        """As `BetweenSteps`."""
        raise AssertionError("nobody waits, and it paused")


class AlwaysDue:
    """As `BetweenSteps`: somebody always waits; `pause` is what he does, `n` how often he did."""

    def __init__(self, pause: Callable[[], None] = lambda: None) -> None:
        self._pause = pause
        self.n = 0

    def is_due(self) -> bool:
        """As `BetweenSteps.is_due`."""
        return True

    def __call__(self) -> None:
        """As `BetweenSteps`."""
        self.n += 1
        self._pause()
