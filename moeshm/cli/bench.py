"""`moeshm bench`: `ring` and `call` are here, the others each in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .bench_copies import copies
from .bench_device_calls import device_calls
from .bench_kernels import kernels
from .bench_options import (
    dtype_option,
    json_option,
    plot_option,
    repeats_option,
    seed_option,
    sizes_option,
)
from .bench_overload import overload
from .bench_policy import policy
from .bench_replay import replay
from .bench_run import show, watched

if TYPE_CHECKING:
    from ..bench.harness import Plan
    from ..bench.report import Report

_Command = TypeVar("_Command", bound=Callable[..., Any])


@click.group()
def bench() -> None:
    """Measure this machine: how fast bytes and calls pass, and how fast its GPU computes."""


def _shared_options(command: _Command) -> _Command:
    """The options that both benchmarks have; the last one here is the first in --help."""
    for option in (
        plot_option,
        json_option,
        seed_option,
        click.option(
            "--messages",
            type=click.IntRange(1, 20_000),
            help="Messages per contender, size and repeat; by default as many as fit its time.",
        ),
        repeats_option(5, "Runs of each contender, interleaved, each in fresh processes."),
    ):
        command = option(command)
    return command


@bench.command()
@_shared_options
@sizes_option("64,1K,8K,64K,1M,16M", "Payloads, in bytes.")
def ring(sizes: list[int], **options: Any) -> None:
    """Round trips and one-way streams: this ring, other libraries, and the machine's floors."""
    from ..bench import ring as question

    def measure(plan: Plan, on_step: Callable[[str], None]) -> Report:
        return question.measure(sizes, plan, on_step)

    _run(measure, question.count_steps, question.CELL_SECONDS, **options)


@bench.command()
@_shared_options
@dtype_option("f32", "f16", text="Format of the activations, both ways.")
def call(dtype: str, **options: Any) -> None:
    """client.compute against a worker that computes nothing, and the three-pipe protocol."""
    from ..bench import call as question
    from ..dtypes import DType

    def measure(plan: Plan, on_step: Callable[[str], None]) -> Report:
        return question.measure(DType.parse(dtype), plan, on_step)

    _run(measure, question.count_steps, question.CELL_SECONDS, **options)


def _run(
    measure: Callable[[Plan, Callable[[str], None]], Report],
    count_steps: Callable[[Plan], int],
    seconds: float,
    *,
    repeats: int,
    messages: int | None,
    seed: int,
    as_json: bool,
    plot_path: Path | None,
) -> None:
    from ..bench import harness
    from ..bench import report as presenter

    plan = harness.Plan(*harness.choose_cpus(), repeats, seconds, messages, seed)
    with watched(count_steps(plan), plot_path) as on_step:
        report = measure(plan, on_step)
    show(report, presenter.print_report, presenter.plot, as_json, plot_path)


bench.add_command(replay)
bench.add_command(policy)
bench.add_command(kernels)
bench.add_command(copies)
bench.add_command(device_calls)
bench.add_command(overload)
