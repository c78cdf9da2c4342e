"""An interrupt while a call is enqueued, at every moment of that: what is on the stream ends, in a
slab that is there until then, and nothing else waits for ever."""

from __future__ import annotations

import itertools

import pytest

import moeshm
from moeshm import device_calls, device_future, device_watch
from tests.crash.arithmetic import FREE, make_inputs
from tests.crash.device_calls.calls import MORE_TOKENS, SOON_S, GpuCall, wait_until, watch_of
from tests.crash.processes import within
from tests.engine_gpu import PATIENCE_S, Movers, Stream
from tests.interrupts import interrupted_at

FILES = device_calls.__file__, device_future.__file__, device_watch.__file__
#: Fewer moments than any of these submits has.
FEWEST_MOMENTS = 10


@pytest.mark.parametrize("n_tokens", [3, MORE_TOKENS])
def test_what_was_launched_ends_in_its_slab(
    client: moeshm.ExpertClient,
    stream: Stream,
    movers: Movers,
    monkeypatch: pytest.MonkeyPatch,
    n_tokens: int,
) -> None:
    monkeypatch.setattr("moeshm.reconnect.FIRST_PAUSE_S", 0.0)
    for moment in itertools.count():
        # In a session that lives.
        GpuCall.of(make_inputs(FREE, 1)).submit(client, stream).wait(PATIENCE_S)
        link, watch, mover = client._link, watch_of(client), movers.opened[-1]
        gate = stream.hold()
        call = GpuCall.of(make_inputs(FREE, 2, n_tokens))
        try:
            with interrupted_at(moment, FILES):
                future = call.submit(client, stream)
        except KeyboardInterrupt:
            if link.loss is not None:
                # All that is over without the stream is settled.
                wait_until(lambda: all(part.is_released for part in watch.parts))  # noqa: B023
                watch.settle()
                if not watch.parts:
                    wait_until(lambda: mover.is_closed)  # noqa: B023
            gate.set()
            with within(SOON_S):
                stream.synchronize()
                wait_until(lambda: not watch.parts)  # noqa: B023
                if link.loss is not None:
                    wait_until(lambda: mover.is_closed)  # noqa: B023
        else:
            gate.set()
            future.wait(PATIENCE_S)
            call.check()
            assert moment > FEWEST_MOMENTS
            return
