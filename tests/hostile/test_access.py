"""Who may connect, and how much one client may take, on live workers and with real users."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import moeshm
from moeshm import settings
from moeshm.errors import ConnectError, HandshakeRefused
from tests.crash.arithmetic import FREE, assert_exact, make_inputs
from tests.crash.processes import NotifySocket, Process, open_fds, running
from tests.hostile.attacker import Attacker, attacking, hello
from tests.hostile.attacks import lingering_sockets
from tests.hostile.conftest import Victim
from tests.users import GROUP, NOBODY, SOMEBODY, as_user, needs_root, shared_folder


@contextlib.contextmanager
def worker(address: str, arguments: list[str] | None = None, **limits: int) -> Iterator[Process]:
    """One that listens there, within the limits."""
    environment: Mapping[str, str] = {
        f"MOESHM_{name.upper()}": str(value) for name, value in limits.items()
    }
    with running(
        ["-m", *(arguments or ["tests.hostile.worker", address])], environment=environment
    ) as process:
        process.log.read_until("listening at")
        yield process


def compute(address: str, transport: str = "auto") -> None:
    """A client that gets what it should."""
    inputs = make_inputs(FREE, 3)
    with moeshm.connect(address, transport=transport) as client:
        assert_exact(client.compute(*inputs), inputs)


def refused(address: str) -> str:
    """What the worker says to a client."""
    with pytest.raises(HandshakeRefused) as caught:
        moeshm.connect(address, timeout_s=5.0)
    return str(caught.value)


def trusting(user: str, act: Callable[[], None]) -> Callable[[], None]:
    """Does it with MOESHM_WORKER_USER; in a process that ends then."""

    def act_so() -> None:
        os.environ["MOESHM_WORKER_USER"] = user
        settings.current.cache_clear()
        act()

    return act_so


@pytest.fixture
def folder() -> Iterator[Path]:
    """Which every user can reach, and only root may write."""
    with shared_folder(0o755) as found:
        yield found


# --- users --------------------------------------------------------------------------------


@needs_root
def test_another_user_does_not_get_in(folder: Path) -> None:
    address = f"unix:{folder / 's'}"

    def knock() -> None:
        with pytest.raises(ConnectError, match="Permission denied"):
            moeshm.connect(address)

    def ask() -> None:
        says = refused(address)
        assert f"user {NOBODY} may not use this worker, which serves root" in says
        assert "start it with --group" in says

    with worker(address) as process:
        as_user(NOBODY, knock)
        # Whoever opened the door, the worker looks who comes in.
        (folder / "s").chmod(0o777)
        fds = open_fds(process.pid)
        as_user(NOBODY, ask)
        line = process.log.read_until("got no session")
        assert f"user {NOBODY} may not use this worker" in line
        assert "WARNING" in line
        assert open_fds(process.pid) == fds
        compute(address)


@needs_root
def test_a_group_is_served_and_nobody_else(folder: Path) -> None:
    address = f"unix:{folder / 's'}"
    os.chown(folder, SOMEBODY, GROUP)

    def knock() -> None:
        with pytest.raises(ConnectError, match="Permission denied"):
            moeshm.connect(address)

    def suspect() -> None:
        with pytest.raises(ConnectError, match=f"set MOESHM_WORKER_USER={SOMEBODY}"):
            moeshm.connect(address)

    of_somebody = ["tests.hostile.worker_of", str(SOMEBODY), str(GROUP), address]
    with worker(address, of_somebody) as process:
        found = (folder / "s").stat()
        assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o660, SOMEBODY, GROUP)
        as_user(NOBODY, knock)
        # Whom it trusts is for the client to say.
        as_user(NOBODY, suspect, [GROUP])
        for transport in ("shared", "stream"):
            as_user(
                NOBODY,
                trusting(str(SOMEBODY), lambda how=transport: compute(address, how)),  # type: ignore[misc]
                [GROUP],
            )
            process.log.read_until("session ended after 1 calls")
        as_user(SOMEBODY, lambda: compute(address))
        (folder / "s").chmod(0o777)
        as_user(NOBODY, trusting(str(SOMEBODY), lambda: _is_no_member(address)))
        assert "may not use this worker" in process.log.read_until("got no session")


def _is_no_member(address: str) -> None:
    assert f"user {NOBODY} may not use this worker" in refused(address)
    assert f"and the group {GROUP}; have the user added" in refused(address)


@needs_root
def test_thousands_who_are_refused_are_counted(folder: Path) -> None:
    """And somebody else's session goes on."""
    address = f"unix:{folder / 's'}"

    def knock() -> None:
        for _ in range(3000):
            with contextlib.suppress(OSError), attacking(address):
                pass

    notify = NotifySocket(folder / "notify")
    with (
        (folder / "log").open("w+") as log,
        running(
            ["-m", "tests.hostile.worker", address],
            environment=notify.environment,
            stderr=log.fileno(),
        ) as process,
        contextlib.closing(notify),
    ):
        assert notify.receive(process) == "READY=1"
        (folder / "s").chmod(0o777)
        inputs = make_inputs(FREE, 5)
        with moeshm.connect(address) as client:
            as_user(NOBODY, knock)
            assert_exact(client.compute(*inputs), inputs)
        # It stands in the queue behind them all.
        compute(address)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        log.seek(0)
        lines = [line for line in log if "got no session: user" in line]
    counted = [int(each[1]) for line in lines if (each := re.search(r"(\d+) times more", line))]
    assert counted
    assert len(lines) < 1500
    assert len(lines) - len(counted) + sum(counted) == 3000


# --- limits -------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["shared", "stream"])
def test_one_session_more_than_a_process_may_have(tmp_path: Path, transport: str) -> None:
    address = f"unix:{tmp_path / 's'}"
    with worker(address, max_sessions_per_process=2) as process:
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(moeshm.connect(address, transport=transport)) for _ in range(2)
            ]
            says = refused(address)
            assert f"2 connections of process {os.getpid()}" in says
            assert "MOESHM_MAX_SESSIONS_PER_PROCESS=2 of the worker" in says
            assert "close some, or start it with more" in says
            assert "2 connections of process" in process.log.read_until("got no session")
            # Another process has its own.
            as_user(os.geteuid(), lambda: compute(address, transport), os.getgroups())
            for tag, client in enumerate(clients):
                inputs = make_inputs(FREE, tag)
                assert_exact(client.compute(*inputs), inputs)
        compute(address, transport)


def test_one_session_more_than_all_may_have(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's'}"
    with worker(address, max_sessions=2) as process:
        with attacking(address), moeshm.connect(address):
            # One that did not shake hands counts as well.
            assert "2 connections; MOESHM_MAX_SESSIONS=2 of the worker" in refused(address)
        process.log.read_until("session ended after 0 calls")
        compute(address)


def test_one_session_more_than_a_user_may_have(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's'}"
    with worker(address, max_sessions_per_user=1), moeshm.connect(address):
        assert "MOESHM_MAX_SESSIONS_PER_USER=1 of the worker" in refused(address)


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_process_that_is_slow_keeps_no_other_out(tmp_path: Path, has_begun: bool) -> None:
    """More than there is room for, silent or half through their handshakes: those of another
    process get through at once, and the oldest make room."""
    address = f"unix:{tmp_path / 's'}"
    patient = ["tests.hostile.worker", address, "patient"]
    with worker(address, patient, max_handshakes=8) as process, contextlib.ExitStack() as stack:
        slow: list[Attacker] = []

        def connect_slowly() -> None:
            slow.append(stack.enter_context(attacking(address)))
            if has_begun:
                # Some are refused before they say anything.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    slow[-1].control.send(b"\1h")

        for _ in range(300):
            connect_slowly()
        process.log.read_until("8 connections at their handshake; MOESHM_MAX_HANDSHAKES=8")
        for number in range(3):
            as_user(os.geteuid(), lambda: compute(address), os.getgroups())
            reason = slow[number].last_word()
            assert "made room for another client's: MOESHM_MAX_HANDSHAKES=8" in reason
            process.log.read_until("made room for another client's")
            connect_slowly()


def test_who_finds_no_room_comes_again(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's'}"
    patient = ["tests.hostile.worker", address, "patient"]
    with (
        worker(address, patient, max_handshakes=1) as process,
        attacking(address) as silent,
        ThreadPoolExecutor(1) as other,
    ):
        served = other.submit(compute, address)
        assert "1 connections at their handshake" in process.log.read_until("got no session")
        silent.close()
        served.result()


def test_a_slow_handshake_makes_room_where_all_have_as_many(tmp_path: Path) -> None:
    """One of each of many processes would keep everybody out."""
    address = f"unix:{tmp_path / 's'}"
    with worker(address, max_handshakes=1), attacking(address) as silent:
        as_user(os.geteuid(), lambda: compute(address), os.getgroups())
        assert "made room for another client's" in silent.last_word()


def test_those_at_their_handshake_do_not_keep_the_worker(tmp_path: Path) -> None:
    """It would wait for them for minutes."""
    address = f"unix:{tmp_path / 's'}"
    patient = ["tests.hostile.worker", address, "patient"]
    with worker(address, patient) as process, attacking(address) as silent:
        silent.control.send(b"\1h")
        with moeshm.connect(address):  # by then the other is accepted, too
            process.signal(signal.SIGTERM)
            assert "the worker shuts down" in silent.last_word()
        assert process.wait() == 0


@pytest.mark.parametrize("when", ["refused", "hello"])
def test_a_client_that_keeps_a_thread_does_not_keep_the_worker(tmp_path: Path, when: str) -> None:
    """What it sent cannot be closed in minutes."""
    address = f"unix:{tmp_path / 's'}"
    hasty = ["tests.hostile.worker", address, "hasty"]
    with (
        worker(address, hasty, max_sessions=1 if when == "refused" else 9) as process,
        lingering_sockets.lingering(is_hidden=True) as fds,
        attacking(address),
    ):
        victim = Victim(process, address)
        with lingering_sockets.stopped(victim), attacking(address) as attacker:
            lingering_sockets.send(attacker, hello(), fds)
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


def test_bytes_of_a_session(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's'}"
    with (
        worker(address, max_bytes_per_session=800_000) as process,
        moeshm.connect(address, transport="shared") as client,
    ):
        assert "MOESHM_MAX_BYTES_PER_SESSION=800000" in process.log.read_until("were wanted")
        inputs = make_inputs(FREE, 1, 300)
        assert_exact(client.compute(*inputs), inputs)
    with worker(address, max_bytes_per_session=1000) as process:
        assert "bytes, and MOESHM_MAX_BYTES_PER_SESSION=1000 of the worker" in refused(address)
        process.log.read_until("got no session: a session takes at least")


def test_bytes_of_all_sessions(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's'}"
    with worker(address, max_bytes=40_000_000) as process, contextlib.ExitStack() as stack:
        refusals: list[str] = []
        while not refusals:
            try:
                stack.enter_context(moeshm.connect(address, transport="shared"))
            except HandshakeRefused as error:
                refusals.append(str(error))
        assert "40000000 may be taken: close others" in refusals[0]
        assert "got no session: the worker's sessions take" in process.log.read_until("got no")
        stack.close()
        process.log.read_until("session ended after")
        compute(address)
        process.signal(signal.SIGTERM)
        assert "MOESHM_MAX_BYTES was met 1 times" in process.log.read_rest()
