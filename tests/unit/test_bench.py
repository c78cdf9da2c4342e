"""The benchmarks: arithmetic, harness, contenders, and what `--json` prints."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from moeshm.bench import call, floors, harness, native, report, ring, schema
from moeshm.bench.contender import MODES, Cell
from moeshm.bench.contenders import CONTENDERS
from moeshm.bench.harness import CellSamples, Job, Plan
from moeshm.cli.bench import bench
from moeshm.cli.bench_options import parse_sizes
from moeshm.dtypes import DType
from moeshm.errors import UnsupportedPlatform

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
OPTIONAL = {"pyzmq": "zmq", "iceoryx2": "iceoryx2", "kickmsg": "kickmsg"}

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture
def plan() -> Plan:
    return Plan(*harness.choose_cpus(), repeats=1, seconds=0.01, messages=50, seed=7)


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    yield
    left = Path("/dev/shm").glob(f"{harness.SHM_PREFIX}*")
    # Those of living processes belong to another run on this machine.
    assert [path for path in left if not Path("/proc", path.name.split("-")[2]).exists()] == []


def script(text: str) -> Callable[[], list[str]]:
    return lambda: [sys.executable, "-c", text]


def is_missing(contender: str) -> bool:
    module = OPTIONAL.get(contender.partition("-")[0])
    return module is not None and importlib.util.find_spec(module) is None


# --- arithmetic ---------------------------------------------------------------------------


def test_summary_is_the_median_over_repeats_of_each_repeats_median() -> None:
    fast = CellSamples("c", durations_ns=[1000, 2000, 3000])
    slow = CellSamples("c", durations_ns=[9000, 9000, 9000, 90_000])
    middle = CellSamples("c", messages_per_duration=10, durations_ns=[40_000])
    fields = harness.summarise([fast, slow, middle])
    assert fields["p50_us"] == 4.0
    assert (fields["p50_min_us"], fields["p50_max_us"]) == (2.0, 9.0)
    assert (fields["n"], fields["repeats"]) == (17, 3)
    assert "error" not in fields


def test_summary_keeps_what_was_measured_and_says_what_failed() -> None:
    good = CellSamples("c", durations_ns=[2000])
    fields = harness.summarise([CellSamples("c", error="out of memory"), good])
    assert fields["p50_us"] == 2.0
    assert fields["error"] == "1 of 2 repeats failed: out of memory"
    assert harness.summarise([CellSamples("c", error="gone")]) == {
        "n": 0,
        "repeats": 1,
        "error": "gone",
    }


def test_a_round_trip_is_held_against_a_cache_line_or_against_the_echo_of_its_size() -> None:
    rows = [
        schema.Floor(floor="cache_line_ping_pong", size_bytes=64, p50_us=0.2),
        schema.Floor(floor="spin_echo", size_bytes=64, p50_us=0.3),
        schema.Floor(floor="spin_echo", size_bytes=8192, p50_us=2.0),
    ]
    assert floors.of_round_trip(rows, 64) is rows[0]
    assert floors.of_round_trip(rows, 8192) is rows[2]
    assert floors.of_round_trip(rows, 1024) is None


def test_the_three_pipes_carry_the_bytes_of_a_call() -> None:
    # The published calls: one f32 row of hidden 2048 with eight ids and weights.
    assert call.request_bytes(1, DType.F32) == 2048 * 4 + 8 * 4 + 8 * 4
    assert call.reply_bytes(512, DType.F16) == 512 * 2048 * 2


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("64", [64]), ("64,1K,16M", [64, 1024, 16 << 20]), ("8k, 8K", [8192])],
)
def test_sizes(text: str, sizes: list[int]) -> None:
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize("text", ["", "0", "64,", "K", "1.5M", "-64", "64B"])
def test_a_bad_size_is_named(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size; write bytes like 64, 8K or 16M"):
        parse_sizes(text)


# --- harness ------------------------------------------------------------------------------


def test_a_program_that_fails_keeps_the_cells_it_printed(plan: Plan) -> None:
    text = """
import os, signal
print('{"cell":"a","durations_ns":[5]}', flush=True)
print('{"cell":"b","dur', end="", flush=True)
os.kill(os.getpid(), signal.SIGABRT)
"""
    first, second = harness.run_job(Job("j", script(text), ["a", "b"]), plan)
    assert (first.durations_ns, first.error) == ([5], None)
    assert second.error == "signal SIGABRT"


def test_a_program_that_hangs_is_ended_with_its_children(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(harness, "_START_LIMIT_S", 1.0)
    monkeypatch.setattr(harness, "_CELL_LIMIT_S", 0.0)
    os.mkfifo(tmp_path / "alive")
    # Both hold the FIFO open for writing, so its reader sees the end once both are gone.
    text = f"""
import os, signal
end = os.open({str(tmp_path / "alive")!r}, os.O_RDWR)
os.fork()
signal.pause()
"""
    (only,) = harness.run_job(Job("j", script(text), ["a"]), plan)
    assert only.error == "no result after 1 s"
    reader = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    try:
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)


def test_repeats_are_interleaved_in_an_order_that_the_seed_decides(plan: Plan) -> None:
    text = """
import sys
for cell in sys.argv[5:]: print('{"cell":"%s","durations_ns":[1]}' % cell)
"""
    jobs = [Job(name, script(text), ["a"]) for name in "wxyz"]

    def order(seed: int) -> list[str]:
        steps: list[str] = []
        samples = harness.measure(jobs, plan._replace(repeats=3, seed=seed), steps.append)
        assert {key: len(runs) for key, runs in samples.items()} == {(n, "a"): 3 for n in "wxyz"}
        return steps

    first = order(1)
    for repeat in range(3):
        assert sorted(first[4 * repeat : 4 * repeat + 4]) == list("wxyz")
    assert order(1) == first
    assert order(2) != first


def test_a_job_that_cannot_run_is_reported_and_not_tried_again(plan: Plan) -> None:
    tries = []

    def program() -> list[str]:
        tries.append(1)
        raise UnsupportedPlatform("no C compiler")

    job = Job("j", program, ["a", "b"])
    samples = harness.measure([job], plan._replace(repeats=3), lambda _: None)
    assert len(tries) == 1
    assert [run.error for run in samples["j", "b"]] == ["no C compiler"]


def test_a_missing_library_is_a_row_with_its_remedy(plan: Plan) -> None:
    text = """
import sys
from moeshm.bench import contenders, pair
contenders.Zmq.module = "no_such_module"
pair.main(sys.argv[1:])
"""
    program = script(text)
    job = Job("pyzmq", lambda: [*program(), "pyzmq", "0"], ["latency:64", "throughput:64"])
    for run in harness.run_job(job, plan):
        assert run.error is not None
        assert "No module named 'no_such_module'" in run.error
        assert "pip install 'moeshm[bench]'" in run.error


def test_a_server_that_dies_fails_the_run_at_once(plan: Plan) -> None:
    # The pipe's other end is open in the client too: no end of file tells it.
    text = """
import multiprocessing, sys
from moeshm.bench import pair

def measure_without_server(end, count):
    multiprocessing.active_children()[0].kill()
    end.receive()

pair.time_echoes = measure_without_server
pair.main(sys.argv[1:])
"""
    program = script(text)
    job = Job("mp-pipe", lambda: [*program(), "mp-pipe", "0"], ["latency:64"])
    (run,) = harness.run_job(job, plan)
    assert run.error == "exit status 1: RuntimeError: the server process ended early"


# --- the C programs -----------------------------------------------------------------------


@needs_compiler
def test_a_program_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = native.build("floors")
    assert built.parent == tmp_path / "moeshm"
    before = built.stat().st_mtime_ns
    assert native.build("floors") == built
    assert built.stat().st_mtime_ns == before
    assert sorted(built.parent.iterdir()) == [built]


def test_without_a_compiler_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedPlatform, match="`cc` is not on PATH; install one"):
        native.build("floors")
    assert native.compiler_version() is None


@needs_compiler
@pytest.mark.parametrize(
    ("program", "words", "cell", "complaint"),
    [
        ("floors", [], "sprint:64", "cell 'sprint:64' names no floor"),
        ("floors", [], "64", "cell '64'; write NAME:BYTES"),
        ("three_pipes", ["pipe"], "64", "cell '64'; write REQUEST_BYTES:REPLY_BYTES"),
        ("three_pipes", ["tube"], "64:64", "flavour 'tube'; choose pipe or shared"),
    ],
)
def test_a_c_program_refuses_what_it_does_not_know(
    plan: Plan, program: str, words: list[str], cell: str, complaint: str
) -> None:
    (run,) = harness.run_job(Job("j", harness.c_program(program, *words), [cell]), plan)
    assert run.error == f"exit status 2: {complaint}"


@needs_compiler
@pytest.mark.parametrize("flavour", ["pipe", "shared"])
def test_three_pipes_measures_what_it_is_told(plan: Plan, flavour: str) -> None:
    cells = ["8256:8192", "200000:0", "1:1"]
    runs = harness.run_job(Job("j", harness.c_program("three_pipes", flavour), cells), plan)
    assert [run.error for run in runs] == [None] * 3
    assert [len(run.durations_ns) for run in runs] == [plan.messages] * 3
    assert all(duration > 0 for run in runs for duration in run.durations_ns)


# --- contenders and reports ---------------------------------------------------------------


@pytest.mark.parametrize("name", list(CONTENDERS))
def test_a_contender_delivers_the_bytes(name: str, plan: Plan) -> None:
    """The pair compares what arrived on both sides; sizes around where copying changes."""
    if is_missing(name):
        pytest.skip("not installed")
    cells = [str(Cell(mode, size)) for size in (1, 64 << 10, (64 << 10) + 1) for mode in MODES]
    job = Job(name, harness.python_program("pair", name, "3"), cells)
    runs = harness.run_job(job, plan._replace(messages=400))
    assert [run.error for run in runs] == [None] * len(cells)
    for run in runs:
        assert len(run.durations_ns) * run.messages_per_duration == 400


@needs_compiler
def test_ring_json_follows_the_schema(tmp_path: Path) -> None:
    plot = tmp_path / "ring.png"
    words = ["ring", "--sizes=64", "--repeats=1", "--messages=200", "--seed=5", "--json"]
    if importlib.util.find_spec("matplotlib") is not None:
        words += ["--plot", str(plot)]
    done = CliRunner().invoke(bench, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = msgspec.json.decode(done.stdout, type=schema.RingReport)

    assert (found.meta.benchmark, found.meta.seed, found.meta.repeats) == ("ring", 5, 1)
    assert {row.floor for row in found.floors} == {
        "cache_line_ping_pong",
        "futex_ping_pong",
        "spin_echo",
        "memcpy",
    }
    names = [*CONTENDERS, "three-pipes", "three-pipes-shared"]
    assert sorted((row.contender, row.mode, row.size_bytes) for row in found.results) == sorted(
        (name, mode, 64) for name in names for mode in MODES
    )
    for row in (*found.floors, *(row for row in found.results if not is_missing(row.contender))):
        assert row.error is None, row
        assert row.p50_us is not None
        assert row.p50_min_us == row.p50_us == row.p50_max_us
        assert row.n >= 200
    for row in found.results:
        if row.error is None:
            assert row.gb_per_s is not None
            assert (row.floor_ratio is not None) == (row.mode == "latency")
            assert (row.messages_per_s is not None) == (row.mode == "throughput")
    if "--plot" in words:
        assert plot.read_bytes().startswith(b"\x89PNG")


@needs_compiler
def test_call_report_follows_the_schema(plan: Plan) -> None:
    steps: list[str] = []
    measured = call.measure(DType.F16, plan, steps.append, n_tokens=(1, 3), idle_seconds=0.05)
    assert len(steps) == call.count_steps(plan)
    found = msgspec.json.decode(msgspec.json.encode(measured), type=schema.CallReport)
    calls = [row for row in found.results if row.mode == "call"]
    names = ["moeshm-shared", "moeshm-stream", "three-pipes", "three-pipes-shared"]
    assert sorted((row.contender, row.n_tokens) for row in calls) == sorted(
        (name, n_tokens) for name in names for n_tokens in (1, 3)
    )
    for row in calls:
        assert row.error is None, row
        assert row.n == plan.messages
        assert row.three_pipes_ratio is not None
        assert row.request_bytes == (row.n_tokens or 0) * (2048 * 2 + 64)
    idle = [row for row in found.results if row.mode == "idle"]
    assert [row.contender for row in idle] == ["moeshm-shared", "moeshm-stream"]
    for row in idle:
        assert row.error is None, row
        assert row.idle_worker_cpu_percent is not None


def test_tables_show_every_contender_and_each_problem_once(plan: Plan) -> None:
    failed = [
        schema.RingRow(contender="pyzmq", mode=mode, size_bytes=64, error="unavailable: [zmq]")
        for mode in MODES
    ]
    good = schema.RingRow(
        contender="mp-pipe",
        mode="latency",
        size_bytes=8192,
        p50_us=40.0,
        p99_us=1234.5,
        p50_min_us=39.0,
        p50_max_us=41.0,
    )
    console = Console(record=True, width=110, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        report.print_report(
            schema.RingReport(
                meta=harness.metadata("ring", plan), floors=[], results=[*failed, good]
            ),
            console,
        )
    text = console.export_text()
    assert "39 … 41" in text
    assert "1,234" in text
    assert text.count("pyzmq: unavailable: [zmq] (2 rows)") == 1


def test_a_plot_without_matplotlib_fails_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(ring, "measure", lambda *_: pytest.fail("measured"))
    done = CliRunner().invoke(bench, ["ring", "--plot", "ring.png"])
    assert done.exit_code == 1
    assert "pip install 'moeshm[bench]'" in done.output


def test_the_documentation_names_every_field() -> None:
    text = DOCS.read_text() + DOCS.with_name("overload.md").read_text()
    structs = [
        struct
        for struct in vars(schema).values()
        if isinstance(struct, type) and issubclass(struct, msgspec.Struct)
    ]
    assert schema.RingRow in structs
    fields = {field for struct in structs for field in struct.__struct_fields__}
    assert sorted(field for field in fields if f"`{field}`" not in text) == []


def test_the_documentation_names_every_contender_and_floor() -> None:
    text = DOCS.read_text()
    measured = ring.all_contenders([64], seed=0)
    names = {contender.job.name for contender in measured}
    names |= {cell.partition(":")[0] for cell in floors.job([64]).cells}
    assert sorted(name for name in names if f"`{name}`" not in text) == []
