"""A worker that is killed, at any moment: calls end at once, and the next finds another worker."""

from __future__ import annotations

import os
import select
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import moeshm
from moeshm.backends.cpu import CpuBackend
from moeshm.call import CallFuture
from moeshm.checkpoint import load
from moeshm.demo import tiny_moe_path
from moeshm.errors import SettingError, WorkerDied
from moeshm.layers import Activation
from tests.crash.arithmetic import (
    FREE,
    GATED,
    MANY_TOKENS,
    WIDE,
    ArithmeticBackend,
    assert_exact,
    make_inputs,
)
from tests.crash.processes import (
    GatedWorker,
    gated_worker,
    mapped_rings,
    open_fds,
    wait_for_end,
    within,
)

#: Far below a call's default deadline of 120 s.
SOON_S = 15.0


def test_every_call_in_flight_ends_at_once(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    futures = [client.submit(*make_inputs(GATED, tag)) for tag in range(5)]
    worker.next_turn()
    worker.process.kill()
    for future in futures:
        with within(SOON_S), pytest.raises(WorkerDied, match="session with the worker is over"):
            future.result()
        assert future.done()


def test_threads_that_wait_are_told(worker: GatedWorker, client: moeshm.ExpertClient) -> None:
    errors: list[type[BaseException]] = []

    def call(tag: int) -> None:
        try:
            client.compute(*make_inputs(GATED, tag))
        except WorkerDied as error:
            errors.append(type(error))

    threads = [threading.Thread(target=call, args=(tag,)) for tag in range(6)]
    for thread in threads:
        thread.start()
    worker.next_turn()
    worker.process.kill()
    for thread in threads:
        thread.join(SOON_S)
        assert not thread.is_alive()
    # Whoever submits after the loss was noticed gets it, too.
    assert errors == [WorkerDied] * 6


def test_calls_in_flight_fall_back_exactly(worker: GatedWorker, transport: str) -> None:
    fallback = ArithmeticBackend()
    with moeshm.connect(worker.address, transport=transport, fallback=fallback) as client:
        inputs = [make_inputs(GATED, tag, n_tokens=tag + 1) for tag in range(5)]
        futures = [client.submit(*each) for each in inputs]
        worker.let_go()
        worker.next_turn()
        worker.next_turn()
        worker.process.kill()
        with within(SOON_S):
            for future, each in zip(futures, inputs, strict=True):
                assert_exact(future.result(), each)
        # The first had its turn, and its answer may have been lost or not.
        assert client.stats().fallbacks["worker_died"] in (4, 5)
        assert client.stats().fallback_calls == client.stats().fallbacks["worker_died"]


def test_many_threads_fall_back_exactly(worker: GatedWorker, transport: str) -> None:
    fallback = ArithmeticBackend()
    with moeshm.connect(worker.address, transport=transport, fallback=fallback) as client:
        failures: list[BaseException] = []

        def call(thread: int) -> None:
            try:
                for tag in range(thread * 100, thread * 100 + 20):
                    inputs = make_inputs(FREE if tag % 100 < 10 else GATED, tag)
                    assert_exact(client.compute(*inputs), inputs)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        while worker.next_turn()[0] != GATED:
            pass
        worker.process.kill()
        for thread in threads:
            thread.join(2 * SOON_S)
            assert not thread.is_alive()
        assert failures == []
        assert client.stats().fallback_calls >= 4 * 10


def test_inputs_survive_an_output_that_is_their_own_memory(
    worker: GatedWorker, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call in two messages, the first answered into `out` before the worker died."""
    with moeshm.connect(
        worker.address, transport=transport, fallback=ArithmeticBackend()
    ) as client:
        monkeypatch.setattr(client._link, "max_tokens", 2)
        inputs = make_inputs(GATED, tag=7, n_tokens=4)
        hidden_states = inputs.hidden_states.copy()
        future = client.submit(
            GATED, hidden_states, inputs.topk_ids, inputs.topk_weights, out=hidden_states
        )
        worker.next_turn()
        worker.let_go()
        worker.next_turn()  # so that the first part was answered
        worker.process.kill()
        result = future.result()
        assert result is hidden_states
        assert_exact(result, inputs)


def test_killed_while_its_reply_is_copied(
    worker: GatedWorker, client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = CallFuture.take

    def kill_and_take(self: CallFuture, *arguments: Any) -> None:
        worker.process.kill()
        take(self, *arguments)

    monkeypatch.setattr(CallFuture, "take", kill_and_take)
    inputs = make_inputs(WIDE, n_tokens=MANY_TOKENS)
    assert_exact(client.compute(*inputs), inputs)


@pytest.mark.parametrize("has_fallback", [False, True])
def test_killed_in_the_middle_of_its_reply(worker: GatedWorker, has_fallback: bool) -> None:
    """Over a stream, a reply that is larger than the socket's buffers has begun to arrive."""
    fallback = ArithmeticBackend() if has_fallback else None
    with moeshm.connect(worker.address, transport="stream", fallback=fallback) as client:
        inputs = make_inputs(WIDE, n_tokens=MANY_TOKENS)
        future = client.submit(*inputs)
        incoming = client._link.session.transport._socket  # type: ignore[attr-defined]
        assert select.select([incoming], [], [], SOON_S)[0]
        worker.process.kill()
        if has_fallback:
            assert_exact(future.result(), inputs)
        else:
            with within(SOON_S), pytest.raises(WorkerDied):
                future.result()


def test_idle_death_shows_at_the_next_call(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    inputs = make_inputs(FREE)
    assert_exact(client.compute(*inputs), inputs)
    worker.process.kill()
    for _ in range(2):
        with within(SOON_S), pytest.raises(WorkerDied):
            client.compute(*inputs)
    assert client.stats().reconnects == 0


def test_idle_death_with_a_fallback(worker: GatedWorker, transport: str) -> None:
    fallback = ArithmeticBackend()
    with moeshm.connect(worker.address, transport=transport, fallback=fallback) as client:
        worker.process.kill()
        for tag in range(4):
            inputs = make_inputs(FREE, tag)
            with within(SOON_S):
                assert_exact(client.compute(*inputs), inputs)
        assert client.stats().fallback_calls == 4


def test_a_fallback_is_logged_once(
    worker: GatedWorker, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    fallback = ArithmeticBackend()
    with moeshm.connect(worker.address, transport=transport, fallback=fallback) as client:
        worker.process.kill()
        for tag in range(3):
            client.compute(*make_inputs(FREE, tag))
    assert len([each for each in caplog.records if "fallback computes" in each.message]) == 1


def test_a_fallback_must_hold_the_same_experts(worker: GatedWorker, transport: str) -> None:
    fallback = ArithmeticBackend()
    fallback.layers = {n: info for n, info in fallback.layers.items() if n != GATED}
    with pytest.raises(SettingError, match="fallback does not hold expert 0 of layer 1"):
        moeshm.connect(worker.address, transport=transport, fallback=fallback)


def test_a_fallback_that_computes_something_else_is_refused(
    worker: GatedWorker, transport: str
) -> None:
    fallback = ArithmeticBackend()
    fallback.layers = {
        number: msgspec.structs.replace(info, activation=Activation.GEGLU)
        for number, info in fallback.layers.items()
    }
    with pytest.raises(SettingError, match="fallback has layer 1 with activation=geglu"):
        moeshm.connect(worker.address, transport=transport, fallback=fallback)


def test_a_client_finds_the_worker_that_an_operator_restarts(
    tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeshm.reconnect.FIRST_PAUSE_S", 0.0)
    inputs = make_inputs(FREE)
    with gated_worker(tmp_path) as first:
        client = moeshm.connect(first.address, transport=transport)
        first.process.kill()
    with client:
        with pytest.raises(WorkerDied):
            client.compute(*inputs)
        with gated_worker(tmp_path) as second:
            assert_exact(client.compute(*inputs), inputs)
            assert client.worker_pid == second.process.pid
            stats = client.stats()
            assert (stats.reconnects, stats.worker_restarts) == (1, 0)


def test_a_lost_worker_leaves_nothing_in_the_client(
    tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeshm.reconnect.FIRST_PAUSE_S", 0.0)
    inputs = make_inputs(GATED)
    before = open_fds(os.getpid()), mapped_rings(os.getpid())
    for _ in range(3):
        with (
            gated_worker(tmp_path) as worker,
            moeshm.connect(worker.address, transport=transport) as client,
        ):
            future = client.submit(*inputs)
            worker.next_turn()
            worker.process.kill()
            with pytest.raises(WorkerDied):
                future.result()
            with pytest.raises(WorkerDied, match="cannot be reached"):
                client.compute(*inputs)
            assert "memfd" not in "".join(open_fds(os.getpid()))
            assert mapped_rings(os.getpid()) == before[1]
    assert (open_fds(os.getpid()), mapped_rings(os.getpid())) == before


# --- a worker of one's own ----------------------------------------------------------------


def _random_call(seed: int) -> tuple[int, Any, Any, Any]:
    rng = np.random.default_rng(seed)
    hidden_states = rng.standard_normal((3, 128)).astype(np.float32)
    weights = rng.random((3, 4), dtype=np.float32)
    return seed % 4, hidden_states, rng.integers(0, 16, (3, 4), dtype=np.int32), weights


def test_a_spawned_worker_is_restarted_by_the_next_call(transport: str) -> None:
    with moeshm.spawn_worker(tiny_moe_path(), threads=1, transport=transport) as client:
        expected = client.compute(*_random_call(1))
        for n in (1, 2):
            pid = client.worker_pid
            os.kill(pid, signal.SIGKILL)
            with within(SOON_S), pytest.raises(WorkerDied):
                client.compute(*_random_call(1))
            np.testing.assert_array_equal(client.compute(*_random_call(1)), expected)
            assert client.worker_pid != pid
            assert client.stats().worker_restarts == client.stats().reconnects == n
        folders = [each for each in os.listdir(tempfile.gettempdir()) if _is_of(each, client)]
        last = client.worker_pid
    wait_for_end(last)
    assert folders
    assert not any((Path(tempfile.gettempdir()) / each).exists() for each in folders)


def _is_of(folder: str, client: moeshm.ExpertClient) -> bool:
    socket_path = Path(tempfile.gettempdir()) / folder / "worker.sock"
    command = Path(f"/proc/{client.worker_pid}/cmdline").read_text()
    return f"unix:{socket_path}" in command


def test_a_spawned_worker_with_a_fallback_never_fails(transport: str) -> None:
    fallback = CpuBackend(load(tiny_moe_path()).layers, threads=1)
    with moeshm.spawn_worker(
        tiny_moe_path(), threads=1, transport=transport, fallback=fallback
    ) as client:
        for seed in range(6):
            if seed % 2:
                os.kill(client.worker_pid, signal.SIGKILL)
            call = _random_call(seed)
            expected = np.empty_like(call[1])
            fallback.ffn(*call, expected)
            np.testing.assert_array_equal(client.compute(*call), expected)
        assert client.stats().fallbacks == {"worker_died": 3}
        assert client.stats().worker_restarts == 2
