"""The bundled model's experts, placed here and on two workers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moeshm.backends.reference import reference_ffn
from moeshm.checkpoint import load
from moeshm.demo import tiny_moe_path
from moeshm.offload import ExpertOffload
from moeshm.placement import LayerPlacement, Placement
from tests.crash.processes import NotifySocket, Process, running

MODEL = str(tiny_moe_path())
LAYERS, EXPERTS = 4, 16
CHECKPOINT = load(tiny_moe_path())
#: Hot 0-3; 4-11 on both workers; 12-15 on the second alone.
PLACEMENT = Placement(
    ["a", "b"],
    {
        layer: LayerPlacement(
            EXPERTS,
            tuple(range(4)),
            {"a": tuple(range(4, 12)), "b": tuple(range(4, 16))},
        )
        for layer in range(LAYERS)
    },
)


@contextlib.contextmanager
def placed_worker(
    folder: Path, name: str, placement: Placement = PLACEMENT
) -> Iterator[tuple[Process, str]]:
    """A worker of that name in the placement, ready, and its address."""
    folder = folder / name
    folder.mkdir()
    placement.save(folder / "placement.json")
    address = f"unix:{folder / 'w.sock'}"
    options = ["--model", MODEL, "--listen", address, "--threads", "1", "--quiet"]
    placed = ["--placement", str(folder / "placement.json"), "--name", name]
    notify = NotifySocket(folder / "notify")
    try:
        with running(
            ["-m", "moeshm", "worker", *options, *placed], environment=notify.environment
        ) as process:
            assert notify.receive(process) == "READY=1"
            yield process, address
    finally:
        notify.close()


def draw_call(seed: int, n_tokens: int = 9) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    ids = rng.random((n_tokens, EXPERTS)).argsort(axis=1)[:, :4].astype(np.int32)
    x = rng.standard_normal((n_tokens, 128), np.float32)
    return x, ids, rng.random(ids.shape, np.float32)


def assert_exact(offload: ExpertOffload, layer: int, call: tuple[Any, Any, Any]) -> None:
    """The offload's sum is the reference's."""
    found = offload.forward(layer, *call, timeout_s=30)
    np.testing.assert_allclose(
        found, reference_ffn(CHECKPOINT.layers[layer], *call), rtol=1e-4, atol=1e-5
    )
