"""`moeshm bench kernels`: experts on a GPU, against its limits and against others."""

from __future__ import annotations

import click

from ..settings import parse_kernels
from .bench_played import numbers_of, words_of
from .bench_run import json_option, seed_option, show, watched

SHAPES = ("qwen3-30b-a3b", "qwen3.5-35b-a3b", "mixtral-8x7b")
MORE_SHAPES = ("deepseek-v3", "gpt-oss-120b")
CONTENDERS = ("moeshm", "torch-grouped", "triton")


@click.command()
@click.option(
    "--shapes",
    callback=words_of(*SHAPES, *MORE_SHAPES),
    metavar="LIST",
    default=",".join(SHAPES),
    show_default=True,
    help=f"Models whose layers are computed; also {', '.join(MORE_SHAPES)}.",
)
@click.option(
    "--tokens",
    "n_tokens",
    callback=lambda context, option, text: text and numbers_of(int, "1,16")(context, option, text),
    metavar="LIST",
    help="Of a call; by default 1,4,16,128,1024,4096, of mixtral-8x7b 1,16,1024,4096.",
)
@click.option(
    "--dtypes",
    callback=words_of("bf16", "f16", "f32"),
    metavar="LIST",
    default="bf16",
    show_default=True,
    help="Of weights and activations.",
)
@click.option(
    "--contenders",
    callback=words_of(*CONTENDERS),
    metavar="LIST",
    default=",".join(CONTENDERS),
    show_default=True,
)
@click.option(
    "--kernels",
    default="auto",
    show_default=True,
    metavar="WISH",
    help="Of moeshm, for experiments, as MOESHM_KERNELS: decode=fma,prefill=mma.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Turns of each contender, interleaved.",
)
@seed_option
@json_option
def kernels(
    shapes: list[str],
    n_tokens: list[int] | None,
    dtypes: list[str],
    contenders: list[str],
    kernels: str,
    repeats: int,
    seed: int,
    as_json: bool,
) -> None:
    """Time one call of a layer's experts on a GPU, with fresh uniform routing in each call.

    Beside it what the GPU's memory and arithmetic allow, PyTorch's grouped matrix products, and
    kernels in Triton. What is not installed is reported with the reason.
    """
    from ..bench import harness, kernels_report
    from ..bench import kernels as question

    plan = harness.Plan(*harness.choose_cpus(), repeats, 0.0, None, seed)
    asked = question.Asked(
        shapes=shapes,
        tokens=n_tokens,
        dtypes=dtypes,
        contenders=contenders,
        kernels=kernels,
    )
    with watched(len(shapes) * len(dtypes), None) as on_step:
        parse_kernels(kernels)  # before minutes are spent on measuring
        report = question.measure(asked, plan, on_step)
    show(report, kernels_report.print_kernels, None, as_json, None)
