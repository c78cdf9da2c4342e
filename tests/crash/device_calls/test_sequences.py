"""A session of more calls than there are sequences."""

from __future__ import annotations

import pytest

from moeshm._claims import Allocator
from moeshm._words import store_word
from moeshm.transport.slab import DONE, GIVEN, SLOT_BYTES, SLOTS, TAKEN
from tests.crash.arithmetic import FREE, make_inputs
from tests.crash.device_calls.calls import (
    SOON_S,
    GpuCall,
    Kind,
    assert_same_session,
    connected,
    watch_of,
)
from tests.crash.processes import GatedWorker, within
from tests.engine_gpu import PATIENCE_S, Movers, Stream

#: Fewer are left than calls are made at a time.
N_LEFT, N_CALLS = 5, 12


def used_up(memory: memoryview, data_bytes: int) -> Allocator:
    """As after so many calls."""
    last = 0xFFFFFFFE - N_LEFT
    for slot in range(SLOTS):
        for flag in (GIVEN, DONE, TAKEN):
            store_word(memory, slot * SLOT_BYTES + flag, last - SLOTS)
    return Allocator(memory, data_bytes, last)


def test_calls_go_on_when_sequences_begin_anew(
    lasting_worker: GatedWorker,
    movers: Movers,
    kind: Kind,
    stream: Stream,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moeshm.device_watch.Allocator", used_up)
    with connected(lasting_worker, kind) as client, within(SOON_S):
        calls = [GpuCall.of(make_inputs(FREE, tag)) for tag in range(N_CALLS)]
        futures = [call.submit(client, stream) for call in calls]
        for call, future in zip(calls, futures, strict=True):
            future.wait(PATIENCE_S)
            call.check()
        assert_same_session(client, stream)
        claim = watch_of(client).allocator.claim(1, 8, 1, 0)
        assert claim is not None
        assert claim.sequence <= 2 * N_CALLS
    assert len(movers.opened) == 1
