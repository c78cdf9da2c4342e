"""`moeshm bench ring` and `moeshm bench call`: measure transports and calls on this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import UnsupportedPlatform

if TYPE_CHECKING:
    from ..bench.harness import Plan
    from ..bench.report import Report

_Command = TypeVar("_Command", bound=Callable[..., Any])
#: Where output is no terminal, tables get all the room they need.
_FILE_COLUMNS = 110
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


@click.group()
def bench() -> None:
    """Measure this machine: how fast bytes and calls pass between two processes."""


def _shared_options(command: _Command) -> _Command:
    """The options that both benchmarks have; the last one here is the first in --help."""
    for option in (
        click.option(
            "--plot",
            "plot_path",
            type=click.Path(dir_okay=False, writable=True, path_type=Path),
            metavar="FILE.png",
            help="Draw the curves; needs matplotlib.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead."),
        click.option(
            "--seed",
            type=int,
            default=0,
            show_default=True,
            help="Of the payload, and of the order of the contenders in each repeat.",
        ),
        click.option(
            "--messages",
            type=click.IntRange(1, 20_000),
            help="Messages per contender, size and repeat; by default as many as fit its time.",
        ),
        click.option(
            "--repeats",
            type=click.IntRange(1),
            default=5,
            show_default=True,
            help="Runs of each contender, interleaved, each in fresh processes.",
        ),
    ):
        command = option(command)
    return command


def parse_sizes(text: str) -> list[int]:
    """`64,8K,1M` as bytes; click.BadParameter names the word that is no size."""
    sizes = []
    for word in text.split(","):
        unit = word.strip()[-1:].upper()
        unit = "" if unit.isdigit() else unit
        number = word.strip()[: len(word.strip()) - len(unit)]
        if unit not in _UNITS or not number.isdecimal() or int(number) == 0:
            raise click.BadParameter(f"{word!r} is no size; write bytes like 64, 8K or 16M")
        sizes.append(int(number) * _UNITS[unit])
    return list(dict.fromkeys(sizes))


@bench.command()
@_shared_options
@click.option(
    "--sizes",
    default="64,1K,8K,64K,1M,16M",
    show_default=True,
    callback=lambda _context, _option, text: parse_sizes(text),
    help="Payloads, in bytes.",
)
def ring(sizes: list[int], **options: Any) -> None:
    """Round trips and one-way streams: this ring, other libraries, and the machine's floors."""
    from ..bench import ring as question

    def measure(plan: Plan, on_step: Callable[[str], None]) -> Report:
        return question.measure(sizes, plan, on_step)

    _run(measure, question.count_steps, question.CELL_SECONDS, **options)


@bench.command()
@_shared_options
@click.option(
    "--dtype",
    type=click.Choice(["f32", "f16"]),
    default="f32",
    show_default=True,
    help="Format of the activations, both ways.",
)
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
    import msgspec
    from rich.console import Console
    from rich.progress import Progress

    from ..bench import harness
    from ..bench import report as presenter

    if plot_path is not None:
        try:
            presenter.check_plotting()  # before minutes are spent on measuring
        except UnsupportedPlatform as error:
            raise click.ClickException(str(error)) from None
    plan = harness.Plan(*harness.choose_cpus(), repeats, seconds, messages, seed)
    # Standard output belongs to the report alone.
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=count_steps(plan))
        report = measure(
            plan, lambda name: progress.update(task, advance=1, description=f"measured {name}")
        )
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        width = None if sys.stdout.isatty() else _FILE_COLUMNS
        presenter.print_report(report, Console(width=width))
    if plot_path is not None:
        presenter.plot(report, plot_path)
