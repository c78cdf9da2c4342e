"""A model's experts placed here and on two workers: exact sums, refusals by name, and a kill."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import moeshm
from moeshm.backends.cpu import CpuBackend
from moeshm.backends.reference import reference_ffn
from moeshm.checkpoint import load
from moeshm.cli import cli
from moeshm.demo import tiny_moe_path
from moeshm.errors import HandshakeRefused, WorkerDied
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
def placed_worker(folder: Path, name: str) -> Iterator[tuple[Process, str]]:
    """A worker of that name in the placement, ready, and its address."""
    folder = folder / name
    folder.mkdir()
    PLACEMENT.save(folder / "placement.json")
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


def draw_call(seed: int, n_tokens: int = 9) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.random((n_tokens, EXPERTS)).argsort(axis=1)[:, :4].astype(np.int32)
    x = rng.standard_normal((n_tokens, 128), np.float32)
    return x, ids, rng.random(ids.shape, np.float32)


def assert_exact(offload: ExpertOffload, layer: int, seed: int) -> None:
    call = draw_call(seed)
    found = offload.forward(layer, *call, timeout_s=30)
    np.testing.assert_allclose(
        found, reference_ffn(CHECKPOINT.layers[layer], *call), rtol=1e-4, atol=1e-5
    )


def test_sums_are_exact_before_and_after_a_worker_is_killed(tmp_path: Path) -> None:
    backend = CpuBackend(CHECKPOINT.layers, threads=1)
    with (
        placed_worker(tmp_path, "a") as (first, first_address),
        placed_worker(tmp_path, "b") as (_, second_address),
        moeshm.connect(first_address, placement=PLACEMENT.fingerprint("a")) as a,
        moeshm.connect(second_address, placement=PLACEMENT.fingerprint("b")) as b,
    ):
        offload = ExpertOffload({"a": a, "b": b}, PLACEMENT, local=backend)
        for layer in range(LAYERS):
            assert_exact(offload, layer, seed=layer)
        before = offload.stats()
        assert before.hot_slots > 0
        assert set(before.cold_slots) == {"a", "b"}
        first.kill()
        for layer in range(LAYERS):
            assert_exact(offload, layer, seed=10 + layer)
        after = offload.stats()
        assert after.losses == {"a": 1}
        assert after.cold_slots["a"] == before.cold_slots["a"]
        slots = 2 * LAYERS * 9 * 4
        assert after.hot_slots + sum(after.cold_slots.values()) == slots


def test_experts_of_a_lost_worker_without_a_replica_need_a_fallback(tmp_path: Path) -> None:
    backend = CpuBackend(CHECKPOINT.layers, threads=1)
    with (
        placed_worker(tmp_path, "a") as (_, first_address),
        placed_worker(tmp_path, "b") as (second, second_address),
        moeshm.connect(first_address) as a,
        moeshm.connect(second_address) as b,
    ):
        clients = {"a": a, "b": b}
        alone = ExpertOffload(clients, PLACEMENT, local=backend)
        covered = ExpertOffload(clients, PLACEMENT, local=backend, fallback=backend)
        second.kill()
        assert_exact(covered, 0, seed=1)
        assert sum(covered.stats().fallback_slots.values()) > 0
        with pytest.raises(WorkerDied):
            alone.forward(0, *draw_call(1), timeout_s=30)


def test_a_worker_that_holds_other_experts_refuses_by_name(tmp_path: Path) -> None:
    with placed_worker(tmp_path, "a") as (_, address):
        wrong = PLACEMENT.fingerprint("b")
        with pytest.raises(HandshakeRefused, match=f"gives this worker '{wrong}', and it holds"):
            moeshm.connect(address, placement=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", "a"], "--placement and --name go together"),
        (["--placement", "FILE"], "--placement and --name go together"),
        (["--placement", "FILE", "--name", "a", "--layers", "0"], "leave the others out"),
    ],
)
def test_options_that_contradict_each_other(
    tmp_path: Path, options: list[str], message: str
) -> None:
    PLACEMENT.save(tmp_path / "p.json")
    words = [str(tmp_path / "p.json") if word == "FILE" else word for word in options]
    base = ["worker", "--model", MODEL, "--listen", f"unix:{tmp_path / 'w.sock'}"]
    done = CliRunner().invoke(cli, [*base, *words])
    assert done.exit_code == 2
    assert message in done.output
