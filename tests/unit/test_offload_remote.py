"""What an offload knows of one worker and of the ways to it."""

from __future__ import annotations

from typing import Any

from moeshm.errors import DeadlineExceeded, WorkerDied
from moeshm.offload.remote import Remote
from moeshm.policy import Policy
from tests.unit.offload_clients import FakeClient


def test_a_forward_keeps_the_ways_that_were_down_when_it_began() -> None:
    """Others lose the worker meanwhile: a forward that is told of that in the middle would find no
    way left to a worker that it chose for having one."""
    client: Any = FakeClient((0, 1))
    remote = Remote("w", {"shared": client, "stream": client}, Policy(), is_ours=False)
    remote.failed("shared", DeadlineExceeded("late"))
    remote.answered("shared")
    at_its_begin = remote.down_ways()
    assert at_its_begin == frozenset()
    remote.failed("stream", WorkerDied("gone"))
    assert at_its_begin == frozenset()
    assert remote.down_ways() == {"stream"}
