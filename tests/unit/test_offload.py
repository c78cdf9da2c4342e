"""Every slot is computed once, wherever its expert is and whoever is lost on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeshm.backends.reference import ReferenceBackend, reference_ffn
from moeshm.checkpoint import ExpertLayer
from moeshm.dtypes import DType, widen
from moeshm.errors import (
    ClientClosed,
    DeadlineExceeded,
    InvalidCall,
    NotReady,
    SettingError,
    WorkerDied,
    WorkerFailed,
)
from moeshm.held import HeldView
from moeshm.layers import LayerInfo
from moeshm.offload import ExpertOffload
from moeshm.placement import LayerPlacement, Placement, PlacementError
from moeshm.stats import CallTimes, StatsCounter
from tests.checkpoints import random_layer

HIDDEN, EXPERTS, TOP_K = 8, 7, 3
WHOLE = random_layer(1, hidden_size=HIDDEN, intermediate_size=4, num_experts=EXPERTS, top_k=TOP_K)


def share(experts: tuple[int, ...]) -> ExpertLayer:
    """The layer with some of its experts."""
    info = WHOLE.info
    part = LayerInfo(
        hidden_size=info.hidden_size,
        intermediate_size=info.intermediate_size,
        num_experts=info.num_experts,
        top_k=info.top_k,
        experts=experts,
    )
    return ExpertLayer(part, [WHOLE.expert(expert) for expert in experts])


class Answer:
    """A result that is there, or the error that came instead."""

    times = CallTimes(1, 100, 100, 1000, 1000, 1000, 1000, 4000)

    def __init__(self, outcome: Any, after_s: float = 0.0) -> None:
        self._outcome = outcome
        self._at = time.monotonic() + after_s

    def wait(self) -> None:
        while time.monotonic() < self._at:
            pass

    def add_to(self, total: Any) -> None:
        self.wait()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        total += widen(self._outcome)


class FakeClient:
    """Computes at once; `fate` says for each call whether and how the worker is lost."""

    transport = "shared"
    max_tokens = 64
    buffer_bytes = 1 << 20
    has_fallback = False
    wire_dtype: DType | None = None

    def __init__(self, experts: tuple[int, ...], fate: list[str] | None = None) -> None:
        self._backends: dict[HeldView, ReferenceBackend] = {}
        self.view = self._add(experts)
        self.layers = self.view.layers
        #: What happens to the calls after the calibration.
        self.fate: list[str] | None = None
        self._fate = fate or []
        self.calls = 0
        #: Answers at the deadline, with an error.
        self.late = False
        #: Takes nothing before the deadline.
        self.blocks = False

    def calibrated(self) -> None:
        self.fate, self.calls = self._fate, 0

    def _add(self, experts: tuple[int, ...]) -> HeldView:
        backend = ReferenceBackend({0: share(experts)})
        view = HeldView(backend.layers)
        self._backends[view] = backend
        return view

    def stats(self) -> Any:
        return StatsCounter().snapshot()

    def offer(self, view: HeldView) -> None:
        self.offered = view

    def hold(self, experts: Mapping[int, tuple[int, ...]]) -> HeldView:
        if self.fate and self.fate[0] != "lives":
            raise WorkerDied("gone while it loaded")
        return self._add(experts[0])

    def release(self, view: HeldView) -> None:
        del self._backends[view]

    @property
    def held(self) -> list[tuple[int, ...]]:
        return [view.experts[0] for view in self._backends]

    def submit(
        self, layer: int, x: Any, ids: Any, weights: Any, timeout_s: Any = None, **how: Any
    ) -> Answer:
        assert how["wire_dtype"] in DType
        assert how["slice_tokens"] >= 1
        self.calls += 1
        if self.wire_dtype is not None:
            assert how["wire_dtype"] is self.wire_dtype
        if self.blocks:
            Answer(None, after_s=timeout_s).wait()
            raise DeadlineExceeded("the ring was full")
        if self.late:
            return Answer(DeadlineExceeded("late"), after_s=timeout_s)
        fate = self.fate.pop(0) if self.fate else "lives"
        if fate == "unreachable":
            raise WorkerDied("gone before the call")
        if fate == "dies":
            return Answer(WorkerDied("gone with the call"))
        if fate == "hangs":
            return Answer(DeadlineExceeded("late"))
        out = np.empty_like(x)
        self._backends[how.get("view", self.view)].ffn(layer, x, ids, weights, out)
        return Answer(out)


def make(
    placement: Placement, fates: Mapping[str, list[str]] | None = None, **options: Any
) -> tuple[ExpertOffload, dict[str, Any]]:
    clients: dict[str, Any] = {
        name: FakeClient(placement.experts_of(name)[0], (fates or {}).get(name))
        for name in placement.workers
        if placement.experts_of(name)
    }
    offload = ExpertOffload(clients, placement, **options)
    for client in clients.values():
        client.calibrated()
    return offload, clients


def draw_call(seed: int, n_tokens: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    ids = rng.random((n_tokens, EXPERTS)).argsort(axis=1)[:, :TOP_K].astype(np.int32)
    ids[rng.random(ids.shape) < 0.2] = -1
    x = rng.standard_normal((n_tokens, HIDDEN), np.float32)
    return x, ids, rng.random(ids.shape, np.float32)


def assert_exact(offload: ExpertOffload, call: tuple[Any, Any, Any]) -> None:
    np.testing.assert_allclose(
        offload.forward(0, *call), reference_ffn(WHOLE, *call), rtol=1e-5, atol=1e-6
    )


@st.composite
def placements(draw: st.DrawFn, workers: list[str] | None = None) -> Placement:
    if workers is None:
        workers = [f"w{i}" for i in range(draw(st.integers(1, 3)))]
    hot: list[int] = []
    cold: dict[str, list[int]] = {name: [] for name in workers}
    for expert in range(EXPERTS):
        where = draw(st.sets(st.sampled_from(workers)))
        for name in where:
            cold[name].append(expert)
        if not where:
            hot.append(expert)
    layer = LayerPlacement(EXPERTS, tuple(hot), {n: tuple(held) for n, held in cold.items()})
    return Placement(workers, {0: layer})


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


# --- calibration ------------------------------------------------------------------------


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


# --- another placement ------------------------------------------------------------------


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
