"""An interrupt of a stream, at every moment: each record comes once and whole, whoever was sending
or receiving, and the stream goes on."""

from __future__ import annotations

import collections
import contextlib
import itertools
import socket
import struct
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from moeshm.errors import PeerDied, RingClosed, RingEmpty, RingFull
from moeshm.transport import stream
from moeshm.transport.stream import StreamMessage, StreamTransport
from tests.interrupts import interrupt_often, interrupted_at
from tests.wire import pattern

EPOCH = 7
HEADER = struct.Struct("<QIIQQ")
FILES = (stream.__file__,)
#: Fewer moments than any of these has.
FEWEST_MOMENTS = 10
#: More than the sender's socket holds.
LARGE = 100_000
LONG_S = 60.0


class Scene:
    """A client's end, and a worker that reads and writes bytes only, and only while the client
    waits."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.client = StreamTransport(ours, EPOCH, True)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self.peer.setblocking(False)
        self.client._ready = self._ready  # type: ignore[assignment, method-assign]
        #: What it is to send, a piece at each of the client's waits.
        self.pieces: list[bytes] = []
        self.is_deaf = False
        #: What happens in the client's next wait.
        self.meanwhile: Callable[[], None] = lambda: None
        self._came = b""

    def _ready(self, _events: int, _timeout_ms: float) -> set[int]:
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        if self.pieces:
            self.peer.sendall(self.pieces.pop(0))
        if self.is_deaf:
            return set()
        self.take(7000)
        return {self.client._socket.fileno()}

    def take(self, n_bytes: int) -> None:
        """Of what the client has sent, as the worker."""
        with contextlib.suppress(BlockingIOError):
            self._came += self.peer.recv(n_bytes)

    def records(self) -> list[tuple[int, bytes]]:
        """Types and bytes of all that came; they are whole and in sequence."""
        self.take(1 << 20)
        records: list[tuple[int, bytes]] = []
        at = 0
        while at < len(self._came):
            length, kind, flags, epoch, sequence = HEADER.unpack_from(self._came, at)
            at += HEADER.size
            assert (flags, epoch, sequence) == (0, EPOCH, len(records))
            assert at + length <= len(self._came), "the last of them is not whole"
            records.append((kind, self._came[at : at + length]))
            at += length
        return records

    def close(self) -> None:
        """Both ends, and what refers to itself: it must not be collected in another's moments."""
        self.client.close()
        self.peer.close()
        del self.client._ready


@pytest.fixture
def scene() -> Iterator[Scene]:
    with contextlib.closing(Scene()) as found:
        yield found


def at_every_moment(
    begin: Callable[[Scene], object], do: Callable[[Scene], object]
) -> Iterator[Scene]:
    """Scenes that were begun and in which something was interrupted; each time later."""
    for moment in itertools.count():
        with contextlib.closing(Scene()) as scene:
            begin(scene)
            try:
                with interrupted_at(moment, FILES):
                    do(scene)
            except KeyboardInterrupt:
                yield scene
            else:
                assert moment > FEWEST_MOMENTS
                return


def nothing(_: Scene) -> None:
    """Begins nothing."""


def packed(records: list[bytes]) -> bytes:
    """As they travel."""
    return b"".join(
        HEADER.pack(len(data), 1, 0, EPOCH, number) + data for number, data in enumerate(records)
    )


def in_pieces(data: bytes, *cuts: int) -> list[bytes]:
    """Cut there."""
    return [data[a:b] for a, b in itertools.pairwise((0, *cuts, len(data)))]


def interrupt() -> None:
    raise KeyboardInterrupt


def write_interrupted(scene: Scene, data: bytes, kind: int) -> None:
    """Of which a part has left."""
    scene.meanwhile = interrupt
    mine = bytearray(data)
    with pytest.raises(KeyboardInterrupt):
        scene.client.write((mine,), kind, 0, LONG_S)
    # It is the caller's again.
    mine[:] = bytes(len(mine))


# --- receiving ----------------------------------------------------------------------------


def test_a_receiver_loses_no_record_and_gets_none_twice() -> None:
    sent = [pattern(100), b"", pattern(70_000), pattern(9)]
    taken: list[bytes] = []

    def begin(scene: Scene) -> None:
        taken.clear()
        # In the midst of a header, of a payload, and several at once.
        scene.pieces = in_pieces(packed(sent), 10, 32, 50, 140, 30_000)

    def receive(scene: Scene) -> None:
        with contextlib.suppress(RingEmpty):
            while len(taken) < len(sent):
                # As the link: in one step.
                taken.extend(map(bytes, map(scene.client.acquire, (LONG_S,))))

    for scene in at_every_moment(begin, receive):
        receive(scene)
        assert taken == sent
        with pytest.raises(RingEmpty):
            scene.client.acquire(0.0)


def test_what_a_sender_took_in_is_there_after_an_interrupt() -> None:
    sent = [pattern(100, n) for n in range(4)]

    def begin(scene: Scene) -> None:
        scene.pieces = in_pieces(packed(sent), 10, 50, 300, 310)

    for scene in at_every_moment(
        begin, lambda scene: scene.client.write((pattern(LARGE),), 5, 0, LONG_S)
    ):
        assert [bytes(scene.client.acquire(LONG_S)) for _ in sent] == sent


def test_signals_at_any_moment_lose_no_record() -> None:
    """Also as `acquire` returns, where no function is entered."""
    worker, fds = StreamTransport.create(EPOCH)
    client = StreamTransport.attach(fds[0], EPOCH)
    taken: collections.deque[StreamMessage] = collections.deque()

    def go_on() -> None:
        client.write((b"as long as it likes",), 1, 0, LONG_S)
        with contextlib.suppress(RingEmpty):
            while True:
                taken.extend(map(worker.acquire, (0.0,)))

    interrupt_often(300, go_on)
    go_on()
    assert [record.sequence for record in taken] == list(range(len(taken)))
    client.close()
    with pytest.raises(PeerDied):
        worker.acquire(0.0)


# --- sending ------------------------------------------------------------------------------


def test_a_record_whose_sender_is_interrupted_leaves_whole_or_not_at_all() -> None:
    data, was_sent = pattern(LARGE), set()
    mine = np.frombuffer(data, np.uint8).copy()

    def send(scene: Scene) -> None:
        mine[:] = np.frombuffer(data, np.uint8)
        scene.client.write((b"head", mine), 5, 0, LONG_S)

    for scene in at_every_moment(nothing, send):
        # It is the caller's again.
        mine[:] = 0
        scene.client.write((b"after",), 6, 0, LONG_S)
        *before, after = scene.records()
        assert after == (6, b"after")
        assert before in ([], [(5, b"head" + data)])
        was_sent.add(bool(before))
    assert True in was_sent


def test_who_finishes_anothers_record_may_be_interrupted_as_well() -> None:
    first, second = pattern(LARGE, 1), pattern(LARGE, 2)

    for scene in at_every_moment(
        lambda scene: write_interrupted(scene, first, 1),
        lambda scene: scene.client.write((second,), 2, 0, LONG_S),
    ):
        scene.client.write((b"third",), 3, 0, LONG_S)
        assert scene.records() in (
            [(1, first), (3, b"third")],
            [(1, first), (2, second), (3, b"third")],
        )


@pytest.mark.parametrize("timeout_s", [0.0, 0.01])
def test_without_room_for_the_rest_of_another_a_record_does_not_begin(
    scene: Scene, timeout_s: float
) -> None:
    data = pattern(LARGE)
    write_interrupted(scene, data, 1)
    scene.is_deaf = True
    # Also where it is of no use any more: it ends no session.
    scene.client.finish_by = time.monotonic()
    for _ in range(3):
        with pytest.raises(RingFull, match="whose sender was interrupted"):
            scene.client.write((b"refused",), 2, 0, timeout_s)
    assert not scene.client.is_closed
    scene.is_deaf = False
    scene.client.write((b"sent",), 3, 0, LONG_S)
    assert scene.records() == [(1, data), (3, b"sent")]


def test_the_rest_of_a_record_may_take_several_senders(scene: Scene) -> None:
    """Who has little time sends what there is room for."""
    data, n_refused = pattern(LARGE), 0
    write_interrupted(scene, data, 1)
    while True:
        try:
            scene.client.write((b"sent",), 2, 0, 0.0)
            break
        except RingFull:
            n_refused += 1
    assert n_refused > 1
    assert scene.records() == [(1, data), (2, b"sent")]


def test_a_close_sends_no_rest(scene: Scene) -> None:
    write_interrupted(scene, pattern(LARGE), 1)
    scene.client.close()
    with pytest.raises(RingClosed):
        scene.client.write((b"x",), 2, 0, LONG_S)


def test_the_other_side_may_go_before_it_has_the_rest(scene: Scene) -> None:
    write_interrupted(scene, pattern(LARGE), 1)
    scene.peer.close()
    with pytest.raises(PeerDied):
        scene.client.write((b"x",), 2, 0, LONG_S)


@pytest.mark.parametrize("finish_by", [0.0, None], ids=["late", "the other side takes nothing"])
def test_who_runs_out_of_time_in_the_midst_of_a_record_ends_the_stream(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, finish_by: float | None
) -> None:
    monkeypatch.setattr("moeshm._stream.STALL_S", 0.01)
    scene.client.finish_by = finish_by
    scene.is_deaf = True
    with pytest.raises(PeerDied if finish_by is None else RingFull):
        scene.client.write((pattern(LARGE),), 1, 0, LONG_S)
    assert scene.client.is_closed
