"""`moeshm bench copies`: a GPU's copies from and to rings, against those of pinned memory."""

from __future__ import annotations

import click

from .bench_run import json_option, parse_sizes, seed_option, show, watched


@click.command()
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="cuda:N|hip:N|auto",
    help="The GPU; auto is the first.",
)
@click.option(
    "--sizes",
    default="1M,4M,16M,64M",
    show_default=True,
    callback=lambda _context, _option, text: parse_sizes(text),
    help="Of a copy, in bytes.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Turns of each contender, interleaved.",
)
@seed_option
@json_option
def copies(device: str, sizes: list[int], repeats: int, seed: int, as_json: bool) -> None:
    """Time copies between a GPU and rings in shared memory, both ways.

    Rings are registered with the driver, as a worker on a GPU registers those of its sessions.
    Beside them: pinned memory that the driver itself allocated, and a ring that is not registered.
    """
    from ..bench import copies as question
    from ..bench import copies_report, harness

    plan = harness.Plan(*harness.choose_cpus(), repeats, 0.0, None, seed)
    with watched(question.count_steps(plan), None) as on_step:
        report = question.measure(question.open_gpu(device), sizes, plan, on_step)
    show(report, copies_report.print_copies, None, as_json, None)
