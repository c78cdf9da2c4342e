"""`moeshm bench kernels`: limits, work, verdicts, contenders in turns, and a device that breaks."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from moeshm.backends.gpu.device import Device
from moeshm.backends.reference import reference_ffn
from moeshm.bench import (
    harness,
    kernels,
    kernels_moeshm,
    kernels_program,
    kernels_report,
    kernels_shapes,
    kernels_work,
)
from moeshm.bench.kernels import Asked
from moeshm.bench.kernels_contender import Entry, Gpu, HostTimes, Prepared
from moeshm.bench.kernels_moeshm import Moeshm
from moeshm.bench.kernels_program import Began, FoundGpu, Line, Measured, Refused, Setup
from moeshm.bench.kernels_shapes import KERNEL_SHAPES, KernelShape, limit_of, peaks_of
from moeshm.bench.kernels_work import CALLS, PROBES, Cell, Work, judge
from moeshm.bench.replay_model import Shape
from moeshm.bench.schema import GpuInfo, KernelReport, KernelRow
from moeshm.cli import bench_kernels
from moeshm.cli.bench import bench
from moeshm.dtypes import Array, DType, narrow
from moeshm.errors import UnsupportedPlatform, WorkerFailed
from moeshm.layers import Activation
from tests.simt.device import IdleDevice, SimtDevice

ROOT = Path(__file__).parents[2]
H100 = "NVIDIA H100 80GB HBM3"
TINY = KernelShape(Shape("tiny", 64, 64, 8, 2, 1), (1, 4))
#: Sizes that every contender takes.
SMALL = KernelShape(Shape("small", 256, 128, 8, 2, 1))
BIASED = KernelShape(Shape("biased", 64, 64, 8, 2, 1), (3,), Activation.SWIGLU_CLAMPED, True)
GPU = GpuInfo(
    name=H100,
    arch="sm_90",
    multiprocessors=132,
    total_bytes=80 << 30,
    l2_bytes=50 << 20,
    versions={"cupy": "14.2.0", "triton": None},
    copy_gb_per_s=3000.0,
    limit_gb_per_s=3350.0,
    limit_tflops={"bf16": 989.0},
    limit_source="datasheet",
)


class ShimGpu:
    """A `Gpu` whose device is the shim, and whose clock says what it is told to."""

    stream_handle = 0

    def __init__(self) -> None:
        self.device: Device = SimtDevice()
        self.us_of_launch = 160.0
        self.rounds: list[int] = []
        self.broken: RuntimeError | None = None

    def wait(self) -> None:
        if self.broken is not None:
            raise self.broken

    def time_us(self, launch: Callable[[], None], rounds: int) -> float:
        launch()
        self.rounds.append(rounds)
        return self.us_of_launch

    def record(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        return enqueue

    def poison(self, address: int, nbytes: int) -> None:
        ctypes.memset(address, 0xFF, nbytes)

    def read(self, address: int, target: Array) -> None:
        ctypes.memmove(target.ctypes.data, address, target.nbytes)


class Recited:
    """A contender that writes the reference's rows, times `scale`."""

    def __init__(self, work: Work, scale: float = 1.0) -> None:
        self._work = work
        self._scale = scale
        self.launches = self.closed = 0

    def prepare(self, cell: Cell) -> Prepared:
        out = np.zeros_like(cell.hidden_states)
        values = reference_ffn(self._work.layer, cell.hidden_states, *cell.routings[-1])
        result = narrow((values * self._scale).astype(np.float32), self._work.info.weight_dtype)

        def launch() -> None:
            self.launches += 1
            out[...] = result

        def close() -> None:
            self.closed += 1

        return Prepared(
            launch, out.ctypes.data, "recited", close, lambda: HostTimes(9.0, 30.0, 20.0, 2.0)
        )


class Run(NamedTuple):
    gpu: Gpu
    lines: list[Line]

    def rows(self) -> dict[tuple[int, str], KernelRow]:
        found = [line.row for line in self.lines if isinstance(line, Measured)]
        return {(row.n_tokens, row.contender): row for row in found}


def run(
    entries: Mapping[str, Entry],
    *,
    shape: KernelShape = TINY,
    dtype: DType = DType.BF16,
    n_tokens: tuple[int, ...] = (4,),
    gpu: Gpu | None = None,
) -> Run:
    work = Work(shape, dtype, seed=5)
    names = list(entries)
    cells = [(n, names) for n in n_tokens]
    setup = Setup(shape.sizes.name, str(dtype), cells, "auto", repeats=3, seed=5)
    done = Run(gpu or ShimGpu(), [])
    kernels_program.measure(setup, done.gpu, work, GPU, entries, done.lines.append)
    return done


def entry(make: Callable[[Work], Any]) -> Entry:
    return Entry(lambda _gpu, work, _kernels: make(work), lambda _work: None)


# --- limits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "n_tokens", "n_distinct", "us", "reason"),
    [
        ("qwen3-30b-a3b", 1, 8, 22.5, "memory"),
        ("qwen3.5-35b-a3b", 16, 102, 192, "memory"),
        ("qwen3-30b-a3b", 4096, 128, 371, "memory"),
        ("mixtral-8x7b", 4096, 8, 2918, "arithmetic"),
    ],
)
def test_a_limit_is_the_longer_of_reading_and_computing(
    shape: str, n_tokens: int, n_distinct: float, us: float, reason: str
) -> None:
    peaks, source = peaks_of(H100, 3000.0)
    assert source == "datasheet"
    limit = limit_of(KERNEL_SHAPES[shape].info(DType.BF16), n_tokens, n_distinct, peaks)
    assert limit.us == pytest.approx(us, rel=0.01)
    assert limit.reason == reason


def test_a_device_without_a_datasheet_is_held_against_a_copy() -> None:
    peaks, source = peaks_of("GeForce", 300.0)
    assert source == "measured copy"
    limit = limit_of(KERNEL_SHAPES["mixtral-8x7b"].info(DType.F32), 4096, 8, peaks)
    assert limit.reason == "memory"
    assert limit.us == pytest.approx((8 * 3 * 4096 * 14336 + 2 * 4096 * 4096) * 4 / 300e3)


def test_goals_are_those_of_one_card_and_format() -> None:
    assert kernels_shapes.goal_us(H100, "qwen3-30b-a3b", "bf16", 1) == 27
    assert kernels_shapes.goal_us(H100, "qwen3-30b-a3b", "f32", 1) is None
    assert kernels_shapes.goal_us("NVIDIA H200", "qwen3-30b-a3b", "bf16", 1) is None


@pytest.mark.parametrize("shape", KERNEL_SHAPES.values(), ids=list(KERNEL_SHAPES))
def test_a_layer_is_much_larger_than_a_cache(shape: KernelShape) -> None:
    info = shape.info(DType.BF16)
    experts = CALLS * min(info.top_k, info.num_experts)
    read_between = kernels_shapes.call_bytes(info, CALLS, min(experts, info.num_experts))
    assert read_between > 10 * GPU.l2_bytes


# --- work and verdicts --------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [1, 5, 33])
@pytest.mark.parametrize("shape", [TINY, BIASED], ids=["tiny", "biased"])
def test_probes_are_rows_of_the_last_call_whose_outputs_are_known(
    shape: KernelShape, n_tokens: int
) -> None:
    work = Work(shape, DType.F32, seed=3)
    cell = work.cell(n_tokens)
    assert len(cell.rows) == len(set(cell.rows)) == min(n_tokens, PROBES)
    expected = reference_ffn(work.layer, cell.hidden_states, *cell.routings[-1])[cell.rows]
    np.testing.assert_array_equal(cell.expected, expected)
    assert np.abs(expected).max() > 0.01


def test_every_call_has_a_routing_of_its_own_and_every_expert_its_weights() -> None:
    work = Work(TINY, DType.BF16, seed=3)
    cell = work.cell(40)
    assert len({routing.ids.tobytes() for routing in cell.routings}) == CALLS >= 8
    for ids, weights in cell.routings:
        assert (np.sort(ids, axis=1)[:, 1:] != np.sort(ids, axis=1)[:, :-1]).all()
        assert set(ids.ravel()) == set(range(8))
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    assert cell.n_distinct == 8
    assert len({work.matrices(expert).tobytes() for expert in range(8)}) == 8
    again = Work(TINY, DType.BF16, seed=3).cell(40)
    assert again.hidden_states.tobytes() == cell.hidden_states.tobytes()


def test_matrices_are_what_the_layer_has() -> None:
    work = Work(TINY, DType.BF16, seed=3)
    weights = work.layer.expert(5)
    parts = (weights.gate_proj, weights.up_proj, weights.down_proj)
    assert work.matrices(5).tobytes() == b"".join(part.tobytes() for part in parts)


def test_a_verdict_names_error_and_repeatability() -> None:
    cell = Work(TINY, DType.F32, seed=3).cell(20)
    output = np.zeros_like(cell.hidden_states)
    output[cell.rows] = cell.expected.astype(np.float32)
    right = judge(output, output.copy(), cell)
    assert right.relative_error < 1e-6
    assert right.is_repeatable
    wrong = judge(output * np.float32(1.5), output, cell)
    assert wrong.relative_error == pytest.approx(0.5)
    assert not wrong.is_repeatable


def test_an_output_that_was_not_written_is_no_output() -> None:
    cell = Work(TINY, DType.BF16, seed=3).cell(20)
    output = np.zeros_like(cell.hidden_states)
    output[7, 3] = 0xFFFF
    with pytest.raises(ValueError, match="1 of 1280 outputs are not finite"):
        judge(output, output, cell)


# --- contenders in turns ------------------------------------------------------------------


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


# --- one process after the other ----------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, *outputs: tuple[list[Line], int]) -> list[Setup]:
    """Processes that print these lines and end with that status; what each was asked."""
    asked: list[Setup] = []
    left = list(outputs)

    def command(setup: Setup) -> list[str]:
        asked.append(setup)
        lines, status = left.pop(0)
        text = "\n".join(msgspec.json.encode(line).decode() for line in lines)
        program = f"import sys; print({text!r}); sys.stderr.write('lost\\n'); sys.exit({status})"
        return [sys.executable, "-c", program]

    monkeypatch.setattr(kernels, "_command", command)
    return asked


def measured(n_tokens: int, name: str, p50_us: float = 10.0) -> Measured:
    return Measured(
        KernelRow(contender=name, shape="tiny", dtype="bf16", n_tokens=n_tokens, p50_us=p50_us)
    )


def setup_of(*names: str, n_tokens: tuple[int, ...] = (1, 4)) -> Setup:
    return Setup("tiny", "bf16", [(n, list(names)) for n in n_tokens], "auto", repeats=3, seed=0)


def test_who_ends_the_process_is_blamed_and_the_others_are_measured_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first: list[Line] = [FoundGpu(GPU), Began("a", 1), measured(1, "a"), measured(1, "b")]
    first += [Began("a", 4), Began("b", 4)]
    second: list[Line] = [FoundGpu(GPU), Began("a", 4), measured(4, "a", 12.0)]
    asked = scripted(monkeypatch, (first, 1), (second, 0))
    gpu, rows = kernels.run(setup_of("a", "b"))
    assert gpu == GPU
    assert [(row.n_tokens, row.contender) for row in rows] == [
        *((1, "a"), (1, "b"), (4, "a"), (4, "b"))
    ]
    assert rows[2].p50_us == 12.0
    assert rows[3].error == "it ended the process: exit status 1: lost"
    assert [setup.cells for setup in asked] == [
        [(1, ["a", "b"]), (4, ["a", "b"])],
        [(4, ["a"])],
    ]


def test_a_process_that_blames_nobody_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, ([FoundGpu(GPU), Began("a", 1), measured(1, "a"), measured(4, "a")], 1))
    with pytest.raises(WorkerFailed, match="tiny bf16 was not measured: exit status 1: lost"):
        kernels.run(setup_of("a", "b"))


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, ([Refused("no CuPy; pip install 'moeshm[cuda13]'")], 0))
    with pytest.raises(UnsupportedPlatform, match=r"moeshm\[cuda13\]"):
        kernels.run(setup_of("a"))
    scripted(monkeypatch, ([], 1))
    with pytest.raises(WorkerFailed, match="could not be examined: exit status 1: lost"):
        kernels.run(setup_of("a"))


def test_ratios_are_over_the_peers_of_the_same_cell() -> None:
    names = ("moeshm", "torch-grouped", "triton")
    rows = [measured(1, name, us).row for name, us in zip(names, (10, 40, 20), strict=True)]
    rows += [measured(4, "moeshm").row]
    kernels.add_ratios(rows)
    assert [(row.grouped_ratio, row.triton_ratio) for row in rows] == [
        *((0.25, 0.5), (None, 2.0), (0.5, None), (None, None))
    ]


def test_everything_asked_is_a_process_of_its_own() -> None:
    plan = harness.Plan(0, 0, 7, 0.0, None, 3)
    asked = Asked(["mixtral-8x7b", "qwen3-30b-a3b"], None, ["bf16", "f32"], ["moeshm"])
    setups = asked.setups(plan)
    assert [(each.shape, each.dtype) for each in setups] == [
        (shape, dtype) for shape in asked.shapes for dtype in asked.dtypes
    ]
    assert [n for n, _ in setups[0].cells] == [1, 16, 1024, 4096]
    assert [n for n, _ in setups[2].cells] == [1, 4, 16, 128, 1024, 4096]
    assert (setups[0].repeats, setups[0].seed) == (7, 3)


def test_the_program_says_one_thing_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = ShimGpu()
    monkeypatch.setattr(gpu, "describe", lambda: GPU, raising=False)
    monkeypatch.setattr(kernels_program, "open_device", lambda _name: gpu.device)
    monkeypatch.setattr(kernels_program, "CupyGpu", lambda _device: gpu)
    monkeypatch.setattr(kernels_program, "CONTENDERS", {"right": entry(Recited)})
    monkeypatch.setattr(kernels_program, "KERNEL_SHAPES", {"tiny": TINY})
    kernels_program.main([msgspec.json.encode(setup_of("right", n_tokens=(4,))).decode()])
    printed = capsys.readouterr().out.splitlines()
    lines: list[Line] = [msgspec.json.decode(text, type=Line) for text in printed]
    assert lines[0] == FoundGpu(GPU)
    assert lines[1:-1] == [Began("right", 4)] * (1 + 3 + 1)
    assert isinstance(lines[-1], Measured)
    assert lines[-1].row.error is None


# --- the command --------------------------------------------------------------------------


def test_json_follows_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Line] = [FoundGpu(GPU), Began("moeshm", 1), measured(1, "moeshm")]
    asked = scripted(monkeypatch, (lines, 0))
    words = ["kernels", "--json", "--shapes=qwen3-30b-a3b", "--tokens=1", "--contenders=moeshm"]
    done = CliRunner().invoke(bench, [*words, "--kernels=decode=fma"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = msgspec.json.decode(done.stdout, type=KernelReport)
    assert found.meta.benchmark == "kernels"
    assert found.gpu == GPU
    assert [row.contender for row in found.results] == ["moeshm"]
    (setup,) = asked
    assert (setup.cells, setup.kernels) == ([(1, ["moeshm"])], "decode=fma")


def test_the_command_and_its_page_know_every_shape_and_contender() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for choices, known in (
        (bench_kernels.CONTENDERS, kernels_program.CONTENDERS),
        (bench_kernels.SHAPES + bench_kernels.MORE_SHAPES, KERNEL_SHAPES),
    ):
        assert list(choices) == list(known)
        assert [name for name in known if f"`{name}`" not in page] == []


def test_kernels_that_do_not_exist_are_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "measure", lambda *_: pytest.fail("measured"))
    done = CliRunner().invoke(bench, ["kernels", "--kernels=decode=magic"])
    assert done.exit_code == 1
    assert "decode=magic" in done.output


def test_tables_show_every_figure_and_each_problem_once() -> None:
    absent = [
        KernelRow(contender="triton", shape="tiny", dtype="bf16", n_tokens=n, error="no triton")
        for n in (1, 4)
    ]
    good = measured(1, "moeshm", 27.25).row
    kernels_program.add_limits(good, TINY.info(DType.BF16), 2.0, GPU)
    good.relative_error, good.is_repeatable, good.goal_us = 2.5e-3, True, 99.0
    report = KernelReport(
        meta=harness.metadata("kernels", harness.Plan(0, 0, 3, 0.0, None, 0)),
        gpu=GPU,
        results=[good, *absent],
    )
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=200, file=nowhere)
        kernels_report.print_kernels(report, console)
    text = console.export_text()
    for figure in ("27.2", "2.5e-03", "yes", "99", "3,350 GB/s", "989 TFLOP/s bf16", "datasheet"):
        assert figure in text
    assert text.count("triton: no triton (2 rows)") == 1
    assert "sorted by expert" not in text
