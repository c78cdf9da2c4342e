"""A client's views over several sessions, when threads hold and release while it connects anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import pytest

from moeshm.errors import InvalidCall, ProtocolError, SessionError, WorkerDied
from moeshm.held import ClientViews, HeldView, SessionNumbers
from moeshm.layers import LayerInfo
from tests.wire import partial_info


def layers_of(experts: Mapping[int, Sequence[int]]) -> dict[int, LayerInfo]:
    return {layer: partial_info(8, 9, ids, 2) for layer, ids in experts.items()}


class FakeLink:
    """A session whose worker holds whatever it is asked for."""

    def __init__(self, experts: Mapping[int, Sequence[int]]) -> None:
        self.views = SessionNumbers(self)  # type: ignore[arg-type]
        self.session: Any = self
        self.welcome: Any = self
        self.takes_orders = True
        self.version = "0.1"
        self.layers = layers_of(experts)
        #: Call ids whose replies are nobody's.
        self.forgotten: list[int] = []
        self.loss: Exception | None = None
        self.orders: list[dict[str, Any]] = []
        #: Before an order to hold is answered.
        self.meanwhile: Callable[[], object] = lambda: None

    def new_id(self) -> int:
        return 1

    def order(self, _call_id: int | None, receiver: Any, packed: bytes) -> None:
        self.orders.append(msgspec.msgpack.decode(packed))
        if self.orders[-1]["type"] == "hold":
            self.meanwhile()
            receiver.layers = layers_of(dict.fromkeys(self.orders[-1]["experts"], ()))

    def tell(self, packed: bytes) -> None:
        self.orders.append(msgspec.msgpack.decode(packed, strict=False))

    def await_order(self, _receiver: Any, _deadline: float) -> bool:
        return True

    def forget(self, call_id: int) -> None:
        self.forgotten.append(call_id)

    def lose(self, cause: Exception) -> Exception:
        self.loss = cause
        return WorkerDied(str(cause))

    def held(self) -> list[Any]:
        """What was ordered, without the numbers."""
        return [order.get("experts", order["type"]) for order in self.orders]


FIRST, SECOND, THIRD = {0: (0, 1)}, {0: (4,)}, {1: (7, 3)}


@pytest.fixture
def first() -> FakeLink:
    return FakeLink(FIRST)


@pytest.fixture
def views(first: FakeLink) -> ClientViews:
    return ClientViews(HeldView(first.layers), first)  # type: ignore[arg-type]


def hold(views: ClientViews, link: Any, experts: Any, current: Any = None) -> HeldView | None:
    """As `ExpertClient.hold`; None when another session is the client's by now."""
    number, layers = link.views.hold(experts, 9.0)
    view = HeldView(layers)
    return view if views.add(view, number, link, lambda: current or link) else None


def test_what_an_old_session_holds_is_in_vain(views: ClientViews, first: FakeLink) -> None:
    second = FakeLink(FIRST)
    assert hold(views, first, SECOND, current=second) is None
    # So it is not restored either.
    views.restore(second, lambda _link: None)  # type: ignore[arg-type]
    assert second.orders == []


def test_what_was_offered_last_is_offered_again(views: ClientViews, first: FakeLink) -> None:
    second, third = hold(views, first, SECOND), hold(views, first, THIRD)
    assert second is not None
    assert third is not None
    for view in (third, second):
        views.offer(view, lambda: first)  # type: ignore[arg-type,return-value]
    assert first.orders[2:] == [{"type": "offer", "view": 2}, {"type": "offer", "view": 1}]
    link = FakeLink(FIRST)
    used: list[object] = []
    views.restore(link, used.append)  # type: ignore[arg-type]
    assert used == [link]
    assert link.held() == [{0: [4]}, {1: [7, 3]}, "offer"]
    assert link.orders[2] == {"type": "offer", "view": link.views.of(second)}
    # One that was released is not.
    views.discard(second)
    with pytest.raises(InvalidCall, match="was released"):
        views.offer(second, lambda: link)  # type: ignore[arg-type,return-value]
    last = FakeLink(FIRST)
    views.restore(last, lambda _link: None)  # type: ignore[arg-type]
    assert last.held() == [{1: [7, 3]}]


def test_what_was_only_held_is_offered_to_nobody(views: ClientViews, first: FakeLink) -> None:
    hold(views, first, SECOND)
    link = FakeLink(FIRST)
    views.restore(link, lambda _link: None)  # type: ignore[arg-type]
    assert first.held() == link.held() == [{0: [4]}]


def test_a_worker_that_knows_no_orders_gets_none(views: ClientViews, first: FakeLink) -> None:
    first.takes_orders = False
    with pytest.raises(InvalidCall, match=r"worker \(moeshm '0\.1'\) .* takes no orders; update"):
        first.views.hold(SECOND, 9.0)
    views.offer(view_of(first), lambda: first)  # type: ignore[arg-type,return-value]
    first.views.release(view_of(first))
    assert first.orders == []
    # One that comes back as it was is welcome, and any other is not.
    again = FakeLink(FIRST)
    again.takes_orders = False
    views.restore(again, lambda _link: None)  # type: ignore[arg-type]
    other = FakeLink(SECOND)
    other.takes_orders = False
    with pytest.raises(SessionError, match="update the worker"):
        views.restore(other, lambda _link: None)  # type: ignore[arg-type]
    assert other.orders == []


def view_of(link: FakeLink) -> HeldView:
    """The one that its session began with."""
    return next(view for view, number in link.views._numbers.items() if number == 0)


def test_an_interrupt_leaves_no_view_behind(
    first: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(first, "await_order", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.views.hold(SECOND, 9.0)
    assert first.forgotten == [1]
    assert first.orders[1:] == [{"type": "release", "view": first.orders[0]["view"]}]


@pytest.mark.parametrize(
    "experts", [{-1: [0]}, {2**32: [0]}, {0: [2**70]}, {0: [1 << 20]}, {0: [-1]}]
)
def test_what_cannot_be_ordered_is_not_sent(first: FakeLink, experts: Any) -> None:
    with pytest.raises(InvalidCall, match="it must be a whole number"):
        first.views.hold(experts, 9.0)
    assert first.orders == []


def test_a_worker_that_says_what_cannot_be_is_left(
    first: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(receiver: Any, _deadline: float) -> bool:
        receiver.layers = {0: partial_info(8, 3, (), 2)}
        return True

    monkeypatch.setattr(first, "await_order", lie)
    with pytest.raises(WorkerDied, match="says it holds cannot be: experts must lie in"):
        first.views.hold({0: (4,)}, 9.0)
    with pytest.raises(WorkerDied, match=r"asked for layers \[1\], the worker has \[0\]"):
        first.views.hold({1: (2,)}, 9.0)
    assert isinstance(first.loss, ProtocolError)


def test_a_view_that_is_the_welcomes_is_not_ordered(views: ClientViews, first: FakeLink) -> None:
    newest = hold(views, first, SECOND)
    assert newest is not None
    link = FakeLink(SECOND)
    views.restore(link, lambda _link: None)  # type: ignore[arg-type]
    assert link.held() == [{0: [0, 1]}]
    assert link.views.of(newest) == 0


def test_what_threads_do_meanwhile_is_done_to_the_new_session(
    views: ClientViews, first: FakeLink
) -> None:
    second = hold(views, first, SECOND)
    assert second is not None
    link = FakeLink({5: (0,)})

    def once() -> None:
        link.meanwhile = lambda: None
        views.discard(second)
        first.views.release(second)
        hold(views, first, THIRD)

    link.meanwhile = once
    views.restore(link, lambda _link: None)  # type: ignore[arg-type]
    # The welcome's is of no use; what was released comes, and goes again.
    assert link.held() == ["release", {0: [0, 1]}, {0: [4]}, {1: [7, 3]}, "release"]
    with pytest.raises(InvalidCall, match="was released"):
        link.views.of(second)
