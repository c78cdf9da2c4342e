"""An offload that reaches workers by their addresses, and moves experts while it computes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

import moeshm
from moeshm.backends.cpu import CpuBackend
from moeshm.dtypes import DType
from moeshm.errors import CallError, HandshakeRefused, SettingError, WorkerDied
from moeshm.offload import ExpertOffload
from moeshm.placement import Placement, PlacementError
from moeshm.policy import Policy

from .placed import CHECKPOINT, EXPERTS, LAYERS, PLACEMENT, assert_exact, draw_call, placed_worker

BACKEND = CpuBackend(CHECKPOINT.layers, threads=1)


def rule(n_hot: int, shift: int = 0) -> Placement:
    """`n_hot` experts from `shift` on are hot, the others dealt out to both workers."""
    hot = {(shift + i) % EXPERTS for i in range(n_hot)}
    return Placement.by_rule(
        ["a", "b"], dict.fromkeys(range(LAYERS), EXPERTS), lambda _layer, expert: expert in hot
    )


@pytest.mark.parametrize("transport", ["stream", "shared"])
@pytest.mark.parametrize("mode", ["stream", "batched"])
def test_what_the_policy_says_is_what_is_sent(tmp_path: Path, mode: str, transport: str) -> None:
    policy = Policy(mode=mode, transport=transport, batch_capacity=64)
    everything = Placement.by_rule(["a"], {0: EXPERTS}, lambda *_: False)
    with (
        placed_worker(tmp_path, "a", everything) as (_, address),
        ExpertOffload({"a": address}, everything, policy=policy) as offload,
    ):
        x, ids, weights = draw_call(1, n_tokens=30)
        ids[4:12] = -1
        assert_exact(offload, 0, (x, ids, weights))
        stats = offload.stats()
        assert stats.rows == 22
        assert stats.messages == (6 if mode == "stream" else 1)
        (explanation,) = offload.explain(0)
        (verdict,) = explanation.verdicts
        assert verdict.transport == transport
        assert verdict.slice_tokens == (4 if mode == "stream" else 64)
        assert verdict.wire_dtype is DType.F32
        assert verdict.is_chosen


def test_auto_learns_from_every_forward_and_explains_itself(tmp_path: Path) -> None:
    with (
        placed_worker(tmp_path, "a") as (_, a),
        placed_worker(tmp_path, "b") as (_, b),
        ExpertOffload({"a": a, "b": b}, PLACEMENT, local=BACKEND) as offload,
    ):
        for seed in range(30):
            for layer in range(LAYERS):
                assert_exact(offload, layer, draw_call(seed, n_tokens=1 if seed % 2 else 40))
        explanations = offload.explain(0)
        assert {each.worker for each in explanations} == {"a", "b"}
        assert {each.work.n_tokens for each in explanations} == {1, 40}
        for each in explanations:
            assert sum(verdict.is_chosen for verdict in each.verdicts) == 1
            assert {verdict.transport for verdict in each.verdicts} == {"shared", "stream"}
            assert any(verdict.n_measured for verdict in each.verdicts)
            text = str(each)
            assert each.worker in text
            assert all(verdict.why in text for verdict in each.verdicts)
        stats = offload.stats()
        assert stats.forwards == 30 * LAYERS
        assert stats.fallback_calls == 0
        assert (stats.reconnects, stats.worker_restarts, stats.stepped_down) == (0, 0, {})
        assert stats.choices.keys() == {"a", "b"}
        assert 15 * LAYERS * 2 <= stats.calls <= 30 * LAYERS * 2


def test_the_policys_capacity_holds_for_addresses(tmp_path: Path) -> None:
    """Not only what MOESHM_BATCH_CAPACITY allows."""
    everything = Placement.by_rule(["a"], {0: EXPERTS}, lambda *_: False)
    policy = Policy(mode="batched", transport="shared", batch_capacity=2048)
    with (
        placed_worker(tmp_path, "a", everything) as (_, address),
        ExpertOffload({"a": address}, everything, policy=policy) as offload,
    ):
        assert_exact(offload, 0, draw_call(1, n_tokens=1500))
        assert offload.stats().messages == 1


def test_addresses_are_held_to_the_placement(tmp_path: Path) -> None:
    with (
        placed_worker(tmp_path, "a") as (_, address),
        pytest.raises(HandshakeRefused, match="gives this worker"),
    ):
        ExpertOffload({"a": address, "b": address}, PLACEMENT, local=BACKEND)


def test_a_transport_that_no_client_has_is_refused(tmp_path: Path) -> None:
    everything = Placement.by_rule(["a"], {0: EXPERTS}, lambda *_: False)
    with (
        placed_worker(tmp_path, "a", everything) as (_, address),
        moeshm.connect(address, transport="stream") as client,
        pytest.raises(SettingError, match="transport='shared', but this worker offers stream"),
    ):
        ExpertOffload({"a": client}, everything, policy=Policy(transport="shared"))


# --- another placement ------------------------------------------------------------------


def test_experts_move_while_forwards_go_on(tmp_path: Path) -> None:
    placements = [rule(4, shift=3), rule(0), rule(9, shift=12), rule(4)]
    first = rule(4)
    with (
        placed_worker(tmp_path, "a", first) as (_, a),
        placed_worker(tmp_path, "b", first) as (_, b),
        ExpertOffload({"a": a, "b": b}, first, local=BACKEND) as offload,
    ):
        is_over = threading.Event()
        failures: list[BaseException] = []

        def compute(seed: int) -> None:
            try:
                while not is_over.is_set():
                    seed += 2
                    assert_exact(offload, seed % LAYERS, draw_call(seed))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=compute, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        try:
            for placement in placements:
                offload.apply(placement).result(timeout_s=60)
                assert offload.placement == placement
                for layer in range(LAYERS):
                    assert_exact(offload, layer, draw_call(layer))
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
        assert not failures, failures
        stats = offload.stats()
        assert stats.placements_applied == len(placements)
        assert stats.losses == {}


def test_workers_drop_what_a_placement_takes_from_them(tmp_path: Path) -> None:
    """What new sessions are told they hold is what the last placement gave them."""
    with (
        placed_worker(tmp_path, "a", rule(4)) as (_, a),
        placed_worker(tmp_path, "b", rule(4)) as (_, b),
        ExpertOffload({"a": a, "b": b}, rule(4), local=BACKEND) as offload,
    ):
        then = rule(10, shift=2)
        offload.apply(then).result(timeout_s=60)
        for address, name in ((a, "a"), (b, "b")):
            with _once_offered(address, then.fingerprint(name)) as client:
                held = {number: info.experts for number, info in client.layers.items()}
            assert held == then.experts_of(name)
        # And an offload may begin with it.
        with ExpertOffload({"a": a, "b": b}, then, local=BACKEND) as other:
            assert_exact(other, 1, draw_call(1))


def _once_offered(address: str, fingerprint: str) -> moeshm.ExpertClient:
    """A client, as soon as the worker has read what it shall tell newcomers."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return moeshm.connect(address, placement=fingerprint)
        except HandshakeRefused:
            if time.monotonic() > deadline:
                raise


def test_a_placement_that_fits_nothing_is_refused_at_once(tmp_path: Path) -> None:
    with (
        placed_worker(tmp_path, "a", rule(4)) as (_, a),
        placed_worker(tmp_path, "b", rule(4)) as (_, b),
        ExpertOffload({"a": a, "b": b}, rule(4), local=BACKEND) as offload,
    ):
        with pytest.raises(PlacementError, match="no worker 'c'; this offload has a, b"):
            offload.apply(
                Placement.by_rule(["c"], dict.fromkeys(range(LAYERS), EXPERTS), lambda *_: False)
            )
        with pytest.raises(PlacementError, match=r"has layers \[0\], this offload"):
            offload.apply(Placement.by_rule(["a"], {0: EXPERTS}, lambda *_: False))
        with pytest.raises(PlacementError, match="layer 0 has 8 experts in the placement and 16"):
            offload.apply(
                Placement.by_rule(["a"], dict.fromkeys(range(LAYERS), 8), lambda *_: False)
            )
        assert offload.placement == rule(4)
        assert_exact(offload, 0, draw_call(0))


def test_a_worker_that_dies_while_it_loads_leaves_the_last_placement(tmp_path: Path) -> None:
    with (
        placed_worker(tmp_path, "a", rule(4)) as (process, a),
        placed_worker(tmp_path, "b", rule(4)) as (_, b),
        ExpertOffload({"a": a, "b": b}, rule(4), local=BACKEND, fallback=BACKEND) as offload,
    ):
        process.kill()
        with pytest.raises(WorkerDied):
            offload.apply(rule(5)).result(timeout_s=60)
        assert offload.placement == rule(4)
        assert offload.stats().placements_failed == 1
        assert_exact(offload, 0, draw_call(0))
        assert offload.stats().fallback_calls == 1


def test_closing_ends_a_change_that_is_under_way(tmp_path: Path) -> None:
    with (
        placed_worker(tmp_path, "a", rule(4)) as (process, a),
        placed_worker(tmp_path, "b", rule(4)) as (_, b),
    ):
        offload = ExpertOffload({"a": a, "b": b}, rule(4), local=BACKEND)
        process.stop()
        change = offload.apply(rule(5))
        with pytest.raises(PlacementError, match="another placement is being applied"):
            offload.apply(rule(6))
        assert not change.done()
        offload.close()
        with pytest.raises(CallError):
            change.result(timeout_s=10)
