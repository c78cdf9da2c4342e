"""Asks every worker a little at first, so that the policy's first choices are no guesses."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable

import numpy as np

from ..arrays import Inputs
from ..errors import CallError, DeviceError
from ..layers import LayerInfo
from ..policy import Choice, Shape, Times, Work
from .activations import Activations, HostActivations
from .gpu_activations import EngineGpu
from .layer import shape_of
from .remote import Remote, times_of

_log = logging.getLogger(__name__)

#: For one worker: all shapes of its layers, transports and formats together.
BUDGET_NS = 100_000_000
#: Of a probe: the first one of its size finds memory that was never touched.
TURNS = 2


def calibrate(remotes: Iterable[Remote], gpu: EngineGpu | None) -> None:
    """Let every worker compute made-up rows of growing number over every way to it; rows on the
    engine's GPU, if it has one.

    Nothing is begun once the budget is spent, nor what is expected to exceed it. Rows have the
    dtype of the layer's weights, as an engine's usually have. A way that is lost meanwhile, or
    fails, is left to the first real calls.
    """
    for remote in remotes:
        layers = {shape_of(info): (number, info) for number, info in remote.layers.items()}
        end_ns = time.perf_counter_ns() + BUDGET_NS
        failed: set[str] = set()
        for n_left, (shape, (number, info)) in zip(
            range(len(layers), 0, -1), layers.items(), strict=True
        ):
            share_ns = (end_ns - time.perf_counter_ns()) // n_left
            if share_ns > 0:
                _calibrate(remote, shape, number, info, share_ns, gpu, failed)


def _calibrate(
    remote: Remote,
    shape: Shape,
    number: int,
    info: LayerInfo,
    budget_ns: int,
    gpu: EngineGpu | None,
    failed: set[str],
) -> None:
    """One shape, by all ways but those that failed."""
    end_ns = time.perf_counter_ns() + budget_ns
    held = len(info.experts)
    probes = remote.chooser.probes(
        shape, held, min(info.top_k, held), info.weight_dtype, budget_ns / TURNS, gpu is not None
    )
    for choice, work in probes:
        way = choice.transport
        if way in failed:
            continue
        try:
            turns = [_probe(remote, number, info, work, choice, gpu)]
            while len(turns) < TURNS and time.perf_counter_ns() < end_ns:
                turns.append(_probe(remote, number, info, work, choice, gpu))
        except (CallError, DeviceError) as error:
            failed.add(way)
            words = "worker %r could not be calibrated by way of %s: %s"
            _log.warning(words, remote.name, way, str(error))
        else:
            least = min(turns, key=lambda times: times.elapsed_ns)
            remote.chooser.seed(shape, work, choice, least)
        if time.perf_counter_ns() >= end_ns:
            return


def _probe(
    remote: Remote,
    number: int,
    info: LayerInfo,
    work: Work,
    choice: Choice,
    gpu: EngineGpu | None,
) -> Times:
    rows = work.n_tokens
    # Neighbours take other experts, as many as there are.
    ids = np.arange(rows * work.top_k, dtype=np.int32) % len(info.experts)
    inputs = Inputs(
        np.zeros((rows, info.hidden_size), work.dtype.numpy),
        ids.reshape(rows, work.top_k),
        np.full((rows, work.top_k), 1 / work.top_k, np.float32),
        work.dtype,
        0,
        False,
    )
    client = remote.clients[choice.transport]
    given: Activations = HostActivations(inputs) if gpu is None else gpu.probe(inputs)
    with contextlib.closing(given):
        pending = given.submit(client, number, inputs.topk_ids, choice, client.view, None)
        given.take(pending)
    assert pending.times is not None
    return times_of(pending.times, choice)
