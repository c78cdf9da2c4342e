"""Target: a live client, and a worker that gives it one wrong answer an execution.

The client gets a typed error, or just the rows that came in the reply, and stays what it was.
"""

from __future__ import annotations

import contextlib
import mmap
import select
import socket
import struct
import tempfile
from pathlib import Path

from moeshm import errors, handshake, protocol, session
from moeshm.errors import MoeshmError
from moeshm.handshake import Welcome
from moeshm.session import ControlSocket, Session
from moeshm.transport.shared import SharedTransport
from moeshm.transport.stream import StreamTransport
from tests.crash.arithmetic import ArithmeticBackend
from tests.crash.processes import PATIENCE_S
from tests.fuzz import handshakes, records
from tests.fuzz.choices import Choices
from tests.fuzz.keeper import Keeper
from tests.fuzz.lied_client import INPUTS
from tests.fuzz.ring import PLACES
from tests.fuzz.scenes import LOOK_EVERY, TRANSPORTS, Scene
from tests.fuzz.victims import Victim

_PACKET_BYTES = 32 << 10


class _LyingSocket(ControlSocket):
    """Sends a welcome that is not what it was, once it is told to."""

    lie: Choices | None = None

    def send(self, message: handshake.ControlMessage, fds: list[int], timeout_s: float) -> None:
        """As `ControlSocket.send`."""
        if self.lie is None or not isinstance(message, Welcome):
            super().send(message, fds, timeout_s)
            return
        data = handshakes.changed_welcome(message, self.lie)[: _PACKET_BYTES - 1]
        passed = (fds + [self.fileno()] * 5)[: self.lie.near(len(fds), 8) % 7]
        with contextlib.suppress(OSError):
            socket.send_fds(self._socket, [b"\0" + data], passed)


class _Scene(Scene[Session]):
    """The client, and the worker's sessions with it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        path = str(Path(self._folder.name) / "s")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        self._listener.listen()
        self._listener.settimeout(PATIENCE_S)
        super().__init__(Victim("tests.fuzz.lied_client", f"unix:{path}"))
        assert self.victim.process.output.read_until("ready") == "ready\n"

    def call(self, transport: str, lie: Choices | None) -> tuple[Session, int] | None:
        """Have the client make a call; its session and the call's id. None: it did not get so far,
        as the welcome was a lie."""
        if lie is not None:
            self.drop(transport)
        opened = self.sessions.get(transport)
        if opened is not None and _is_left(opened):
            self.drop(transport)
            opened = None
        # Or its client would only find that its session is gone.
        self.victim.process.say(f"{transport} {'anew' if opened is None else ''}")
        if opened is None:
            opened = self._open(transport, lie)
        if opened is None:
            return None
        try:
            record = opened.transport.acquire(PATIENCE_S)
        except MoeshmError:
            # It hurt itself the last time, and the client only found that its session was over.
            self.said()
            self.drop(transport)
            return self.call(transport, lie)
        call_id, _ = protocol.read_call_header(record)
        record.release()
        return opened, call_id

    def _open(self, transport: str, lie: Choices | None) -> Session | None:
        while True:
            control = _LyingSocket(self._listener.accept()[0])
            control.lie = lie
            try:
                opened = session.accept(control, ArithmeticBackend().layers, "x", 8, PATIENCE_S)
            except MoeshmError:
                control.close()
                continue
            break
        if lie is not None:
            # Whatever it takes it for, it cannot be served.
            self.said()
            opened.close()
            return None
        self.sessions[transport] = opened
        return opened

    def said(self) -> str:
        """What the client says next."""
        try:
            return self.victim.process.output.read_until("\n").strip()
        except EOFError:
            self.victim.check_alive()
            raise

    def look(self) -> None:
        """A call over each transport is answered, and the client says with what."""
        for transport in TRANSPORTS:
            called = self.call(transport, None)
            assert called is not None
            _answer(*called)
            assert self.said() == INPUTS.hidden_states.tobytes().hex()
        if self.n_executions == LOOK_EVERY:
            self.victim.remember()

    def close(self) -> None:
        """End all."""
        self._listener.close()
        super().close()
        self._folder.cleanup()


_scene = Keeper(_Scene)


def close() -> None:
    """Let go of the client."""
    _scene.close()


def seeds() -> list[bytes]:
    """Every kind of lie over every transport."""
    return [bytes([kind, *more]) for kind in range(8) for more in ([], [1] * 8, [0, 3, 200, 7])]


def test_one(data: bytes) -> str:
    """What the client made of it; AssertionError for what it must not."""
    choices = Choices(data)
    how = choices.byte()
    scene = _scene()
    transport, kind = TRANSPORTS[how & 1], how >> 1 & 7
    if kind == 0:
        scene.call(transport, choices)
        scene.count()
        return f"{transport}: welcome"
    called = scene.call(transport, None)
    assert called is not None
    opened, call_id = called
    sent = _lie(opened, call_id, choices, kind == 1)
    said = scene.said()
    if said.isalpha() and said in vars(errors):
        outcome = said
        if not issubclass(vars(errors)[said], errors.InvalidCall | errors.WorkerFailed):
            scene.drop(transport)
    else:
        assert any(bytes.fromhex(said) == each[64:] for each in sent), f"{said} was never sent"
        outcome = "rows"
    scene.count()
    return f"{transport}: {outcome}"


def _is_left(opened: Session) -> bool:
    """The client has closed it."""
    return bool(select.select([opened.control.fileno()], [], [], 0)[0]) or opened.peer_is_gone()


def _answer(opened: Session, call_id: int) -> None:
    """Truly, or nearly: the rows that came."""
    rows = INPUTS.hidden_states
    header = struct.pack("<HHIQQIB35x", 1, 0, 2, call_id, 0, rows.shape[1], 0)
    opened.transport.write((header, rows), protocol.REPLY)


def _lie(opened: Session, call_id: int, choices: Choices, damages: bool) -> list[bytes]:
    """Send replies, and damage what they come by; the replies."""
    sent = []
    for _ in range(1 + choices.below(2)):
        packed = records.make_reply(choices)
        if choices.byte() < 224 and len(packed) >= 16:
            packed = packed[:8] + struct.pack("<Q", call_id) + packed[16:]
        kind = choices.near(protocol.REPLY, 32)
        try:
            opened.transport.write((packed,), kind & 0xFFFFFFFF, 0, 0.0)
        except MoeshmError:
            break
        sent.append(packed)
    if damages:
        if isinstance(opened.transport, SharedTransport):
            _damage(opened.transport, choices)
        elif isinstance(opened.transport, StreamTransport):
            with contextlib.suppress(OSError):
                opened.transport._socket.send(choices.take(64) or b"\0")
    return sent


def _damage(transport: SharedTransport, choices: Choices) -> None:
    """Words of the ring's control page; the record was published, and is read or is not."""
    ring = (transport._tx, transport._rx)[choices.below(2)]
    with contextlib.suppress(MoeshmError), mmap.mmap(ring.fileno(), 0) as memory:
        at = PLACES[choices.below(len(PLACES))]
        (old,) = struct.unpack_from("<Q", memory, at)
        memory[at : at + 8] = struct.pack("<Q", choices.near(old, 64))
