"""`moeshm bench replay` and `policy`: what is counted, and the real commands."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from rich.console import Console

from moeshm.bench import (
    harness,
    policy,
    replay,
    replay_report,
    replay_rows,
    replay_trace,
    schema,
)
from moeshm.bench.harness import CellSamples, Job, Plan
from moeshm.bench.replay import Replay, Way
from moeshm.bench.replay_engine import Run
from moeshm.bench.replay_model import SHAPES
from moeshm.cli.bench import bench

from ..replays import messages, payload, small_replay

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
HOT = 0.2
#: A prompt so short that the three layers are over in an instant.
SMALL = ["--prompt=42", "--completion=5", "--chunk=16", "--layers=3", f"--hot={HOT}", "--seed=3"]


def candidate(slice_tokens: int, is_chosen: bool) -> schema.Candidate:
    return schema.Candidate(
        n_tokens=512,
        transport="shared",
        wire_dtype="f32",
        slice_tokens=slice_tokens,
        predicted_us=2.0,
        expected_us=2.0,
        measured_us=None,
        n_measured=0,
        is_chosen=is_chosen,
        why="",
    )


RUN = Run(
    calls=7,
    prefill_calls=4,
    rows=20,
    payload_bytes=1000,
    prefill_s=2.0,
    fallback_calls=0,
    pack_s=1.0,
    wait_s=4.0,
    unpack_s=0.5,
    compute_s=3.0,
    prefill_candidates=[candidate(4, False), candidate(64, True)],
    decode_candidates=[candidate(1024, True)],
    decode_tokens_per_s=10.0,
    losses=0,
    alone_s=4.0,
    alone_forward_s=5.0,
)


@pytest.fixture
def plan() -> Plan:
    return Plan(*harness.choose_cpus(), repeats=2, seconds=0.0, messages=None, seed=7)


@pytest.fixture
def small() -> Replay:
    return small_replay()


def run_json(*words: str, type_: type[Any]) -> Any:
    done = CliRunner().invoke(bench, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return msgspec.json.decode(done.stdout, type=type_)


def shown(print_it: Callable[[Console], None]) -> str:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=160, file=nowhere)
        print_it(console)
        return console.export_text()


# --- counting -----------------------------------------------------------------------------


def test_a_row_is_the_median_of_its_repeats_with_their_spread(
    small: Replay, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = msgspec.structs.replace
    found: list[Run | str] = [
        change(RUN, prefill_s=5.0, decode_tokens_per_s=30.0, fallback_calls=3, losses=2),
        change(RUN, wait_s=1.0, alone_s=1.0, alone_forward_s=9.0),
        change(RUN, prefill_s=3.0, calls=9),
        "out of memory",
    ]
    monkeypatch.setattr(replay, "run_once", lambda *_: found.pop(0))
    way = Way("auto", "auto", "f32", 0.25)
    measured = replay.measure(small._replace(is_null=False, ways=[way]), plan._replace(repeats=4))
    (row,) = measured.results
    assert (row.mode, row.transport, row.wire_dtype, row.remote_speed) == way
    assert (row.prefill_s, row.prefill_min_s, row.prefill_max_s) == (3.0, 2.0, 5.0)
    assert (row.calls, row.rows, row.payload_bytes) == (7, 20, 1000)
    # Once is too often: no median hides it.
    assert (row.fallback_calls, row.losses) == (3, 2)
    assert row.decode_tokens_per_s == 10.0
    assert (row.decode_min_tokens_per_s, row.decode_max_tokens_per_s) == (10.0, 30.0)
    # Waited for beyond the worker's own time: 1, 0 and 1 s.
    assert (row.transport_s, row.exchange_s) == (2.5, 5.5)
    assert (row.alone_s, row.alone_forward_s) == (4.0, 5.0)
    assert row.prefill_choices == ["shared f32 64"] * 3
    assert row.decode_choices == ["shared f32 1024"] * 3
    assert [each.slice_tokens for each in row.candidates] == [4, 64, 1024]
    assert row.error == "1 of 4 repeats failed: out of memory"
    assert measured.contenders == []


def test_what_fails_is_a_row_with_its_error_and_is_not_tried_again(
    small: Replay, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ["no rings"]
    monkeypatch.setattr(replay, "run_once", lambda *_: answers.pop())
    monkeypatch.setattr(
        harness, "run_job", lambda job, _: [CellSamples(job.cells[0], error="no cc")]
    )
    measured = replay.measure(small, plan)
    assert answers == []
    assert measured.results[0].error == "1 of 1 repeats failed: no rings"
    assert measured.results[0].calls is None
    assert [row.error for row in measured.contenders] == ["no cc", "no cc"]
    text = shown(lambda console: replay_report.print_replay(measured, console))
    assert "batched shared f16: 1 of 1 repeats failed: no rings" in text


def test_an_engine_that_cannot_run_says_why(small: Replay, plan: Plan, tmp_path: Path) -> None:
    setup = replay.engine_setup(small, small.ways[0], 0, tmp_path / "none.npz", tmp_path / "p.json")
    found = replay.run_once(setup, plan)
    assert isinstance(found, str)
    assert "none.npz" in found


def ratios_of(
    small: Replay, plan: Plan, monkeypatch: pytest.MonkeyPatch, runs: dict[Way, list[Run | str]]
) -> dict[Way, tuple[float | None, float | None]]:
    """Of prefill and decode, when the ways' repeats give these runs."""
    waiting = {way[:3]: list(found) for way, found in runs.items()}
    monkeypatch.setattr(
        replay,
        "run_once",
        lambda setup, _: waiting[setup.mode, setup.transport, setup.wire_dtype].pop(0),
    )
    played = small._replace(is_null=False, ways=list(runs))
    measured = replay.measure(played, plan._replace(repeats=max(map(len, runs.values()))))
    return {
        way: (row.ratio_to_best, row.decode_ratio_to_best)
        for way, row in zip(runs, measured.results, strict=True)
    }


def run_of(prefill_s: float, decode_tokens_per_s: float) -> Run:
    return msgspec.structs.replace(
        RUN, prefill_s=prefill_s, decode_tokens_per_s=decode_tokens_per_s
    )


def test_ratios_to_the_best_fixed_way_are_taken_repeat_by_repeat(
    small: Replay, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second repeat was a slow minute for all: ratios of medians would not be these.
    auto = Way("auto", "auto", "f16", 1.0)
    batched = Way("batched", "shared", "f16", 1.0)
    stream = Way("stream", "shared", "f16", 1.0)
    other = Way("batched", "shared", "f32", 1.0)
    found = ratios_of(
        small,
        plan,
        monkeypatch,
        {
            auto: [run_of(2.2, 8.0), run_of(12.0, 4.0), run_of(1.0, 20.0)],
            batched: [run_of(2.0, 8.0), run_of(10.0, 1.0), run_of(2.0, 10.0)],
            stream: [run_of(3.0, 10.0), run_of(30.0, 2.0), run_of(3.0, 40.0)],
            other: [run_of(0.1, 99.0)] * 3,
        },
    )
    assert found[auto] == pytest.approx((1.1, 1.25))
    assert found[batched] == pytest.approx((1.0, 2.0))
    assert found[stream] == pytest.approx((1.5, 1.0))
    assert found[other] == (1.0, 1.0)


def test_a_way_that_failed_has_no_ratio_and_is_nobodys_measure(
    small: Replay, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto, batched = Way("auto", "auto", "f16", 1.0), Way("batched", "shared", "f16", 1.0)
    stream = Way("stream", "shared", "f16", 1.0)
    found = ratios_of(
        small,
        plan,
        monkeypatch,
        {
            auto: [run_of(3.0, 10.0), run_of(9.0, 10.0)],
            batched: ["no rings"],
            stream: [run_of(2.0, 10.0), "no rings"],
        },
    )
    assert found == {auto: (1.5, 1.0), batched: (None, None), stream: (1.0, 1.0)}
    assert ratios_of(small, plan, monkeypatch, {auto: [RUN]}) == {auto: (None, None)}


def test_ratios_are_of_the_whole_trace(
    small: Replay, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = replay.pipes_sizes(small, small.placement())
    each = [CellSamples("c", len(sizes), [int(s * 1e9)]) for s in (11.0, 12.0, 22.0, 24.0)]
    monkeypatch.setattr(replay, "run_once", lambda *_: RUN)
    monkeypatch.setattr(harness, "run_job", lambda *_: [each.pop(0)])
    measured = replay.measure(small, plan)
    for row in measured.contenders:
        assert row.calls == len(sizes)
        assert row.total_s is not None
        assert row.alone_ratio == pytest.approx(row.total_s / 4)
        assert row.exchange_ratio == pytest.approx(row.total_s / 5.5)
        assert row.transport_ratio == pytest.approx(row.total_s / 2.5)
    assert sum(row.total_s or 0 for row in measured.contenders) == pytest.approx(69 / 2)


def test_a_fallback_and_a_loss_are_never_silent(small: Replay, plan: Plan) -> None:
    row = schema.ReplayRow(
        mode="batched",
        transport="shared",
        wire_dtype="f16",
        remote_speed=1.0,
        fallback_calls=17,
        losses=3,
    )
    found = schema.ReplayReport(
        meta=harness.metadata("replay", plan),
        trace=small.summary(),
        results=[row],
        contenders=[],
        published=replay.PUBLISHED,
        reductions=[],
    )
    text = shown(lambda console: replay_report.print_replay(found, console))
    assert "batched shared f16: 17 calls were computed by the fallback, not by the worker" in text
    assert "batched shared f16: the worker was lost 3 times with calls on their way" in text


def test_the_published_table_gives_the_published_reductions() -> None:
    (original,) = replay_rows.reductions([], replay.PUBLISHED)
    assert round(original.calls_percent, 1) == -90.9
    assert round(original.payload_percent, 1) == -48.2
    assert round(original.prefill_percent, 1) == -32.2


# --- the C program ------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("flavour", ["pipe", "shared"])
def test_the_three_pipes_replay_a_file_of_calls_once(
    flavour: str, plan: Plan, tmp_path: Path
) -> None:
    path = tmp_path / "calls.txt"
    path.write_text("4160 4096\n" * 1030 + "300000 1\n")
    cells = [f"trace:{path}", "64:64"]
    program = harness.c_program("three_pipes", flavour)
    trace, usual = harness.run_job(Job("j", program, cells), plan._replace(messages=20))
    assert (trace.error, usual.error) == (None, None)
    assert (trace.messages_per_duration, len(trace.durations_ns)) == (1031, 1)
    assert trace.durations_ns[0] > 0
    assert len(usual.durations_ns) == 20


@needs_compiler
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "write lines of REQUEST_BYTES REPLY_BYTES"),
        ("64 64\n64 none\n", "write lines of REQUEST_BYTES REPLY_BYTES"),
        (None, "No such file or directory"),
    ],
)
def test_the_three_pipes_refuse_what_is_no_trace(
    plan: Plan, tmp_path: Path, text: str | None, complaint: str
) -> None:
    path = tmp_path / "calls.txt"
    if text is not None:
        path.write_text(text)
    job = Job("j", harness.c_program("three_pipes", "pipe"), [f"trace:{path}"])
    (run,) = harness.run_job(job, plan)
    assert run.error is not None
    assert complaint in run.error


# --- the commands -------------------------------------------------------------------------


@needs_compiler
def test_replay_counts_what_travels_in_every_mode(tmp_path: Path) -> None:
    plot = tmp_path / "replay.png"
    words = ["replay", *SMALL, "--null-compute", "--transports=shared", "--repeats=1"]
    if importlib.util.find_spec("matplotlib") is not None:
        words += ["--plot", str(plot)]
    found: schema.ReplayReport = run_json(*words, type_=schema.ReplayReport)
    assert "--plot" not in words or plot.read_bytes().startswith(b"\x89PNG")

    trace = replay_trace.synthetic(SHAPES["qwen3.5-35b-a3b"].with_layers(3), 42, 5, seed=3)
    windows, whole = (messages(trace, HOT, 16, window) for window in (4, 1024))
    rows = {(row.mode, row.wire_dtype): row for row in found.results}
    assert list(rows) == [(mode, dtype) for mode in replay.MODES for dtype in replay.DTYPES]
    for (mode, dtype), row in rows.items():
        assert row.error is None, row
        assert (row.transport, row.rows) == ("shared", sum(windows))
        assert (row.fallback_calls, row.losses) == (0, 0)
        assert (row.ratio_to_best or 0) > 0
        assert (row.decode_ratio_to_best or 0) > 0
        assert (row.alone_s is not None) == (mode == "batched")
        if mode != "auto":
            sent = windows if mode == "stream" else whole
            assert row.calls == len(sent)
            itemsize = {"f32": 4, "f16": 2}[dtype]
            assert row.payload_bytes == payload(sent, 2048, itemsize, 8)
        else:
            assert len(whole) <= (row.calls or 0) <= len(windows)
            assert row.prefill_choices[0].startswith(f"shared {dtype} ")
        assert (row.prefill_s or 0) > 0
        assert (row.decode_tokens_per_s or 0) > 0
    decode_calls = (rows["batched", "f16"].calls or 0) - (rows["batched", "f16"].prefill_calls or 0)
    assert decode_calls == sum(trace.has_cold(replay_trace.place(trace, HOT, "w"))[:, 42:].flat)

    assert [row.contender for row in found.contenders] == list(replay.THREE_PIPES)
    for rival in found.contenders:
        assert rival.error is None, rival
        assert rival.calls == len(whole)
        assert rival.payload_bytes == sum(whole) * (2048 * 2 + 64)
        assert rival.reply_bytes == sum(whole) * 2048 * 2
        assert rival.alone_ratio is not None
        assert rival.exchange_ratio is not None
    original, ours = found.reductions
    assert ours.calls_percent == pytest.approx(100 * (len(whole) / len(windows) - 1))
    assert ours.calls_percent < -30
    assert ours.payload_percent < -48
    assert (original.source, ours.source) == ("original", "replay")
    assert found.published == replay.PUBLISHED


def test_replay_computes_real_experts_by_a_recorded_trace_at_other_speeds(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    words = ["--transports=stream", "--modes=batched,auto", "--dtypes=f32", "--repeats=1"]
    recorded: schema.ReplayReport = run_json(
        *("replay", "--record", str(path), "--prompt=40", "--completion=2", "--scale=2"),
        *("--remote-speed=1/4,3", *words),
        type_=schema.ReplayReport,
    )
    assert [row.remote_speed for row in recorded.results] == [0.25, 0.25, 3.0, 3.0]
    assert {row.error for row in recorded.results} == {None}
    assert recorded.contenders == []
    trace = recorded.trace
    assert (trace.source, trace.shape, trace.hidden_size) == ("recorded", "tiny", 64)
    again: schema.ReplayReport = run_json(
        *("replay", "--trace", str(path), "--shape=tiny", "--scale=2"),
        *("--remote-speed=3", *words),
        type_=schema.ReplayReport,
    )
    assert again.trace == trace
    assert [(row.rows, row.fallback_calls) for row in again.results] == [
        (row.rows, 0) for row in recorded.results[2:]
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--remote-speed=1,2"], "give one number"),
        (["--tokens=1,4097"], "4097; at most 4096"),
        (["--hot=1"], "hot=1 leaves none of 256 experts to the worker; pass less"),
        (["--tokens=0"], "'0' is no number above 0; write some like 1,16,128,512"),
    ],
)
def test_policy_refuses_what_it_cannot_run(
    words: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "measure", lambda *_: pytest.fail("measured"))
    done = CliRunner().invoke(bench, ["policy", *words])
    assert done.exit_code != 0
    assert complaint in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--record=a.npz", "--trace=FILE"], "give one of them"),
        (["--record=a.npz", "--shape=qwen3-30b-a3b"], "--shape tiny"),
        (["--trace=FILE"], "experts, top-4; qwen3.5-35b-a3b has 256, top-8"),
        (["--trace=FILE", "--shape=tiny", "--prompt=5"], "prompt=5, but the trace has 4"),
        (["--layers=41"], "layers=41; qwen3.5-35b-a3b has 1..40"),
        (["--modes=fast"], "'fast'; choose among stream, batched, auto"),
        (["--remote-speed=1/0"], "'1/0' is no number above 0"),
        (["--hot=1"], "hot=1 leaves none of 256 experts to the worker; pass less"),
        (["--hot=0.999"], "hot=0.999 leaves none of 256 experts to the worker"),
        (
            ["--hot=0.9", "--prompt=1", "--completion=0"],
            "hot=0.9 covers every expert that the trace uses",
        ),
        (["--warm-up=-1"], "-1 is not in the range x>=0"),
        (["--worker-device=cuda:1", "--null-compute"], "--null-compute uses no GPU"),
        (["--engine-device=cuda", "--remote-speed=1,4"], "GPUs have speeds of their own"),
        (["--worker-device=gpu"], "'gpu' is not cpu, cuda:N or hip:N"),
    ],
)
def test_replay_refuses_what_does_not_fit(
    tmp_path: Path, words: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "measure", lambda *_: pytest.fail("measured"))
    path = tmp_path / "trace.npz"
    replay_trace.synthetic(SHAPES["tiny"], 4, 1, seed=0).save(path)
    words = [word.replace("FILE", str(path)) for word in words]
    if "qwen3.5" in complaint and "experts" in complaint:
        words += ["--layers=1"]
    done = CliRunner().invoke(bench, ["replay", *words])
    assert done.exit_code != 0
    assert complaint in " ".join(done.output.split())


def test_policy_explains_every_candidate_and_chooses_one(tmp_path: Path) -> None:
    plot = tmp_path / "policy.png"
    words = ["policy", "--tokens=1,100", "--forwards=12", "--null-compute", "--layers=2"]
    if importlib.util.find_spec("matplotlib") is not None:
        words += ["--plot", str(plot)]
    found: schema.PolicyReport = run_json(*words, "--explain", type_=schema.PolicyReport)
    assert "--plot" not in words or plot.read_bytes().startswith(b"\x89PNG")
    assert found.meta.messages_per_cell == 12
    for n_tokens, slices in ((1, {1024}), (100, {4, 16, 64, 1024})):
        rows = [row for row in found.results if row.n_tokens == n_tokens]
        assert len(rows) == 2 * len(slices)
        assert {row.transport for row in rows} == {"shared", "stream"}
        assert {row.slice_tokens for row in rows} == slices
        assert [row.is_chosen for row in rows].count(True) == 1
        (chosen,) = (row for row in rows if row.is_chosen)
        assert chosen.n_measured > 0
        assert chosen.measured_us is not None
        assert chosen.why
    assert [each.n_tokens for each in found.overlaps] == [1, 100]
    for each in found.overlaps:
        longer = max(each.local_us, each.remote_us)
        assert each.overlap_ratio == pytest.approx(each.forward_us / longer)
    every, chosen_only = (
        shown(lambda console, e=e: replay_report.print_policy(found, console, e))  # type: ignore[misc]
        for e in (True, False)
    )
    assert every.count("stream") > chosen_only.count("stream")
