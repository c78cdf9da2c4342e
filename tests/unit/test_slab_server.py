"""The worker's side of a slab: what it offers, and that it asks a device that does not answer."""

from __future__ import annotations

import os

import msgspec
import numpy as np
import pytest

from moeshm._words import load_word, store_word
from moeshm.backends import BetweenSteps, SlabCall
from moeshm.dtypes import DType
from moeshm.errors import DeviceError, DeviceLost
from moeshm.handshake import Hello
from moeshm.slab_server import SlabServer
from moeshm.transport.slab import DONE, PAGE_BYTES, SLOT_BYTES, Places
from tests.crash.arithmetic import (
    FREE,
    HIDDEN_SIZE,
    NUM_EXPERTS,
    STEPPED,
    ArithmeticBackend,
    assert_exact,
    make_inputs,
)
from tests.crash.stepping import SteppingArithmetic
from tests.steps import AlwaysDue, NeverDue


class Slab:
    """A `WorkerSlab` of a device that forgets calls."""

    def __init__(self, memory: memoryview, handle: bytes) -> None:
        self.memory = memory
        self.handle = handle
        self.is_lost = False
        self.n_waits = 0

    def share_of_step(self, call: SlabCall) -> float:
        """As `WorkerSlab.share_of_step`."""
        return call.n_tokens / STEP_TOKENS[call.layer]

    def prepare(self, call: SlabCall) -> None:
        """As `WorkerSlab.prepare`."""

    def enqueue(self, _call: SlabCall, between_steps: BetweenSteps) -> None:
        """As `WorkerSlab.enqueue`: as if it were of two steps."""
        if between_steps.is_due():
            between_steps()

    def wait(self) -> None:
        """As `WorkerSlab.wait`."""
        self.n_waits += 1
        if self.is_lost:
            raise DeviceLost("it fell off the bus")

    def close(self) -> None:
        """As `WorkerSlab.close`."""
        self.memory = memoryview(b"")


class Backend(ArithmeticBackend):
    """A `SlabUser` that may refuse."""

    vendor = "cuda"
    bus_id = "0000:1b:00.0"

    def __init__(self, refuses: tuple[str, ...] = ()) -> None:
        super().__init__()
        self._refuses = refuses
        self.slabs: list[Slab] = []

    def open_slab(self, memory: memoryview, device_bytes: int) -> Slab:
        """As `SlabUser.open_slab`."""
        if ("device" if device_bytes else "pinned") in self._refuses:
            raise DeviceError("not this one")
        self.slabs.append(Slab(memory, b"here" if device_bytes else b""))
        return self.slabs[-1]


def offer(server: SlabServer, slab: str, vendor: str = "cuda") -> tuple[str, str]:
    """The kind that a client gets, and why it is not another."""
    hello = Hello(
        protocol=1, version="", transport="auto", batch_capacity=1, slab=slab, vendor=vendor
    )
    made, fd, why = server.offer(hello, PAGE_BYTES)
    os.close(fd)
    return made.kind, why


CALL = SlabCall(
    FREE, 1, HIDDEN_SIZE, 2, DType.F32, Places(3, 0, 256, 512, 768), 9, NUM_EXPERTS, None
)
#: By layer: of a step.
STEP_TOKENS = {FREE: 1024, STEPPED: 64}
#: Of a call of three tokens: values of a token, and where they are.
AREAS = (HIDDEN_SIZE, 0), (2, 256), (2, 512), (HIDDEN_SIZE, 768)


def test_a_device_that_takes_long_is_asked() -> None:
    backend = Backend()
    server = SlabServer(backend)
    offer(server, "pinned")
    (slab,) = backend.slabs
    server.check()
    server.compute(CALL, NeverDue())
    assert slab.n_waits == 0
    server.check()
    assert slab.n_waits == 1
    # Once is enough: it waited.
    server.check()
    assert slab.n_waits == 1
    server.compute(CALL, NeverDue())
    store_word(slab.memory, 3 * 512 + DONE, 9)
    server.check()
    assert slab.n_waits == 1
    store_word(slab.memory, 3 * 512 + DONE, 8)
    server.compute(CALL, NeverDue())
    slab.is_lost = True
    with pytest.raises(DeviceLost, match="fell off"):
        server.check()
    server.close()
    server.close()


@pytest.mark.parametrize(
    ("refuses", "wish", "vendor", "kind", "words"),
    [
        ((), "auto", "cuda", "device", ""),
        ((), "auto", "hip", "pinned", "no device slab: the worker computes on 'cuda'"),
        ((), "pinned", "cuda", "pinned", ""),
        (("device",), "auto", "cuda", "pinned", "no device slab: not this one"),
        (("device", "pinned"), "auto", "cuda", "pinned", "the host serves the slab"),
    ],
)
def test_what_is_offered(
    refuses: tuple[str, ...], wish: str, vendor: str, kind: str, words: str
) -> None:
    """And the client hears why it is not better."""
    server = SlabServer(Backend(refuses))
    found, why = offer(server, wish, vendor)
    assert found == kind
    assert words in why
    assert bool(words) == bool(why)
    assert server.summary.startswith(f"{kind} slab of 2 MiB")
    assert ("served by the host" in server.summary) == ("pinned" in refuses)
    server.close()


def test_why_there_is_none() -> None:
    with pytest.raises(DeviceError, match="no device slab: not this one"):
        offer(SlabServer(Backend(("device",))), "device")
    with pytest.raises(DeviceError, match="computes on 'cuda', the engine on 'hip'"):
        offer(SlabServer(Backend()), "device", "hip")
    with pytest.raises(DeviceError, match="computes on 'arithmetic', the engine on 'cuda'"):
        offer(SlabServer(ArithmeticBackend()), "device")


def test_a_session_that_is_far_ahead_waits() -> None:
    """Others' calls are behind its own on the device."""
    backend = Backend()
    server = SlabServer(backend)
    offer(server, "pinned")
    (slab,) = backend.slabs
    waits = []
    for _ in range(48):
        server.prepare(CALL)
        server.compute(CALL, NeverDue())
        waits.append(slab.n_waits)
    assert waits == [n // 16 for n in range(48)]
    slab.is_lost = True
    with pytest.raises(DeviceLost):
        server.prepare(CALL)
    server.close()


def test_a_call_that_would_be_too_much_waits_before_it_is_begun() -> None:
    """By what part of a step it is, not by tokens. One alone may be as long as it likes."""
    backend = Backend()
    server = SlabServer(backend)
    offer(server, "pinned")
    (slab,) = backend.slabs
    waits = []
    for layer, n_tokens in (
        (FREE, 512), (FREE, 512), (FREE, 1), (STEPPED, 32), (STEPPED, 31), (FREE, 16),
        (FREE, 1024), (FREE, 5000), (FREE, 1),
    ):  # fmt: skip
        call = msgspec.structs.replace(CALL, layer=layer, n_tokens=n_tokens)
        server.prepare(call)
        server.compute(call, NeverDue())
        waits.append(slab.n_waits)
    assert waits == [0, 0, 1, 1, 1, 2, 3, 4, 5]
    server.close()


def test_the_device_computes_a_slabs_call_in_steps() -> None:
    """What its pause raises passes, and nothing is left to ask the device about."""
    backend = Backend()
    server = SlabServer(backend)
    offer(server, "pinned")
    (slab,) = backend.slabs
    due = AlwaysDue()
    server.compute(CALL, due)
    assert due.n == 1
    server.check()
    assert slab.n_waits == 1

    def stop() -> None:
        raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        server.compute(CALL, AlwaysDue(stop))
    server.check()
    assert slab.n_waits == 1
    server.close()


def test_the_host_computes_a_slabs_call_in_steps() -> None:
    """What its pause raises passes, and the call is not done then."""
    server = SlabServer(SteppingArithmetic(lambda _layer, _tag: None))
    offer(server, "pinned")
    assert server._segment is not None
    memory, data = server._segment.memory, server._segment.data
    hidden, ids, weights = (np.frombuffer(data, np.float32, 3 * n, at) for n, at in AREAS[:3])
    _, hidden_states, topk_ids, topk_weights = inputs = make_inputs(STEPPED, 5)
    hidden[:], weights[:] = hidden_states.ravel(), topk_weights.ravel()
    ids.view(np.int32)[:] = topk_ids.ravel()
    call = msgspec.structs.replace(
        CALL, layer=STEPPED, n_tokens=3, places=Places(3, *(at for _, at in AREAS))
    )

    def stop() -> None:
        raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        server.compute(call, AlwaysDue(stop))
    assert load_word(memory, 3 * SLOT_BYTES + DONE) == 0
    due = AlwaysDue()
    server.compute(call, due)
    assert due.n == 2
    assert load_word(memory, 3 * SLOT_BYTES + DONE) == call.sequence
    out = np.frombuffer(data, np.float32, 3 * HIDDEN_SIZE, AREAS[3][1]).reshape(3, HIDDEN_SIZE)
    assert_exact(out.copy(), inputs)
    del hidden, ids, weights, out, memory, data
    server.close()
