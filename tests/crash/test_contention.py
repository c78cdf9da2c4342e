"""Threads that send, receive and wait beside each other, and what each of them is told."""

from __future__ import annotations

import threading
import traceback
from pathlib import Path

import numpy as np
import pytest

import moeshm
from moeshm import reconnect, supervisor
from moeshm.demo import tiny_moe_path
from moeshm.errors import CallError, ClientClosed, DeadlineExceeded, WorkerDied
from tests.crash.arithmetic import (
    FREE,
    GATED,
    MANY_TOKENS,
    WIDE,
    ArithmeticBackend,
    assert_exact,
    make_inputs,
)
from tests.crash.processes import GatedWorker, within

DEADLINE_S = 0.4
SOON_S = 15.0


def test_a_waiting_sender_and_a_caller_do_not_wait_for_each_other(
    client: moeshm.ExpertClient,
) -> None:
    """One fills the transport with calls; the other's `compute` may not keep their replies out."""
    wide = [make_inputs(WIDE, tag, MANY_TOKENS) for tag in range(3)]
    done = threading.Event()
    errors: list[Exception] = []

    def flood() -> None:
        try:
            futures = [client.submit(*wide[n % 3]) for n in range(12)]
            for n, future in enumerate(futures):
                assert_exact(future.result(), wide[n % 3])
        except Exception as error:
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=flood)
    thread.start()
    small = make_inputs(FREE, 7)
    while not done.is_set():
        assert_exact(client.compute(*small), small)
    thread.join()
    assert errors == []
    assert client.stats().reconnects == 0


def test_a_call_that_waits_for_others_to_send_keeps_its_deadline(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    worker.process.stop()
    held = threading.Event()

    def fill() -> None:
        try:
            while True:
                held.set()
                client.submit(*make_inputs(WIDE, 1, MANY_TOKENS), timeout_s=SOON_S)
        except CallError:
            return

    thread = threading.Thread(target=fill)
    thread.start()
    assert held.wait(SOON_S)
    inputs = make_inputs(WIDE, 2, MANY_TOKENS)
    with within(SOON_S / 2), pytest.raises(CallError):
        client.submit(*inputs, timeout_s=DEADLINE_S).result()
    client.close()
    thread.join()


def test_a_large_call_to_a_worker_that_hangs_ends_at_its_deadline(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    worker.process.stop()
    with within(SOON_S / 2), pytest.raises(DeadlineExceeded):
        client.compute(*make_inputs(WIDE, 1, MANY_TOKENS), timeout_s=DEADLINE_S)


def test_a_busy_worker_is_waited_for_until_the_deadline(
    worker: GatedWorker, client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only for as long as a stalled stream is: more than fits is sent while it computes."""
    monkeypatch.setattr("moeshm._stream.STALL_S", 0.05)
    gated = client.submit(*make_inputs(GATED, 1))
    worker.next_turn()
    wide = [make_inputs(WIDE, tag, MANY_TOKENS) for tag in range(4)]
    results: list[object] = []

    def send() -> None:
        futures = [client.submit(*inputs) for inputs in wide]
        results.extend(future.result() for future in futures)

    thread = threading.Thread(target=send)
    thread.start()
    thread.join(0.5)  # longer than the stall limit; no verdict depends on it
    worker.let_go()
    gated.result()
    thread.join()
    for result, inputs in zip(results, wide, strict=True):
        assert_exact(result, inputs)
    assert client.stats().reconnects == 0


def test_close_ends_a_compute_with_client_closed(worker: GatedWorker, transport: str) -> None:
    """With a fallback as well: nothing was lost, the caller closed it."""
    client = moeshm.connect(worker.address, transport=transport, fallback=ArithmeticBackend())
    errors: list[BaseException] = []

    def compute() -> None:
        try:
            client.compute(*make_inputs(GATED, 1))
        except CallError as error:
            errors.append(error)

    thread = threading.Thread(target=compute)
    thread.start()
    worker.next_turn()
    client.close()
    thread.join()
    assert [type(error) for error in errors] == [ClientClosed]
    assert client.stats().fallbacks == {}
    worker.let_go()


def test_calls_without_a_worker_keep_nothing(
    worker: GatedWorker, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that is raised again and again collects the frames of every time."""
    monkeypatch.setattr(reconnect, "FIRST_PAUSE_S", 3600.0)
    with moeshm.connect(
        worker.address, transport=transport, fallback=ArithmeticBackend()
    ) as client:
        worker.process.kill()
        inputs = make_inputs(FREE, 1)
        for _ in range(20):
            assert_exact(client.compute(*inputs), inputs)
            assert_exact(client.submit(*inputs).result(), inputs)
        loss = client._link.loss
        assert loss is not None
        assert len(list(traceback.walk_tb(loss.__traceback__))) < 20


def test_one_missed_deadline_does_not_load_the_model_anew(transport: str) -> None:
    call = (
        0,
        np.ones((1024, 128), np.float32),
        np.zeros((1024, 4), np.int32),
        np.ones((1024, 4), np.float32),
    )
    with moeshm.spawn_worker(tiny_moe_path(), threads=1, transport=transport) as client:
        expected = client.compute(*call)
        first = client.worker_pid
        with pytest.raises((DeadlineExceeded, WorkerDied)):
            client.compute(*call, timeout_s=1e-4)
        np.testing.assert_array_equal(client.compute(*call), expected)
        assert client.worker_pid == first
        assert client.stats().worker_restarts == 0


def test_folders_that_killed_engines_left_are_swept_and_no_others(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(short_folder))
    monkeypatch.setattr(supervisor, "_NEW_FOLDER_S", -1.0)
    for name in ("moeshm-worker-dead", "moeshm-worker-unlocked", "other"):
        (short_folder / name).mkdir()
    (short_folder / "moeshm-worker-dead" / "lock").touch()
    with moeshm.spawn_worker(tiny_moe_path(), threads=1) as first:
        left = {path.name for path in short_folder.iterdir()}
        assert left >= {"moeshm-worker-unlocked", "other"}
        assert "moeshm-worker-dead" not in left
        with moeshm.spawn_worker(tiny_moe_path(), threads=1):
            pass
        # The second start left the first one's folder alone.
        assert {path.name for path in short_folder.iterdir()} == left
        assert first.layers
    assert {path.name for path in short_folder.iterdir()} == {"moeshm-worker-unlocked", "other"}
