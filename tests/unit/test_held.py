"""A client's views over several sessions, when threads hold and release while it connects anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import pytest

from moeshm.errors import InvalidCall
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
        self.layers = layers_of(experts)
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

    def wait(self, _receiver: Any, _deadline: float) -> bool:
        return True

    def held(self) -> list[Any]:
        """What was ordered, without the numbers."""
        return [order.get("experts", "release") for order in self.orders]


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


def test_the_newest_is_what_others_begin_with(views: ClientViews, first: FakeLink) -> None:
    hold(views, first, SECOND)
    hold(views, first, THIRD)
    link = FakeLink(FIRST)
    used: list[object] = []
    views.restore(link, used.append)  # type: ignore[arg-type]
    assert used == [link]
    assert [(each["experts"], each["is_default"]) for each in link.orders] == [
        ({0: [4]}, False),
        ({1: [7, 3]}, True),
    ]


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
