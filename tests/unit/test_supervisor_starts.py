"""A worker process of one's own that an interrupt keeps from being started, at every moment of
that: once it is closed nothing is left, and until then it can be started."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeshm import supervisor
from moeshm.supervisor import WorkerProcess
from tests import leaks
from tests.interrupts import interrupted_at

#: Says that it is ready, and stays until it is ended.
READY = """
import os, signal, socket
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
    ready.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
signal.pause()
"""
#: Fewer moments than any of these starts has.
FEWEST_MOMENTS = 10
FILES = supervisor.__file__, subprocess.__file__, tempfile.__file__
#: An interrupt leaves it to the interpreter to close what is not known to anybody yet.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def folder(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sockets are; workers are such ones that load nothing."""
    command = [sys.executable, "-I", "-S", "-c", READY]
    monkeypatch.setattr("tempfile.tempdir", str(short_folder))
    monkeypatch.setattr(supervisor, "python_module", lambda *_words: command.copy())
    return short_folder


def made() -> WorkerProcess:
    """Not started."""
    return WorkerProcess("unused", "cpu", False, None, {0: [1]}, None)


def assert_nothing_is_left(before: leaks.Snapshot, folder: Path, moment: int) -> None:
    """Of the one that was interrupted then."""
    assert (leaks.find_leaks(before), list(folder.iterdir())) == ([], []), f"moment {moment}"


def is_interrupted(what: Callable[[], object], moment: int) -> bool:
    """By then; False when it ended before."""
    try:
        with interrupted_at(moment, FILES):
            what()
    except KeyboardInterrupt:
        return True
    assert moment > FEWEST_MOMENTS
    return False


def test_one_that_was_not_made(folder: Path) -> None:
    before = leaks.take_snapshot()
    for moment in itertools.count():
        workers: list[WorkerProcess] = []
        was_interrupted = is_interrupted(lambda: workers.append(made()), moment)  # noqa: B023
        while workers:
            workers.pop().stop()
        assert_nothing_is_left(before, folder, moment)
        if not was_interrupted:
            break


def test_one_that_is_stopped(folder: Path) -> None:
    before = leaks.take_snapshot()
    for moment in itertools.count():
        worker = made()
        was_interrupted = is_interrupted(worker.restart, moment)
        worker.stop()
        assert_nothing_is_left(before, folder, moment)
        if not was_interrupted:
            break


def test_one_that_is_started_again(folder: Path) -> None:
    before = leaks.take_snapshot()
    worker = made()
    for moment in itertools.count():
        if not is_interrupted(worker.restart, moment):
            break
        worker.restart()
        assert worker.is_running()
    worker.stop()
    assert_nothing_is_left(before, folder, moment)


def test_a_client_that_was_not_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nobody can close it."""

    class Client:
        def __init__(
            self,
            open_session: Callable[[None], object],
            close: Callable[[], None],
            *_arguments: Any,
            **_named: Any,
        ) -> None:
            self.close = close
            open_session(None)

    monkeypatch.setattr(supervisor, "ExpertClient", Client)
    monkeypatch.setattr("moeshm.session.connect", lambda *_arguments, **_named: None)
    before = leaks.take_snapshot()
    for moment in itertools.count():
        clients: list[Any] = []

        def spawn() -> None:
            clients.append(supervisor.spawn_worker("unused"))  # noqa: B023

        was_interrupted = is_interrupted(spawn, moment)
        for client in clients:
            client.close()
        assert_nothing_is_left(before, folder, moment)
        if not was_interrupted:
            break
