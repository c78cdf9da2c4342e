"""What `moeshm bench replay` and `policy` play: their common options, and what these mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import SettingError
from .bench_options import numbers_of, scale_option

if TYPE_CHECKING:
    from ..bench.replay import Replay, Way

_Command = TypeVar("_Command", bound=Callable[..., Any])
#: The shape of the model that comes with moeshm.
BUNDLED = "tiny"
_SHAPES = ("qwen3.5-35b-a3b", "qwen3-30b-a3b", BUNDLED)
#: Of the original's workload.
DEFAULT_PROMPT, DEFAULT_COMPLETION = 4248, 128


def _speed(word: str) -> float:
    above, _, below = word.partition("/")
    return float(above) / float(below or 1)


def replay_options(command: _Command) -> _Command:
    """What both commands play; the last one here is the first in --help."""
    for option in (
        click.option(
            "--remote-speed",
            "remote_speeds",
            callback=numbers_of(_speed, "1/16,1/4,1,4"),
            metavar="LIST",
            default="1",
            show_default=True,
            help="How many times as fast as the local part the worker is: 1/16,1/4,1,4.",
        ),
        click.option(
            "--null-compute", is_flag=True, help="Nothing is computed: experts touch the bytes."
        ),
        scale_option("Divides hidden and intermediate size, for real compute on a small machine."),
        click.option(
            "--hot",
            type=click.FloatRange(0, 1),
            help="Share of each layer's experts that stay in the engine; by default 0.58.",
        ),
        click.option(
            "--shape",
            "shape_name",
            type=click.Choice(_SHAPES),
            help=f"Sizes of the layers; by default {_SHAPES[0]}.",
        ),
        click.option("--layers", "n_layers", type=click.IntRange(1), help="The first ones only."),
    ):
        command = option(command)
    return command


def played_by(
    *,
    trace_path: Path | None = None,
    record_path: Path | None = None,
    n_prompt: int | None,
    n_completion: int | None,
    chunk: int,
    shape_name: str | None,
    n_layers: int | None,
    scale: int,
    hot: float | None,
    null_compute: bool,
    seed: int,
    ways: list[Way],
    warm_up: int = 0,
    engine_device: str = "cpu",
    worker_device: str = "cpu",
) -> Replay:
    """What the options ask for. SettingError, UsageError: they do not fit each other."""
    from ..bench import replay_trace
    from ..bench.replay import Replay
    from ..bench.replay_model import SHAPES

    if record_path is not None:
        if trace_path is not None:
            raise click.UsageError("--record makes a trace and --trace reads one; give one of them")
        if shape_name not in (None, BUNDLED):
            raise click.UsageError(f"--record plays the bundled model: --shape {BUNDLED}")
        shape_name = BUNDLED
    shape = SHAPES[shape_name or _SHAPES[0]].with_layers(n_layers)
    hot = replay_trace.DEFAULT_HOT if hot is None else hot
    if round(hot * shape.num_experts) == shape.num_experts:
        raise SettingError(
            f"hot={hot:g} leaves none of {shape.num_experts} experts to the worker; pass less"
        )
    if trace_path is not None:
        trace = replay_trace.Trace.load(trace_path)
        trace = trace.fitted(shape, n_prompt, n_completion)
    else:
        n_prompt = DEFAULT_PROMPT if n_prompt is None else n_prompt
        n_completion = DEFAULT_COMPLETION if n_completion is None else n_completion
        if record_path is None:
            trace = replay_trace.synthetic(shape, n_prompt, n_completion, seed)
        else:
            trace = replay_trace.record(n_prompt, n_completion)
            trace.save(record_path)
            trace = trace.fitted(shape)
    replay = Replay(
        shape=shape.scaled(scale),
        scale=scale,
        trace=trace,
        hot=hot,
        chunk=chunk,
        is_null=null_compute,
        warm_up=warm_up,
        ways=ways,
        engine_device=engine_device,
        worker_device=worker_device,
    )
    replay.check()
    return replay
