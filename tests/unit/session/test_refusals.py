"""Clients that get no session: each is told why, and leaves nothing."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from moeshm import access, session, sizes
from moeshm.errors import HandshakeRefused, ProtocolError, SegmentError, SessionError
from moeshm.foreign_fds import close_fds
from moeshm.handshake import Hello, Refusal, Welcome
from moeshm.limits import Admission, Admissions, Busy
from moeshm.session import ControlSocket, Session
from moeshm.settings import Settings
from tests.wire import HELLO, PATIENCE_S, WHOLE, meanwhile, n_fds

from .sides import LAYERS, address


@pytest.fixture
def sockets() -> Iterator[tuple[ControlSocket, socket.socket]]:
    """A control socket, and what may be anything at the other end."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control = ControlSocket(left)
    with right:
        yield control, right
    control.close()


def accepting(listener: socket.socket) -> Callable[[], None]:
    """A worker that refuses the next client: closes, as the daemon does, what it cannot open."""

    def accept() -> None:
        control = ControlSocket(listener.accept()[0])
        try:
            session.accept(control, LAYERS, "null", 64, PATIENCE_S).close()
        except (ProtocolError, SegmentError):
            pass
        else:
            raise AssertionError("it was accepted")
        finally:
            control.close()

    return accept


@pytest.mark.usefixtures("no_segments")
def test_who_insists_on_shared_memory_is_refused(listener: socket.socket) -> None:
    with (
        meanwhile(accepting(listener)),
        pytest.raises(HandshakeRefused, match="4096 bytes cannot be had"),
    ):
        session.connect(address(listener), "shared", 64, PATIENCE_S)


@pytest.mark.parametrize(
    ("transport", "capacity", "says"),
    [
        ("tcp", 64, "transport 'tcp'; choose auto, shared or stream"),
        ("auto", 0, "batch_capacity=0"),
        ("auto", 5000, "batch_capacity=5000"),
        ("x" * 5000, 64, "at most 4096 bytes"),
    ],
)
def test_a_refusal_arrives_with_its_reason(
    listener: socket.socket, transport: str, capacity: int, says: str
) -> None:
    with (
        meanwhile(accepting(listener)),
        pytest.raises(HandshakeRefused, match=f"the worker refused: .*{says}"),
    ):
        session.connect(address(listener), transport, capacity, PATIENCE_S)


def test_another_version_is_refused_with_both(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "Hello", lambda **fields: Hello(**{**fields, "protocol": 99}))
    with (
        meanwhile(accepting(listener)),
        pytest.raises(HandshakeRefused, match=r"speaks protocol 99 .* this worker 1; install"),
    ):
        session.connect(address(listener), "auto", 64, PATIENCE_S)


def test_a_refusal_that_does_not_wait_for_the_hello(listener: socket.socket) -> None:
    """Whether or not it is there already."""
    for waits_for_hello in (False, True):

        def refuse(waits_for_hello: bool = waits_for_hello) -> None:
            sock, _ = listener.accept()
            if waits_for_hello:
                select.select([sock], [], [], PATIENCE_S)
            session.refuse(sock, HandshakeRefused("not you\nINFO all is well"))

        with (
            meanwhile(refuse),
            pytest.raises(HandshakeRefused, match=r"the worker refused: not you\\nINFO all is"),
        ):
            session.connect(address(listener), "auto", 64, PATIENCE_S)


def test_a_busy_worker_is_asked_again(listener: socket.socket) -> None:
    def accept() -> None:
        for _ in range(3):
            session.refuse(listener.accept()[0], Busy("full"))
        control = ControlSocket(listener.accept()[0])
        with session.accept(control, LAYERS, "null", 64, PATIENCE_S):
            pass

    with meanwhile(accept):
        session.connect(address(listener), "auto", 64, PATIENCE_S).close()


def test_a_worker_that_stays_busy_has_refused(listener: socket.socket) -> None:
    is_over = threading.Event()

    def refuse() -> None:
        while not is_over.is_set():
            if select.select([listener], [], [], 0.01)[0]:
                session.refuse(listener.accept()[0], Busy("full"))

    with meanwhile(refuse):
        try:
            with pytest.raises(HandshakeRefused, match="the worker refused: full") as caught:
                session.connect(address(listener), "auto", 64, 0.05)
        finally:
            is_over.set()
    assert type(caught.value) is HandshakeRefused


@pytest.mark.parametrize("transport", ["shared", "stream", "auto"])
def test_a_session_keeps_within_its_bytes(listener: socket.socket, transport: str) -> None:
    """What it really maps is what was counted, or less."""
    most = sizes.session_bytes(LAYERS, transport, False, 500)
    book = Admissions(Settings(max_bytes_per_session=most))
    found: list[tuple[Admission, Session]] = []

    def accept() -> None:
        sock, _ = listener.accept()
        admission = book.admit(sock, access.peer_of(sock))
        control = ControlSocket(sock)
        found.append(
            (
                admission,
                session.accept(control, LAYERS, "null", 4096, PATIENCE_S, admission=admission),
            )
        )

    with meanwhile(accept):
        client = session.connect(address(listener), transport, 4096, PATIENCE_S)
    ((admission, worker),) = found
    with client, worker:
        assert 500 <= client.welcome.max_tokens < 4096
        assert f"MOESHM_MAX_BYTES_PER_SESSION={most}" in admission.cut
        assert admission.n_bytes <= most
        # Each part is mapped twice.
        mapped = sum(each.nbytes for each in worker.transport.memory()) // 2
        assert mapped <= admission.n_bytes
        assert transport == "stream" or mapped > admission.n_bytes // 8


def test_a_session_too_large_is_refused_at_the_client(listener: socket.socket) -> None:
    book = Admissions(Settings(max_bytes_per_session=1000))

    def accept() -> None:
        sock, _ = listener.accept()
        admission = book.admit(sock, access.peer_of(sock))
        control = ControlSocket(sock)
        with contextlib.closing(control), pytest.raises(HandshakeRefused):
            session.accept(control, LAYERS, "null", 4096, PATIENCE_S, admission=admission)

    with (
        meanwhile(accept),
        pytest.raises(HandshakeRefused, match=r"at least \d+ bytes, and MOESHM_MAX_BYTES_PER_SES"),
    ):
        session.connect(address(listener), "auto", 64, PATIENCE_S)


@pytest.mark.parametrize("is_evicted", [False, True])
def test_who_was_evicted_gets_no_welcome(listener: socket.socket, is_evicted: bool) -> None:
    """Though its hello came."""
    book = Admissions(Settings())

    def accept() -> None:
        sock, _ = listener.accept()
        admission = book.admit(sock, access.peer_of(sock))
        select.select([sock], [], [], PATIENCE_S)
        if is_evicted:
            admission.evict(Busy("made room"))
        with contextlib.closing(ControlSocket(sock, is_worker=True)) as control:
            if is_evicted:
                with pytest.raises(Busy, match="made room"):
                    session.accept(control, LAYERS, "null", 4096, PATIENCE_S, admission=admission)
                return
            with session.accept(control, LAYERS, "null", 64, PATIENCE_S, admission=admission):
                assert not admission.is_shaking

    with meanwhile(accept):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(address(listener).removeprefix("unix:"))
        with contextlib.closing(ControlSocket(sock)) as client:
            client.send(HELLO, [], PATIENCE_S)
            answer, fds = client.receive(PATIENCE_S)
            close_fds(fds)
            assert isinstance(answer, Refusal if is_evicted else Welcome)


def test_a_silent_client_is_not_waited_for(sockets: tuple[ControlSocket, socket.socket]) -> None:
    control, _ = sockets
    with pytest.raises(SessionError, match="did not come in time"):
        session.accept(control, LAYERS, "null", 64, 0.01)


def test_a_client_that_leaves_before_the_welcome_leaves_nothing(
    sockets: tuple[ControlSocket, socket.socket],
) -> None:
    control, right = sockets
    right.send(WHOLE)
    right.close()
    before = n_fds()
    with pytest.raises(SessionError, match="could not be sent"):
        session.accept(control, LAYERS, "null", 64, PATIENCE_S)
    assert n_fds() == before
