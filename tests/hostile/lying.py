"""A worker that lies to its client: of plain sockets, or with a real session."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

import moeshm
from moeshm import orders, protocol, session
from moeshm._ring import RingConsumer, RingProducer
from moeshm.session import ControlSocket, Session
from tests.crash.arithmetic import FREE, HIDDEN_SIZE, ArithmeticBackend, make_inputs
from tests.wire import PATIENCE_S, meanwhile

INPUTS = make_inputs(FREE, 1, n_tokens=2)
ROWS = INPUTS.hidden_states.tobytes()
EPOCH = 0xE60C
#: What a lie does with the session of a client, and the id of its first call or order.
Lie = Callable[[Session, int], None]


@contextlib.contextmanager
def listening(folder: Path, serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a worker that serves one connection, meanwhile."""

    def serve_one() -> None:
        with listener.accept()[0] as sock:
            sock.settimeout(PATIENCE_S)
            serve(sock)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.settimeout(PATIENCE_S)
        listener.bind(str(folder / "s"))
        listener.listen()
        with meanwhile(serve_one):
            yield f"unix:{folder / 's'}"


def wait_until_gone(sock: socket.socket) -> None:
    """Until the client hangs up."""
    with contextlib.suppress(ConnectionResetError):
        while sock.recv(1 << 16):
            pass


@contextlib.contextmanager
def lied_to(folder: Path, transport: str, lie: Lie) -> Iterator[moeshm.ExpertClient]:
    """A client whose worker answers its first call or order with a lie, and then waits."""

    def serve(sock: socket.socket) -> None:
        control = ControlSocket(sock)
        with session.accept(control, ArithmeticBackend().layers, "x", 64, PATIENCE_S) as opened:
            record = opened.transport.acquire(PATIENCE_S)
            if record.type == protocol.ORDER:
                order = orders.parse_order(record)
                assert isinstance(order, orders.Hold)
                call_id = order.call_id
            else:
                call_id, _ = protocol.read_call_header(record)
            record.release()
            lie(opened, call_id)
            sock.settimeout(PATIENCE_S)
            wait_until_gone(sock)

    with (
        listening(folder, serve) as address,
        moeshm.connect(address, transport=transport) as client,
    ):
        yield client


def reply_header(**changed: int) -> bytes:
    """Of a reply with rows to `INPUTS`, right but for what is changed."""
    header = {"version": 1, "status": 0, "n_tokens": 2, "call_id": 1, "compute_ns": 0}
    header.update({"hidden_size": HIDDEN_SIZE, "dtype": 0, **changed})
    return struct.pack("<HHIQQIB35x", *header.values())


def replying(data: bytes = ROWS, **changed: int) -> Lie:
    """With a reply, right but for what is changed."""

    def lie(opened: Session, call_id: int) -> None:
        header = reply_header(**{"call_id": call_id, **changed})
        opened.transport.write((header, data), protocol.REPLY)

    return lie


# --- of plain sockets ---------------------------------------------------------------------


def welcome(way: str, /, **changed: Any) -> bytes:
    """A packet that welcomes, right but for what is changed."""
    layers = {FREE: msgspec.to_builtins(ArithmeticBackend().layers[FREE])}
    fields = {
        "type": "welcome",
        "protocol": 1,
        "version": "x",
        "backend": "x",
        "transport": way,
        "stepped_down": "",
        "epoch": EPOCH,
        "max_tokens": 8,
        "layers": layers,
    }
    return b"\0" + msgspec.msgpack.encode({**fields, **changed})


def sending(packets: Sequence[bytes], fds: Sequence[int] = ()) -> Callable[[socket.socket], None]:
    """Answers a hello with these, the fds along with the first, and waits."""

    def serve(sock: socket.socket) -> None:
        sock.recv(1 << 16)
        try:
            for number, packet in enumerate(packets):
                socket.send_fds(sock, [packet], [] if number else list(fds))
        except (BrokenPipeError, ConnectionResetError):
            return
        wait_until_gone(sock)

    return serve


def make_rings(n_calls: int = 1, n_replies: int = 1, epoch: int = EPOCH) -> list[int]:
    """The fds of rings as they should be, so many of them; the caller's to close."""
    fds = []
    for kind, count in ((RingConsumer, n_calls), (RingProducer, n_replies)):
        for _ in range(count):
            with kind.create(None, 64 << 10, epoch=epoch) as ring:
                fds.append(os.dup(ring.fileno()))
    return fds


def own_fds() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))
