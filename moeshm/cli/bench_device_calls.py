"""`moeshm bench device-calls`: what a call costs beyond its kernels, engine and worker on GPUs."""

from __future__ import annotations

import click

from .bench_kernels import MORE_SHAPES, SHAPES
from .bench_options import (
    dtype_option,
    gpu_option,
    json_option,
    repeats_option,
    seed_option,
    shape_option,
    tokens_option,
)
from .bench_run import show, watched


@click.command("device-calls")
@shape_option([*SHAPES, *MORE_SHAPES], SHAPES[0])
@dtype_option("bf16", "f16", "f32", text="Of weights and activations.")
@tokens_option("1,16", "1,4,16,128,512", "Of a call.")
@gpu_option(
    "--engine-device", "The GPU that has the activations; auto is the first.", default="cuda:0"
)
@gpu_option(
    "--worker-device",
    "The GPU that has the experts; auto is another one than the engine's, if there is one.",
)
@click.option(
    "--resident",
    "is_resident",
    is_flag=True,
    help="As of moeshm worker: a kernel that stays computes calls of few tokens.",
)
@repeats_option(5, "Runs, each in fresh processes, in which the ways take turns.")
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
