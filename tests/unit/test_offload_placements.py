"""Another placement for an offload at work: sums stay exact, and what is not in use is released."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeshm.backends.reference import ReferenceBackend, reference_ffn
from moeshm.errors import ClientClosed, NotReady, WorkerDied, WorkerFailed
from moeshm.held import HeldView
from moeshm.placement import LayerPlacement, Placement, PlacementError

from .offload_clients import EXPERTS, WHOLE, assert_exact, draw_call, make, placements, share


@settings(max_examples=100, deadline=None)
@given(st.lists(placements(["a", "b"]), min_size=2, max_size=5), st.data(), st.integers(0, 2**32))
def test_any_placements_one_after_the_other_give_exact_sums(
    chosen: list[Placement], data: st.DataObject, seed: int
) -> None:
    backend = ReferenceBackend({0: WHOLE})
    everywhere = LayerPlacement(EXPERTS, (), {name: tuple(range(EXPERTS)) for name in "ab"})
    first = Placement(["a", "b"], {0: everywhere})
    offload, clients = make(first, local=backend, fallback=backend)
    for number, placement in enumerate(chosen):
        before = offload.placement
        is_lost = data.draw(st.booleans(), label="a worker is lost while it loads")
        clients["a"].fate = ["dies"] if is_lost else []
        change = offload.apply(placement)
        if is_lost and placement.experts_of("a"):
            with pytest.raises(WorkerDied, match="while it loaded"):
                change.result(timeout_s=10)
            assert offload.placement == before
        else:
            change.result(timeout_s=10)
            assert offload.placement == placement
        clients["a"].fate = []
        assert_exact(offload, draw_call(seed + number, 6))
        # What a lent client was opened with stays; of all others, only what is in use.
        for name, client in clients.items():
            now = offload.placement.experts_of(name).get(0)
            has_moved = offload.stats().placements_applied > 0
            assert client.held[1:] == ([now] if now and has_moved else [])


def cold(n_hot: int) -> Placement:
    return Placement.by_rule(["a"], {0: EXPERTS}, lambda _layer, expert: expert < n_hot)


def test_whatever_fails_in_a_change_is_told_and_the_next_may_follow() -> None:
    offload, clients = make(cold(0), local=ReferenceBackend({0: WHOLE}))
    hold = clients["a"].hold

    def broken(_: Any) -> HeldView:
        raise OSError("no more threads")

    clients["a"].hold = broken
    change = offload.apply(cold(2))
    for _ in range(2):
        with pytest.raises(WorkerFailed, match="OSError: no more threads"):
            change.result(timeout_s=10)
    assert offload.placement == cold(0)
    clients["a"].hold = hold
    offload.apply(cold(2)).result(timeout_s=10)
    assert offload.placement == cold(2)
    assert clients["a"].offered.experts == cold(2).experts_of("a")
    stats = offload.stats()
    assert (stats.placements_applied, stats.placements_failed) == (1, 1)


def test_the_engine_may_bring_what_computes_the_new_hot_experts() -> None:
    first, then = ReferenceBackend({0: share((0, 1))}), ReferenceBackend({0: share((0, 1, 2, 3))})
    offload, _ = make(cold(2), local=first)
    with pytest.raises(PlacementError, match="the local backend does not hold expert 2 of layer 0"):
        offload.apply(cold(4))
    offload.apply(cold(4), local=then).result(timeout_s=10)
    assert_exact(offload, draw_call(1, 6))


def test_a_forward_keeps_the_experts_that_it_began_with() -> None:
    """Released only when it is over, however long the new placement is in force."""
    inside, go_on = threading.Event(), threading.Event()

    def local(_layer: int, x: Any, ids: Any, weights: Any) -> Any:
        inside.set()
        go_on.wait(10)
        return reference_ffn(WHOLE, x, ids, weights).astype(np.float32)

    offload, clients = make(cold(2), local=local)
    offload.apply(cold(3)).result(timeout_s=10)
    call = draw_call(1, 6)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(offload.forward(0, *call)))
    thread.start()
    assert inside.wait(10)
    change = offload.apply(cold(4))
    with pytest.raises(NotReady):
        change.result(timeout_s=0.01)
    assert cold(3).experts_of("a")[0] in clients["a"].held
    go_on.set()
    thread.join()
    change.result(timeout_s=10)
    assert cold(3).experts_of("a")[0] not in clients["a"].held
    np.testing.assert_allclose(results[0], reference_ffn(WHOLE, *call), rtol=1e-5, atol=1e-6)


def test_closing_releases_what_lent_clients_hold_for_it() -> None:
    offload, clients = make(cold(0), local=ReferenceBackend({0: WHOLE}))
    offload.apply(cold(2)).result(timeout_s=10)
    assert len(clients["a"].held) == 2
    offload.close()
    offload.close()
    assert clients["a"].held == [tuple(range(EXPERTS))]
    with pytest.raises(ClientClosed):
        offload.apply(cold(3))


def test_a_change_does_not_come_into_force_after_the_end() -> None:
    offload, clients = make(cold(0), local=ReferenceBackend({0: WHOLE}))
    hold, go_on = clients["a"].hold, threading.Event()

    def slow(experts: Any) -> HeldView:
        go_on.wait(10)
        view: HeldView = hold(experts)
        return view

    clients["a"].hold = slow
    change = offload.apply(cold(2))
    with pytest.raises(PlacementError, match="another placement is being applied"):
        offload.apply(cold(3))
    offload.close()
    go_on.set()
    with pytest.raises(ClientClosed, match="closed while workers loaded"):
        change.result(timeout_s=10)
    assert clients["a"].held == [tuple(range(EXPERTS))]
