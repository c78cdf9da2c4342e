"""A client's fallback holds what its views list, or is refused."""

from __future__ import annotations

import msgspec
import pytest

import moeshm
from moeshm.errors import InvalidCall, SettingError
from moeshm.layers import Activation
from tests.growing import Experts, GrowingArithmetic

from .serving import FIRST, NEWER, Worker, assert_means, listed, some_call


def test_a_fallback_computes_calls_of_every_view(worker: Worker, transport: str) -> None:
    # More than the worker's, in another order.
    fallback = GrowingArithmetic({0: (4, 2, 1, 0, 3), 1: range(6), 2: range(6)})
    with moeshm.connect(worker.address, transport=transport, fallback=fallback) as client:
        with pytest.raises(InvalidCall, match="the fallback does not hold expert 5 of layer 0"):
            client.hold(NEWER)
        view = client.hold({0: (2, 0), 2: (3, 5)})
        worker.close()
        assert_means(client, {0: (2, 0), 2: (3, 5)}, view)
        assert_means(client, FIRST)
        assert client.stats().fallback_calls == 36


@pytest.mark.parametrize("held", [{0: (0, 1), 1: (5, 1)}, {0: (0, 1, 2)}])
def test_a_fallback_that_lacks_an_expert_is_refused(
    worker: Worker, transport: str, held: Experts
) -> None:
    with pytest.raises(SettingError, match=r"the fallback does not hold expert \d of layer \d"):
        moeshm.connect(worker.address, transport=transport, fallback=GrowingArithmetic(held))


def test_a_fallback_of_another_model_is_refused(worker: Worker, transport: str) -> None:
    """At once, or with the view whose layers it has otherwise."""
    fallback = GrowingArithmetic({**FIRST, 2: range(6)})
    layers = dict(fallback.layers)
    fallback.layers = {**layers, 1: msgspec.structs.replace(layers[1], top_k=2)}
    with pytest.raises(SettingError, match="has layer 1 with top_k=2, and the worker with 3"):
        moeshm.connect(worker.address, transport=transport, fallback=fallback)
    geglu = msgspec.structs.replace(layers[2], activation=Activation.GEGLU)
    fallback.layers = {**layers, 2: geglu}
    with moeshm.connect(worker.address, transport=transport, fallback=fallback) as client:
        with pytest.raises(InvalidCall, match="layer 2 with activation=geglu, and the worker with"):
            client.hold({2: (3,)})
        # The worker was told.
        some_call(client)
        assert worker.held() == listed(FIRST)
