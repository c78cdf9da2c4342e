"""What clients may take of a worker: connections, handshakes and bytes, each within its limit."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from moeshm import limits, process, settings, sizes
from moeshm.access import Peer
from moeshm.backends import BetweenSteps, SlabCall
from moeshm.dtypes import DType
from moeshm.errors import HandshakeRefused, InvalidCall
from moeshm.holdings import Holdings
from moeshm.limits import Admission, Admissions, Busy
from moeshm.orders import Hold, Release
from moeshm.settings import Settings
from moeshm.slab_server import SlabServer
from moeshm.transport.slab import Places
from moeshm.views import SessionViews
from tests.crash.arithmetic import FREE, WIDE, ArithmeticBackend
from tests.steps import NeverDue
from tests.wire import dense_info


class Clients:
    """Connections to a worker, both ends in this process, whoever they are said to be of."""

    def __init__(self, stack: contextlib.ExitStack, **limits: Any) -> None:
        self._stack = stack
        self.book = Admissions(Settings(**limits))

    def pass_time(self) -> None:
        """All that are at their handshake are slow by now."""
        for each in self.book._here:
            each.began_at -= 1.0

    def connect(self, pid: int = 1, uid: int = 1) -> tuple[Admission, socket.socket]:
        """Let one in; with the client's end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stack.enter_context(ours)
        self._stack.enter_context(theirs)
        return self.book.admit(ours, Peer(pid, uid, uid)), theirs

    def refused(self, pid: int = 1, uid: int = 1) -> str:
        """Why another is not let in."""
        with pytest.raises(HandshakeRefused) as caught:
            self.connect(pid, uid)
        prefix = "busy: " if isinstance(caught.value, Busy) else ""
        return prefix + str(caught.value)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Closes what a test opened."""
    with contextlib.ExitStack() as opened:
        yield opened


# --- connections --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("max_sessions", "3 connections; MOESHM_MAX_SESSIONS=3 of the worker allows no more"),
        ("max_sessions_per_user", "3 connections of user 64001; MOESHM_MAX_SESSIONS_PER_USER=3"),
        ("max_sessions_per_process", "3 connections of process 7; MOESHM_MAX_SESSIONS_PER_PROCESS"),
    ],
)
def test_one_more_than_the_limit_is_refused(
    stack: contextlib.ExitStack, setting: str, says: str
) -> None:
    clients = Clients(stack, **{setting: 3})
    admitted = [clients.connect(7, 64001)[0] for _ in range(3)]
    for _ in range(2):
        assert clients.refused(7, 64001).startswith(says)
    assert clients.book.refused == {setting: 2}
    # Handshakes that are over count as well.
    admitted[0].has_shaken_hands()
    assert clients.refused(7, 64001).startswith(says)
    admitted[0].end()
    admitted[0].end()
    clients.connect(7, 64001)
    assert clients.refused(7, 64001).startswith(says)


def test_a_limit_is_each_ones_own(stack: contextlib.ExitStack) -> None:
    clients = Clients(stack, max_sessions_per_process=1, max_sessions_per_user=2)
    clients.connect(7, 64001)
    clients.connect(8, 64001)
    assert "of user 64001" in clients.refused(9, 64001)
    clients.connect(7, 64002)
    assert "of process 7" in clients.refused(7, 64002)
    clients.connect(8, 64002)


def test_processes_that_cannot_be_told_apart_are_not_taken_for_one(
    stack: contextlib.ExitStack,
) -> None:
    clients = Clients(stack, max_sessions_per_process=1, max_sessions_per_user=2)
    clients.connect(0)
    clients.connect(0)
    assert "of user" in clients.refused(0)


def test_another_user_of_the_same_number_is_another_process(stack: contextlib.ExitStack) -> None:
    """In other containers numbers come again."""
    clients = Clients(stack, max_handshakes=2, max_sessions_per_process=2)
    clients.connect(7, 1)
    clients.connect(7, 2)
    clients.pass_time()
    clients.connect(7, 3)
    assert [each.why_evicted is None for each in clients.book._here] == [False, True, True]


@pytest.mark.parametrize(
    "setting", ["max_sessions", "max_sessions_per_user", "max_sessions_per_process"]
)
def test_who_hung_up_counts_until_the_end_and_others_come_again(
    stack: contextlib.ExitStack, setting: str
) -> None:
    """Or one that connects and hangs up, again and again, would hold more than it may."""
    clients = Clients(stack, **{setting: 2})
    admission, first = clients.connect()
    clients.connect()
    assert not clients.refused().startswith("busy")
    first.close()
    assert clients.refused().startswith("busy: 2 connections")
    admission.end()
    clients.connect()
    assert clients.refused().startswith("2 connections")


# --- handshakes ---------------------------------------------------------------------------


def test_a_process_with_many_handshakes_keeps_no_other_out(stack: contextlib.ExitStack) -> None:
    clients = Clients(stack, max_handshakes=3)
    slow = [clients.connect(7) for _ in range(3)]
    # It has its share.
    assert clients.refused(7).startswith("busy: 3 connections at their handshake")
    newcomer, _ = clients.connect(8)
    assert [each.why_evicted is not None for each, _ in slow] == [True, False, False]
    assert "handshake of process 7 made room" in str(slow[0][0].why_evicted)
    assert newcomer.why_evicted is None
    # Both have as good as the same now.
    assert clients.refused(8).startswith("busy")
    assert clients.book.refused == {"max_handshakes": 3}
    newcomer.has_shaken_hands()
    clients.connect(8)
    assert [each.why_evicted is not None for each, _ in slow] == [True, False, False]


def evicted(clients: Clients) -> list[tuple[int, int]]:
    """Uid and pid of those whose handshakes had to end, in the order in which they came."""
    return [each.peer[1::-1] for each in clients.book._here if each.why_evicted is not None]


def test_a_user_with_many_processes_keeps_no_other_out(stack: contextlib.ExitStack) -> None:
    """One silent connection of each; and two of one of them."""
    clients = Clients(stack, max_handshakes=6)
    for pid in (1, 2, 3, 4, 4, 5):
        clients.connect(pid, uid=1)
    clients.connect(9, uid=2)
    assert evicted(clients) == [(1, 4)]
    clients.connect(10, uid=2)
    clients.connect(11, uid=2)
    assert evicted(clients) == [(1, 1), (1, 2), (1, 4)]
    # Now they have 3 each.
    assert clients.refused(12, uid=2).startswith("busy")


def test_where_all_have_as_many_the_slow_ones_make_room(stack: contextlib.ExitStack) -> None:
    """As where one has very many processes, with a silent connection of each."""
    clients = Clients(stack, max_handshakes=3)
    for pid in range(1, 4):
        clients.connect(pid)
    assert clients.refused(4).startswith("busy")
    clients.pass_time()
    clients.connect(4)
    assert evicted(clients) == [(1, 1)]
    clients.connect(5)
    clients.connect(6)
    # Those that are left just came.
    assert clients.refused(7).startswith("busy")


def test_processes_without_a_number_are_told_apart(stack: contextlib.ExitStack) -> None:
    clients = Clients(stack, max_handshakes=2)
    for _ in range(2):
        clients.connect(0)
    assert clients.refused(5).startswith("busy"), "none of them has more than its share"
    clients.pass_time()
    clients.connect(5)
    assert evicted(clients) == [(1, 0)]


def test_who_was_evicted_gets_no_welcome(stack: contextlib.ExitStack) -> None:
    clients = Clients(stack, max_handshakes=2)
    welcomed, evicted_one = (clients.connect()[0] for _ in range(2))
    welcomed.has_shaken_hands()
    clients.book.evict_all(Busy("the worker shuts down"))
    assert welcomed.why_evicted is None
    assert evicted_one._socket.recv(1) == b""
    with pytest.raises(Busy, match="shuts down"):
        evicted_one.has_shaken_hands()


def test_an_evicted_handshake_ends(stack: contextlib.ExitStack) -> None:
    """What waits for its hello gets no more; what it says still arrives."""
    clients = Clients(stack, max_handshakes=2)
    slow, theirs = clients.connect(7)
    clients.connect(7)
    clients.connect(8)
    assert slow.why_evicted is not None
    assert slow._socket.recv(1) == b""
    slow._socket.send(b"sorry")
    assert theirs.recv(10) == b"sorry"


# --- bytes --------------------------------------------------------------------------------

LAYERS = {0: dense_info(2048, 8, 8)}


def bytes_for(n_tokens: int) -> int:
    """Of a session over rings."""
    return sizes.session_bytes(LAYERS, "shared", False, n_tokens)


def test_a_session_that_would_take_too_much_gets_shorter_calls(
    stack: contextlib.ExitStack,
) -> None:
    clients = Clients(stack, max_bytes_per_session=bytes_for(100))
    admission, _ = clients.connect()
    n_tokens = admission.take_bytes(4096, bytes_for)
    assert bytes_for(n_tokens) <= bytes_for(100) < bytes_for(n_tokens + 1)
    assert admission.n_bytes == bytes_for(n_tokens)
    assert admission.cut == (f"4096 were wanted: MOESHM_MAX_BYTES_PER_SESSION={bytes_for(100)}")
    assert clients.book.refused == {"max_bytes_per_session": 1}
    other, _ = clients.connect()
    assert other.take_bytes(n_tokens, bytes_for) == n_tokens
    assert other.cut == ""


def test_a_session_of_which_nothing_fits_is_refused(stack: contextlib.ExitStack) -> None:
    clients = Clients(stack, max_bytes_per_session=bytes_for(1) - 1)
    admission, _ = clients.connect()
    with pytest.raises(HandshakeRefused, match=rf"at least {bytes_for(1)} bytes, and MOESHM_MAX_B"):
        admission.take_bytes(64, bytes_for)
    assert admission.n_bytes == 0


def test_all_sessions_together_take_no_more_than_there_is(stack: contextlib.ExitStack) -> None:
    clients = Clients(stack, max_bytes=1000)
    (first, theirs), (second, _), (third, _) = (clients.connect(n, uid=n) for n in (1, 2, 3))
    first.take_bytes(1, lambda _: 300)
    second.take_bytes(1, lambda _: 300)
    with pytest.raises(
        HandshakeRefused, match="take 600 bytes, and this one would take 401; 1000 may be taken"
    ) as caught:
        third.take_bytes(1, lambda _: 401)
    assert not isinstance(caught.value, Busy)
    third.take_bytes(1, lambda _: 400)
    # Its own are not counted twice.
    third.take_bytes(1, lambda _: 400)
    theirs.close()
    with pytest.raises(Busy):
        third.take_bytes(1, lambda _: 401)
    first.end()
    third.take_bytes(1, lambda _: 500)
    assert clients.book.refused == {"max_bytes": 2}


def test_no_process_and_no_user_takes_all(stack: contextlib.ExitStack) -> None:
    clients = Clients(stack, max_bytes=1000)
    first, second, third, other = (clients.connect(pid)[0] for pid in (1, 1, 2, 3))
    first.take_bytes(1, lambda _: 300)
    with pytest.raises(HandshakeRefused, match=r"of one process take 300 .* take 201; 500 may"):
        second.take_bytes(1, lambda _: 201)
    second.take_bytes(1, lambda _: 200)
    third.take_bytes(1, lambda _: 250)
    with pytest.raises(HandshakeRefused, match=r"of one user take 750 .* take 1; 750 may"):
        other.take_bytes(1, lambda _: 1)
    clients.connect(4, uid=2)[0].take_bytes(1, lambda _: 250)


def test_one_session_each_may_have_that_takes_all(stack: contextlib.ExitStack) -> None:
    clients = Clients(stack, max_bytes=1000)
    clients.connect(1)[0].take_bytes(1, lambda _: 1000)
    with pytest.raises(HandshakeRefused, match="sessions take 1000 bytes"):
        clients.connect(2)[0].take_bytes(1, lambda _: 1)


def test_half_of_what_is_free_may_be_taken(
    stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "available_memory", lambda: 1 << 30)
    admission, _ = Clients(stack, max_bytes_per_session=1 << 40).connect()
    with pytest.raises(HandshakeRefused, match=f"{1 << 29} may be taken"):
        admission.take_bytes(1, lambda _: (1 << 29) + 1)
    admission.take_bytes(1, lambda _: 1 << 28)


def test_someone_is_served_where_no_memory_is_free(
    stack: contextlib.ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It may well be, in a moment."""
    monkeypatch.setattr(process, "available_memory", lambda: 0)
    admission, _ = Clients(stack).connect()
    admission.take_bytes(1, lambda _: 32 << 20)
    assert "0 bytes of memory are free; sessions may take 67108864" in caplog.text


@pytest.mark.parametrize("transport", ["shared", "stream", "auto"])
@pytest.mark.parametrize("has_slab", [False, True])
def test_longer_calls_never_take_less(transport: str, has_slab: bool) -> None:
    """What the search for the longest that fits relies on."""
    found = [sizes.session_bytes(LAYERS, transport, has_slab, n) for n in range(1, 4097, 15)]
    assert found == sorted(found)
    assert found[-1] > 2 * found[0]
    assert found[-1] <= Settings().max_bytes_per_session


# --- files --------------------------------------------------------------------------------


def test_as_many_files_as_sessions_may_need(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = [1024, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limit))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limit.__setitem__(slice(2), new))
    assert limits.allow_fds(Settings(max_sessions=10)) == ""
    assert limit == [1024, 4096]
    assert limits.allow_fds(Settings(max_sessions=256)) == ""
    assert 1024 < limit[0] < 4096
    said = limits.allow_fds(Settings(max_sessions=5000))
    assert limit == [4096, 4096]
    assert "4096 open files are allowed, and MOESHM_MAX_SESSIONS=5000 may need" in said


# --- what the worker does for a session ---------------------------------------------------


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of a worker with little to give."""
    small = Settings(max_experts_per_session=5, max_calls_per_session=3)
    monkeypatch.setattr(settings, "current", lambda: small)


@pytest.mark.usefixtures("limited")
def test_experts_that_views_list() -> None:
    """Whether they are held already or ordered only; those of the welcome do not count."""
    with SessionViews(Holdings(ArithmeticBackend())) as views:
        views.hold(Hold(1, 1, {FREE: (0, 1), WIDE: (2,)}))
        with pytest.raises(
            InvalidCall,
            match=r"6 experts listed .* MOESHM_MAX_EXPERTS_PER_SESSION=5 of .*release a view first",
        ):
            views.hold(Hold(2, 2, {FREE: (0, 1, 2)}))
        views.hold(Hold(3, 2, {FREE: (0, 1)}))
        answered: list[int] = []
        while len(answered) < 2:
            answered += [call_id for call_id, _ in views.answers(lambda _: None)]
            os.sched_yield()
        with pytest.raises(InvalidCall, match="6 experts listed"):
            views.hold(Hold(4, 3, {FREE: (0,)}))
        views.release(Release(1))
        views.hold(Hold(5, 3, {FREE: (0, 1, 2)}))


class CountingSlab:
    """A device's slab that is waited for."""

    handle = b""

    def __init__(self) -> None:
        self.n_begun = self.n_waits = 0

    def share_of_step(self, _call: SlabCall) -> float:
        """Calls are bounded by their number."""
        return 0.0

    def prepare(self, _call: SlabCall) -> None:
        """Nothing to prepare."""

    def enqueue(self, _call: SlabCall, _between_steps: BetweenSteps) -> None:
        """Begin it."""
        self.n_begun += 1

    def wait(self) -> None:
        """All are done."""
        self.n_begun = 0
        self.n_waits += 1


@pytest.mark.usefixtures("limited")
def test_calls_that_a_device_has_begun() -> None:
    server, slab = SlabServer(ArithmeticBackend()), CountingSlab()
    server._slab = slab  # type: ignore[assignment]
    call = SlabCall(0, 1, 64, 2, DType.F32, Places(0, 0, 0, 0, 0), 1, 4, None, 9, 0)
    for _ in range(10):
        server.prepare(call)
        server.compute(call, NeverDue())
        assert slab.n_begun <= 3
    assert slab.n_waits == 3
