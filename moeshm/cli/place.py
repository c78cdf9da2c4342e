"""`moeshm place`: from routing statistics to a placement, or with --watch to changes of one."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import click

from . import FILE_COLUMNS

if TYPE_CHECKING:
    from rich.console import Console

    from ..placement import Placement
    from ..routing_stats import RoutingStats

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
_ONLY_WITHOUT_WATCH = ("model", "budget", "workers", "replicas", "floor")
_ONLY_WITH_WATCH = ("placement", "gain", "max_swaps", "interval_s", "steps")


def parse_bytes(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    """`8GiB` as a number of bytes; click.BadParameter for what is no size."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found.group(2).upper() if found else "?"
    if found is None or unit not in _UNITS:
        raise click.BadParameter(f"{text!r} is no size; write bytes, or like 512MiB or 8GiB")
    return int(float(found.group(1)) * _UNITS[unit])


@click.command()
@click.option("--stats", "stats_path", required=True, metavar="FILE", help="Counts: .csv or .npz.")
@click.option("--model", metavar="DIR", help="The model, for its experts' sizes.")
@click.option(
    "--budget", callback=parse_bytes, metavar="8GiB", help="Memory of the engine for hot experts."
)
@click.option(
    "--workers", default="w0", show_default=True, metavar="A,B", help="Names, for the cold experts."
)
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--floor",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Hot experts that every layer gets first.",
)
@click.option(
    "--output",
    metavar="FILE",
    help="Write the placement here; by default it is printed, or with --watch only its swaps.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the shares as JSON, a line each time.")
@click.option(
    "--watch", "is_watch", is_flag=True, help="Propose swaps whenever the engine saves --stats."
)
@click.option("--placement", metavar="FILE", help="--watch: the placement that the engine has.")
@click.option(
    "--gain",
    type=click.FloatRange(1),
    default=1.25,
    show_default=True,
    help="--watch: how many times as often a cold expert must be used as the hot one.",
)
@click.option(
    "--max-swaps",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="--watch: most swaps of a step.",
)
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0.01, 86400),
    default=5,
    show_default=True,
    help="--watch: seconds between two looks at --stats.",
)
@click.option("--steps", type=click.IntRange(1), help="--watch: end after so many.")
@click.pass_context
def place(
    context: click.Context,
    stats_path: str,
    model: str | None,
    budget: int | None,
    workers: str,
    replicas: int,
    floor: int,
    output: str | None,
    as_json: bool,
    is_watch: bool,
    placement: str | None,
    gain: float,
    max_swaps: int,
    interval_s: float,
    steps: int | None,
) -> None:
    """Choose hot experts by value per byte, and deal the cold ones out to workers.

    Prints, by layer, the expected share of (token, expert) pairs that stay in the engine. With
    --watch it looks, until SIGINT or SIGTERM, at what the engine counts, and proposes swaps.
    """
    _check_form(context, is_watch)
    if is_watch:
        from .place_watch import Watch, shower, watch

        assert placement is not None
        task = Watch(stats_path, placement, gain, max_swaps, output)
        watch(task, interval_s, steps, shower(as_json))
        return
    assert model is not None
    assert budget is not None
    names = [name.strip() for name in workers.split(",")]
    _place(stats_path, model, budget, names, replicas, floor, output, as_json)


def _check_form(context: click.Context, is_watch: bool) -> None:
    """click.UsageError: an option of the other form was given, or one of this form was not."""
    required, foreign, form = ["model", "budget"], _ONLY_WITH_WATCH, "with"
    if is_watch:
        required, foreign, form = ["placement"], _ONLY_WITHOUT_WATCH, "without"
    for option in context.command.params:
        name = option.name or ""
        is_given = context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
        if name in foreign and is_given:
            raise click.UsageError(f"{option.opts[0]} is there only {form} --watch; leave it out")
        if name in required and not is_given:
            raise click.MissingParameter(ctx=context, param=option)


def _place(
    stats_path: str,
    model: str,
    budget: int,
    workers: list[str],
    replicas: int,
    floor: int,
    output: str | None,
    as_json: bool,
) -> None:
    import msgspec
    from rich.console import Console

    from .. import checkpoint
    from ..placement import Placement
    from ..routing_stats import RoutingStats

    stats = RoutingStats.load(stats_path)
    layers = checkpoint.load(model, stats.layers).layers
    sizes = {number: layer.expert(0).nbytes for number, layer in layers.items()}
    for number, layer in layers.items():
        if len(layer) != len(stats.counts(number)):
            raise click.ClickException(
                f"layer {number} has {len(layer)} experts in {model} and "
                f"{len(stats.counts(number))} in {stats_path}; these are of different models"
            )
    placement = Placement.from_budget(workers, stats, sizes, budget, floor, replicas)
    if output is not None:
        placement.save(output)
    if as_json:
        click.echo(msgspec.json.encode(summary(placement, stats, sizes)).decode())
    elif output is None:
        click.echo(placement.to_json(), nl=False)
    else:
        width = None if sys.stdout.isatty() else FILE_COLUMNS
        print_shares(summary(placement, stats, sizes), Console(width=width))


def summary(placement: Placement, stats: RoutingStats, sizes: dict[int, int]) -> dict[str, object]:
    """`layers`: number, hot experts and bytes, expected hot share (null if nothing was counted);
    `hot_bytes` and `hot_share` of the whole; `fingerprints` by worker."""
    shares = placement.hot_share(stats)
    rows = [
        {
            "layer": number,
            "num_experts": layer.num_experts,
            "hot_experts": len(layer.hot),
            "hot_bytes": len(layer.hot) * sizes[number],
            "hot_share": shares[number],
        }
        for number, layer in placement.layers.items()
    ]
    return {
        "layers": rows,
        "hot_bytes": sum(len(each.hot) * sizes[n] for n, each in placement.layers.items()),
        "hot_share": placement.total_hot_share(stats),
        "fingerprints": {name: placement.fingerprint(name) for name in placement.workers},
    }


def print_shares(shares: dict[str, object], console: Console) -> None:
    """The summary as a table."""
    from rich.table import Table

    table = Table(title="expected share of slots that stay in the engine", title_justify="left")
    for heading in ("layer", "hot experts", "of", "MiB", "hot share"):
        table.add_column(heading, justify="right")
    rows = shares["layers"]
    assert isinstance(rows, list)
    for row in rows:
        share = row["hot_share"]
        table.add_row(
            str(row["layer"]),
            str(row["hot_experts"]),
            str(row["num_experts"]),
            f"{row['hot_bytes'] / 2**20:,.1f}",
            "–" if share is None else f"{share:.1%}",
        )
    console.print(table)
    whole = shares["hot_share"]
    hot_bytes = shares["hot_bytes"]
    assert isinstance(hot_bytes, int)
    text = "nothing was counted" if whole is None else f"{whole:.1%} of all slots"
    console.print(f"hot: {text}, {hot_bytes / 2**20:,.1f} MiB")
