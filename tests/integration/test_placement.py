"""A model's experts placed here and on two workers: exact sums, refusals by name, and a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

import moeshm
from moeshm.backends.cpu import CpuBackend
from moeshm.cli import cli
from moeshm.errors import HandshakeRefused, WorkerDied
from moeshm.offload import ExpertOffload

from .placed import CHECKPOINT, LAYERS, MODEL, PLACEMENT, assert_exact, draw_call, placed_worker


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
            assert_exact(offload, layer, draw_call(layer))
        before = offload.stats()
        assert before.hot_slots > 0
        assert set(before.cold_slots) == {"a", "b"}
        first.kill()
        for layer in range(LAYERS):
            assert_exact(offload, layer, draw_call(10 + layer))
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
        assert_exact(covered, 0, draw_call(1))
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
        (["--resident"], "--resident is for a GPU; name it by --device"),
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
