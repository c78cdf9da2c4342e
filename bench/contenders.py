"""The Python contenders of `moeshm bench ring`, by name; those of a few lines live here."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from multiprocessing.context import SpawnContext
from typing import Any

from .contender import VIEW_BYTES, Cell, Contender, Endpoint, window
from .contender_iceoryx2 import Iceoryx2
from .contender_kickmsg import Kickmsg

#: What libraries that queue whole messages may hold in one direction.
_QUEUE_BYTES = 64 << 20
_QUEUE_MESSAGES = 1000


class Ring(Contender):
    """moeshm's ring: one each way, sized to the work."""

    module = "moeshm._ring"

    def __init__(self, spin_us: float) -> None:
        self.spin_us = spin_us

    def open(self, link: str, cell: Cell, payload: bytes, is_client: bool) -> Endpoint:
        from moeshm._ring import RingConsumer, RingProducer

        there, back = f"/{link}-there", f"/{link}-back"
        # One record in flight needs room for one; a stream gets at least 256 KiB, which stays
        # in a core's cache, and room for four.
        record_bytes = cell.size + 128
        capacity = record_bytes if cell.mode == "latency" else max(256 << 10, 4 * record_bytes)
        if is_client:
            tx = RingProducer.create(there, capacity, spin_us=self.spin_us)
            rx = RingConsumer.create(back, capacity, spin_us=self.spin_us)
        else:
            rx = RingConsumer.attach(there, spin_us=self.spin_us)
            tx = RingProducer.attach(back, spin_us=self.spin_us)
        received = bytearray(cell.size)
        acquire = rx.acquire

        def receive() -> bytearray:
            record = acquire()
            record.copy_to(received)
            record.release()
            return received

        def close() -> None:
            tx.close()
            rx.close()

        return Endpoint(functools.partial(tx.write, (payload,)), receive, close)


class Pipe(Contender):
    """multiprocessing.Pipe(), duplex as by default: a socket pair."""

    def link(self, context: SpawnContext, cell: Cell) -> Any:
        del cell
        return context.Pipe()

    def open(self, link: Any, cell: Cell, payload: bytes, is_client: bool) -> Endpoint:
        del cell
        end = link[0] if is_client else link[1]
        return Endpoint(functools.partial(end.send_bytes, payload), end.recv_bytes, end.close)


class Queue(Contender):
    """A multiprocessing.Queue each way, with its feeder threads and pickling."""

    def link(self, context: SpawnContext, cell: Cell) -> Any:
        most = window(cell.size, _QUEUE_BYTES, _QUEUE_MESSAGES)
        return context.Queue(most), context.Queue(most)

    def open(self, link: Any, cell: Cell, payload: bytes, is_client: bool) -> Endpoint:
        del cell
        tx, rx = link if is_client else link[::-1]

        def close() -> None:
            for queue in (tx, rx):
                queue.close()
                queue.join_thread()

        return Endpoint(functools.partial(tx.put, payload), rx.get, close)


class Zmq(Contender):
    """pyzmq PAIR sockets over ipc://, without pyzmq's own copies where that pays."""

    module = "zmq"

    def open(self, link: str, cell: Cell, payload: bytes, is_client: bool) -> Endpoint:
        import zmq

        context = zmq.Context()
        socket = context.socket(zmq.PAIR)
        # By default 1000 messages may queue on each side, of 16 MiB too.
        socket.sndhwm = socket.rcvhwm = window(cell.size, _QUEUE_BYTES, _QUEUE_MESSAGES)
        (socket.bind if is_client else socket.connect)(f"ipc://@{link}")
        copy = cell.size < VIEW_BYTES

        def receive() -> Any:
            message: Any = socket.recv(copy=copy)
            return message if copy else message.buffer

        def close() -> None:
            socket.close(linger=0)
            context.term()

        return Endpoint(functools.partial(socket.send, payload, copy=copy), receive, close)


#: Longer than anything waits here, so it never sleeps.
_ALWAYS_SPINNING_US = 1e6

CONTENDERS: Mapping[str, Contender] = {
    "moeshm-spin": Ring(_ALWAYS_SPINNING_US),
    "moeshm-sleep": Ring(0),
    "mp-pipe": Pipe(),
    "mp-queue": Queue(),
    "pyzmq": Zmq(),
    "iceoryx2-poll": Iceoryx2(polls=True),
    "iceoryx2-wait": Iceoryx2(polls=False),
    "kickmsg-poll": Kickmsg(polls=True),
    "kickmsg-wait": Kickmsg(polls=False),
}
