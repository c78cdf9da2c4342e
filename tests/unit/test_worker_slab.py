"""Descriptors at the worker: what is done before a call's arrays are there, and what after."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from moeshm import protocol
from moeshm._ring import RingConsumer, RingProducer
from moeshm._words import load_word, store_word
from moeshm.access import Peer
from moeshm.backends import BetweenSteps, SlabCall
from moeshm.descriptors import DESCRIPTOR
from moeshm.errors import DeviceError, DeviceLost, InvalidCall, PeerDied
from moeshm.handshake import Hello
from moeshm.holdings import Holdings
from moeshm.orders import Release
from moeshm.slab_server import SlabServer
from moeshm.transport.slab import DONE, GIVEN, PAGE_BYTES, REFUSED, SLOT_BYTES, TOLD
from moeshm.turns import Turns
from moeshm.views import SessionViews
from moeshm.worker import SessionServer, _BetweenSteps
from tests.crash.arithmetic import FREE, HIDDEN_SIZE, ArithmeticBackend

_FORM = struct.Struct("<HHIQqIIHBBIII4Q48x")
_PATIENCE_NS = 10_000_000_000
_SLOT = 3


class Slab:
    """A `WorkerSlab` whose client gives a call's arrays when that is prepared, and not before."""

    handle = b""

    def __init__(self, memory: memoryview, turns: Turns) -> None:
        self.memory = memory
        self._turns = turns
        self.seen: list[str] = []
        #: What `prepare` raises.
        self.error: Exception | None = None
        #: What is done between two steps of a call.
        self.pause: Callable[[BetweenSteps], None] = lambda _: None

    def share_of_step(self, _call: SlabCall) -> float:
        """As `WorkerSlab.share_of_step`."""
        return 0.0

    def prepare(self, call: SlabCall) -> None:
        """As `WorkerSlab.prepare`."""
        assert not self._turns._taken.locked(), "others have to wait for this client"
        self.seen.append(f"prepare {call.sequence}")
        if self.error is not None:
            raise self.error
        store_word(self.memory, call.places.slot * SLOT_BYTES + GIVEN, call.sequence)

    def enqueue(self, call: SlabCall, between_steps: BetweenSteps) -> None:
        """As `WorkerSlab.enqueue`."""
        assert self._turns._taken.locked()
        self.pause(between_steps)
        self.seen.append(f"enqueue {call.sequence}")

    def wait(self) -> None:
        """As `WorkerSlab.wait`."""

    def close(self) -> None:
        """As `WorkerSlab.close`."""
        self.memory = memoryview(b"")


class Backend(ArithmeticBackend):
    """A `SlabUser`."""

    vendor = "cuda"
    bus_id = ""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self._turns = turns
        self.slabs: list[Slab] = []

    def open_slab(self, memory: memoryview, device_bytes: int) -> Slab:
        """As `SlabUser.open_slab`."""
        assert not device_bytes
        self.slabs.append(Slab(memory, self._turns))
        return self.slabs[-1]


class Served:
    """A session's server, and a client that writes into its ring."""

    def __init__(self, producer: RingProducer, consumer: RingConsumer) -> None:
        self.turns = turns = Turns()
        backend = Backend(turns)
        self.slabs = SlabServer(backend)
        hello = Hello(protocol=1, version="", transport="auto", batch_capacity=1, slab="pinned")
        _, fd, _ = self.slabs.offer(hello, PAGE_BYTES)
        os.close(fd)
        (self.slab,) = backend.slabs
        #: Replies' texts; each is an error.
        self.said: list[str] = []
        transport = SimpleNamespace(write=lambda parts, *_how: self.said.append(parts[1].decode()))
        self.is_gone = False
        session: Any = SimpleNamespace(
            transport=transport,
            welcome=SimpleNamespace(max_tokens=8),
            peer_is_gone=lambda: self.is_gone,
            control=SimpleNamespace(peer_pid=1, peer=Peer(1, 0, 0)),
        )
        self._producer, self._consumer = producer, consumer
        views = SessionViews(Holdings(backend))
        self.server = SessionServer(session, views, turns, threading.Event(), self.slabs)

    def answer(self, record: bytes, kind: int) -> None:
        """As the session's thread does."""
        self._producer.write((record,), kind)
        self.server._answer(self._consumer.acquire(1.0))

    def call(self, sequence: int, **changed: int) -> None:
        """To a layer that is here, with arrays of two tokens."""
        numbers = {
            "layer": FREE, "call_id": sequence, "deadline": time.monotonic_ns() + _PATIENCE_NS,
            "n_tokens": 2, "hidden_size": HIDDEN_SIZE, "top_k": 2, "are_global": 0, "dtype": 0,
            "view": 0, "slot": _SLOT, "sequence": sequence, "x": 0, "ids": 256, "weights": 512,
            "out": 768, **changed,
        }  # fmt: skip
        self.answer(_FORM.pack(1, 128, *numbers.values()), DESCRIPTOR)

    def flag(self, which: int) -> int:
        """Of the calls' slot."""
        return load_word(self.slab.memory, _SLOT * SLOT_BYTES + which)


@pytest.fixture
def served() -> Iterator[Served]:
    with (
        RingProducer.create(None, 4096) as producer,
        RingConsumer.attach(producer.fileno()) as consumer,
    ):
        made = Served(producer, consumer)
        with contextlib.closing(made.slabs):
            yield made


@pytest.mark.parametrize("are_global", [0, 1])
def test_calls_are_prepared_before_their_arrays_are_there_and_without_the_turn(
    served: Served, are_global: int
) -> None:
    """The first, which is read the long way, and those that are plain."""
    for sequence in (1, 2, 3):
        served.call(sequence, are_global=are_global)
        assert served.slab.seen == [f"prepare {sequence}", f"enqueue {sequence}"]
        served.slab.seen.clear()
    assert (served.said, served.server.calls, served.server.rows) == ([], 3, 6)


@pytest.mark.parametrize("n_before", [0, 2])
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"deadline": 1}, "the deadline passed"),
        ({"n_tokens": 9}, "n_tokens=9"),
        ({"top_k": 3}, "top_k=3"),
        ({"view": 1}, "view 1 is not held"),
        ({"layer": 77}, "layer 77 is not on this worker"),
    ],
)
def test_what_cannot_be_is_refused_and_the_session_goes_on(
    served: Served, n_before: int, changed: dict[str, int], says: str
) -> None:
    for sequence in range(n_before):
        served.call(sequence)
    served.call(9, **changed)
    assert [says in text for text in served.said] == [True]
    assert (served.flag(REFUSED), served.flag(DONE)) == (TOLD, 9)
    served.call(10)
    assert served.slab.seen[-1] == "enqueue 10"
    assert len(served.said) == 1


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (InvalidCall("no such rows"), "no such rows"),
        (DeviceError("no room"), "DeviceError: no room"),
        (DeviceLost("off the bus"), "DeviceLost: off the bus"),
    ],
)
def test_a_call_that_cannot_be_prepared(served: Served, error: Exception, says: str) -> None:
    """Nobody waits for its arrays."""
    served.slab.error = error
    served.call(9)
    assert [says in text for text in served.said] == [True]
    assert (served.flag(REFUSED), served.flag(DONE)) == (TOLD, 9)
    assert served.slab.seen == ["prepare 9"]
    assert (served.server.device_lost is not None) == isinstance(error, DeviceLost)


def test_a_call_whose_deadline_passes_between_two_steps(served: Served) -> None:
    """Its client is told, and the session goes on."""

    def let_it_pass(steps: BetweenSteps) -> None:
        assert isinstance(steps, _BetweenSteps)
        steps._deadline_ns = 1
        assert steps.is_due()
        steps()

    served.slab.pause = let_it_pass
    served.call(9)
    assert ["passed between two steps of the call" in text for text in served.said] == [True]
    assert (served.flag(REFUSED), served.flag(DONE)) == (TOLD, 9)
    assert (served.server.calls, served.turns._taken.locked()) == (0, False)
    served.slab.pause = lambda _: None
    served.call(10)
    assert (served.server.calls, len(served.said)) == (1, 1)


def test_a_client_that_leaves_between_two_steps(served: Served) -> None:
    """Nobody is told, and the turn is free."""

    def leave(steps: BetweenSteps) -> None:
        served.is_gone = True
        assert steps.is_due()
        steps()

    served.slab.pause = leave
    with pytest.raises(PeerDied, match="its call is not finished"):
        served.call(9)
    assert (served.said, served.flag(DONE)) == ([], 0)
    assert not served.turns._taken.locked()


def test_a_view_that_was_released_is_not_known_any_more(served: Served) -> None:
    served.call(1)
    served.call(2)
    served.answer(msgspec.msgpack.encode(Release(view=0)), protocol.ORDER)
    served.call(3)
    assert ["view 0 is not held" in text for text in served.said] == [True]
    assert served.slab.seen[-1] == "enqueue 2"
