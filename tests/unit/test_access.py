"""Who may talk to whom: clients by user and group, workers by user, both as the kernel says."""

from __future__ import annotations

import grp
import os
import pwd
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from moeshm import access, session, settings
from moeshm.access import Peer
from moeshm.errors import ConnectError, HandshakeRefused, SessionError, SettingError
from tests.users import GROUP, NOBODY, SOMEBODY, as_user, needs_root, shared_folder
from tests.wire import PATIENCE_S, meanwhile


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where every user may listen."""
    with shared_folder() as found:
        yield found


def listening_at(path: Path, backlog: int = 8) -> socket.socket:
    """Whoever may reach the path may connect."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    path.chmod(0o777)
    listener.listen(backlog)
    return listener


# --- clients ------------------------------------------------------------------------------


def judged(path: Path, uid: int, groups: Sequence[int], group: int | None) -> str:
    """Why a client of that user is refused; empty when it is served."""

    def connect() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            client.connect(str(path))

    with listening_at(path) as listener:
        as_user(uid, connect, groups)
        sock, _ = listener.accept()
    with sock:
        peer = access.peer_of(sock)
        assert (peer.uid, peer.gid) == (uid, uid)
        try:
            access.check_client(sock, peer, group)
        except HandshakeRefused as error:
            return str(error)
    return ""


def test_the_same_user_is_served() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        peer = access.peer_of(left)
        assert peer == (os.getpid(), os.geteuid(), os.getegid())
        access.check_client(left, peer, None)
        access.check_client(left, Peer(1, 0, 0), None)


@needs_root
@pytest.mark.parametrize(
    ("uid", "groups", "group", "says"),
    [
        (NOBODY, (), None, f"user {NOBODY} may not use this worker, which serves root; start it"),
        (NOBODY, (GROUP,), None, "start it with --group"),
        (NOBODY, (), GROUP, f"serves root and the group {GROUP}; have the user added"),
        (NOBODY, (SOMEBODY, GROUP + 1), GROUP, "have the user added"),
        (NOBODY, (SOMEBODY, GROUP), GROUP, ""),
        (GROUP, (), GROUP, ""),
        (GROUP, range(NOBODY, NOBODY + 257), GROUP, ""),
        (NOBODY, range(GROUP, GROUP + 256), GROUP + 255, ""),
        (NOBODY, range(GROUP, GROUP + 257), GROUP, "cannot be read .*at most 256 are looked at"),
    ],
)
def test_other_users_are_served_in_the_group_only(
    folder: Path, uid: int, groups: Sequence[int], group: int | None, says: str
) -> None:
    found = judged(folder / "s", uid, groups, group)
    assert bool(found) == bool(says)
    assert re.search(says, found)


# --- workers ------------------------------------------------------------------------------


def test_a_worker_of_ones_own_user_or_of_root() -> None:
    for uid in (os.geteuid(), 0):
        access.check_worker(Peer(1, uid, 0), "/w.sock", "")


@pytest.mark.parametrize("named", [str(NOBODY), "daemon"])
def test_a_worker_of_a_user_that_is_named(named: str) -> None:
    access.check_worker(Peer(1, access.user_id(named), 0), "/w.sock", named)
    with pytest.raises(ConnectError, match=rf"runs as user {SOMEBODY}, not as .*{named} or root;"):
        access.check_worker(Peer(1, SOMEBODY, 0), "/w.sock", named)


def test_a_worker_of_another_user_and_what_to_do() -> None:
    with pytest.raises(
        ConnectError,
        match=rf"at /w\.sock runs as user {NOBODY}, .*set MOESHM_WORKER_USER={NOBODY}",
    ):
        access.check_worker(Peer(1, NOBODY, 0), "/w.sock", "")


@needs_root
def test_root_is_named_once() -> None:
    with pytest.raises(ConnectError, match=rf"runs as user {NOBODY}, not as root; if that"):
        access.check_worker(Peer(1, NOBODY, 0), "/w.sock", "")


@pytest.mark.parametrize("name", ["no-such-user", "-1", "1e3"])
def test_a_user_that_is_none(name: str) -> None:
    with pytest.raises(SettingError, match=f"MOESHM_WORKER_USER='{name}' is no user here"):
        access.check_worker(Peer(1, NOBODY, 0), "/w.sock", name)


@needs_root
def test_a_fake_worker_is_told_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another user, where everybody may put a socket: not even a hello."""
    path = folder / "s"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def pretend() -> None:
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen()

    as_user(NOBODY, pretend)
    received: list[bytes] = []

    def listen() -> None:
        sock, _ = listener.accept()
        with sock:
            received.append(sock.recv(1 << 16))

    with listener:
        with (
            meanwhile(listen),
            pytest.raises(ConnectError, match=f"who listens at {path} runs as user {NOBODY}"),
        ):
            session.connect(f"unix:{path}", "auto", 64, PATIENCE_S)
        assert received == [b""]
        # It is what is named that is believed.
        named = settings.Settings(worker_user=str(NOBODY))
        monkeypatch.setattr(settings, "current", lambda: named)
        with meanwhile(listen), pytest.raises(SessionError, match="closed the connection"):
            session.connect(f"unix:{path}", "auto", 64, PATIENCE_S)
        assert len(received[1]) > 10


# --- groups -------------------------------------------------------------------------------


def test_ones_own_group_by_name_and_number() -> None:
    gid = os.getegid()
    assert access.own_group(access.group_name(gid)) == access.own_group(str(gid)) == gid


@pytest.mark.parametrize("name", ["no-such-group", "-1", ""])
def test_a_group_that_is_none(name: str) -> None:
    with pytest.raises(SettingError, match=f"--group '{name}': there is no such group here"):
        access.own_group(name)


@needs_root
def test_a_group_of_others() -> None:
    def name_it() -> None:
        assert access.own_group(str(GROUP)) == GROUP
        with pytest.raises(
            SettingError,
            match=rf"user {NOBODY} is not a member; choose of {NOBODY}, {GROUP}, or .*usermod",
        ):
            access.own_group("daemon")

    as_user(NOBODY, name_it, [GROUP])
    # Root may give it away.
    assert access.own_group("daemon") == access.own_group("1")


def test_names_that_are_no_text_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bytes that are no UTF-8 are read; who is refused is told its name."""
    named = SimpleNamespace(pw_name="a\udcff", gr_name="b\udcff")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: named)
    monkeypatch.setattr(grp, "getgrgid", lambda _: named)
    assert access.user_name(1) == "a\\udcff"
    assert access.group_name(1) == "b\\udcff"


def test_names_of_what_has_none() -> None:
    assert access.user_name(NOBODY) == str(NOBODY)
    assert access.group_name(1 << 40) == str(1 << 40)
