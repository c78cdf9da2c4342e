"""Log records: plain lines, or JSON objects that a machine can read whatever is in them."""

from __future__ import annotations

import datetime
import errno
import importlib
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from moeshm import logs
from moeshm.access import Peer
from moeshm.printable import printable
from tests.wire import meanwhile


@pytest.fixture(autouse=True)
def _own_logger() -> Iterator[None]:
    """The package's logger as it was, afterwards."""
    logger = logging.getLogger("moeshm")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


def written(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines on standard error; standard output stays empty."""
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=False)
    logging.getLogger("moeshm.worker").info("%d calls", 3)
    (line,) = written(capsys)
    assert line.endswith(" INFO 3 calls")


@pytest.mark.parametrize(
    ("level", "n_lines"), [("debug", 4), ("info", 3), ("warning", 2), ("error", 1)]
)
@pytest.mark.parametrize("as_json", [False, True])
def test_levels(
    capsys: pytest.CaptureFixture[str], level: str, n_lines: int, as_json: bool
) -> None:
    logs.configure(level, as_json)
    logger = logging.getLogger("moeshm.daemon")
    for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logger.log(number, "something")
    assert len(written(capsys)) == n_lines


def test_configured_twice_it_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=False)
    logs.configure("info", as_json=True)
    logging.getLogger("moeshm").warning("once")
    assert len(written(capsys)) == 1


def test_other_packages_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    before = logging.getLogger().handlers[:]
    logs.configure("debug", as_json=True)
    logging.getLogger("someone.else").debug("not ours")
    assert logging.getLogger().handlers == before
    assert written(capsys) == []


def test_a_json_record_has_the_documented_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=True)
    before = datetime.datetime.now(datetime.timezone.utc)
    logging.getLogger("moeshm.daemon").warning("process %d: %s", 12, "gone")
    record = json.loads(written(capsys)[0])
    time = datetime.datetime.fromisoformat(record.pop("time").replace("Z", "+00:00"))
    assert before - datetime.timedelta(seconds=1) < time
    assert time <= datetime.datetime.now(datetime.timezone.utc)
    assert record == {
        "level": "warning",
        "logger": "moeshm.daemon",
        "pid": os.getpid(),
        "message": "process 12: gone",
    }


def test_a_traceback_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=True)
    try:
        raise RuntimeError("two\nlines")
    except RuntimeError:
        logging.getLogger("moeshm").exception("failed")
    (line,) = written(capsys)
    record = json.loads(line)
    assert record["message"] == "failed"
    assert record["traceback"].startswith("Traceback")
    assert record["traceback"].endswith("two\nlines")


@pytest.mark.parametrize(
    "text", ["line\nbreak", "\x00\x1b[0m", "ünïcode …", "half a \ud83d", "\udcff"]
)
def test_any_text_is_one_valid_line(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Among them a file name that is no UTF-8, as Python decodes it."""
    logs.configure("info", as_json=True)
    logging.getLogger("moeshm").info("cannot read %s", text)
    (line,) = written(capsys)
    assert json.loads(line)["message"].startswith("cannot read ")


# --- what others say ----------------------------------------------------------------------

FORGED = "\n2026-01-01 00:00:00,000 INFO all is well\x1b[2K\r\u2028x\x00"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_record_stays_one_line(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    logs.configure("info", as_json)
    logging.getLogger("moeshm").info("the peer says %s", FORGED)
    out = capsys.readouterr().err
    assert out.count("\n") == 1
    assert not set(out[:-1]) & set("\n\r\x1b\x00")


def test_no_line_of_a_traceback_looks_like_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=False)
    try:
        raise ValueError(FORGED)
    except ValueError:
        logging.getLogger("moeshm").exception("it failed")
    first, *rest = written(capsys)
    assert first.endswith("ERROR it failed")
    assert "all is well" in "".join(rest)
    assert all(line.startswith("  ") for line in rest)
    assert "\x1b" not in "".join(rest)


def test_what_is_too_long_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", as_json=False)
    logging.getLogger("moeshm").info("%s", "x" * 100_000)
    (line,) = written(capsys)
    assert line.endswith("xxx... (100000 characters)")
    assert len(line) < 9000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ümläuts", "ümläuts"),
        ("a\nb\x1b[2J\x7f\u202e", "a\\nb\\x1b[2J\\x7f\\u202e"),
        ("\ud800", "\\ud800"),
        ("x" * 11, "xxxxxxxxxx... (11 characters)"),
        ("\n" * 10, "\\n" * 10),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text, 10) == shown


# --- a log that nobody reads --------------------------------------------------------------


class Unread:
    """A pipe, or a socket, in which there is no room."""

    def __init__(self, kind: str) -> None:
        if kind == "socket":
            left, right = socket.socketpair()
            self.reader, self.writer = left.detach(), right.detach()
        else:
            self.reader, self.writer = os.pipe()
        self.n_filled = 0
        os.set_blocking(self.writer, False)
        for size in (4096, 1):
            try:
                while True:
                    self.n_filled += os.write(self.writer, b"x" * size)
            except BlockingIOError:
                pass
        os.set_blocking(self.writer, True)
        os.set_blocking(self.reader, False)

    def configure(self, monkeypatch: pytest.MonkeyPatch, as_json: bool = False) -> None:
        """Have records written there, as if it were standard error."""
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", open(self.writer, "w", closefd=False))  # noqa: SIM115
            logs.configure("info", as_json)

    def read(self) -> bytes:
        """All that is there, but what filled it."""
        data = bytearray()
        try:
            while more := os.read(self.reader, 65536):
                data += more
        except BlockingIOError:
            pass
        n_filled, self.n_filled = self.n_filled, 0
        return bytes(data[n_filled:])

    def close(self) -> None:
        """Both ends, unless the reader's is closed."""
        os.close(self.writer)
        if self.reader >= 0:
            os.close(self.reader)


@pytest.fixture(
    params=["pipe", "socket", "pipe before Linux 6.4", "pipe of a Python without flags"]
)
def unread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Unread]:
    """One of each kind."""

    def fail(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if "before" in request.param:
        monkeypatch.setattr(os, "pwritev", fail)
    elif "without" in request.param:
        monkeypatch.delattr(os, "RWF_NOWAIT")
    found = Unread(request.param)
    yield found
    found.close()


def log_lines(*lines: str) -> None:
    """Log these, without waiting for ever."""

    def log() -> None:
        for line in lines:
            logging.getLogger("moeshm").info("%s", line)

    with meanwhile(log):
        pass


@pytest.mark.parametrize("as_json", [False, True])
def test_nobody_waits_for_who_does_not_read_the_log(
    unread: Unread, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """Lines are lost, and counted once somebody reads; none is torn."""
    unread.configure(monkeypatch, as_json)
    log_lines(*(f"line {number}" for number in range(100)))
    assert unread.read() == b""
    log_lines("read again", "and on")
    lines = unread.read().decode().splitlines()
    said = [json.loads(each)["message"] if as_json else each.split(" ", 3)[3] for each in lines]
    lost = "99 lines were lost, since nobody read those before them"
    assert said == ["line 0", lost, "read again", "and on"]


def test_a_line_that_finds_room_for_a_part_goes_on_there(
    unread: Unread, monkeypatch: pytest.MonkeyPatch
) -> None:
    unread.configure(monkeypatch)
    unread.read()
    long = ["ü" * 7000] * 200
    log_lines(*long)
    data = unread.read()
    log_lines("read again")
    *shown, lost, last = (data + unread.read()).decode().splitlines()
    assert {each.split(" ", 3)[3] for each in shown} == {long[0]}
    assert f"{len(long) - len(shown)} lines were lost" in lost
    assert last.endswith("read again")


def test_what_was_kept_is_written_at_the_end(
    unread: Unread, monkeypatch: pytest.MonkeyPatch
) -> None:
    unread.configure(monkeypatch)
    log_lines("the last word")
    unread.read()
    (handler,) = logging.getLogger("moeshm").handlers
    handler.flush()
    assert unread.read().endswith(b"the last word\n")


def test_a_reader_that_is_gone_is_no_error(unread: Unread, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: logging.Handler, record: logging.LogRecord) -> None:
        raise AssertionError(record)

    monkeypatch.setattr(logging.Handler, "handleError", fail)
    unread.configure(monkeypatch)
    os.close(unread.reader)
    unread.reader = -1
    log_lines("one", "two")


# --- lines about peers --------------------------------------------------------------------


class Clock:
    """Time that passes when it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """In place of the system's."""
    monkeypatch.setattr(logs, "_SAME_LINES", 3.0)
    monkeypatch.setattr(logs, "_PEER_LINES", 5.0)
    monkeypatch.setattr(logs, "_USER_LINES", 9.0)
    monkeypatch.setattr(logs, "_LIMITED_LINES", 2.0)
    return Clock(monkeypatch)


@pytest.fixture
def peers(clock: Clock) -> logs.PeerLog:  # noqa: ARG001
    """Lines about peers, as a daemon logs them."""
    return logs.PeerLog(logging.getLogger("moeshm.daemon"))


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The messages."""
    return [line.split(" ", 3)[3] for line in written(capsys)]


def test_the_same_line_is_counted_when_it_comes_very_often(
    capsys: pytest.CaptureFixture[str], clock: Clock, peers: logs.PeerLog
) -> None:
    logs.configure("info", as_json=False)
    for _ in range(100):
        peers.log(Peer(7, 1, 1), logging.WARNING, "refused")
    peers.log(Peer(7, 1, 1), logging.WARNING, "refused otherwise")
    peers.log(Peer(8, 1, 1), logging.INFO, "refused")
    peers.summarise()
    assert said(capsys) == [
        *["process 7: refused"] * 3,
        "process 7: refused otherwise",
        "process 8: refused",
    ]
    clock.now += logs.SUMMARY_S
    peers.summarise()
    assert said(capsys) == ["process 7: 97 times more: refused"]
    # It is told once, and by now a few may be written again.
    peers.summarise(is_over=True)
    peers.log(Peer(7, 1, 1), logging.WARNING, "refused")
    assert said(capsys) == ["process 7: refused"]


def test_at_the_end_the_rest_is_told_at_once(
    capsys: pytest.CaptureFixture[str], peers: logs.PeerLog
) -> None:
    logs.configure("info", as_json=False)
    for _ in range(4):
        peers.log(Peer(7, 1, 1), logging.WARNING, "refused\nINFO all is well")
    peers.summarise(is_over=True)
    assert said(capsys)[3:] == ["process 7: 1 times more: refused\\nINFO all is well"]


def test_lines_of_a_level_that_is_not_wanted_are_not_told_of_either(
    capsys: pytest.CaptureFixture[str], peers: logs.PeerLog
) -> None:
    logs.configure("warning", as_json=False)
    for _ in range(100):
        peers.log(Peer(7, 1, 1), logging.INFO, "a session")
    peers.summarise(is_over=True)
    assert said(capsys) == []


def test_lines_that_all_differ_are_counted_as_well(
    capsys: pytest.CaptureFixture[str], clock: Clock, peers: logs.PeerLog
) -> None:
    logs.configure("info", as_json=False)
    for number in range(1000):
        peers.log(Peer(7, 1, 1), logging.WARNING, f"refused for the {number}th time")
    assert len(said(capsys)) == 5
    clock.now += logs.SUMMARY_S
    peers.summarise()
    shown = said(capsys)
    assert len(shown) == 21
    assert shown[-1] == "975 more lines of 995 kinds were left out"
    assert len(peers._lines) <= 512


def test_a_user_with_many_processes_is_one(
    capsys: pytest.CaptureFixture[str], peers: logs.PeerLog
) -> None:
    logs.configure("info", as_json=False)
    for pid in range(1, 101):
        peers.log(Peer(pid, 1, 1), logging.WARNING, "refused")
    peers.log(Peer(1, 2, 2), logging.WARNING, "refused")
    assert said(capsys) == [
        *(f"process {pid}: refused" for pid in range(1, 10)),
        "process 1: refused",
    ]


def test_processes_without_a_number_are_not_taken_for_one(
    capsys: pytest.CaptureFixture[str], peers: logs.PeerLog
) -> None:
    """But for their user."""
    logs.configure("info", as_json=False)
    for _ in range(100):
        peers.log(Peer(0, 1, 1), logging.WARNING, "refused")
    peers.summarise(is_over=True)
    assert said(capsys) == [*["process 0: refused"] * 9, "process 0: 91 times more: refused"]


def test_lines_of_nobody_in_particular(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    logs.configure("info", as_json=False)
    name = "moeshm.test_lines_of_nobody"
    log = logs.limited(name)
    assert logs.limited(name) is log
    for number in range(100):
        log.warning("%d experts loaded", number)
    clock.now += 0.15
    log.warning("%d%% loaded", 100)
    log.warning("nothing")
    assert said(capsys) == [
        "0 experts loaded",
        "1 experts loaded",
        "100% loaded (98 lines before it were left out)",
    ]


@pytest.mark.parametrize("name", ["moeshm.holdings", "moeshm.worker", "moeshm.daemon.lost"])
def test_what_clients_give_cause_for_is_limited(name: str) -> None:
    importlib.import_module("moeshm.daemon")
    assert any(isinstance(each, logs._Limit) for each in logging.getLogger(name).filters)


def test_lines_that_a_peer_makes_up_are_not_kept(
    capsys: pytest.CaptureFixture[str], clock: Clock, peers: logs.PeerLog
) -> None:
    """Without a summary in between; those that were left out are told of all the same."""
    logs.configure("info", as_json=False)
    for number in range(8000):
        peers.log(Peer(7, 1, 1), logging.WARNING, f"refused for the {number}th time")
        assert len(peers._lines) <= 1025
    assert len(said(capsys)) == 5
    clock.now += logs.SUMMARY_S
    peers.summarise()
    assert said(capsys)[-1] == "7975 more lines of 7995 kinds were left out"
