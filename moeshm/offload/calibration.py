"""Asks every worker a little at first, so that the policy's first choices are no guesses."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from ..errors import CallError
from ..layers import LayerInfo
from ..policy import Choice, Shape, Times, Work
from .layer import shape_of
from .remote import Remote, times_of

_log = logging.getLogger(__name__)

#: For one worker: all shapes of its layers, transports and formats together.
BUDGET_NS = 100e6
#: Of a probe: the first one of its size finds memory that was never touched.
TURNS = 2


def calibrate(remotes: Iterable[Remote]) -> None:
    """Let every worker compute made-up rows of growing number over every way to it.

    Rows have the dtype of the layer's weights, as an engine's usually have. A worker that is lost
    meanwhile, or fails, is left to the first real calls.
    """
    for remote in remotes:
        layers = {shape_of(info): (number, info) for number, info in remote.layers.items()}
        try:
            for shape, (number, info) in layers.items():
                _calibrate(remote, shape, number, info, BUDGET_NS / TURNS / len(layers))
        except CallError as error:
            _log.warning("worker %r could not be calibrated: %s", remote.name, error)


def _calibrate(
    remote: Remote, shape: Shape, number: int, info: LayerInfo, budget_ns: float
) -> None:
    top_k = min(info.top_k, len(info.experts))
    for choice, work in remote.chooser.probes(shape, top_k, info.weight_dtype, budget_ns):
        turns = [_probe(remote, number, info, work, choice) for _ in range(TURNS)]
        remote.chooser.seed(shape, work, choice, min(turns, key=lambda times: times.elapsed_ns))


def _probe(remote: Remote, number: int, info: LayerInfo, work: Work, choice: Choice) -> Times:
    rows = work.n_tokens
    # Neighbours take other experts, as many as there are.
    ids = np.arange(rows * work.top_k, dtype=np.int32) % len(info.experts)
    future = remote.clients[choice.transport].submit(
        number,
        np.zeros((rows, info.hidden_size), work.dtype.numpy),
        ids.reshape(rows, work.top_k),
        np.full((rows, work.top_k), 1 / work.top_k, np.float32),
        wire_dtype=choice.wire_dtype,
        slice_tokens=choice.slice_tokens,
    )
    future.add_to(np.zeros((rows, info.hidden_size), np.float32))
    return times_of(future)
