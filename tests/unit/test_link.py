"""Orders that are not answered: sent in their order, waited for by nobody, whoever else sends."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from moeshm import protocol
from moeshm.errors import DeadlineExceeded, PeerDied, RingEmpty, RingFull, WorkerDied
from moeshm.held import HeldView
from moeshm.link import Link
from moeshm.orders import Hold, Release, pack_order, parse_order
from moeshm.receivers import Nobody
from tests.wire import meanwhile, message, partial_info

LAYERS = {0: partial_info(8, 9, (0, 1), 2)}


class FakeTransport:
    """Takes records while there is room, and delivers none."""

    def __init__(self) -> None:
        self.room = 0
        self.error: Exception | None = None
        self.sent: list[Any] = []
        self.has_unread = self.is_closed = False
        self.finish_by: float | None = None
        #: Before a call is written.
        self.meanwhile: Callable[[], object] = lambda: None

    def write(self, parts: Any, type: int, flags: int = 0, timeout_s: float = 0.0) -> None:
        assert (type, flags) == (protocol.ORDER, 0)
        if self.error is not None:
            raise self.error
        self._take(timeout_s)
        self.sent.append(parse_order(message(b"".join(parts), type)))

    def write_call(self, *_: Any) -> int:
        self.meanwhile()
        self._take(0.0)
        self.sent.append("call")
        return 64

    def acquire(self, timeout_s: float) -> Any:
        raise RingEmpty(f"nothing within {timeout_s} s")

    def _take(self, timeout_s: float) -> None:
        if not self.room:
            raise RingFull(f"no room within {timeout_s} s")
        self.room -= 1


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
def link(transport: FakeTransport) -> Link:
    welcome = SimpleNamespace(max_tokens=8, layers=LAYERS, takes_orders=True)
    session: Any = SimpleNamespace(
        transport=transport, welcome=welcome, close=lambda: None, farewell=lambda: None
    )
    return Link(session, 8)


def release(link: Link, *numbers: int) -> None:
    for number in numbers:
        view = HeldView(LAYERS)
        link.views.put(view, number)
        link.views.release(view)


NOTHING: Any = None
CALL = (0, NOTHING, NOTHING, NOTHING, NOTHING, 0)


def test_a_release_without_room_goes_before_the_next_call(
    link: Link, transport: FakeTransport
) -> None:
    """The session lives: another thread may be waiting for the same room."""
    release(link, 1, 2)
    assert link.loss is None
    assert transport.sent == []
    transport.room = 3
    link.send(Nobody(1e9), *CALL, None)
    assert transport.sent == [Release(1), Release(2), "call"]


def test_a_call_that_is_awaited_at_once_takes_it_along(
    link: Link, transport: FakeTransport
) -> None:
    release(link, 1)
    transport.room = 2
    with pytest.raises(DeadlineExceeded):  # nothing comes
        link.call(*CALL, NOTHING, 1.0)
    assert transport.sent == [Release(1), "call"]


def test_what_is_left_over_goes_with_the_next_release(link: Link, transport: FakeTransport) -> None:
    release(link, 1, 2)
    transport.room = 1
    release(link, 3)
    assert transport.sent == [Release(1)]
    transport.room = 2
    release(link, 4)
    assert transport.sent == [Release(number) for number in (1, 2, 3)]


def test_an_order_to_hold_comes_after_what_makes_room_for_it(
    link: Link, transport: FakeTransport
) -> None:
    hold = Hold(7, 3, {0: (1,)})
    release(link, 1, 2)
    transport.room = 2
    with pytest.raises(RingFull):
        link.order(7, Nobody(0.0), pack_order(hold))
    assert transport.sent == [Release(1), Release(2)]
    transport.room = 1
    link.order(7, Nobody(0.0), pack_order(hold))
    assert transport.sent[2:] == [hold]


def test_a_release_while_another_thread_sends_is_sent_by_that(
    link: Link, transport: FakeTransport
) -> None:
    def releasing() -> None:
        with meanwhile(lambda: release(link, 1)):
            # Its end waits for the other thread, which must not wait for this one.
            pass

    transport.meanwhile = releasing
    transport.room = 2
    link.send(Nobody(1e9), *CALL, None)
    assert transport.sent == ["call", Release(1)]


def test_a_release_of_a_session_that_is_over_means_nothing(
    link: Link, transport: FakeTransport
) -> None:
    transport.error = PeerDied("gone")
    release(link, 1)
    assert "gone" in str(link.loss)
    transport.error = None
    transport.room = 1
    release(link, 2)
    assert transport.sent == []
    with pytest.raises(WorkerDied):
        link.send(Nobody(1e9), *CALL, None)
