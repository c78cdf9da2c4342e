"""`moeshm bench device-calls`, without a GPU: its two programs, verdicts, figures, refusals."""

from __future__ import annotations

import gc
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from moeshm import device_arrays, engine_device
from moeshm.bench import (
    device_calls,
    device_calls_client,
    device_calls_report,
    gpu_worker,
    harness,
    kernels_work,
)
from moeshm.bench.device_calls import Asked
from moeshm.bench.device_calls_client import (
    WAYS,
    Engine,
    Found,
    Line,
    Sampled,
    Setup,
    cell_name,
    cell_names,
    whats_of,
)
from moeshm.bench.device_calls_gpu import choose_worker_device
from moeshm.bench.gpu_worker import Ready, Refused, WorkerSetup
from moeshm.bench.harness import CellSamples, Plan
from moeshm.bench.kernels_work import CALLS, Work
from moeshm.bench.schema import DeviceCallReport, DeviceCallRow, GpuInfo
from moeshm.cli.bench import bench
from moeshm.dtypes import Array, DType
from moeshm.errors import DeviceError, UnsupportedPlatform, WorkerFailed
from tests.engine_gpu import GpuArray, Movers, Stream

from .bench_gpus import GPU, TINY, ShimGpu
from .bench_programs import scripted

ROOT = Path(__file__).parents[2]
FEW_CALLS = 3  # of a graph, in place of CALLS
PLAN = Plan(*harness.choose_cpus(), 1, 0.0, None, 3)
#: The worker's program, on the shim instead of a GPU.
ON_THE_SHIM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from moeshm.bench import gpu_worker, kernels_work
from tests.unit.test_bench_device_calls import DescribedGpu
from tests.unit.bench_gpus import TINY
from tests.simt.device import SimtDevice

kernels_work.CALLS = gpu_worker.CALLS = {FEW_CALLS}
gpu_worker.open_device = lambda name: SimtDevice()
gpu_worker.CupyGpu = DescribedGpu
gpu_worker.KERNEL_SHAPES = {{"tiny": TINY}}
gpu_worker.main(sys.argv[1:])
"""


class DescribedGpu(ShimGpu):
    """One that says what it is."""

    def __init__(self, device: Any) -> None:
        super().__init__()
        self.device = device

    def describe(self) -> GpuInfo:
        """As `CupyGpu.describe`."""
        return GPU


STREAM_NS = 12_345  # what HostEngine's clock says


class HostEngine:
    """An `Engine` whose GPU is the host; `spoil` may change what is read from it."""

    name = "cuda:0"

    def __init__(self) -> None:
        self.stream = Stream()
        self.spoil: Callable[[Array], None] = lambda _output: None

    def put(self, array: Array) -> GpuArray:
        """As `Engine.put`."""
        return GpuArray(array.copy())

    def read(self, values: GpuArray) -> Array:
        """As `Engine.read`."""
        output: Array = values.host.copy()
        self.spoil(output)
        return output

    def describe(self) -> GpuInfo:
        """As `Engine.describe`."""
        return msgspec.structs.replace(GPU, name="the engine's")

    def worker_device(self, wanted: str) -> str:
        """As `Engine.worker_device`, of two."""
        return choose_worker_device(wanted, self.name, 2)

    def stream_ns(self, begin: Callable[[], Any]) -> tuple[int, Any]:
        """As `Engine.stream_ns`."""
        return STREAM_NS, begin()

    def peer_copy(self, worker_device: str, n_bytes: int) -> Callable[[], None]:
        """As `Engine.peer_copy`."""
        assert worker_device == "simt"
        if n_bytes == activation_bytes(4):
            raise DeviceError("out of memory")
        near = np.zeros(n_bytes, np.uint8)
        return lambda: near.fill(1)


def activation_bytes(n_tokens: int) -> int:
    """Of the shape TINY in bfloat16."""
    return n_tokens * 64 * 2


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """The measuring program stops Python's collector."""
    yield
    gc.enable()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostEngine]:
    """The engine's GPU, and a worker's program that runs here."""
    made = HostEngine()
    monkeypatch.setattr(device_arrays, "_current_stream", lambda _values: made.stream.ptr)
    monkeypatch.setattr(engine_device, "open_mover", Movers().open)
    monkeypatch.setattr(gpu_worker, "KERNEL_SHAPES", {"tiny": TINY})
    for module in (kernels_work, device_calls_client):
        monkeypatch.setattr(module, "CALLS", FEW_CALLS)

    def command(address: str, setup: WorkerSetup) -> list[str]:
        return [sys.executable, "-c", ON_THE_SHIM, address, msgspec.json.encode(setup).decode()]

    monkeypatch.setattr(gpu_worker, "_command", command)
    yield made
    made.stream.close()


def setup_of(*n_tokens: int) -> Setup:
    return Setup(
        shape="tiny",
        dtype="bf16",
        n_tokens=list(n_tokens),
        engine_device="cuda:0",
        worker_device="auto",
        seconds=0.0,
        seed=3,
    )


def measured(engine: Engine, setup: Setup) -> tuple[Found, dict[str, CellSamples]]:
    lines: list[Line] = []
    device_calls_client.run(setup, engine, lines.append)
    found, *sampled = lines
    assert isinstance(found, Found)
    samples = {line.samples.cell: line.samples for line in sampled if isinstance(line, Sampled)}
    assert len(samples) == len(sampled)
    return found, samples


# --- the two programs ---------------------------------------------------------------------


def test_every_way_is_measured_against_a_worker_that_computes(engine: HostEngine) -> None:
    found, samples = measured(engine, setup_of(1, 4))
    assert (found.engine_device, found.worker_device) == ("cuda:0", "simt")
    assert (found.engine_gpu.name, found.worker_gpu) == ("the engine's", GPU)
    # The shim's clock says 160 us for a graph.
    assert found.kernels_us == {1: 160 / FEW_CALLS, 4: 160 / FEW_CALLS}
    assert sorted(samples) == sorted(cell_names([1, 4]))
    for cell, each in samples.items():
        if cell.endswith("device"):
            assert "only GPUs of the same vendor" in (each.error or "")
        elif cell == "peer_copy:4:":
            assert each.error == "out of memory"
        else:
            assert each.error is None
            assert len(each.durations_ns) == device_calls_client._LEAST_LAPS * FEW_CALLS
            assert min(each.durations_ns) > 0
            assert (set(each.durations_ns) == {STREAM_NS}) == cell.startswith("stream")


def set_zero(output: Array) -> None:
    output[-1] = 0


def set_nan(output: Array) -> None:
    output[-1] = 0xFFFF


def set_a_bit(output: Array) -> None:
    output[-1, -1] ^= 1


@pytest.mark.parametrize(
    ("spoil", "n_first", "error"),
    [
        (set_zero, 0, "ValueError: error"),
        (set_nan, 0, "ValueError: 64 of 256 outputs are not finite"),
        (set_a_bit, 1, "ValueError: the output has other bits after it was timed than before"),
    ],
)
def test_a_wrong_output_is_an_error_and_no_figure(
    engine: HostEngine, spoil: Callable[[Array], None], n_first: int, error: str
) -> None:
    """From the read after `n_first` on."""
    n_reads = 0

    def spoil_later(output: Array) -> None:
        nonlocal n_reads
        n_reads += 1
        if n_reads > n_first:
            spoil(output)

    engine.spoil = spoil_later
    _, samples = measured(engine, setup_of(4))
    for what in whats_of("pinned"):
        wrong = samples[cell_name(what, 4, "pinned")]
        assert (wrong.error or "").startswith(error)
        assert not wrong.durations_ns
    for what in whats_of("rings"):
        assert samples[cell_name(what, 4, "rings")].error is None


def test_ways_whose_outputs_differ_are_found_out(engine: HostEngine) -> None:
    engine.spoil = set_a_bit
    _, samples = measured(engine, setup_of(4))
    errors = {way: samples[cell_name("compute", 4, way)].error for way in ("rings", "pinned")}
    # Whichever comes second.
    assert sorted(map(str, errors.values())) == [
        "None",
        "ValueError: the output has other bits than that of another way",
    ]


def test_only_what_begins_a_call_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now, begun, finished = 0, list[int](), list[int]()

    def begin(number: int) -> int:
        nonlocal now
        now += 10
        begun.append(number)
        return number

    def finish(result: int) -> None:
        nonlocal now
        now += 1000
        finished.append(result)

    clock = types.SimpleNamespace(perf_counter_ns=lambda: now)
    monkeypatch.setattr(device_calls_client, "time", clock)
    lap_s = CALLS * 1010e-9
    durations_ns = device_calls_client.time_calls(begin, finish, 5.5 * lap_s)
    assert durations_ns == [10] * 5 * CALLS
    assert begun == finished == [*range(CALLS)] * 6


@pytest.mark.parametrize(
    ("wanted", "engine_device", "n_devices", "expected"),
    [
        ("auto", "cuda:0", 1, "cuda:0"),
        ("auto", "cuda:0", 2, "cuda:1"),
        ("auto", "cuda:1", 8, "cuda:0"),
        ("auto", "hip:0", 4, "hip:1"),
        ("cuda:0", "cuda:0", 2, "cuda:0"),
    ],
)
def test_the_workers_gpu_is_another_one_if_there_is_one(
    wanted: str, engine_device: str, n_devices: int, expected: str
) -> None:
    assert choose_worker_device(wanted, engine_device, n_devices) == expected


def test_a_worker_that_cannot_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = WorkerSetup(shape="qwen3-30b-a3b", dtype="bf16", device="cuda:99", n_tokens=[1], seed=0)
    with (
        pytest.raises(UnsupportedPlatform, match=r"the worker cannot serve: .*cuda:99"),
        gpu_worker.ready_worker(setup),
    ):
        pytest.fail("ready")
    monkeypatch.setattr(gpu_worker, "_command", lambda *_: [sys.executable, "-c", "exit(7)"])
    with pytest.raises(WorkerFailed, match="exit status 7"), gpu_worker.ready_worker(setup):
        pytest.fail("ready")


def test_setups_and_lines_are_json() -> None:
    worker = WorkerSetup(shape="tiny", dtype="f32", device="cuda:1", n_tokens=[1, 2], seed=9)
    ready = Ready("cuda:1", GPU, {1: 2.5, 16: 3.5})
    for each, kind in (
        (setup_of(1, 2), Setup),
        (worker, WorkerSetup),
        (ready, gpu_worker.Word),
        (Refused("why"), Line),
        (Sampled(CellSamples("a", 1, [5])), Line),
    ):
        assert msgspec.json.decode(msgspec.json.encode(each), type=kind) == each


# --- figures ------------------------------------------------------------------------------


FOUND = Found("cuda:0", "cuda:1", GPU, GPU, {1: 30.0, 512: 400.0})
ASKED = Asked(
    shape="qwen3-30b-a3b",
    dtype="bf16",
    n_tokens=[1, 512],
    engine_device="cuda:0",
    worker_device="auto",
)


def lines_of(us: dict[str, float], found: Found = FOUND) -> list[Line]:
    """A line for each cell that has a time."""
    cells = [CellSamples(cell, 1, [round(each * 1000)]) for cell, each in us.items()]
    return [found, *map(Sampled, cells)]


GOOD = {
    **{cell_name("compute", 1, way): 50.0 for way in WAYS},
    **{cell_name("compute", 512, way): 500.0 for way in WAYS},
    **{cell_name("submit", n, way): 9.0 for n in (1, 512) for way in WAYS},
    **{cell_name("stream", n, way): 40.0 for n in (1, 512) for way in ("pinned", "device")},
    cell_name("peer_copy", 1): 10.0,
    cell_name("peer_copy", 512): 80.0,
}


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {cell: 2 * us for cell, us in GOOD.items()}
    kernels = msgspec.structs.replace(FOUND, kernels_us={1: 34.0, 512: 400.0})
    asked = scripted(monkeypatch, device_calls, (lines_of(GOOD), 0), (lines_of(slow, kernels), 0))
    steps: list[str] = []
    plan = PLAN._replace(repeats=2)
    report = device_calls.measure(ASKED, plan, steps.append)
    assert msgspec.convert(msgspec.to_builtins(report), DeviceCallReport, str_keys=True) == report
    assert len(steps) == device_calls.count_steps(plan) == 4
    assert [setup.repeat for setup in asked] == [0, 1]
    assert (report.engine_device, report.worker_device) == ("cuda:0", "cuda:1")
    assert not [note for note in report.meta.notes if "one GPU" in note]
    rows = {(row.n_tokens, row.way): row for row in report.results}
    assert list(rows) == [(n, way) for n in (1, 512) for way in WAYS]
    few, many = rows[1, "pinned"], rows[512, "device"]
    assert (few.p50_us, few.p50_min_us, few.p50_max_us) == (75.0, 50.0, 100.0)
    assert (few.submit_us, few.kernels_us, few.overhead_us) == (13.5, 32.0, 43.0)
    assert (few.stream_us, rows[1, "rings"].stream_us) == (60.0, None)
    assert few.copy_ratio is None
    assert (many.overhead_us, many.copy_ratio) == (350.0, 120 / 350)
    copy, _, ring = report.floors
    assert (copy.floor, copy.size_bytes, copy.p50_us) == ("peer_copy", 2048 * 2, 15.0)
    assert copy.gb_per_s == pytest.approx(2 * 4096 / 15e3)
    assert (ring.floor, ring.size_bytes, ring.error) == ("ring", 64, None)
    assert ring.p50_us


def test_calls_that_cost_nothing_beyond_their_kernels_have_no_ratio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted(
        monkeypatch,
        device_calls,
        (lines_of({**GOOD, cell_name("compute", 512, "rings"): 390.0}), 0),
    )
    rows = device_calls.measure(ASKED, PLAN, lambda _: None).results
    (row,) = (row for row in rows if (row.n_tokens, row.way) == (512, "rings"))
    assert (row.overhead_us, row.copy_ratio) == (-10.0, None)


def test_who_ends_early_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    some = {cell: us for cell, us in GOOD.items() if ":1:" in cell}
    scripted(monkeypatch, device_calls, (lines_of(some), 1), ([], 1))
    report = device_calls.measure(ASKED, PLAN._replace(repeats=2), lambda _: None)
    for row in report.results:
        if row.n_tokens == 1:
            assert row.error == "1 of 2 repeats failed: exit status 1: lost"
            assert (row.p50_us, row.kernels_us) == (50.0, 30.0)
        else:
            assert row.error == "exit status 1: lost"
            assert row.p50_us is row.overhead_us is row.copy_ratio is None


def test_one_gpu_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = msgspec.structs.replace(FOUND, worker_device="cuda:0")
    scripted(monkeypatch, device_calls, (lines_of(GOOD, shared), 0))
    report = device_calls.measure(ASKED, PLAN, lambda _: None)
    assert "one GPU: engine and worker share it" in report.meta.notes[-1]


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, device_calls, ([Refused("no CuPy; pip install 'moeshm[cuda13]'")], 0))
    with pytest.raises(UnsupportedPlatform, match=r"device calls need a GPU: .*moeshm\[cuda13\]"):
        device_calls.measure(ASKED, PLAN, lambda _: None)
    scripted(monkeypatch, device_calls, ([], 1))
    with pytest.raises(WorkerFailed, match="not measured: exit status 1: lost"):
        device_calls.measure(ASKED, PLAN, lambda _: None)


def test_calls_are_bytes_of_the_layer() -> None:
    work = Work(TINY, DType.BF16, seed=0)
    assert device_calls_client.activation_bytes(work.info, 3) == activation_bytes(3)
    assert activation_bytes(3) == work.cell(3).hidden_states.nbytes


# --- the command --------------------------------------------------------------------------


def test_the_command_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fresh processes, which see none even if there is one."""
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.setenv(variable, "")
    done = CliRunner().invoke(bench, ["device-calls", "--repeats=1"])
    assert done.exit_code == 1
    assert "Error: device calls need a GPU: " in done.output


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    us = {cell: each for cell, each in GOOD.items() if "device" not in cell}
    refused = [
        Sampled(CellSamples(cell_name(what, n, "device"), error="no peer access"))
        for what in whats_of("device")
        for n in (1, 512)
    ]
    setups = scripted(monkeypatch, device_calls, ([*lines_of(us), *refused], 0))
    words = [
        "device-calls",
        "--tokens=1,512",
        "--repeats=1",
        "--worker-device=cuda:1",
        "--resident",
    ]
    done = CliRunner().invoke(bench, words + ["--json"] * as_json, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (setup,) = setups
    assert (setup.shape, setup.dtype, setup.n_tokens) == ("qwen3-30b-a3b", "bf16", [1, 512])
    assert (setup.engine_device, setup.worker_device) == ("cuda:0", "cuda:1")
    assert setup.is_resident
    assert setup.seconds == device_calls.CELL_SECONDS
    if as_json:
        report = msgspec.json.decode(done.stdout, type=DeviceCallReport)
        assert report.meta.benchmark == "device-calls"
        assert {row.way for row in report.results} == set(WAYS)
        assert report.is_resident
    else:
        for text in ("worker on cuda:1", "peer_copy", "client.compute, qwen3-30b-a3b, bf16", "80%"):
            assert text in done.stdout
        assert done.stdout.count("device: no peer access (2 rows)") == 1


def test_tables_leave_out_what_was_not_measured() -> None:
    row = DeviceCallRow(way="rings", shape="tiny", dtype="bf16", n_tokens=1, error="gone")
    report = DeviceCallReport(
        meta=harness.metadata("device-calls", PLAN),
        engine_device="cuda:0",
        worker_device="cuda:1",
        engine_gpu=GPU,
        worker_gpu=GPU,
        floors=[],
        results=[row],
    )
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=160, file=nowhere)
        device_calls_report.print_device_calls(report, console)
    text = console.export_text()
    assert "rings: gone (1 rows)" in text
    assert "None" not in text


def test_the_page_knows_every_way() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert [name for name in (*WAYS, "peer_copy", "ring") if f"`{name}`" not in page] == []
