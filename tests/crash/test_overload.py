"""More than a worker can do: steps of long calls, deadlines, clients that leave, bursts."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import moeshm
from moeshm.errors import CallError, DeadlineExceeded, NotReady, WorkerDied
from tests.crash.arithmetic import FREE, GATED, STEPPED, CallInputs, assert_exact, make_inputs
from tests.crash.processes import GatedWorker, gated_worker, within

SOON_S = 15.0
DEADLINE_S = 0.3


def step(tag: int, number: int) -> tuple[int, int]:
    """What is told of a step of the call with this tag."""
    return STEPPED, 100 * tag + number


def submit(
    client: moeshm.ExpertClient, inputs: CallInputs, timeout_s: float = DEADLINE_S
) -> tuple[Any, float]:
    """A call and its deadline, which its reply alone ends: the client itself would wait for hours.

    Again, with more time, where the client finds it too late to send it.
    """
    while True:
        try:
            future = client.submit(*inputs, timeout_s=timeout_s)
        except DeadlineExceeded:
            timeout_s *= 2
            assert timeout_s < SOON_S, "nothing can be sent"
            continue
        deadline = future.deadline
        future.deadline += 3600
        return future, deadline


def test_a_long_call_lets_anothers_call_pass_after_exactly_one_step(
    worker: GatedWorker, client: moeshm.ExpertClient, transport: str
) -> None:
    long, short = make_inputs(STEPPED, 1, n_tokens=40), make_inputs(FREE, 7)
    with moeshm.connect(worker.address, transport=transport) as other:
        future = client.submit(*long)
        assert worker.next_turn() == step(1, 0)
        worker.let_go()
        # Nobody waited.
        assert worker.next_turn() == step(1, 1)
        answer = other.submit(*short)
        worker.wait_until_queued()
        worker.let_go()
        assert worker.next_turn() == (FREE, 7)
        # The long call is still in its middle.
        assert_exact(answer.result(), short)
        assert worker.next_turn() == step(1, 2)
        worker.let_go(38)
        assert_exact(future.result(), long)


def test_a_short_call_is_not_interrupted(
    worker: GatedWorker, client: moeshm.ExpertClient, transport: str
) -> None:
    """Or it would be by every step of a long one."""
    inputs = make_inputs(STEPPED, 1, n_tokens=3)
    with moeshm.connect(worker.address, transport=transport) as other:
        future = client.submit(*inputs)
        assert worker.next_turn() == step(1, 0)
        answer = other.submit(*make_inputs(FREE, 7))
        worker.wait_until_queued()
        worker.let_go(3)
        turns = [worker.next_turn() for _ in range(3)]
        assert turns == [step(1, 1), step(1, 2), (FREE, 7)]
        assert_exact(future.result(), inputs)
        answer.result()


def test_a_long_call_ends_with_its_clients_session(
    worker: GatedWorker, client: moeshm.ExpertClient, transport: str
) -> None:
    with moeshm.connect(worker.address, transport=transport) as leaver:
        future = leaver.submit(*make_inputs(STEPPED, 1, n_tokens=50))
        assert worker.next_turn() == step(1, 0)
    with pytest.raises(CallError):
        future.result()
    worker.let_go()
    log = worker.process.log.read_until("session ended after")
    assert "session ended after 0 calls" in log, log
    assert "Traceback" not in log
    inputs = make_inputs(FREE, 9)
    assert_exact(client.compute(*inputs), inputs)
    assert worker.next_turn() == (FREE, 9)


def test_a_long_call_ends_between_steps_once_its_deadline_passed(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    """The worker says so itself."""
    inputs = make_inputs(STEPPED, 1, n_tokens=50)
    future, deadline = submit(client, inputs)
    timeout_s = DEADLINE_S
    while not worker.has_event():
        # On a machine that has much to do it may have been refused before it began.
        with contextlib.suppress(NotReady):
            with pytest.raises(DeadlineExceeded):
                future.result(timeout_s=0.0)
            timeout_s *= 2
            future, deadline = submit(client, inputs, timeout_s)
    assert worker.next_turn() == step(1, 0)
    time.sleep(max(0.0, deadline - time.monotonic()))
    worker.let_go()
    with within(SOON_S), pytest.raises(DeadlineExceeded, match="between two steps of the call"):
        future.result()
    assert client.stats().reconnects == 0
    inputs = make_inputs(FREE, 9)
    assert_exact(client.compute(*inputs), inputs)
    assert worker.next_turn() == (FREE, 9)


def test_a_call_that_waits_is_refused_at_its_deadline_and_the_session_goes_on(
    worker: GatedWorker, client: moeshm.ExpertClient, transport: str
) -> None:
    """By the worker, without a turn: another's call is computed all the time."""
    with moeshm.connect(worker.address, transport=transport) as other:
        future = client.submit(*make_inputs(GATED, 1))
        worker.next_turn()
        late, _ = submit(other, make_inputs(FREE, 2))
        # However late it comes to the queue.
        worker.wait_until_queued()
        with within(SOON_S), pytest.raises(DeadlineExceeded, match="before the call's turn came"):
            late.result()
        worker.let_go()
        assert_exact(future.result(), make_inputs(GATED, 1))
        inputs = make_inputs(FREE, 3)
        assert_exact(other.compute(*inputs), inputs)
        assert worker.next_turn() == (FREE, 3)
        assert other.stats().reconnects == 0


def test_a_burst_ends_in_results_or_typed_errors_and_leaves_nothing(
    tmp_path: Path, transport: str
) -> None:
    """More clients than cores, each with more calls than can be done in time."""
    with gated_worker(tmp_path) as worker:
        n_before = n_threads(worker)
        reader = threading.Thread(target=_read_events, args=(worker,), daemon=True)
        reader.start()
        ends: list[str] = []

        def burst(seed: int) -> None:
            with moeshm.connect(worker.address, transport=transport) as client:
                for n in range(40):
                    inputs = make_inputs(FREE, 1000 * seed + n, n_tokens=40)
                    try:
                        futures = [client.submit(*inputs, timeout_s=0.002) for _ in range(8)]
                    except CallError as error:
                        ends.append(type(error).__name__)
                        continue
                    for future in futures:
                        try:
                            assert_exact(future.result(), inputs)
                            ends.append("result")
                        except (DeadlineExceeded, WorkerDied) as error:
                            ends.append(type(error).__name__)
                inputs = make_inputs(FREE, seed)
                assert_exact(client.compute(*inputs), inputs)
                ends.append("last")

        threads = [threading.Thread(target=burst, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(4 * SOON_S)
            assert not thread.is_alive()
        assert ends.count("last") == 6
        assert set(ends) <= {"result", "last", "DeadlineExceeded", "WorkerDied"}
        end = time.monotonic() + SOON_S
        while n_threads(worker) > n_before:
            assert time.monotonic() < end, "sessions live on"
        inputs = make_inputs(FREE, 99)
        with moeshm.connect(worker.address, transport=transport) as client:
            assert_exact(client.compute(*inputs), inputs)


def n_threads(worker: GatedWorker) -> int:
    """Of the worker, each session's among them."""
    return len(list(Path(f"/proc/{worker.process.pid}/task").iterdir()))


def _read_events(worker: GatedWorker) -> None:
    try:
        while True:
            worker.next_event()
    except (EOFError, AssertionError, OSError):
        return
