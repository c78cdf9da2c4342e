"""Opening a session: what both sides get, and everything that can be refused."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeshm
from moeshm import access, protocol, session, sizes
from moeshm.dtypes import DType
from moeshm.errors import (
    ConnectError,
    Corrupt,
    HandshakeRefused,
    MoeshmError,
    ProtocolError,
    SegmentError,
    SessionError,
)
from moeshm.foreign_fds import close_fds
from moeshm.handshake import Goodbye, Hello, Refusal, Welcome
from moeshm.limits import Admission, Admissions, Busy
from moeshm.session import ControlSocket, Session
from moeshm.settings import Settings
from moeshm.transport.shared import SharedTransport
from tests.wire import (
    HELLO,
    LAST,
    PATIENCE_S,
    WHOLE,
    dense_info,
    meanwhile,
    n_fds,
    packets,
    take,
    with_fds,
)

LAYERS = {0: dense_info(64, 4, 2), 3: dense_info(128, 8, 4)}


@pytest.fixture
def sockets() -> Iterator[tuple[ControlSocket, socket.socket]]:
    """A control socket, and what may be anything at the other end."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control = ControlSocket(left)
    with right:
        yield control, right
    control.close()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """Where a worker would listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        yield sock


def address(listener: socket.socket) -> str:
    """Of a listener."""
    return f"unix:{listener.getsockname()}"


# --- whole handshakes ---------------------------------------------------------------------


@contextlib.contextmanager
def opened(
    listener: socket.socket, transport: str = "auto", capacity: int = 64, max_tokens: int = 4096
) -> Iterator[tuple[Session, Session]]:
    """Both sides of a session: the client's and the worker's."""
    sides: list[Session] = []

    def accept() -> None:
        control = ControlSocket(listener.accept()[0])
        try:
            sides.append(session.accept(control, LAYERS, "null", max_tokens, PATIENCE_S))
        except MoeshmError:
            control.close()

    with contextlib.ExitStack() as stack:
        with meanwhile(accept):
            client = session.connect(address(listener), transport, capacity, PATIENCE_S)
            stack.enter_context(client)
        (worker,) = sides
        stack.enter_context(worker)
        yield client, worker


@pytest.mark.parametrize(
    ("wish", "given"), [("auto", "shared"), ("shared", "shared"), ("stream", "stream")]
)
def test_a_session_opens_with_the_transport_wished_for(
    listener: socket.socket, wish: str, given: str
) -> None:
    with opened(listener, wish) as (client, worker):
        assert client.welcome == worker.welcome
        assert client.transport.name == worker.transport.name == client.welcome.transport == given
        assert client.welcome.stepped_down == ""
        assert client.welcome.layers == LAYERS
        assert client.welcome.takes_orders
        client.transport.write((b"hello",), 1)
        assert take(worker.transport) == (1, b"hello")
        worker.transport.write((b"you",), 2)
        assert take(client.transport) == (2, b"you")


@pytest.mark.parametrize("transport", ["shared", "stream"])
@pytest.mark.parametrize(("wanted", "allowed"), [(64, 4096), (4096, 64), (1, 1)])
def test_max_tokens_is_what_both_allow_and_fits(
    listener: socket.socket, transport: str, wanted: int, allowed: int
) -> None:
    with opened(listener, transport, wanted, allowed) as (client, worker):
        n_tokens = client.welcome.max_tokens
        assert n_tokens == min(wanted, allowed)
        for info in LAYERS.values():
            calls = protocol.call_bytes(n_tokens, info.top_k, info.hidden_size, DType.F32)
            assert calls <= client.transport.send_capacity
            assert calls <= worker.transport.receive_capacity
            replies = protocol.reply_bytes(n_tokens, info.hidden_size, DType.F32)
            assert replies <= worker.transport.send_capacity
            assert replies <= client.transport.receive_capacity


@given(
    st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 64), st.integers(1, 64),
    st.integers(1, 4096),
)  # fmt: skip
def test_the_rings_hold_the_largest_call_of_every_layer(
    hidden: int, other_hidden: int, top_k: int, other_top_k: int, max_tokens: int
) -> None:
    layers = {0: dense_info(hidden, 64, top_k), 1: dense_info(other_hidden, 64, other_top_k)}
    calls, replies = sizes.ring_sizes(layers, max_tokens)
    assert max(calls, replies) <= sizes.MAX_RING_BYTES
    n_tokens = min(max_tokens, sizes.fitting_tokens(layers, calls, replies))
    assert n_tokens >= 1
    for info in layers.values():
        for dtype in DType:
            call = protocol.call_bytes(n_tokens, info.top_k, info.hidden_size, dtype)
            assert call <= calls
            assert protocol.reply_bytes(n_tokens, info.hidden_size, dtype) <= replies
    if max(calls, replies) < sizes.MAX_RING_BYTES:
        assert n_tokens == max_tokens


@pytest.fixture
def no_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were no shared memory."""

    def create(*_: Any) -> Any:
        raise SegmentError(errno.ENOSPC, "4096 bytes cannot be had")

    monkeypatch.setattr(SharedTransport, "create", create)


@pytest.mark.usefixtures("no_segments")
def test_auto_steps_down_and_says_why(
    listener: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(listener, "auto") as (client, worker):
        assert client.transport.name == worker.transport.name == "stream"
        assert "4096 bytes cannot be had" in client.welcome.stepped_down

    def accept() -> None:
        control = ControlSocket(listener.accept()[0])
        with session.accept(control, LAYERS, "null", 64, PATIENCE_S):
            pass

    with meanwhile(accept), moeshm.connect(address(listener), transport="auto") as expert_client:
        assert expert_client.transport == "stream"
        ((why, count),) = expert_client.stats().stepped_down.items()
    assert "4096 bytes cannot be had" in why
    assert count == 1
    assert any("4096 bytes cannot be had" in each.getMessage() for each in caplog.records)


# --- refusals -----------------------------------------------------------------------------


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


# --- workers that are none ----------------------------------------------------------------


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


# --- the last word ------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_a_goodbye_is_heard_after_the_end(listener: socket.socket, transport: str) -> None:
    with opened(listener, transport) as (client, worker):
        assert client.farewell() is None
        worker.control.send(Goodbye("the worker shuts down"), [], PATIENCE_S)
        worker.close()
        assert client.farewell() == "the worker shuts down"
        assert client.farewell() is None
        client.close()
        assert client.farewell() is None


@pytest.mark.parametrize(
    "attack",
    [packets(LAST + b"junk"), packets(b"x"), packets(WHOLE), with_fds((WHOLE, 3), (LAST, 5))],
)
def test_a_last_word_that_is_none(
    listener: socket.socket, attack: Callable[[socket.socket], None]
) -> None:
    with opened(listener) as (client, worker):
        attack(worker.control._socket)
        before = n_fds()
        assert client.farewell() is None
        assert n_fds() == before
