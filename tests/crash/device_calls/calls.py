"""Calls whose arrays are on the engine's GPU, for tests: ways to be served, clients, arrays."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest

import moeshm
from moeshm.device_watch import Watch
from tests.crash.arithmetic import (
    FREE,
    HIDDEN_SIZE,
    ArithmeticBackend,
    CallInputs,
    assert_exact,
    make_inputs,
)
from tests.crash.processes import GatedWorker, within
from tests.engine_gpu import PATIENCE_S, GpuArray, Stream

SOON_S = 15.0


class Kind(NamedTuple):
    """How a worker serves slabs, and what a client asks for and gets."""

    has_gpu: bool
    transport: str
    slab: str
    #: Bytes of rows that are given and taken by one launch.
    most_exchanged: int = -1


#: Of calls of 16 tokens; `MORE_TOKENS` of one part are too many.
MOST_EXCHANGED = 16 * HIDDEN_SIZE * 4
MORE_TOKENS = 17
KINDS = {
    "pinned, by the host": Kind(False, "auto", "pinned"),
    "pinned": Kind(True, "shared", "pinned"),
    "device": Kind(True, "auto", "device"),
    "device, by one launch": Kind(True, "auto", "device", MOST_EXCHANGED),
}
#: For tests that wait a lot, and whose subject is the same for all: those that differ most.
unlike_kinds = pytest.mark.parametrize(
    "kind", ["pinned, by the host", "device, by one launch"], indirect=True, scope="module"
)


@contextlib.contextmanager
def connected(
    worker: GatedWorker, kind: Kind, fallback: ArithmeticBackend | None = None
) -> Iterator[moeshm.ExpertClient]:
    """A client with a GPU."""
    transport = kind.transport
    if fallback is not None and kind.slab == "device":
        # By itself a client with a fallback asks for pinned ones.
        transport = "device"
    with moeshm.connect(
        worker.address, transport=transport, engine_device="cuda:0", fallback=fallback
    ) as client:
        assert client.slab == kind.slab
        yield client


def wait_until(is_so: Callable[[], bool]) -> None:
    """Until a thread of this process has got there."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def watch_of(client: moeshm.ExpertClient) -> Watch:
    """Of its session's slab."""
    calls = client._link.device_calls
    assert calls is not None
    return calls._watch


class GpuCall(NamedTuple):
    """A call's arrays on the GPU, and its output."""

    inputs: CallInputs
    arrays: tuple[GpuArray, GpuArray, GpuArray]
    out: GpuArray

    @classmethod
    def of(cls, inputs: CallInputs) -> GpuCall:
        """Copies, and an output that was never written."""
        hidden, ids, weights = (GpuArray(each.copy()) for each in inputs[1:])
        return cls(inputs, (hidden, ids, weights), GpuArray(np.full_like(inputs[1], np.nan)))

    def submit(
        self,
        client: moeshm.ExpertClient,
        stream: Stream,
        timeout_s: float | None = None,
        slice_tokens: int | None = None,
    ) -> moeshm.DeviceFuture:
        """On the stream."""
        future: moeshm.DeviceFuture = client.submit(
            self.inputs.layer, *self.arrays, out=self.out, timeout_s=timeout_s,
            slice_tokens=slice_tokens, stream=stream,
        )  # fmt: skip
        return future

    def check(self) -> None:
        """Its output, where the stream has passed it."""
        assert_exact(self.out.host, self.inputs)


def assert_same_session(client: moeshm.ExpertClient, stream: Stream) -> None:
    """Calls work there, and nothing of earlier ones is left."""
    for tag in (8, 9):
        call = GpuCall.of(make_inputs(FREE, tag))
        with within(SOON_S):
            call.submit(client, stream).wait(PATIENCE_S)
        call.check()
    wait_until(lambda: not watch_of(client).parts)
    # Takes in every reply that came before its own.
    inputs = make_inputs(FREE, 7)
    assert_exact(client.compute(*inputs), inputs)
    assert client._link._pending == {}
    assert client.stats().reconnects == 0
