"""The CPU's backend in steps: the same bits however often it pauses; what is in use meanwhile."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from moeshm.backends import SteppingBackend, cpu, cpu_layer, cpu_matmul, cpu_team
from moeshm.backends.cpu import CpuBackend
from moeshm.checkpoint.layer import ExpertLayer
from moeshm.dtypes import Array, DType, FloatArray, narrow
from tests.checkpoints import STORAGES, random_layer
from tests.steps import AlwaysDue, NeverDue


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small experts take the way of large ones, in many steps, on all threads."""
    monkeypatch.setattr(cpu, "SMALL_MODEL_BYTES", 0)
    monkeypatch.setattr(cpu, "PARALLEL_MIN", 0)
    monkeypatch.setattr(cpu, "MOST_ROWS", 8)
    monkeypatch.setattr(cpu, "MAX_ROWS", 120)
    monkeypatch.setattr(cpu, "_PIECE_ELEMENTS", 300)
    monkeypatch.setattr(cpu_layer, "_PIECE_ELEMENTS", 100)
    monkeypatch.setattr(cpu_matmul, "BLOCK_ELEMENTS", 400)
    monkeypatch.setattr(cpu_matmul, "FLOAT32_ROWS", 8)
    monkeypatch.setattr(cpu_team, "STEP_MULTIPLY_ADDS", 1)


class Call:
    """A call and its result, NaN until it is computed."""

    def __init__(self, layer: ExpertLayer, n_tokens: int, dtype: DType, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        hidden = rng.standard_normal((n_tokens, layer.info.hidden_size), np.float32)
        self.ids = rng.integers(-1, len(layer), (n_tokens, 3), np.int32)
        self.weights = rng.random((n_tokens, 3), np.float32)
        self.x = narrow(hidden, dtype)
        self.out = np.full(hidden.shape, np.nan, np.float32)

    @property
    def arrays(self) -> tuple[Array, Any, Any, FloatArray]:
        """As `ffn` takes them."""
        return self.x, self.ids, self.weights, self.out


def alone(layer: ExpertLayer, call: Call) -> FloatArray:
    """Its result on one thread, without a pause."""
    CpuBackend({0: layer}, threads=1).ffn(0, *call.arrays)
    result: FloatArray = call.out.copy()
    call.out[...] = np.nan
    return result


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("weight_dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize("storage", STORAGES)
def test_pauses_do_not_change_a_bit(threads: int, weight_dtype: DType, storage: str) -> None:
    layer = random_layer(1, weight_dtype=weight_dtype, storage=storage)
    backend = CpuBackend({0: layer}, threads)
    assert isinstance(backend, SteppingBackend)
    for n_tokens in (1, 7, 100):
        call = Call(layer, n_tokens, DType.BF16)
        expected = alone(layer, call)
        due = AlwaysDue()
        backend.ffn_in_steps(0, *call.arrays, due)
        np.testing.assert_array_equal(call.out, expected)
        # Of its own thread; the others may do most.
        assert due.n >= (3 if threads == 1 else 1)
        backend.ffn_in_steps(0, *call.arrays, NeverDue())
        np.testing.assert_array_equal(call.out, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_others_compute_in_the_pauses(threads: int) -> None:
    """By the same backend, which is in the middle of a call."""
    layer = random_layer(2, weight_dtype=DType.BF16)
    backend = CpuBackend({0: layer}, threads)
    long, short = Call(layer, 60, DType.F32, 1), Call(layer, 9, DType.F32, 2)
    expected, expected_short = alone(layer, long), alone(layer, short)

    def compute_short() -> None:
        backend.ffn(0, *short.arrays)
        np.testing.assert_array_equal(short.out, expected_short)
        short.out[...] = np.nan

    due = AlwaysDue(compute_short)
    backend.ffn_in_steps(0, *long.arrays, due)
    assert due.n > 3
    np.testing.assert_array_equal(long.out, expected)


def test_nobody_works_in_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the helpers either, who then have no task in hand."""
    steps: list[int] = []
    #: How many were done at each pause.
    pauses: list[int] = []
    multiply = cpu_matmul.multiply

    def watched(weights: Array, xs: Sequence[Array], outs: Sequence[Array]) -> Iterator[int]:
        for done in multiply(weights, xs, outs):
            steps.append(threading.get_ident())
            yield done

    def look() -> None:
        before = len(steps)
        # Whoever would go on has every opportunity.
        for _ in range(20):
            time.sleep(0)
        assert len(steps) == before
        pauses.append(before)

    monkeypatch.setattr(cpu_layer, "multiply", watched)
    layer = random_layer(3, weight_dtype=DType.BF16)
    backend = CpuBackend({0: layer}, threads=4)
    for _ in range(20):
        call = Call(layer, 100, DType.F32)
        backend.ffn_in_steps(0, *call.arrays, AlwaysDue(look))
        if len(set(steps)) > 1:
            break
    assert len(set(steps)) > 1, "nobody helped"
    assert min(pauses) < len(steps), "helpers finished everything before the first pause"


@pytest.mark.parametrize("threads", [1, 3])
def test_a_pause_that_raises_ends_the_call_and_frees_everything(threads: int) -> None:
    layer = random_layer(4, weight_dtype=DType.BF16)
    backend = CpuBackend({0: layer}, threads)

    def stop() -> None:
        if due.n == 3:
            raise TimeoutError("enough")

    due = AlwaysDue(stop)
    call = Call(layer, 100, DType.F32)
    gone = weakref.ref(call.out), weakref.ref(call.x)
    with pytest.raises(TimeoutError, match="enough"):
        backend.ffn_in_steps(0, *call.arrays, due)
    again = Call(layer, 100, DType.F32)
    expected = alone(layer, again)
    backend.ffn_in_steps(0, *again.arrays, NeverDue())
    np.testing.assert_array_equal(again.out, expected)
    del call
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_an_error_in_the_middle_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer(5, weight_dtype=DType.BF16)
    backend = CpuBackend({0: layer}, threads=3)
    call = Call(layer, 50, DType.F32)
    with monkeypatch.context() as patched:

        def fail(*_: object) -> FloatArray:
            raise MemoryError("no room")

        patched.setattr(cpu_layer, "activate", fail)
        with pytest.raises(MemoryError, match="no room"):
            backend.ffn_in_steps(0, *call.arrays, AlwaysDue())
    expected = alone(layer, call)
    backend.ffn_in_steps(0, *call.arrays, AlwaysDue())
    np.testing.assert_array_equal(call.out, expected)


def test_how_much_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block times as many rows as go together, whatever the expert and the call are."""
    monkeypatch.undo()
    most = cpu_matmul.BLOCK_ELEMENTS * (cpu_matmul.MOST_ROWS + 16)
    for shape in ((2048, 2048), (4096, 1024), (64, 14336)):
        weights = np.zeros(shape, np.uint16)
        for stored in (weights, weights.T):
            xs = [np.zeros((n, stored.shape[1]), np.float32).T for n in (cpu_matmul.MOST_ROWS, 40)]
            outs = [np.zeros((len(stored), x.shape[1]), np.float32) for x in xs]
            assert max(cpu_matmul.multiply(stored, xs, outs)) <= most


def test_rows_of_one_expert_are_cut_evenly() -> None:
    layer = random_layer(6)
    outputs = np.empty((20, layer.info.hidden_size), np.float32)
    x = np.zeros((20, layer.info.hidden_size), np.float32)
    backend = CpuBackend({0: layer}, threads=1)
    task = cpu._compute_group(backend._layers[0], x, 1, 0, np.arange(20), outputs)
    copied = [next(task) // (64 * layer.info.hidden_size) for _ in range(3)]
    assert copied == [7, 7, 6]
    task.close()  # type: ignore[attr-defined]
