"""Experts loaded and dropped by a real worker, while several engines call it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeshm
from moeshm.backends.cpu import CpuBackend
from moeshm.checkpoint import load
from moeshm.demo import tiny_moe_path
from moeshm.errors import InvalidCall
from moeshm.held import HeldView
from tests.crash.processes import running
from tests.wire import PATIENCE_S, meanwhile

MODEL = tiny_moe_path()
HIDDEN_SIZE, TOP_K, NUM_EXPERTS = 128, 4, 16
FIRST: Mapping[int, Sequence[int]] = {0: range(16), 1: (0, 1, 2)}
NEWER: Mapping[int, Sequence[int]] = {0: range(15, 7, -1), 1: (5, 2, 0), 3: (1, 14)}


@pytest.fixture(scope="module")
def whole() -> CpuBackend:
    """All experts, by the same arithmetic: a result has one value, to the bit."""
    return CpuBackend(load(MODEL).layers, 1)


def assert_exact(
    client: moeshm.ExpertClient,
    view: HeldView | None,
    experts: Mapping[int, Sequence[int]],
    whole: CpuBackend,
    rng: np.random.Generator,
) -> None:
    """A call of every layer of the view, of some tokens."""
    for layer, order in experts.items():
        n_tokens = int(rng.integers(1, 20))
        hidden = rng.standard_normal((n_tokens, HIDDEN_SIZE)).astype(np.float32)
        ids = rng.integers(-1, len(order), (n_tokens, TOP_K), dtype=np.int32)
        weights = rng.random((n_tokens, TOP_K), dtype=np.float32)
        wanted = np.empty_like(hidden)
        whole.ffn(layer, hidden, np.array([*order, -1], np.int32)[ids], weights, wanted)
        found = client.compute(layer, hidden, ids, weights, view=view, timeout_s=PATIENCE_S)
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_two_engines_call_on_while_one_of_them_changes_what_is_held(
    tmp_path: Path, transport: str, whole: CpuBackend
) -> None:
    address = f"unix:{tmp_path / 'w.sock'}"
    experts = tmp_path / "experts.json"
    experts.write_text('{"0": "0-15", "1": "0-2"}')
    command = ["-m", "moeshm", "worker", "--model", str(MODEL), "--listen", address]
    with running([*command, "--experts", str(experts), "--threads", "1"]) as process:
        process.log.read_until("listening at")
        with (
            moeshm.connect(address, transport=transport) as one,
            moeshm.connect(address, transport=transport) as other,
        ):
            is_over = threading.Event()
            n_rounds = threading.Semaphore(0)

            def call(client: moeshm.ExpertClient, seed: int) -> None:
                rng = np.random.default_rng(seed)
                while not is_over.is_set():
                    assert_exact(client, None, FIRST, whole, rng)
                    n_rounds.release()

            rng = np.random.default_rng(7)
            with meanwhile(*(lambda c=c, s=s: call(c, s) for s, c in enumerate((one, other, one)))):
                try:
                    for _ in range(5):
                        view = one.hold(NEWER)
                        assert_exact(one, view, NEWER, whole, rng)
                        aside = one.hold({1: (15,), 2: (3, 4)})
                        assert_exact(one, aside, {1: (15,), 2: (3, 4)}, whole, rng)
                        one.release(view)
                        one.release(aside)
                        for _ in range(6):
                            assert n_rounds.acquire(timeout=PATIENCE_S)
                finally:
                    is_over.set()
        log = process.log.read_until("loaded 3 experts of 2 layers")
        assert "layer 3: 2 more experts loaded" in log
        process.log.read_until("dropped")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert "Traceback" not in process.log.read_rest()


def test_a_worker_that_is_killed_holds_the_views_again(whole: CpuBackend) -> None:
    rng = np.random.default_rng(8)
    options: dict[str, Any] = {"model": MODEL, "threads": 1}
    with moeshm.spawn_worker(**options, experts={0: (3, 1), 2: (0,)}) as client:
        view = client.hold(NEWER)
        with pytest.raises(InvalidCall, match="layer 9 cannot be loaded"):
            client.hold({9: (0,)})
        for _ in range(2):
            os.kill(client.worker_pid, signal.SIGKILL)
            with pytest.raises(moeshm.errors.WorkerDied):
                assert_exact(client, view, NEWER, whole, rng)
            assert_exact(client, view, NEWER, whole, rng)
            assert_exact(client, None, {0: (3, 1), 2: (0,)}, whole, rng)
        client.release(client.view)
        os.kill(client.worker_pid, signal.SIGKILL)
        with pytest.raises(moeshm.errors.WorkerDied):
            assert_exact(client, view, NEWER, whole, rng)
        assert_exact(client, view, NEWER, whole, rng)
        with pytest.raises(InvalidCall, match="was released"):
            assert_exact(client, None, {0: (3, 1)}, whole, rng)
        assert client.stats().worker_restarts == 3
