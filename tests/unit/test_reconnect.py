"""A lost worker is looked for by one attempt at a time; calls wait as long as they can afford."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from moeshm import reconnect
from moeshm.errors import ConnectError, WorkerDied
from moeshm.reconnect import Reconnector

LOSS = WorkerDied("lost")
FAR = 60.0


class FakeLink:
    """What a Reconnector hands on and, when nobody wants it, closes."""

    def __init__(self, loss: WorkerDied | None = None) -> None:
        self.loss = loss
        self.closed = threading.Event()

    def close(self, _error: Exception) -> None:
        self.closed.set()


class Opener:
    """Opens a link when it is let, or fails with what it is given."""

    def __init__(self, error: Exception | None = None, waits: bool = True) -> None:
        self.error = error
        self.attempts = 0
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.link: Any = FakeLink()
        self._current: Any = FakeLink(LOSS)
        if not waits:
            self.may_end.set()

    def __call__(self) -> Any:
        self.attempts += 1
        self.begun.set()
        assert self.may_end.wait(FAR)
        if self.error is not None:
            raise self.error
        self._current = self.link
        return self.link

    def current(self) -> Any:
        return self._current


def deadline() -> float:
    return time.monotonic() + FAR


def nothing() -> None:
    return


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


def test_the_new_session_is_handed_to_everyone_who_waits() -> None:
    opener = Opener()
    reconnector = Reconnector(nothing)
    waiting = [
        in_thread(lambda: reconnector.link(opener, opener.current, deadline(), False))
        for _ in range(3)
    ]
    assert opener.begun.wait(FAR)
    opener.may_end.set()
    for thread, results in waiting:
        thread.join(FAR)
        assert results == [opener.link]
    assert opener.attempts == 1
    # Whoever comes late gets it, too, and starts nothing: a spawned worker would be killed.
    assert reconnector.link(opener, opener.current, deadline(), False) is opener.link
    assert opener.attempts == 1


def test_with_a_fallback_only_the_first_call_waits_and_not_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reconnect, "FALLBACK_PATIENCE_S", 0.01)
    opener = Opener()
    reconnector = Reconnector(nothing)
    for _ in range(3):
        with pytest.raises(WorkerDied, match="lost; the worker is looked for, and not there yet"):
            reconnector.link(opener, opener.current, deadline(), True)
    assert opener.attempts == 1
    opener.may_end.set()
    # Without a fallback a call waits for what is under way.
    assert reconnector.link(opener, opener.current, deadline(), False) is opener.link
    assert opener.attempts == 1


def test_a_call_waits_no_longer_than_its_deadline() -> None:
    opener = Opener()
    with pytest.raises(WorkerDied, match="not there yet"):
        Reconnector(nothing).link(opener, opener.current, time.monotonic() + 0.01, False)
    opener.may_end.set()


def test_a_failed_attempt_is_followed_by_a_pause_that_grows() -> None:
    opener = Opener(ConnectError("nobody there"), waits=False)
    reconnector = Reconnector(nothing)
    with pytest.raises(WorkerDied, match="cannot be reached: nobody there"):
        reconnector.link(opener, opener.current, deadline(), False)
    with pytest.raises(WorkerDied, match=r"^lost$"):
        reconnector.link(opener, opener.current, deadline(), False)
    assert opener.attempts == 1
    assert reconnector._pause_s == reconnect.FIRST_PAUSE_S
    reconnector._retry_at = 0.0
    with pytest.raises(WorkerDied, match="cannot be reached"):
        reconnector.link(opener, opener.current, deadline(), False)
    assert reconnector._pause_s == 2 * reconnect.FIRST_PAUSE_S
    opener.error = None
    reconnector._retry_at = 0.0
    assert reconnector.link(opener, opener.current, deadline(), False) is opener.link
    assert reconnector._pause_s == 0


def test_any_error_of_an_attempt_reaches_the_call() -> None:
    opener = Opener(RuntimeError("a bug"), waits=False)
    with pytest.raises(WorkerDied, match="cannot be reached: a bug"):
        Reconnector(nothing).link(opener, opener.current, deadline(), False)


def test_what_is_opened_after_the_client_was_closed_is_ended() -> None:
    discarded = threading.Event()
    opener = Opener()
    reconnector = Reconnector(discarded.set)
    with pytest.raises(WorkerDied):
        reconnector.link(opener, opener.current, time.monotonic(), False)
    reconnector.close()
    opener.may_end.set()
    assert opener.link.closed.wait(FAR)
    assert discarded.wait(FAR)
