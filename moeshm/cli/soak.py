"""`moeshm soak`: does it survive my crashes on my machine?"""

from __future__ import annotations

import contextlib
import math
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from . import FILE_COLUMNS
from .devices import device_of

if TYPE_CHECKING:
    from rich.console import Console

    from ..soak.director import Soak
    from ..soak.report import Report

#: Between two lines about the moment, where nobody watches.
_TELL_S = 30.0


def _finite(_context: click.Context, _option: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a number of minutes; give one like 2.")
    return value


@click.command()
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    callback=_finite,
    default=2.0,
    show_default=True,
)
@click.option("--seed", type=click.IntRange(0), help="Repeats the faults and the calls' inputs.")
@click.option("--model", metavar="DIR", help="By default the small one that ships with moeshm.")
@click.option(
    "--device",
    callback=device_of("cpu", "auto"),
    default="cpu",
    show_default=True,
    metavar="cpu|cuda:N|hip:N|auto",
    help="Of the workers.",
)
@click.option(
    "--clients",
    "n_callers",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Processes that call; three are one of each kind.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
@click.pass_context
def soak(
    context: click.Context,
    minutes: float,
    seed: int | None,
    model: str | None,
    device: str,
    n_callers: int,
    as_json: bool,
) -> None:
    """Mix loads, kills, hangs, hostile peers and moving experts, and check every result.

    The exit status is 1 when a result is wrong, something hangs or leaks, or an error has no cause;
    missed deadlines are only counted. Ctrl-C ends it with what was found so far.
    """
    import msgspec
    from rich.console import Console

    from ..demo import tiny_moe_path
    from ..soak.director import Soak

    seed = secrets.randbits(31) if seed is None else seed
    console = Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)
    with _shown(console, as_json) as show:
        run = Soak(model or tiny_moe_path(), 60 * minutes, seed, device, n_callers, show)
        with _ended_by_signals(run):
            report = run.run()
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        print_report(report, console)
    context.exit(0 if report.is_clean else 1)


def print_report(report: Report, console: Console) -> None:
    """A line per figure, and then what went wrong."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ..soak.report import lines_of

    table = Table(box=box.SIMPLE, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in lines_of(report):
        table.add_row(name, Text(value))
    console.print(table)
    for failure in report.failures:
        console.print(failure, style="red", markup=False, highlight=False)


@contextlib.contextmanager
def _shown(console: Console, as_json: bool) -> Iterator[Callable[[Report, str], None]]:
    """A line with the figures of the moment; without a terminal to rewrite it on, one in a while on
    standard error."""
    from rich.console import Console
    from rich.live import Live

    from ..soak.report import live_line

    terminal = Console(stderr=True) if as_json else console
    if not terminal.is_terminal:
        yield _told_from_time_to_time()
        return
    with Live(console=terminal, transient=True, auto_refresh=False) as live:
        yield lambda report, doing: live.update(live_line(report, doing), refresh=True)


def _told_from_time_to_time() -> Callable[[Report, str], None]:
    from ..soak.report import live_line

    next_s = 0.0

    def tell(report: Report, doing: str) -> None:
        nonlocal next_s
        if report.elapsed_s >= next_s:
            next_s = report.elapsed_s + _TELL_S
            with contextlib.suppress(OSError):  # whoever read it may be gone
                click.echo(live_line(report, doing), err=True)

    return tell


@contextlib.contextmanager
def _ended_by_signals(run: Soak) -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP ends the run in good order, which may take minutes, the
    second at once; the end of the clean-up is waited for. What nohup has ignored stays so."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)

    def end(number: int, _frame: object) -> None:
        run.stop()
        for each in numbers:
            signal.signal(each, interrupt)
        with contextlib.suppress(OSError):  # the terminal may be gone
            name = signal.Signals(number).name
            click.echo(f"{name}: ending in good order; at once after another", err=True)

    def interrupt(_number: int, _frame: object) -> None:
        if not run.is_cleaning_up:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
