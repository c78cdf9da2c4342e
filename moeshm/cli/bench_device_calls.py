"""`moeshm bench device-calls`: what a call costs beyond its kernels, engine and worker on GPUs."""

from __future__ import annotations

import click

from .bench_kernels import MORE_SHAPES, SHAPES
from .bench_played import numbers_of
from .bench_run import json_option, seed_option, show, watched


@click.command("device-calls")
@click.option(
    "--shape",
    type=click.Choice([*SHAPES, *MORE_SHAPES]),
    default=SHAPES[0],
    show_default=True,
    help="The model whose layer is computed.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "f16", "f32"]),
    default="bf16",
    show_default=True,
    help="Of weights and activations.",
)
@click.option(
    "--tokens",
    "n_tokens",
    callback=numbers_of(int, "1,16"),
    metavar="LIST",
    default="1,4,16,128,512",
    show_default=True,
    help="Of a call.",
)
@click.option(
    "--engine-device",
    default="cuda:0",
    show_default=True,
    metavar="cuda:N|hip:N|auto",
    help="The GPU that has the activations; auto is the first.",
)
@click.option(
    "--worker-device",
    default="auto",
    show_default=True,
    metavar="cuda:N|hip:N|auto",
    help="The GPU that has the experts; auto is another one than the engine's, if there is one.",
)
@click.option(
    "--resident",
    "is_resident",
    is_flag=True,
    help="As of moeshm worker: a kernel that stays computes calls of few tokens.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Runs, each in fresh processes, in which the ways take turns.",
)
@seed_option
@json_option
def device_calls(
    shape: str,
    dtype: str,
    n_tokens: list[int],
    engine_device: str,
    worker_device: str,
    is_resident: bool,
    repeats: int,
    seed: int,
    as_json: bool,
) -> None:
    """Time client.compute and client.submit of a worker on a GPU, by each way there is.

    Arrays of the host through rings, and arrays of the engine's GPU through pinned memory of the
    host and through memory of the worker's GPU. Beside them: what the kernels take by themselves,
    and bare copies between the two GPUs.
    """
    from ..bench import device_calls as question
    from ..bench import device_calls_report, harness

    plan = harness.Plan(*harness.choose_cpus(), repeats, question.CELL_SECONDS, None, seed)
    asked = question.Asked(
        shape=shape,
        dtype=dtype,
        n_tokens=n_tokens,
        engine_device=engine_device,
        worker_device=worker_device,
        is_resident=is_resident,
    )
    with watched(question.count_steps(plan), None) as on_step:
        report = question.measure(asked, plan, on_step)
    show(report, device_calls_report.print_device_calls, None, as_json, None)
