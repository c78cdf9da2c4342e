"""`moeshm bench kernels`: one process after the other, what it prints, and the command."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from moeshm.bench import harness, kernels, kernels_program, kernels_report
from moeshm.bench.kernels import Asked
from moeshm.bench.kernels_program import Began, FoundGpu, Line, Measured, Refused, Setup
from moeshm.bench.kernels_shapes import KERNEL_SHAPES
from moeshm.bench.schema import KernelReport, KernelRow
from moeshm.cli import bench_kernels
from moeshm.cli.bench import bench
from moeshm.dtypes import DType
from moeshm.errors import UnsupportedPlatform, WorkerFailed

from .bench_gpus import GPU, TINY, Recited, ShimGpu, entry
from .bench_programs import scripted

ROOT = Path(__file__).parents[2]


# --- one process after the other ----------------------------------------------------------


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
    asked = scripted(monkeypatch, kernels, (first, 1), (second, 0))
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
    scripted(
        monkeypatch,
        kernels,
        ([FoundGpu(GPU), Began("a", 1), measured(1, "a"), measured(4, "a")], 1),
    )
    with pytest.raises(WorkerFailed, match="tiny bf16 was not measured: exit status 1: lost"):
        kernels.run(setup_of("a", "b"))


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, kernels, ([Refused("no CuPy; pip install 'moeshm[cuda13]'")], 0))
    with pytest.raises(UnsupportedPlatform, match=r"moeshm\[cuda13\]"):
        kernels.run(setup_of("a"))
    scripted(monkeypatch, kernels, ([], 1))
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
    asked = scripted(monkeypatch, kernels, (lines, 0))
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
