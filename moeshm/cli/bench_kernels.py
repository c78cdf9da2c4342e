"""`moeshm bench kernels`: experts on a GPU, against its limits and against others."""

from __future__ import annotations

import click

from ..settings import parse_kernels
from .bench_options import json_option, repeats_option, seed_option, tokens_option, words_option
from .bench_run import show, watched

SHAPES = ("qwen3-30b-a3b", "qwen3.5-35b-a3b", "mixtral-8x7b")
MORE_SHAPES = ("deepseek-v3", "gpt-oss-120b")
CONTENDERS = ("moeshm", "torch-grouped", "triton")


@click.command()
@words_option(
    "--shapes",
    [*SHAPES, *MORE_SHAPES],
    SHAPES,
    f"Models whose layers are computed; also {', '.join(MORE_SHAPES)}.",
)
@tokens_option(
    "1,16",
    None,
    "Of a call; by default 1,4,16,128,1024,4096, of mixtral-8x7b 1,16,1024,4096.",
)
@words_option("--dtypes", ["bf16", "f16", "f32"], ["bf16"], "Of weights and activations.")
@words_option("--contenders", CONTENDERS)
@click.option(
    "--kernels",
    default="auto",
    show_default=True,
    metavar="WISH",
    help="Of moeshm, for experiments, as MOESHM_KERNELS: decode=fma,prefill=mma.",
)
@repeats_option(10, "Turns of each contender, interleaved.")
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
