"""Clients as an offload is lent them: each worker's part of a call is judged by itself.

An offload hides a worker that is lost, where others or a fallback take over, and hands on the loss
of one of several. What each of them gave, or why not, only its client knows.
"""

from __future__ import annotations

from typing import Any

from ..call import CallFuture
from ..client import ExpertClient
from ..held import HOLD_TIMEOUT_S
from .books import LONG_S, Books, Call, Losses
from .calls import OpenLine


class LentClient:
    """Does all that its client does, and notes what becomes of it. `losses`: the offload's."""

    def __init__(self, books: Books, opened: OpenLine, losses: Losses) -> None:
        self._books = books
        self._line = opened.line
        self._client: ExpertClient = opened.client
        self._losses = losses

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def submit(self, *arguments: Any, timeout_s: float | None = None, **options: Any) -> Any:
        """As `ExpertClient.submit`."""
        limit_s = LONG_S if timeout_s is None else timeout_s
        call = self._books.begin(self._line, f"part on {self._line.name}", limit_s)
        future = self._books.part(
            call,
            lambda: self._client.submit(*arguments, timeout_s=limit_s, **options),
            self._losses,
            is_answer=False,
        )
        return LentFuture(self._books, call, future, self._losses)

    def hold(self, *arguments: Any, timeout_s: float | None = None) -> Any:
        """As `ExpertClient.hold`."""
        limit_s = HOLD_TIMEOUT_S if timeout_s is None else timeout_s
        call = self._books.begin(self._line, f"hold on {self._line.name}", limit_s)
        return self._books.part(
            call, lambda: self._client.hold(*arguments, timeout_s=limit_s), self._losses
        )


class LentFuture:
    """What `LentClient.submit` gives."""

    def __init__(self, books: Books, call: Call, future: CallFuture, losses: Losses) -> None:
        self._books = books
        self._call = call
        self._future = future
        self._losses = losses

    def __getattr__(self, name: str) -> Any:
        return getattr(self._future, name)

    def add_to(self, total: Any) -> None:
        """As `CallFuture.add_to`."""
        self._books.part(self._call, lambda: self._future.add_to(total), self._losses)
