"""What remains of orders that come to nothing."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from moeshm.errors import CallError, InvalidCall, RingEmpty
from moeshm.holdings import Holdings
from moeshm.layers import LayerInfo
from moeshm.orders import Hold, Release
from moeshm.views import SessionViews
from tests.growing import GrowingArithmetic, load


class Kept:
    """As a record that the session took last."""


@pytest.fixture
def _no_collection() -> Iterator[None]:
    """As in a worker that is idle."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def refuse(_layers: Mapping[int, LayerInfo]) -> None:
    raise InvalidCall("as if they were too wide")


def answer(views: SessionViews, check: Any) -> tuple[list[Any], weakref.ref[Kept]]:
    """As the serve loop does: with a record in the frame, while nothing came."""
    record = Kept()
    try:
        raise RingEmpty("no record")
    except RingEmpty:
        outcomes = [outcome for _, outcome in views.answers(check)]
    return outcomes, weakref.ref(record)


@pytest.mark.usefixtures("_no_collection")
@pytest.mark.parametrize("is_released", [True, False])
def test_a_refused_order_keeps_nothing_of_its_session(is_released: bool) -> None:
    """Rings stay mapped as long as a record is kept, and nobody collects cycles meanwhile."""
    views = SessionViews(Holdings(GrowingArithmetic({0: (0, 1)}), load))
    views.hold(Hold(1, 1, {0: (4,)}))
    if is_released:
        views.release(Release(1))
    for thread in threading.enumerate():
        if thread.name == "moeshm-loading":
            thread.join()
    outcomes, record = answer(views, refuse)
    assert [type(each) for each in outcomes] == [InvalidCall]
    assert isinstance(outcomes[0], CallError)
    del outcomes
    assert record() is None
