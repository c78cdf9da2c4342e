"""Experts that come and go on the CPU backend: each slot computes its own, whatever was there."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeshm.backends import GrowingBackend, Ids, cpu
from moeshm.backends.cpu import CpuBackend
from moeshm.backends.null import NullBackend
from moeshm.backends.reference import ReferenceBackend, reference_ffn
from moeshm.checkpoint import ExpertLayer, ExpertWeights
from moeshm.dtypes import Array, FloatArray
from tests.checkpoints import NUM_EXPERTS, STORAGES, random_layer
from tests.wire import PATIENCE_S, meanwhile

LAYER = random_layer(1, has_bias=True)


def part(layer: ExpertLayer, experts: Sequence[int]) -> ExpertLayer:
    """These experts of a layer that is here as a whole."""
    info = msgspec.structs.replace(layer.info, experts=tuple(experts))
    return ExpertLayer(info, [layer.expert(each) for each in experts])


def build(layer: ExpertLayer, is_small: bool, threads: int = 1) -> CpuBackend:
    """Of this one layer, number 0."""
    with pytest.MonkeyPatch.context() as patch:
        if not is_small:
            patch.setattr(cpu, "SMALL_MODEL_BYTES", 0)
        return CpuBackend({0: layer}, threads)


def compute(backend: CpuBackend, hidden: Array, slots: Ids, layer: int = 0) -> FloatArray:
    """The answer with weights of 1, written over NaN."""
    out = np.full(hidden.shape, np.nan, np.float32)
    backend.ffn(layer, hidden, slots, np.ones(slots.shape, np.float32), out)
    return out


def assert_slots(
    backend: CpuBackend, whole: ExpertLayer, slots: dict[int, int], layer: int = 0
) -> None:
    """Each slot computes its expert of the whole layer, for one token and for many."""
    rng = np.random.default_rng(3)
    many = rng.choice([-1, *slots], (cpu.FEW_TOKENS + 1, 2)).astype(np.int32)
    for ids in (many, *(np.array([[slot, -1]], np.int32) for slot in slots)):
        hidden = rng.standard_normal((len(ids), whole.info.hidden_size), np.float32)
        experts = np.array([slots.get(i, -1) for i in ids.ravel().tolist()], np.int32)
        wanted = reference_ffn(
            whole, hidden, experts.reshape(ids.shape), np.ones(ids.shape, np.float32)
        )
        found = compute(backend, hidden, ids, layer)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("storage", STORAGES)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_any_additions_and_removals(
    is_small: bool, has_bias: bool, storage: str, seed: int
) -> None:
    rng = random.Random(seed)
    whole = random_layer(seed % 7, has_bias=has_bias, storage=storage)
    backend = build(part(whole, [2, 4]), is_small)
    slots = {0: 2, 1: 4}
    for _ in range(6):
        missing = sorted(set(range(NUM_EXPERTS)) - set(slots.values()))
        if missing and rng.random() < 0.6:
            new = rng.sample(missing, rng.randint(1, len(missing)))
            given_slots = backend.add(0, part(whole, new))
            assert not set(given_slots) & set(slots)
            assert max(given_slots) < NUM_EXPERTS
            slots.update(zip(given_slots, new, strict=True))
        else:
            gone = rng.sample(sorted(slots), rng.randint(0, len(slots)))
            backend.remove(0, gone)
            slots = {slot: expert for slot, expert in slots.items() if slot not in gone}
        assert_slots(backend, whole, slots)


@pytest.mark.parametrize("is_small", [True, False])
def test_biases_that_only_some_experts_have(is_small: bool) -> None:
    plain = random_layer(1)
    whole = ExpertLayer(
        LAYER.info, [(LAYER if i % 2 else plain).expert(i) for i in range(NUM_EXPERTS)]
    )
    backend = build(part(whole, [0, 2]), is_small)
    assert backend.add(0, part(whole, [1, 4])) == [2, 3]
    assert_slots(backend, whole, {0: 0, 1: 2, 2: 1, 3: 4})
    backend.remove(0, [2])
    assert backend.add(0, part(whole, [4])) == [2]
    assert_slots(backend, whole, {0: 0, 1: 2, 2: 4, 3: 4})


@pytest.mark.parametrize("is_small", [True, False])
def test_a_layer_that_was_not_there(is_small: bool) -> None:
    backend = build(part(LAYER, [0]), is_small)
    other = random_layer(9, hidden_size=12)
    assert backend.add(5, part(other, [3, 1])) == [0, 1]
    assert_slots(backend, other, {0: 3, 1: 1}, layer=5)
    assert_slots(backend, LAYER, {0: 0})


@pytest.mark.parametrize("is_small", [True, False])
def test_a_removed_expert_is_forgotten(is_small: bool) -> None:
    backend = build(part(LAYER, [0, 1]), is_small)
    backend.remove(0, [1])
    with pytest.raises(KeyError):
        compute(backend, np.ones((1, LAYER.info.hidden_size), np.float32), np.ones((1, 1), "i4"))


def bytes_of(backend: CpuBackend) -> int:
    """Widened weights that it holds."""
    held = backend._layers.values()
    return sum(each.nbytes for layer in held for each in getattr(layer, "_down", {}).values())


def test_growth_does_not_widen_a_model_that_is_not_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is what may come, not what is here."""
    size = 3 * 4 * LAYER.info.hidden_size * LAYER.info.intermediate_size
    monkeypatch.setattr(cpu, "SMALL_MODEL_BYTES", NUM_EXPERTS * size - 1)
    assert bytes_of(CpuBackend({0: part(LAYER, [0])}, 1)) == 0
    monkeypatch.setattr(cpu, "SMALL_MODEL_BYTES", NUM_EXPERTS * size)
    backend = CpuBackend({0: part(LAYER, [0])}, 1)
    widened = bytes_of(backend)
    assert widened > 0
    # Another layer would be too much.
    backend.add(1, part(LAYER, [0, 1]))
    assert bytes_of(backend) == widened
    assert_slots(backend, LAYER, {0: 0, 1: 1}, layer=1)


@pytest.mark.parametrize(("is_small", "threads"), [(True, 1), (False, 1), (False, 3)])
@pytest.mark.parametrize("n_tokens", [1, 20])
def test_calls_while_experts_come_and_go(
    is_small: bool, threads: int, n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slots that a call uses do not change; the bits of its result neither."""
    monkeypatch.setattr(cpu, "PARALLEL_MIN", 0)
    backend = build(part(LAYER, [0, 1]), is_small, threads)
    rng = np.random.default_rng(n_tokens)
    hidden = rng.standard_normal((n_tokens, LAYER.info.hidden_size), np.float32)
    slots = rng.integers(-1, 2, (n_tokens, 2), np.int32)
    wanted = compute(backend, hidden, slots)
    is_over = threading.Event()
    n_calls = threading.Semaphore(0)

    def call() -> None:
        while not is_over.is_set():
            np.testing.assert_array_equal(compute(backend, hidden, slots), wanted)
            n_calls.release()

    with meanwhile(call):
        try:
            for _ in range(30):
                backend.remove(0, backend.add(0, part(LAYER, [2, 3, 4, 5])))
                assert n_calls.acquire(timeout=PATIENCE_S)
        finally:
            is_over.set()


@pytest.mark.parametrize("is_small", [True, False])
def test_to_remove_does_not_wait_for_weights_that_are_prepared(
    is_small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that serves removes; another may be busy with a whole layer."""
    backend = build(part(LAYER, [0, 1]), is_small)
    held = backend._layers[0]
    prepare = held._prepare
    begun, may_end, is_removed = threading.Event(), threading.Event(), threading.Event()

    def slowly(weights: ExpertWeights) -> ExpertWeights:
        begun.set()
        assert may_end.wait(PATIENCE_S)
        return prepare(weights)

    def remove() -> None:
        assert begun.wait(PATIENCE_S)
        backend.remove(0, [1])
        is_removed.set()

    monkeypatch.setattr(held, "_prepare", slowly)
    added: list[int] = []
    with meanwhile(lambda: added.extend(backend.add(0, part(LAYER, [4]))), remove):
        try:
            assert is_removed.wait(PATIENCE_S)
        finally:
            may_end.set()
    assert added == [1]
    assert_slots(backend, LAYER, {0: 0, 1: 4})


def test_who_can_grow() -> None:
    makers: list[Callable[[], object]] = [
        lambda: ReferenceBackend({0: LAYER}),
        lambda: NullBackend({0: LAYER.info}),
    ]
    assert isinstance(build(LAYER, True), GrowingBackend)
    assert not any(isinstance(make(), GrowingBackend) for make in makers)
