"""Offloads with arrays on the engine's GPU, for tests: calls, and the ways that they take."""

from __future__ import annotations

from typing import Any

import numpy as np

from moeshm.offload import ExpertOffload
from moeshm.placement import LayerPlacement, Placement
from tests.crash.arithmetic import FREE, NUM_EXPERTS, ArithmeticBackend, make_inputs
from tests.engine_gpu import GpuArray, Stream

#: Sooner than a stream that is made up takes a wait for one without end.
SOON_S = 15.0
#: Every way there is, with the setting that leaves it alone.
WAYS = {"device": "device", "pinned": "shared", "shared": "shared", "stream": "stream"}


def placement(*workers: str) -> Placement:
    """Each of them has all experts of a gated worker's layers; none is hot."""
    everything = tuple(range(NUM_EXPERTS))
    layers = ArithmeticBackend().layers
    return Placement(
        list(workers),
        {n: LayerPlacement(NUM_EXPERTS, (), dict.fromkeys(workers, everything)) for n in layers},
    )


def only(offload: ExpertOffload, way: str) -> ExpertOffload:
    """Let its workers be reached this way alone."""
    for remote in offload._remotes.values():
        remote.chooser._paths = [p for p in remote.chooser._paths if p.transport == way]
        assert remote.chooser._paths, way
    return offload


def on_gpu(*arrays: Any) -> list[GpuArray]:
    return [GpuArray(each.copy()) for each in arrays]


def forward(
    offload: ExpertOffload, layer: int, call: tuple[Any, Any, Any], stream: Stream
) -> np.ndarray[Any, Any]:
    """Its result, once the stream has passed it."""
    result = offload.forward(layer, *on_gpu(*call), timeout_s=SOON_S, stream=stream)
    stream.synchronize()
    assert isinstance(result, GpuArray)
    # Its memory is for the next result once nobody knows it.
    host: np.ndarray[Any, Any] = result.host.copy()
    return host


def expected(layer: int, call: tuple[Any, Any, Any]) -> np.ndarray[Any, Any]:
    out: np.ndarray[Any, Any] = np.empty_like(call[0])
    ArithmeticBackend().ffn(layer, *call, out)
    return out


def draw(seed: int, n_tokens: int = 6) -> tuple[Any, Any, Any]:
    """Some tokens have no expert."""
    call = make_inputs(FREE, seed, n_tokens)[1:]
    call[1][1::3] = -1
    return call
