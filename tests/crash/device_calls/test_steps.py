"""Long calls of a GPU's arrays are computed in steps, whoever serves the slab."""

from __future__ import annotations

import contextlib

import moeshm
from tests.crash.arithmetic import FREE, STEPPED, make_inputs
from tests.crash.device_calls.calls import GpuCall, Kind, connected
from tests.crash.processes import GatedWorker
from tests.engine_gpu import PATIENCE_S, Stream


def test_a_long_call_lets_anothers_call_pass_after_exactly_one_step(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream, kind: Kind
) -> None:
    long, short = (GpuCall.of(make_inputs(*how)) for how in ((STEPPED, 1, 40), (FREE, 7)))
    with connected(worker, kind) as other, contextlib.closing(Stream()) as its_stream:
        future = long.submit(client, stream)
        assert worker.next_turn() == (STEPPED, 100)
        worker.let_go()
        # Nobody waited.
        assert worker.next_turn() == (STEPPED, 101)
        answer = short.submit(other, its_stream)
        worker.wait_until_queued()
        worker.let_go()
        assert worker.next_turn() == (FREE, 7)
        # The long call is still in its middle.
        answer.wait(PATIENCE_S)
        short.check()
        assert not future.done()
        assert worker.next_turn() == (STEPPED, 102)
        worker.let_go(38)
        future.wait(PATIENCE_S)
        long.check()
