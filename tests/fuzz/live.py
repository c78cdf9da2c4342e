"""Target: a live worker, and a client that sends it one wrong thing an execution.

After each, a good call of the same session is answered exactly, or the worker has ended the
session and said why. A bystander is served exactly all the time, and the worker stays what it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import socket
import struct
import time
from typing import Any

import numpy as np

import moeshm
from moeshm import protocol
from moeshm.dtypes import DType
from moeshm.transport.slab import FLAGS_BYTES, GIVEN, SLOT_BYTES, SLOTS
from tests.crash.arithmetic import FREE, HIDDEN_SIZE, assert_exact, make_inputs
from tests.crash.processes import PATIENCE_S
from tests.fuzz import handshakes, records, slabs
from tests.fuzz.choices import Choices
from tests.fuzz.keeper import Keeper
from tests.fuzz.ring import PLACES
from tests.fuzz.scenes import TRANSPORTS, Scene
from tests.fuzz.victims import Victim
from tests.hostile.attacker import (
    ABORTED,
    CONSUMER_WORD,
    PAGE,
    RECORD,
    Attacker,
)

#: A session's rings are not used to their ends.
_MOST_OF_A_SESSION = 150
_PING = make_inputs(FREE, 5, n_tokens=2)
#: For a reply that a client may have made unreadable by itself.
_SPOILED_PATIENCE_S = 0.2
_WIDTHS = {"type": 32, "flags": 32, "epoch": 64, "sequence": 64, "length": 64}
_REPLY_HEADER = struct.Struct("<HHIQQIB35x")
_SYS_FUTEX, _FUTEX_WAKE = 202, 1
_syscall: Any = ctypes.CDLL(None, use_errno=True).syscall


class _Over(Exception):
    """The worker ended the session; with its reason."""


class _Client(Attacker):
    """An attacker who notices the session's end while it waits, and wakes a worker that sleeps."""

    def __init__(self, address: str, transport: str) -> None:
        super().__init__(address)
        # Of the slab's arrays, too, there is something to check.
        self.shake_hands(transport, "pinned")
        self.n_sent = 0
        #: It damaged what it reads itself: what comes proves nothing.
        self.is_spoiled = False

    def poke(self, ring: mmap.mmap, offset: int, value: int) -> None:
        """As `Attacker.poke`, and the worker is told."""
        super().poke(ring, offset, value)
        address = ctypes.addressof(ctypes.c_char.from_buffer(ring, offset))
        _syscall(_SYS_FUTEX, ctypes.c_void_p(address), _FUTEX_WAKE, 1, None, None, 0)

    def ping(self, call_id: int) -> int:
        """Send a good call and receive until its reply, which is exact; how many came before.
        _Over: the worker ended the session."""
        parts = protocol.pack_call(call_id, *_PING, DType.F32)
        n_before = 0
        try:
            self.send(b"".join(bytes(each) for each in parts))
        except (BrokenPipeError, ConnectionResetError):
            raise _Over(self.last_word()) from None
        deadline = time.monotonic() + (_SPOILED_PATIENCE_S if self.is_spoiled else PATIENCE_S)
        while True:
            reply = self._take(deadline)
            _, status, n_tokens, its_id, *_ = _REPLY_HEADER.unpack_from(reply)
            if its_id == call_id:
                if reply[64:].startswith(b"view 0 is not held"):
                    raise _Over("it released what it had")
                assert (status, n_tokens) == (0, 2), reply
                rows = np.frombuffer(reply, np.float32, offset=64).reshape(2, HIDDEN_SIZE)
                assert_exact(rows, _PING)
                return n_before
            n_before += 1

    def _take(self, deadline: float) -> bytes:
        """The next reply; _Over."""
        if self.stream is not None:
            (length, *_) = RECORD.unpack(self._part(RECORD.size))
            return self._part(length)
        while True:
            for _ in range(400):
                if self.bytes_of_replies() > self._read_position:
                    break
                os.sched_yield()
            else:
                # A reply is seen at the latest after this.
                if self._has_word(1):
                    raise _Over(self.last_word())
                assert time.monotonic() < deadline, "the worker hangs"
                continue
            start = PAGE + self._read_position
            length, _, flags, _, _ = RECORD.unpack_from(self.replies, start)
            gap = 64 if length > 64 else 32
            self._read_position += -(-(gap + length) // 64) * 64
            self.poke(self.replies, CONSUMER_WORD, self._read_position << 1)
            if not flags & ABORTED:
                return self.replies[start + gap : start + gap + length]

    def _part(self, size: int) -> bytes:
        assert self.stream is not None
        data = b""
        while len(data) < size:
            try:
                more = self.stream.recv(size - len(data))
            except ConnectionResetError:
                more = b""
            except TimeoutError:
                raise AssertionError("the worker hangs") from None
            if not more:
                raise _Over(self.last_word())
            data += more
        return data

    def _has_word(self, timeout_ms: float) -> bool:
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        return bool(poll.poll(timeout_ms))


class _Scene(Scene[_Client]):
    """The worker, its bystanders and the attacker's sessions."""

    def __init__(self) -> None:
        super().__init__(Victim("tests.hostile.worker", "unix:{folder}/s", ready="listening at"))
        self.address = f"unix:{self.victim.folder / 's'}"
        self._bystanders = [moeshm.connect(self.address, transport=each) for each in TRANSPORTS]
        self.call_id = 0
        self.look()
        self.victim.remember()

    def client(self, transport: str) -> _Client:
        """The attacker's session over that transport."""
        client = self.sessions.get(transport)
        if client is None or client.n_sent >= _MOST_OF_A_SESSION:
            self.drop(transport)
            client = self.sessions[transport] = _Client(self.address, transport)
        client.n_sent += 1
        return client

    def look(self) -> None:
        """The bystanders are served, in their first sessions."""
        for number, bystander in enumerate(self._bystanders):
            inputs = make_inputs(FREE, (self.n_executions + number) % 8)
            assert_exact(bystander.compute(*inputs, timeout_s=PATIENCE_S), inputs)
            assert bystander.stats().reconnects == 0, "the bystander lost its session"

    def close(self) -> None:
        """End all."""
        for bystander in self._bystanders:
            bystander.close()
        super().close()


_scene = Keeper(_Scene)


def close() -> None:
    """Let go of the worker."""
    _scene.close()


def seeds() -> list[bytes]:
    """Every kind of attack over every transport."""
    return [bytes([kind, *more]) for kind in range(10) for more in ([], [1] * 8, [2, 3, 200, 7])]


def test_one(data: bytes) -> str:
    """What the worker did; AssertionError for what it must not."""
    choices = Choices(data)
    how = choices.byte()
    scene = _scene()
    transport = TRANSPORTS[how & 1]
    kind = how >> 1
    if kind % 5 == 0:
        outcome = _shake_hands(scene, choices)
    else:
        attack = (_send_record, _send_record, _damage, _describe)[kind % 5 - 1]
        outcome = _attack(scene, transport, attack, choices)
    scene.count()
    return outcome


def _attack(scene: _Scene, transport: str, attack: Any, choices: Choices) -> str:
    client = scene.client(transport)
    scene.call_id += 1
    # Not an id that a lie could have.
    call_id = (3 << 60) + scene.call_id
    try:
        attack(client, choices)
        n_before = client.ping(call_id)
        outcome = "answered" if n_before else "nothing"
    except (_Over, BrokenPipeError, ConnectionResetError) as over:
        words = str(over).split()[:12]
        outcome = f"over: {' '.join(word for word in words if word.isalpha())}"
        scene.drop(transport)
    except (AssertionError, struct.error):
        scene.victim.check_alive()
        if not client.is_spoiled:
            raise
        outcome = "spoiled"
    if client.is_spoiled:
        scene.drop(transport)
    return f"{transport}: {outcome}"


# --- attacks ----------------------------------------------------------------------------------


def _send_record(client: _Client, choices: Choices) -> None:
    """A call, reply, order or descriptor, with a header that may lie, too."""
    makes = (records.make_call, records.make_order, records.make_descriptor, records.make_reply)
    which = choices.below(5)
    payload = choices.take(256) if which == 4 else makes[which](choices)
    kind = (protocol.CALL, protocol.ORDER, 4, protocol.REPLY, 1 + choices.below(4))[which]
    header = {"type": kind, "flags": 0, "epoch": client.epoch, "sequence": client.sequence}
    header["length"] = len(payload)
    choices.change(header, _WIDTHS)
    # Its arrays are there.
    if client.has_slab and len(payload) >= 48:
        slot, sequence = struct.unpack_from("<II", payload, 40)
        struct.pack_into("<I", client.slab, _given(slot), sequence)
    if client.stream is not None and len(payload) < header["length"] < 1 << 18:
        # Or the worker would wait for the rest, as it should.
        payload = payload.ljust(header["length"], b"\0")
    client.send(payload, **header)


def _given(slot: int) -> int:
    """Where that flag of a slot is."""
    return slot % SLOTS * SLOT_BYTES + GIVEN


def _describe(client: _Client, choices: Choices) -> None:
    """A descriptor whose arrays are there, of a layer that the worker has."""
    fields = slabs.describe(choices)
    data = FLAGS_BYTES
    for index in range(4):
        at = data + 256 + 4 * index
        client.slab[at : at + 4] = struct.pack("<I", choices.near(index % 4, 32))
    sequence = struct.pack("<I", fields["sequence"])
    at = _given(fields["slot"])
    client.slab[at : at + 4] = sequence
    client.send(records.DESCRIPTOR_FORM.pack(*fields.values(), b""), type=4)


def _damage(client: _Client, choices: Choices) -> None:
    """A word of a ring's control page, or of a record; over a stream, bytes that are none."""
    if client.stream is not None:
        client.stream.sendall(choices.take(1 + choices.below(64)) or b"\0")
        # Or the worker would wait for the rest of them, as it should.
        client.stream.sendall(bytes(64))
        return
    client.is_spoiled = choices.below(2) == 1
    ring = client.replies if client.is_spoiled else client.calls
    number = choices.byte()
    at = PLACES[number] if number < len(PLACES) else 64 * choices.below(len(ring) // 64)
    (old,) = struct.unpack_from("<Q", ring, at)
    client.poke(ring, at, choices.near(old, 64))


def _shake_hands(scene: _Scene, choices: Choices) -> str:
    """A connection whose first packets are wrong."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(PATIENCE_S)
        sock.connect(scene.address.removeprefix("unix:"))
        whole = handshakes.changed_hello(choices)
        n_packets = 1 + choices.below(3)
        n_each = -(-len(whole) // n_packets)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for number in range(n_packets):
                mark = bytes([choices.near(number + 1 < n_packets, 8)])
                part = whole[number * n_each : (number + 1) * n_each]
                n_fds = choices.below(6) if choices.byte() > 128 else 0
                socket.send_fds(sock, [mark + part], [sock.fileno()] * n_fds)
        # Or the worker would wait for more.
        sock.shutdown(socket.SHUT_WR)
        try:
            packet, fds, _, _ = socket.recv_fds(sock, 1 << 16, 8)
        except ConnectionResetError:
            return "hello: reset"
        for fd in fds:
            os.close(fd)
    return f"hello: {packet[1:18]!r}" if packet else "hello: closed"
