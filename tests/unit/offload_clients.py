"""Clients that compute at once, of workers that can be lost, and an offload that has them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from moeshm.backends.reference import ReferenceBackend, reference_ffn
from moeshm.checkpoint import ExpertLayer
from moeshm.dtypes import DType, widen
from moeshm.errors import DeadlineExceeded, WorkerDied
from moeshm.held import HeldView
from moeshm.layers import LayerInfo
from moeshm.offload import ExpertOffload
from moeshm.placement import LayerPlacement, Placement
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
