"""Every slot is computed once, wherever its expert is and whoever is lost on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeshm.backends.reference import ReferenceBackend, reference_ffn
from moeshm.dtypes import DType
from moeshm.errors import DeadlineExceeded, InvalidCall, SettingError
from moeshm.offload import ExpertOffload
from moeshm.placement import LayerPlacement, Placement, PlacementError

from .offload_clients import (
    EXPERTS,
    WHOLE,
    Answer,
    FakeClient,
    assert_exact,
    draw_call,
    make,
    placements,
    share,
)

FATES = st.lists(st.sampled_from(["lives", "dies", "hangs", "unreachable"]), max_size=4)


@settings(max_examples=150, deadline=None)
@given(placements(), st.data(), st.integers(0, 9), st.integers(0, 2**32))
def test_any_placement_and_any_losses_give_the_exact_sum(
    placement: Placement, data: st.DataObject, n_tokens: int, seed: int
) -> None:
    fates = {name: data.draw(FATES, label=name) for name in placement.workers}
    backend = ReferenceBackend({0: WHOLE})
    offload, _ = make(placement, fates, local=backend, fallback=backend)
    for number in range(3):
        assert_exact(offload, draw_call(seed + number, n_tokens))
    stats = offload.stats()
    slots = sum(int((draw_call(seed + n, n_tokens)[1] >= 0).sum()) for n in range(3))
    computed = [stats.hot_slots, *stats.cold_slots.values(), *stats.fallback_slots.values()]
    assert sum(computed) == slots
    assert stats.forwards == 3


def test_a_replica_takes_over_what_a_lost_worker_had() -> None:
    layer = LayerPlacement(EXPERTS, (0,), {"a": (1, 2, 3, 4, 5, 6), "b": (1, 2, 3, 4, 5, 6)})
    offload, clients = make(
        Placement(["a", "b"], {0: layer}), {"a": ["dies"]}, local=ReferenceBackend({0: WHOLE})
    )
    call = draw_call(3, 20)
    assert_exact(offload, call)
    stats = offload.stats()
    assert stats.losses == {"a": 1}
    assert list(stats.cold_slots) == ["b"]
    assert stats.fallback_slots == {}
    # It is left alone for a while.
    assert_exact(offload, call)
    assert clients["a"].calls == 1


def test_without_a_fallback_a_worker_that_may_be_gone_is_asked_rather_than_nobody() -> None:
    layer = LayerPlacement(EXPERTS, (), {"a": tuple(range(EXPERTS))})
    offload, clients = make(Placement(["a"], {0: layer}), {"a": ["hangs"]})
    with pytest.raises(DeadlineExceeded, match="late"):
        offload.forward(0, *draw_call(1, 4))
    assert_exact(offload, draw_call(1, 4))
    assert clients["a"].calls == 2


def test_replicas_share_the_experts() -> None:
    both = tuple(range(EXPERTS))
    layer = LayerPlacement(EXPERTS, (), {"a": both, "b": both})
    offload, _ = make(Placement(["a", "b"], {0: layer}))
    x, _, weights = draw_call(1, 5)
    offload.forward(0, x[:1], np.array([[0, 2, 1]], np.int32), weights[:1])
    assert offload.stats().cold_slots == {"a": 2, "b": 1}


def test_a_function_may_compute_the_hot_part() -> None:
    seen = []

    def local(layer: int, x: Any, ids: Any, weights: Any) -> Any:
        seen.append((layer, ids))
        return reference_ffn(WHOLE, x, ids, weights).astype(np.float32)

    placement = Placement.by_rule(["a"], {0: EXPERTS}, lambda _layer, expert: expert < 3)
    offload, _ = make(placement, local=local)
    call = draw_call(2, 6)
    assert_exact(offload, call)
    ((layer, ids),) = seen
    assert layer == 0
    np.testing.assert_array_equal(ids, np.where(call[1] < 3, call[1], -1))


def test_what_the_router_chose_is_counted() -> None:
    placement = Placement.by_rule(["a"], {0: EXPERTS}, lambda *_: False)
    offload, _ = make(placement)
    _, ids, _ = call = draw_call(4, 30)
    offload.forward(0, *call)
    expected = np.bincount(ids[ids >= 0], minlength=EXPERTS)
    np.testing.assert_array_equal(offload.routing.counts(0), expected)


def test_torch_goes_in_and_out() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    placement = Placement.by_rule(["a"], {0: EXPERTS}, lambda *_: False)
    offload, _ = make(placement)
    x, ids, weights = draw_call(5, 6)
    tensors = (
        torch.from_numpy(x).bfloat16(),
        torch.from_numpy(ids).long(),
        torch.from_numpy(weights),
    )
    with torch.no_grad():
        y = offload.forward(0, *tensors)
    assert y.dtype == torch.bfloat16
    expected = reference_ffn(WHOLE, tensors[0].float().numpy(), ids, weights)
    np.testing.assert_allclose(y.float().numpy(), expected, rtol=2e-2, atol=2e-2)


def test_sides_that_disagree_are_refused_by_name() -> None:
    placement = Placement.by_rule(["a", "b"], {0: EXPERTS}, lambda *_: False)
    clients: dict[str, Any] = {name: FakeClient((0, 1)) for name in "ab"}
    with pytest.raises(PlacementError, match="worker 'a' holds 2 experts of layer 0"):
        ExpertOffload(clients, placement)
    with pytest.raises(PlacementError, match="no client for the worker 'a'"):
        ExpertOffload({}, placement)


def test_what_is_missing_in_this_process_is_refused_by_name() -> None:
    hot = Placement.by_rule(["a"], {0: EXPERTS}, lambda _layer, expert: expert < 2)
    with pytest.raises(PlacementError, match="layer 0 has hot experts; pass `local`"):
        make(hot)
    few = ReferenceBackend({0: share((0,))})
    with pytest.raises(PlacementError, match="the local backend does not hold expert 1 of layer 0"):
        make(hot, local=few)
    with pytest.raises(PlacementError, match="the fallback does not hold expert 2 of layer 0"):
        make(hot, local=ReferenceBackend({0: WHOLE}), fallback=few)


def test_bad_calls_are_refused_before_anything_is_sent() -> None:
    offload, clients = make(Placement.by_rule(["a"], {0: EXPERTS}, lambda *_: False))
    x, ids, weights = draw_call(1, 2)
    with pytest.raises(InvalidCall, match="layer 9 is not in the placement"):
        offload.forward(9, x, ids, weights)
    with pytest.raises(InvalidCall, match="expert id 7"):
        offload.forward(0, x, np.full_like(ids, EXPERTS), weights)
    assert clients["a"].calls == 0


def test_the_timeout_is_for_the_whole_forward_not_for_each_worker() -> None:
    everything = tuple(range(EXPERTS))
    layer = LayerPlacement(EXPERTS, (), {"a": everything, "b": everything})
    offload, clients = make(Placement(["a", "b"], {0: layer}))
    for name in "ab":
        clients[name].late = True
    x, _, weights = draw_call(1, 1)
    with pytest.raises(DeadlineExceeded, match="late"):
        offload.forward(0, x, np.zeros((1, 3), np.int32), weights, timeout_s=0.05)
    assert sorted(clients[name].calls for name in "ab") == [0, 1]
    assert offload.stats().losses == {"a": 1}


def test_a_worker_that_no_time_was_left_for_is_not_blamed() -> None:
    layer = LayerPlacement(EXPERTS, (), {"a": (0, 1, 2), "b": (3, 4, 5, 6)})
    offload, clients = make(Placement(["a", "b"], {0: layer}))
    clients["a"].blocks = True
    x, _, weights = draw_call(1, 2)
    ids = np.array([[0, 3, 4], [1, 5, 6]], np.int32)
    with pytest.raises(DeadlineExceeded):
        offload.forward(0, x, ids, weights, timeout_s=0.05)
    assert clients["b"].calls == 0
    assert offload.stats().losses == {"a": 1}
    # Nor left alone.
    offload.forward(0, x, np.array([[3, 4, 5]] * 2, np.int32), weights)
    assert clients["b"].calls == 1


@pytest.mark.parametrize("timeout_s", [0, -1.0, 1e7])
def test_a_timeout_that_no_call_may_have_is_refused(timeout_s: float) -> None:
    offload, clients = make(Placement.by_rule(["a"], {0: EXPERTS}, lambda *_: False))
    with pytest.raises(InvalidCall, match=r"timeout_s=.*; it must lie in 0\.\.1e\+06"):
        offload.forward(0, *draw_call(1, 2), timeout_s=timeout_s)
    assert clients["a"].calls == 0


def test_a_client_with_a_fallback_of_its_own_is_refused() -> None:
    """What that computes would be taken for the worker's."""
    client: Any = FakeClient(tuple(range(EXPERTS)))
    client.has_fallback = True
    with pytest.raises(SettingError, match="worker 'a' has a fallback of its own"):
        ExpertOffload({"a": client}, Placement.by_rule(["a"], {0: EXPERTS}, lambda *_: False))


def test_what_a_lent_client_was_told_about_formats_holds() -> None:
    client: Any = FakeClient(tuple(range(EXPERTS)))
    client.wire_dtype = DType.BF16
    placement = Placement.by_rule(["a"], {0: EXPERTS}, lambda *_: False)
    offload = ExpertOffload({"a": client}, placement)
    assert_exact(offload, draw_call(1, 3))
    assert client.calls > 1


def test_calibration_begins_nothing_once_its_time_is_spent(monkeypatch: Any) -> None:
    now_ns = 0
    client: Any = FakeClient(tuple(range(EXPERTS)))
    submit = client.submit

    def slow(*arguments: Any, **named: Any) -> Answer:
        nonlocal now_ns
        now_ns += 30_000_000
        answer: Answer = submit(*arguments, **named)
        return answer

    client.submit = slow
    monkeypatch.setattr("moeshm.offload.calibration.time.perf_counter_ns", lambda: now_ns)
    ExpertOffload({"a": client}, Placement.by_rule(["a"], {0: EXPERTS}, lambda *_: False))
    assert 1 <= client.calls <= 4


def test_a_worker_that_is_lost_in_calibration_is_left_to_real_calls() -> None:
    client: Any = FakeClient(tuple(range(EXPERTS)))
    client.fate = ["dies"]
    offload = ExpertOffload({"a": client}, Placement.by_rule(["a"], {0: EXPERTS}, lambda *_: False))
    assert_exact(offload, draw_call(1, 3))
