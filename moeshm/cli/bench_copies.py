"""`moeshm bench copies`: a GPU's copies from and to rings, against those of pinned memory."""

from __future__ import annotations

import click

from .bench_options import gpu_option, json_option, repeats_option, seed_option, sizes_option
from .bench_run import show, watched


@click.command()
@gpu_option("--device", "The GPU; auto is the first.")
@sizes_option("1M,4M,16M,64M", "Of a copy, in bytes.")
@repeats_option(5, "Turns of each contender, interleaved.")
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
