"""`moeshm bench policy`: what the policy predicts, what is measured, and what it chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..settings import MAX_BATCH_CAPACITY
from .bench_options import dtype_option, json_option, plot_option, seed_option, tokens_option
from .bench_played import DEFAULT_PROMPT, played_by, replay_options
from .bench_run import show, watched


@click.command()
@click.option("--explain", is_flag=True, help="Show every candidate, not only the chosen ones.")
@replay_options
@tokens_option("1,16,128,512", "1,16,128,512", "Of a forward.")
@dtype_option("f32", "f16")
@click.option(
    "--forwards",
    type=click.IntRange(1),
    default=40,
    show_default=True,
    help="Of each number of tokens.",
)
@seed_option
@json_option
@plot_option
def policy(
    explain: bool,
    n_tokens: list[int],
    dtype: str,
    forwards: int,
    remote_speeds: list[float],
    seed: int,
    as_json: bool,
    plot_path: Path | None,
    **played: Any,
) -> None:
    """What the policy predicts, what is measured, and what it chooses, by number of tokens."""
    from ..bench import harness, replay_report
    from ..bench import policy as question
    from ..bench.replay import Way

    if len(remote_speeds) != 1:
        raise click.BadParameter("give one number", param_hint="--remote-speed")
    if max(n_tokens) > MAX_BATCH_CAPACITY:
        raise click.BadParameter(
            f"{max(n_tokens)}; at most {MAX_BATCH_CAPACITY}", param_hint="--tokens"
        )
    played["n_layers"] = played["n_layers"] or question.LAYERS
    plan = harness.Plan(*harness.choose_cpus(), 1, 0.0, forwards, seed)
    with watched(1, plot_path) as on_step:
        asked = played_by(
            **played,
            # Of a short trace, the hot experts would be all that it uses.
            n_prompt=max(DEFAULT_PROMPT, 2 * max(n_tokens)),
            n_completion=0,
            chunk=max(n_tokens),
            seed=seed,
            ways=[Way("auto", "auto", dtype, remote_speeds[0])],
        )
        report = question.measure(asked, plan, n_tokens)
        on_step("policy")
    show(
        report,
        lambda report, console: replay_report.print_policy(report, console, explain),
        replay_report.plot_policy,
        as_json,
        plot_path,
    )
