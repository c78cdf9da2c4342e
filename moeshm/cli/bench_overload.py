"""`moeshm bench overload`: decode and prefill clients of one worker at a time."""

from __future__ import annotations

import click

from .bench_options import (
    device_option,
    dtype_option,
    json_option,
    repeats_option,
    scale_option,
    seed_option,
    shape_option,
)
from .bench_run import show, watched


@click.command()
@shape_option(["qwen3.5-35b-a3b", "qwen3-30b-a3b", "tiny"], "qwen3-30b-a3b")
@scale_option("Divides hidden and intermediate size.")
@device_option("--device", "Who computes.")
@dtype_option("bf16", "f16", "f32", text="Of the experts.")
@click.option(
    "--decode", "decode_clients", type=click.IntRange(1, 32), default=4, show_default=True
)
@click.option(
    "--prefill", "prefill_clients", type=click.IntRange(1, 32), default=2, show_default=True
)
@click.option(
    "--tokens",
    "prefill_tokens",
    type=click.IntRange(2, 4096),
    default=512,
    show_default=True,
    help="Of a prefill's call.",
)
@click.option(
    "--decode-tokens",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Of a decode's call: the sequences of its batch.",
)
@click.option(
    "--deadline-ms",
    type=click.FloatRange(1.0),
    default=200.0,
    show_default=True,
    help="Of a decode's call.",
)
@click.option("--seconds", type=click.FloatRange(0.1), default=10.0, show_default=True)
@repeats_option(3, "Of each phase.")
@seed_option
@json_option
def overload(
    shape: str,
    scale: int,
    device: str,
    dtype: str,
    decode_clients: int,
    prefill_clients: int,
    prefill_tokens: int,
    decode_tokens: int,
    deadline_ms: float,
    seconds: float,
    repeats: int,
    seed: int,
    as_json: bool,
) -> None:
    """How long calls of few tokens wait while others' prefills keep the worker busy.

    Each kind of client alone, and both together, with long calls in steps and without; and how
    late after their deadlines calls end.
    """
    from ..bench import harness, overload_report
    from ..bench import overload as question
    from ..bench.replay_model import SHAPES
    from ..dtypes import DType

    plan = harness.Plan(*harness.choose_cpus(), repeats, seconds, None, seed)
    asked = question.Asked(
        shape=SHAPES[shape].scaled(scale),
        device=device,
        weight_dtype=DType.parse(dtype),
        decode_clients=decode_clients,
        prefill_clients=prefill_clients,
        prefill_tokens=prefill_tokens,
        decode_tokens=decode_tokens,
        deadline_s=deadline_ms / 1e3,
    )
    with watched(question.count_steps(plan), None) as on_step:
        report = question.measure(asked, plan, on_step)
    show(report, overload_report.print_overload, None, as_json, None)
