"""The contenders of `moeshm bench kernels`: checked, timed in turns, and named when they break."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from moeshm.bench import kernels_moeshm, kernels_program, kernels_work
from moeshm.bench.kernels_contender import Entry, Prepared
from moeshm.bench.kernels_moeshm import Moeshm
from moeshm.bench.kernels_program import Began, Setup
from moeshm.bench.kernels_shapes import KernelShape
from moeshm.bench.kernels_work import CALLS, Cell, Work
from moeshm.dtypes import DType
from tests.simt.device import IdleDevice

from .bench_gpus import BIASED, GPU, SMALL, TINY, Recited, Run, ShimGpu, entry, run


def test_contenders_are_checked_timed_in_turns_and_closed() -> None:
    made: list[Recited] = []

    def make(work: Work) -> Recited:
        made.append(Recited(work, scale=1 + 0.5 * len(made)))
        return made[-1]

    done = run({"right": entry(make), "wrong": entry(make)}, n_tokens=(1, 4))
    rows = done.rows()
    assert list(rows) == [(n, name) for n in (1, 4) for name in ("right", "wrong")]
    for (_, name), row in rows.items():
        assert row.error is None
        # 160 us a launch of 16 calls.
        assert row.p50_us == row.p50_min_us == row.p50_max_us == pytest.approx(10.0)
        assert row.p99_us is None
        # At most 50 launches a repeat.
        assert (row.n, row.repeats) == (3 * 50 * CALLS, 3)
        assert row.is_repeatable
        assert row.plan == "recited"
        assert (row.call_us, row.first_call_us) == (9.0, 30.0)
        assert (row.rested_call_us, row.enqueue_us) == (20.0, 2.0)
        assert row.relative_error == pytest.approx(0.5 * (name == "wrong"), abs=0.01)
        assert row.limit_percent == pytest.approx(100 * (row.limit_us or 0) / 10.0)
    # Two that are checked, one that says how many to time together, three repeats, two again.
    assert [each.launches for each in made] == [2 * (2 + 1 + 3 + 2)] * 2
    assert [each.closed for each in made] == [2, 2]


def test_long_launches_are_timed_one_by_one() -> None:
    gpu = ShimGpu()
    gpu.us_of_launch = 80_000.0
    row = run({"slow": entry(Recited)}, gpu=gpu).rows()[4, "slow"]
    assert set(gpu.rounds) == {1}
    assert row.p50_us == 5000.0


def test_who_fails_is_a_row_with_its_error_and_the_others_go_on() -> None:
    class Failing(Recited):
        def prepare(self, cell: Cell) -> Prepared:
            if cell.n_tokens == 4:
                raise MemoryError("out of memory\nwith details")
            return super().prepare(cell)

    absent = Entry(lambda *_: pytest.fail("made"), lambda _work: "No module named 'triton'")
    entries = {"failing": entry(Failing), "right": entry(Recited), "absent": absent}
    rows = run(entries, n_tokens=(4, 1)).rows()
    assert rows[4, "failing"].error == "MemoryError: out of memory"
    assert rows[4, "failing"].p50_us is None
    assert rows[4, "failing"].limit_us is not None
    assert rows[1, "failing"].error is None
    assert rows[4, "right"].error is rows[1, "right"].error is None
    assert rows[4, "absent"].error == "No module named 'triton'"


def test_who_computes_something_else_when_timed_is_found_out() -> None:
    class Spoilt(Recited):
        def prepare(self, cell: Cell) -> Prepared:
            honest = super().prepare(cell)

            def launch() -> None:
                honest.launch()
                if self.launches > 2:
                    ctypes.memset(honest.out, 0, cell.hidden_states.nbytes)

            return honest._replace(launch=launch)

    row = run({"spoilt": entry(Spoilt), "honest": entry(Recited)}).rows()
    assert row[4, "spoilt"].error is not None
    assert "after it was timed" in row[4, "spoilt"].error
    assert row[4, "honest"].error is None


def test_what_breaks_the_device_ends_the_measurement_and_is_named() -> None:
    gpu = ShimGpu()

    class Breaking(Recited):
        def prepare(self, cell: Cell) -> Prepared:
            gpu.broken = RuntimeError("cudaErrorIllegalAddress")
            raise ValueError(f"no output for {cell.n_tokens} tokens")

    done = Run(gpu, [])
    work = Work(TINY, DType.BF16, seed=5)
    setup = Setup("tiny", "bf16", [(4, ["right", "breaking"])], "auto", repeats=3, seed=5)
    entries = {"right": entry(Recited), "breaking": entry(Breaking)}
    with pytest.raises(RuntimeError, match="cudaErrorIllegalAddress"):
        kernels_program.measure(setup, gpu, work, GPU, entries, done.lines.append)
    assert done.lines[-1] == Began("breaking", 4)


@pytest.mark.parametrize(
    ("shape", "dtype"), [(TINY, DType.F32), (TINY, DType.BF16), (BIASED, DType.F16)]
)
def test_moeshm_computes_what_it_is_timed_with(
    monkeypatch: pytest.MonkeyPatch, shape: KernelShape, dtype: DType
) -> None:
    monkeypatch.setattr(kernels_moeshm, "_REST_S", 0)
    # The shim computes each in tens of milliseconds.
    monkeypatch.setattr(kernels_work, "CALLS", 3)
    gpu = ShimGpu()
    entries = {"moeshm": Entry(Moeshm, lambda _work: None)}
    row = run(entries, shape=shape, dtype=dtype, n_tokens=(3,), gpu=gpu).rows()[3, "moeshm"]
    assert row.error is None
    tolerance = {DType.F32: 1e-5, DType.F16: 3e-3, DType.BF16: 1e-2}[dtype]
    assert 0 < (row.relative_error or 0) < tolerance
    assert row.is_repeatable
    assert row.plan is not None
    assert "decode_down" in row.plan
    assert row.call_us is not None
    assert row.first_call_us is not None
    assert row.rested_call_us is not None
    assert row.enqueue_us is not None


def test_the_first_call_of_a_size_is_timed_when_nothing_was_asked_of_that_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a warm-up, which makes calls of other sizes."""
    gpu, device, work = ShimGpu(), IdleDevice(), Work(TINY, DType.BF16, seed=5)
    gpu.device = device
    sizes: list[int] = []
    device.on_launch = lambda _kernel, call: sizes.append(call.n_tokens)
    moeshm = Moeshm(gpu, work, "auto")
    assert sizes
    sizes_before: list[list[int]] = []
    elapsed_us = kernels_moeshm._elapsed_us

    def note(do: Callable[..., None], call: tuple[Any, ...]) -> float:
        sizes_before.append(list(sizes))
        return elapsed_us(do, call)

    monkeypatch.setattr(kernels_moeshm, "_elapsed_us", note)
    monkeypatch.setattr(kernels_moeshm, "_REST_S", 0)
    moeshm.prepare(work.cell(3))
    first, *rested = sizes_before
    assert 3 not in first
    assert len(rested) == 3


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", list(kernels_program.CONTENDERS))
def test_a_contender_computes_on_a_gpu_what_it_is_timed_with(name: str) -> None:
    from moeshm.backends.gpu.cupy_device import open_device
    from moeshm.bench.kernels_gpu import CupyGpu

    contender = kernels_program.CONTENDERS[name]
    if reason := contender.absence(Work(SMALL, DType.BF16, seed=5)):
        pytest.skip(reason)
    gpu = CupyGpu(open_device("auto"))
    rows = run({name: contender}, shape=SMALL, n_tokens=(1, 40), gpu=gpu).rows().values()
    for row in rows:
        assert row.error is None
        assert (row.relative_error or 1) < 1e-2
        assert (row.p50_us or 0) > 0
    assert gpu.describe().copy_gb_per_s > 0
