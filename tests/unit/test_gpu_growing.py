"""The GPU backend's experts that come and go, one by one and while calls are computed."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from moeshm.backends import GrowingBackend, Ids
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.reference import reference_ffn
from moeshm.checkpoint import ExpertLayer
from moeshm.errors import CheckpointError
from tests.checkpoints import random_layer
from tests.conformance.test_backends import assert_close, compute, draw_call
from tests.simt.device import SimtDevice
from tests.unit.test_gpu_backend import LAYER
from tests.unit.test_gpu_experts import part
from tests.wire import meanwhile


def assert_slots(backend: GpuBackend, whole: ExpertLayer, slots: dict[int, int]) -> None:
    """Each slot computes its expert of the whole layer."""
    ids = np.array([[slot, -1] for slot in slots], np.int32)
    hidden = np.random.default_rng(18).standard_normal((len(ids), 24), np.float32)
    experts = np.array([[expert, -1] for expert in slots.values()], np.int32)
    weights = np.ones(ids.shape, np.float32)
    found = compute(backend, hidden, ids, weights)
    assert_close(found, reference_ffn(whole, hidden, experts, weights), 1e-5)


def test_experts_come_and_go() -> None:
    backend = GpuBackend({0: part(LAYER, [2, 4])}, SimtDevice())
    assert isinstance(backend, GrowingBackend)
    assert backend.layers[0].experts == (2, 4)
    assert backend.add(0, part(LAYER, [5, 0, 1])) == [2, 3, 4]
    assert_slots(backend, LAYER, {0: 2, 1: 4, 2: 5, 3: 0, 4: 1})
    backend.remove(0, [1, 2])
    assert_slots(backend, LAYER, {0: 2, 3: 0, 4: 1})
    assert backend.add(0, part(LAYER, [3])) == [1]
    assert_slots(backend, LAYER, {0: 2, 1: 3, 3: 0, 4: 1})
    assert backend.layers[0].experts == (2, 4)


def test_a_layer_without_experts() -> None:
    """All of its slots are empty."""
    backend = GpuBackend({0: part(LAYER, [])}, SimtDevice())
    hidden, ids, weights = draw_call(19, LAYER, 3, 2)
    assert not compute(backend, hidden, np.full_like(ids, -1), weights).any()


def test_biases_that_come_late() -> None:
    backend = GpuBackend({0: part(LAYER, [0])}, SimtDevice())
    with pytest.raises(CheckpointError, match="layer 0 was loaded without biases"):
        backend.add(0, part(random_layer(1, has_bias=True), [1]))


@pytest.mark.parametrize("n_tokens", [1, 40])
def test_calls_while_experts_come_and_go(n_tokens: int) -> None:
    """The slots that a call uses do not change; the bits of its result neither."""
    backend = GpuBackend({0: part(LAYER, [0, 1])}, SimtDevice())
    hidden, _, weights = draw_call(20, LAYER, n_tokens, 2)
    ids: Ids = np.tile(np.array([[0, 1]], np.int32), (n_tokens, 1))
    expected = compute(backend, hidden, ids, weights)
    is_over = threading.Event()

    def change() -> None:
        while not is_over.is_set():
            backend.remove(0, backend.add(0, part(LAYER, [2, 3, 4])))

    with meanwhile(change):
        for _ in range(20):
            np.testing.assert_array_equal(compute(backend, hidden, ids, weights), expected)
        is_over.set()


def test_several_threads_add_at_once() -> None:
    backend = GpuBackend({0: part(LAYER, [])}, SimtDevice())
    slots: dict[int, int] = {}
    barrier = threading.Barrier(6)

    def add(expert: int) -> None:
        barrier.wait()
        slots[backend.add(0, part(LAYER, [expert]))[0]] = expert

    threads = [threading.Thread(target=add, args=(expert,)) for expert in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(slots) == list(range(6))
    assert_slots(backend, LAYER, slots)
