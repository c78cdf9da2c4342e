"""The CPU's backend in steps: the same bits however often it pauses; what is in use meanwhile."""

from __future__ import annotations

import concurrent.futures
import gc
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from moeshm.backends import SteppingBackend, cpu, cpu_activation, cpu_layer, cpu_matmul, cpu_team
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


def fail_in_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    """At their first step, which the call's own thread waits for."""
    has_failed = threading.Event()

    def activate(*arguments: Any) -> FloatArray:
        if threading.current_thread() is threading.main_thread():
            assert has_failed.wait(20)
            return cpu_activation.activate(*arguments)
        has_failed.set()
        raise MemoryError("no room")

    monkeypatch.setattr(cpu_layer, "activate", activate)


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


def test_an_error_in_a_helper_keeps_no_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a garbage collection: a ring's room is free when its views are gone."""
    layer = random_layer(5, weight_dtype=DType.BF16)
    backend = CpuBackend({0: layer}, threads=3)
    call = Call(layer, 50, DType.F32)
    fail_in_helpers(monkeypatch)
    gone = weakref.ref(call.out), weakref.ref(call.x)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(MemoryError, match="no room") as caught:
            backend.ffn_in_steps(0, *call.arrays, NeverDue())
        del call, caught
        # The pool's threads let go of what they ran a moment after its end.
        end = time.monotonic() + 20
        while any(each() is not None for each in gone) and time.monotonic() < end:
            time.sleep(0.001)
        assert all(each() is None for each in gone)
    finally:
        gc.enable()


def test_an_error_in_a_helper_ends_the_others_soon() -> None:
    """Not only when all other tasks are done."""
    tasks_begun: list[int] = []
    failed = threading.Event()

    def task(number: int) -> Iterator[int]:
        tasks_begun.append(number)
        if threading.current_thread() is not threading.main_thread():
            failed.set()
            raise MemoryError("no room")
        assert failed.wait(20)
        yield 1

    with pytest.raises(MemoryError, match="no room"):
        cpu_team.Team(2).run([task(number) for number in range(1000)], True, cpu_team.Pace(None))
    assert len(tasks_begun) < 1000


def test_interrupts_end_a_call_only_once_its_helpers_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They write into the call's arrays."""
    waits = [0]
    working, go = threading.Event(), threading.Event()
    is_working = [False]

    def interrupted(futures: Any, timeout: float | None = None) -> Any:
        waits[0] += 1
        if waits[0] <= 3:
            assert working.wait(20)
            raise KeyboardInterrupt
        go.set()
        return concurrent.futures.wait(futures, timeout)

    def task() -> Iterator[int]:
        if threading.current_thread() is threading.main_thread():
            # A helper takes the other one.
            assert working.wait(20)
            return
        is_working[0] = True
        working.set()
        assert go.wait(20)
        is_working[0] = False
        yield 1

    monkeypatch.setattr(cpu_team, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cpu_team.Team(2).run([task(), task()], True, cpu_team.Pace(None))
    assert waits[0] == 4
    assert not is_working[0]


def test_a_helper_that_cannot_be_had_ends_those_that_are_at_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No thread can be started: the call ends with an error, and nobody works on it."""
    working, job = threading.Event(), list[Any]()
    team = cpu_team.Team(3)
    pool = team._helpers()
    submit = pool.submit

    def failing(function: Any) -> Any:
        if job:
            assert working.wait(20)
            raise RuntimeError("can't start new thread")
        job.append(submit(function))
        return job[0]

    def task() -> Iterator[int]:
        working.set()
        while True:
            yield 1

    monkeypatch.setattr(pool, "submit", failing)
    with pytest.raises(RuntimeError, match="new thread"):
        team.run([task() for _ in range(3)], True, cpu_team.Pace(None))
    assert job[0].done()


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
@pytest.mark.parametrize("n_rows", [None, 1, 40, cpu_matmul.MOST_ROWS])
def test_how_much_is_done_at_once(
    monkeypatch: pytest.MonkeyPatch, dtype: Any, n_rows: int | None
) -> None:
    """A block times as many rows as go together, whatever the expert and the call are."""
    monkeypatch.undo()
    most = cpu_matmul.BLOCK_ELEMENTS * (cpu_matmul.MOST_ROWS + 16)
    for shape in ((2048, 2048), (4096, 1024), (64, 14336), (1024, 14336)):
        weights = np.zeros(shape, dtype)
        for stored in (weights, weights.T):
            n_out, n_in = stored.shape
            if n_rows is None:
                xs, outs = [np.zeros(n_in, np.float32)], [np.zeros(n_out, np.float32)]
            else:
                xs = [np.zeros((n, n_in), np.float32).T for n in {n_rows, 40}]
                outs = [np.zeros((n_out, x.shape[1]), np.float32) for x in xs]
            done = list(cpu_matmul.multiply(stored, xs, outs))
            assert max(done) <= most
            assert sum(done) == stored.size * sum(16 + x.size // n_in for x in xs)


@pytest.mark.parametrize("shape", [(50, 300), (300, 50), (7, 3)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_blocks_of_float32(shape: tuple[int, int], order: Any) -> None:
    """Cut both ways: the product, of the same bits in every run."""
    rng = np.random.default_rng(1)
    weights = np.asarray(rng.standard_normal(shape, np.float32), order=order)
    xs = [rng.standard_normal((shape[1], n), np.float32) for n in (5, 320)]
    xs.append(rng.standard_normal(shape[1], np.float32))
    runs = []
    for _ in range(2):
        outs = [np.full((shape[0], *x.shape[1:]), np.nan, np.float32) for x in xs]
        for each in zip(xs, outs, strict=True):
            assert sum(cpu_matmul.multiply(weights, [each[0]], [each[1]]))
        assert sum(cpu_matmul.multiply(weights, xs[:2], outs[:2]))
        runs.append(outs)
    for x, out, again in zip(xs, *runs, strict=True):
        np.testing.assert_array_equal(out, again)
        expected = weights.astype(np.float64) @ x
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_rows_without_experts_are_zeroed_in_steps() -> None:
    layer = random_layer(8, weight_dtype=DType.BF16)
    backend = CpuBackend({0: layer}, threads=1)
    call = Call(layer, 100, DType.F32)
    call.ids[...] = -1
    pauses: list[int] = []
    outputs_of = backend._outputs

    def watched(*arguments: Any) -> Any:
        before = due.n
        found = outputs_of(*arguments)
        pauses.append(due.n - before)
        return found

    due = AlwaysDue()
    backend._outputs = watched  # type: ignore[method-assign, assignment]
    backend.ffn_in_steps(0, *call.arrays, due)
    assert not call.out.any()
    # Of 40 tokens, 40 and 20, three rows each.
    per_piece = 300 // layer.info.hidden_size
    assert pauses == [-(-3 * n // per_piece) for n in (40, 40, 20)]


def test_rows_of_one_expert_are_cut_evenly() -> None:
    layer = random_layer(6)
    outputs = np.empty((20, layer.info.hidden_size), np.float32)
    x = np.zeros((20, layer.info.hidden_size), np.float32)
    backend = CpuBackend({0: layer}, threads=1)
    task = cpu._compute_group(backend._layers[0], x, 1, 0, np.arange(20), outputs)
    copied = [next(task) // (64 * layer.info.hidden_size) for _ in range(3)]
    assert copied == [7, 7, 6]
    task.close()  # type: ignore[attr-defined]
