"""Calls that are refused or fail: that call alone, and the session lives."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

import moeshm
from moeshm import protocol
from moeshm.dtypes import DType
from moeshm.errors import DeadlineExceeded, InvalidCall, WorkerFailed
from tests.crash.arithmetic import (
    BROKEN,
    FREE,
    HIDDEN_SIZE,
    NUM_EXPERTS,
    TOP_K,
    CallInputs,
    assert_exact,
    make_inputs,
)
from tests.crash.processes import PATIENCE_S, GatedWorker, gated_worker

GOOD = make_inputs(FREE)
BAD_CALLS = {
    "layer": (GOOD._replace(layer=17), "layer 17"),
    "id too large": (
        GOOD._replace(topk_ids=np.full_like(GOOD.topk_ids, NUM_EXPERTS)),
        f"expert id {NUM_EXPERTS}; local ids of layer 0 are 0..{NUM_EXPERTS - 1}",
    ),
    "negative id": (GOOD._replace(topk_ids=np.full_like(GOOD.topk_ids, -2)), "expert id -2"),
    "hidden size": (
        GOOD._replace(hidden_states=np.zeros((3, HIDDEN_SIZE + 1), np.float32)),
        f"{HIDDEN_SIZE + 1}.*{HIDDEN_SIZE}",
    ),
    "rows": (GOOD._replace(hidden_states=GOOD.hidden_states[:2]), r"topk_ids has shape \[3, 2\]"),
    "top_k": (
        GOOD._replace(
            topk_ids=np.zeros((3, TOP_K + 1), np.int32),
            topk_weights=np.ones((3, TOP_K + 1), np.float32),
        ),
        rf"topk_ids has shape \[3, {TOP_K + 1}\].*1\.\.{TOP_K}",
    ),
    "dtype": (
        GOOD._replace(hidden_states=GOOD.hidden_states.astype(np.float64)),
        "float64",
    ),
    "dtype of ids": (GOOD._replace(topk_ids=GOOD.topk_ids.astype(np.float32)), "float32"),
    "weights": (GOOD._replace(topk_weights=GOOD.topk_weights[:, :1]), "one weight for each id"),
}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatedWorker]:
    """One for all: no bad call harms it."""
    with gated_worker(tmp_path_factory.mktemp("worker")) as started:
        yield started


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_the_client_refuses_it_and_the_session_lives(client: moeshm.ExpertClient, bad: str) -> None:
    inputs, message = BAD_CALLS[bad]
    with pytest.raises(InvalidCall, match=message):
        client.compute(*inputs)
    assert client.stats().messages == 0
    assert_exact(client.compute(*GOOD), GOOD)
    assert client.stats().reconnects == 0


@pytest.mark.parametrize("bad", ["layer", "id too large", "negative id", "top_k"])
def test_the_worker_refuses_it_and_the_session_lives(client: moeshm.ExpertClient, bad: str) -> None:
    """From a client that does not check."""
    inputs, message = BAD_CALLS[bad]
    if bad == "top_k":
        message = rf"top_k={TOP_K + 1} but layer 0 has top_k={TOP_K}"
    with pytest.raises(InvalidCall, match=message):
        raise answer_to(client, 1000, inputs).error or AssertionError("no error")
    assert answer_to(client, 1001, GOOD).error is None


def answer_to(client: moeshm.ExpertClient, call_id: int, inputs: CallInputs) -> protocol.Reply:
    """Send a call past the client's checks."""
    transport = client._link.session.transport
    transport.write(protocol.pack_call(call_id, *inputs, DType.F32), protocol.CALL)
    record = transport.acquire(PATIENCE_S)
    try:
        reply = protocol.parse_reply(record)
    finally:
        record.release()
    assert reply.call_id == call_id
    return reply


def test_a_backend_that_raises_fails_that_call_only(
    client: moeshm.ExpertClient, worker: GatedWorker
) -> None:
    inputs = [make_inputs(BROKEN if tag % 2 else FREE, tag) for tag in range(8)]
    futures = [client.submit(*each) for each in inputs]
    for future, each in zip(futures, inputs, strict=True):
        if each.layer == BROKEN:
            tag = int(each.hidden_states[0, 0])
            with pytest.raises(WorkerFailed, match=f"RuntimeError: no luck with call {tag}"):
                future.result()
            # Again, the same.
            with pytest.raises(WorkerFailed):
                future.result()
        else:
            assert_exact(future.result(), each)
    assert client.stats().reconnects == 0
    log = worker.process.log.read_until("no luck with call 1")
    assert "layer 2: the backend failed" in log


@pytest.mark.parametrize("timeout_s", [math.inf, math.nan, -1.0, 1e300])
def test_a_senseless_deadline_is_an_answer_not_a_crash(
    client: moeshm.ExpertClient, timeout_s: float
) -> None:
    with pytest.raises(InvalidCall, match="timeout_s"):
        client.compute(*GOOD, timeout_s=timeout_s)
    assert_exact(client.compute(*GOOD), GOOD)


def test_a_call_whose_time_is_over_is_not_computed(
    client: moeshm.ExpertClient, worker: GatedWorker
) -> None:
    late, next_one = make_inputs(FREE, 1001), make_inputs(FREE, 1002)
    with pytest.raises(DeadlineExceeded):
        client.compute(*late, timeout_s=1e-9)
    assert_exact(client.compute(*next_one), next_one)
    while (turn := worker.next_turn()) != (FREE, 1002):
        assert turn != (FREE, 1001)
