"""`moeshm bench replay`: an engine's prompt and completion, mode by mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..settings import MAX_BATCH_CAPACITY
from .bench_options import (
    device_option,
    json_option,
    plot_option,
    repeats_option,
    seed_option,
    words_option,
)
from .bench_played import played_by, replay_options
from .bench_run import show, watched


@click.command()
@click.option(
    "--prompt",
    "n_prompt",
    type=click.IntRange(1),
    help="Tokens; by default 4248, or what the trace has.",
)
@click.option(
    "--completion",
    "n_completion",
    type=click.IntRange(0),
    help="Tokens after it, one a forward; by default 128, or what the trace has.",
)
@click.option(
    "--chunk",
    type=click.IntRange(1, MAX_BATCH_CAPACITY),
    default=512,
    show_default=True,
    help="Tokens of a prefill's forward.",
)
@click.option(
    "--trace",
    "trace_path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.npz",
    help="Play this recorded routing.",
)
@click.option(
    "--record",
    "record_path",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE.npz",
    help="Play the routing of the bundled model, and keep it for --trace.",
)
@replay_options
@words_option("--modes", ["stream", "batched", "auto"])
@words_option("--transports", ["shared", "stream"], text="auto chooses among these.")
@words_option(
    "--dtypes",
    ["f32", "f16", "bf16"],
    ["f32", "f16"],
    "Of the engine's activations, which travel as they are.",
)
@device_option(
    "--engine-device",
    "Who computes the experts that stay in the engine, whose activations are the host's.",
)
@device_option(
    "--worker-device",
    "Who computes the others. With a GPU on either side experts are bfloat16.",
)
@click.option(
    "--warm-up",
    type=click.IntRange(0),
    metavar="PASSES",
    default=1,
    show_default=True,
    help="Uncounted passes that go first; 0 counts from the first forward on.",
)
@repeats_option(3, "Runs of each configuration, interleaved, each in fresh processes.")
@seed_option
@json_option
@plot_option
def replay(
    modes: list[str],
    transports: list[str],
    dtypes: list[str],
    remote_speeds: list[float],
    null_compute: bool,
    repeats: int,
    seed: int,
    as_json: bool,
    plot_path: Path | None,
    **played: Any,
) -> None:
    """Replay a prompt and a completion through ExpertOffload, in modes stream, batched and auto.

    Without --trace and --record the routing is synthetic, skewed and bursty. The published table
    of the three-pipe protocol stands beside.
    """
    from ..bench import harness, replay_report
    from ..bench import replay as question

    ways = question.make_ways(modes, transports, dtypes, remote_speeds)
    plan = harness.Plan(*harness.choose_cpus(), repeats, 0.0, None, seed)
    with watched(question.count_steps(ways, null_compute, plan), plot_path) as on_step:
        asked = played_by(**played, null_compute=null_compute, seed=seed, ways=ways)
        report = question.measure(asked, plan, on_step)
    show(report, replay_report.print_replay, replay_report.plot_replay, as_json, plot_path)
