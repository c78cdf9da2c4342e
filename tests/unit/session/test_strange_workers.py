"""Workers that do not answer, or not as one does: an error of its own kind, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moeshm import session
from moeshm.errors import (
    ConnectError,
    Corrupt,
    MoeshmError,
    ProtocolError,
    SegmentError,
    SessionError,
)
from moeshm.handshake import Goodbye, Welcome
from moeshm.session import ControlSocket
from moeshm.transport.shared import SharedTransport
from tests.wire import HELLO, PATIENCE_S, meanwhile, n_fds, take

from .sides import LAYERS, address


def test_nobody_listens(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as closed:
        closed.bind(str(tmp_path / "closed"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.bind(str(tmp_path / "stream"))
        stream.listen()
        for name in ("absent", "no/folder", "file", "closed", "stream"):
            with pytest.raises(ConnectError, match=f"no worker answers at .*{name}.*start one"):
                session.connect(f"unix:{tmp_path / name}", "auto", 64, PATIENCE_S)


def test_a_worker_too_busy_to_accept(tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        contextlib.ExitStack() as stack,
    ):
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                waiting.setblocking(False)
                waiting.connect(str(tmp_path / "s"))
        with pytest.raises(ConnectError, match="too busy"):
            session.connect(address(listener), "auto", 64, 0.02)


def test_a_worker_that_never_answers(listener: socket.socket) -> None:
    with pytest.raises(SessionError, match="did not come in time"):
        session.connect(address(listener), "auto", 64, 0.02)


@contextlib.contextmanager
def answering(listener: socket.socket, message: Any, fds: list[int]) -> Iterator[None]:
    """Whoever connects gets this, whatever it says."""

    def answer() -> None:
        control = ControlSocket(listener.accept()[0])
        control.receive(PATIENCE_S)
        control.send(message, fds, PATIENCE_S)
        control.close()

    with meanwhile(answer):
        yield


def a_welcome(transport: str, epoch: int = 7) -> Welcome:
    """With one small layer."""
    return Welcome(
        protocol=1, version="0.1", backend="null", transport=transport, stepped_down="",
        epoch=epoch, max_tokens=4, layers=LAYERS,
    )  # fmt: skip


@pytest.mark.parametrize("message", [HELLO, Goodbye("x")])
def test_an_answer_of_another_kind(listener: socket.socket, message: Any) -> None:
    with (
        answering(listener, message, []),
        pytest.raises(ProtocolError, match=r"expected welcome, got (hello|goodbye)"),
    ):
        session.connect(address(listener), "auto", 64, PATIENCE_S)


@pytest.mark.parametrize(
    ("transport", "targets", "kind", "says"),
    [
        ("shared", ["/dev/null", "/dev/null"], SegmentError, "no shared memory"),
        ("shared", ["memfd", "memfd"], SegmentError, "has seals"),
        ("shared", ["ring", "ring"], SegmentError, r"has this end|attached"),
        ("shared", ["ring", "/dev/null"], SegmentError, "no shared memory"),
        ("shared", ["ring"], ProtocolError, "came with 1 fds"),
        ("shared", ["ring", "ring", "ring"], ProtocolError, "came with 3 fds"),
        ("stream", [], ProtocolError, "came with 0 fds"),
        ("stream", ["/dev/null"], Corrupt, "no UNIX stream socket"),
        ("stream", ["memfd"], Corrupt, "no UNIX stream socket"),
        ("stream", ["/dev/null", "/dev/null"], ProtocolError, "came with 2 fds"),
    ],
)
def test_a_welcome_with_the_wrong_fds_leaves_none(
    listener: socket.socket,
    transport: str,
    targets: list[str],
    kind: type[MoeshmError],
    says: str,
) -> None:
    worker, ring_fds = SharedTransport.create(4096, 4096, 7, -1, -1)
    memfd = os.memfd_create("test")
    null = os.open("/dev/null", os.O_RDONLY)
    fds = [{"memfd": memfd, "/dev/null": null, "ring": ring_fds[0]}[name] for name in targets]
    before = n_fds()
    try:
        with (
            answering(listener, a_welcome(transport), fds),
            pytest.raises(kind, match=says),
        ):
            session.connect(address(listener), transport, 64, PATIENCE_S)
        assert n_fds() == before
    finally:
        worker.close()
        os.close(memfd)
        os.close(null)


def test_rings_of_another_epoch_are_refused(listener: socket.socket) -> None:
    worker, fds = SharedTransport.create(4096, 4096, 8, -1, -1)
    with (
        contextlib.closing(worker),
        answering(listener, a_welcome("shared", epoch=7), fds),
        pytest.raises(SegmentError, match="epoch 8; expected 7"),
    ):
        session.connect(address(listener), "shared", 64, PATIENCE_S)


def test_auto_steps_down_when_rings_came_that_this_side_cannot_use(
    listener: socket.socket,
) -> None:
    """As a process whose address space is limited finds out."""
    worker, fds = SharedTransport.create(4096, 4096, 8, -1, -1)

    def answer_twice() -> None:
        first = ControlSocket(listener.accept()[0])
        first.receive(PATIENCE_S)
        first.send(a_welcome("shared", epoch=7), fds, PATIENCE_S)
        first.close()
        second = ControlSocket(listener.accept()[0])
        with session.accept(second, LAYERS, "null", 64, PATIENCE_S) as session_of_worker:
            assert take(session_of_worker.transport) == (1, b"hello")

    with (
        contextlib.closing(worker),
        meanwhile(answer_twice),
        session.connect(address(listener), "auto", 64, PATIENCE_S) as client,
    ):
        assert client.transport.name == "stream"
        assert "epoch 8; expected 7" in client.welcome.stepped_down
        client.transport.write((b"hello",), 1)
