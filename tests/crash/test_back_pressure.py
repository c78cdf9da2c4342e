"""Full rings and sockets: nobody waits for ever, and nobody suffers for another's laziness."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import pytest

import moeshm
from moeshm import protocol
from moeshm.dtypes import DType
from moeshm.errors import DeadlineExceeded, MoeshmError, WorkerDied
from tests.crash.arithmetic import (
    FREE,
    GATED,
    MANY_TOKENS,
    WIDE,
    ArithmeticBackend,
    assert_exact,
    make_inputs,
)
from tests.crash.processes import GatedWorker, gated_worker, within

SOON_S = 15.0


@pytest.mark.usefixtures("small_rings")
def test_many_calls_submitted_before_any_is_read(client: moeshm.ExpertClient) -> None:
    inputs = [make_inputs(WIDE, tag, n_tokens=1) for tag in range(400)]
    with within(2 * SOON_S):
        futures = [client.submit(*each) for each in inputs]
        for future, each in zip(futures, inputs, strict=True):
            assert_exact(future.result(), each)
    assert client.stats().messages == 400


def test_large_calls_submitted_before_any_is_read(client: moeshm.ExpertClient) -> None:
    """More than socket buffers, and more than the rings hold."""
    inputs = [make_inputs(WIDE, tag, n_tokens=MANY_TOKENS) for tag in range(5)]
    with within(2 * SOON_S):
        futures = [client.submit(*each) for each in inputs]
        for future, each in zip(reversed(futures), reversed(inputs), strict=True):
            assert_exact(future.result(), each)


def test_replies_of_all_these_calls_may_be_more_than_a_sender_takes_in(
    client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes in what comes while it waits for room, and no more than one call's time brings."""
    monkeypatch.setattr("moeshm.transport.stream._MAX_INBOX_BYTES", 24 << 20)
    inputs = [make_inputs(WIDE, tag, n_tokens=MANY_TOKENS) for tag in range(10)]
    futures = [client.submit(*each) for each in inputs]
    for future, each in zip(futures, inputs, strict=True):
        assert_exact(future.result(), each)


@pytest.mark.usefixtures("small_rings")
def test_a_call_is_cut_into_more_messages_than_the_ring_holds(client: moeshm.ExpertClient) -> None:
    inputs = make_inputs(WIDE, 3, n_tokens=60)
    with within(2 * SOON_S):
        assert_exact(client.compute(*inputs), inputs)
    stats = client.stats()
    assert (stats.calls, stats.messages, stats.rows) == (1, 60, 60)


@pytest.mark.usefixtures("small_rings")
def test_senders_of_several_threads_share_a_full_ring(client: moeshm.ExpertClient) -> None:
    failures: list[BaseException] = []

    def call(thread: int) -> None:
        try:
            inputs = [make_inputs(WIDE, 100 * thread + n, n_tokens=1) for n in range(40)]
            futures = [client.submit(*each) for each in inputs]
            for future, each in zip(futures, inputs, strict=True):
                assert_exact(future.result(), each)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SOON_S)
        assert not thread.is_alive()
    assert failures == []


@pytest.mark.usefixtures("small_rings")
@pytest.mark.parametrize("has_fallback", [False, True])
def test_a_ring_that_stays_full_ends_at_the_deadline(
    worker: GatedWorker, transport: str, has_fallback: bool
) -> None:
    fallback = ArithmeticBackend() if has_fallback else None
    with moeshm.connect(worker.address, transport=transport, fallback=fallback) as client:
        gated, inputs = make_inputs(GATED, 1, n_tokens=1), make_inputs(WIDE, 2, n_tokens=2000)
        first = client.submit(*gated, timeout_s=0.4)
        worker.next_turn()
        with within(2 * SOON_S):
            if has_fallback:
                assert_exact(client.compute(*inputs, timeout_s=0.5), inputs)
                assert_exact(first.result(), gated)
            else:
                with pytest.raises(DeadlineExceeded, match="took no call before the deadline"):
                    client.compute(*inputs, timeout_s=0.5)
                with pytest.raises(WorkerDied):
                    first.result()
        worker.let_go()
        again = make_inputs(WIDE, 3, n_tokens=1)
        assert_exact(client.compute(*again), again)


def test_a_client_that_never_reads_loses_only_its_own_session(
    tmp_path: Path, transport: str
) -> None:
    with (
        gated_worker(tmp_path, reply_timeout_s=0.3) as worker,
        moeshm.connect(worker.address, transport=transport) as lazy,
        moeshm.connect(worker.address, transport=transport) as busy,
    ):
        # Replies of 8 MiB: neither a ring nor a socket holds them all.
        flood = threading.Thread(target=_write_calls, args=(lazy, 5))
        flood.start()
        for tag in range(20):
            inputs = make_inputs(FREE, tag)
            assert_exact(busy.compute(*inputs), inputs)
        log = worker.process.log.read_until("session ended after")
        why = (
            "its replies lay unread for too long"
            if transport == "shared"
            else "took nothing for 0.3 s"
        )
        assert why in log, log
        assert "Traceback" not in log
        flood.join(SOON_S)
        assert not flood.is_alive()
        inputs = make_inputs(FREE, 100)
        assert_exact(busy.compute(*inputs), inputs)
        assert busy.stats().reconnects == 0
        # It may come again.
        with pytest.raises(WorkerDied, match="session with the worker is over"):
            lazy.compute(*inputs)
        assert_exact(lazy.compute(*inputs), inputs)


def _write_calls(client: moeshm.ExpertClient, n_calls: int) -> None:
    """By the transport itself: a client takes replies in while it waits for room."""
    for tag in range(n_calls):
        parts = protocol.pack_call(tag, *make_inputs(WIDE, tag, MANY_TOKENS), DType.F32)
        with contextlib.suppress(MoeshmError):  # the worker has ended the session
            client._link.session.transport.write(parts, protocol.CALL, 0, SOON_S)
