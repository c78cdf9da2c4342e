"""Where log records go: standard error, as plain lines or as JSON objects."""

from __future__ import annotations

import datetime
import logging
import os
import select
import stat
import sys
import threading
import time
from typing import TypeVar

import msgspec

from .access import Peer
from .printable import printable

_Key = TypeVar("_Key")
#: Longer messages are cut.
_MOST_CHARACTERS = 8000
#: Of one peer, the same line so often at once, and so often a second in the long run; then all of
#: its lines.
_SAME_LINES, _SAME_LINES_PER_S = 300.0, 10.0
_PEER_LINES, _PEER_LINES_PER_S = 5000.0, 50.0
#: The same of all of a user's processes, and of a logger that is `limited`.
_USER_LINES, _USER_LINES_PER_S = 20_000.0, 200.0
_LIMITED_LINES, _LIMITED_LINES_PER_S = 1000.0, 10.0
#: How often, at most, those that were left out are told of, and how many kinds of them.
SUMMARY_S = 5.0
_MAX_SUMMARY = 20
#: Peers, and lines, that are remembered.
_MAX_KNOWN = 512


class _PlainFormatter(logging.Formatter):
    """One line a record, whatever is in it; those of a traceback are indented."""

    def format(self, record: logging.LogRecord) -> str:
        message = printable(record.getMessage(), _MOST_CHARACTERS)
        lines = [f"{self.formatTime(record)} {record.levelname} {message}"]
        if record.exc_info:
            traceback = self.formatException(record.exc_info)
            lines += [f"  {printable(line, _MOST_CHARACTERS)}" for line in traceback.split("\n")]
        return "\n".join(lines)


class _JsonFormatter(logging.Formatter):
    """One object a line: time (ISO 8601, UTC), level, logger, message, and a traceback if any."""

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": _encodable(record.getMessage()),
        }
        if record.exc_info:
            content["traceback"] = _encodable(self.formatException(record.exc_info))
        return msgspec.json.encode(content).decode()


def _encodable(text: str) -> str:
    """A file name that is no UTF-8 holds characters that JSON cannot: they are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def configure(level: str, as_json: bool) -> None:
    """Log moeshm's records of at least `level` (debug, info, warning, error) to standard error.

    Where that is a pipe or a socket, nobody waits for its reader: records for which there is no
    room are counted, and told of later.
    """
    handler = _handler()
    handler.setFormatter(_JsonFormatter() if as_json else _PlainFormatter())
    logger = logging.getLogger("moeshm")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def _handler() -> logging.Handler:
    try:
        fd = sys.stderr.fileno()
        mode = os.fstat(fd).st_mode
    except (AttributeError, OSError, ValueError):  # there is none, it is no file, or closed
        return logging.StreamHandler(sys.stderr)
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        return _NeverWaiting(fd, sys.stderr.encoding)
    return logging.StreamHandler(sys.stderr)


class _NeverWaiting(logging.Handler):
    """Writes whole lines in their order, and waits for no reader: a line that finds no room is kept
    until the next record, and records until then are lost, and told of with the next line."""

    def __init__(self, fd: int, encoding: str) -> None:
        super().__init__()
        self._fd = fd
        self._encoding = encoding
        #: What there was no room for yet.
        self._rest = b""
        self._n_lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write it, keep it, or count it."""
        self.flush()
        if self._rest:
            self._n_lost += 1
            return
        try:
            text = self.format(record)
            if self._n_lost:
                text = f"{self.format(_lost(self._n_lost))}\n{text}"
            self._rest = f"{text}\n".encode(self._encoding, "backslashreplace")
        except Exception:  # as of all handlers: the caller is not to fail
            self.handleError(record)
            return
        self._n_lost = 0
        self.flush()

    def flush(self) -> None:
        """Write what is kept, as far as there is room."""
        while self._rest:
            try:
                n_written = _write_some(self._fd, self._rest[: select.PIPE_BUF])
            except OSError:  # who read it is gone
                return
            if not n_written:
                return
            self._rest = self._rest[n_written:]


def _lost(count: int) -> logging.LogRecord:
    text = "%d lines were lost, since nobody read those before them"
    return logging.LogRecord(__name__, logging.WARNING, "", 0, text, (count,), None)


def _write_some(fd: int, data: bytes) -> int:
    """How many bytes there was room for, of PIPE_BUF at most. OSError."""
    # O_NONBLOCK would be for all who have the file.
    try:
        return os.pwritev(fd, [data], -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
    except (OSError, AttributeError, NotImplementedError):
        pass  # a pipe before Linux 6.4, or a system, or a Python, that lacks the call
    # Where others write there, too, they may take the room in between.
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return os.write(fd, data) if poll.poll(0) else 0


def limited(name: str) -> logging.Logger:
    """A logger for lines that clients give cause for, and nobody in particular: where there are
    very many, the rest is counted, and told of with the next that is written."""
    logger = logging.getLogger(name)
    if not any(isinstance(each, _Limit) for each in logger.filters):
        logger.addFilter(_Limit())
    return logger


class _Limit(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._bucket = _Bucket(_LIMITED_LINES, _LIMITED_LINES_PER_S)

    def filter(self, record: logging.LogRecord) -> bool:
        with self._lock:
            if not self._bucket.take(time.monotonic()):
                self._bucket.left_out += 1
                return False
            left_out, self._bucket.left_out = self._bucket.left_out, 0
        if left_out:
            text = f"{record.getMessage()} ({left_out} lines before it were left out)"
            record.msg, record.args = text, ()
        return True


class PeerLog:
    """Lines about peers: where one gives cause for the same line very often, or it or its user for
    very many lines, the rest is counted.

    Any thread may log. Whoever made it calls `summarise` now and then.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        #: By process, line and level, by process, and by user; what was heard last comes last. A
        #: process is its user and its number.
        self._lines: dict[tuple[int, int, str, int], _Bucket] = {}
        self._peers: dict[tuple[int, int], _Bucket] = {}
        self._users: dict[int, _Bucket] = {}
        #: Lines that were left out, and their kinds, of those forgotten before that was told.
        self._n_forgotten = self._n_kinds = 0
        self._summarised_at = time.monotonic()

    def log(self, peer: Peer, level: int, message: str) -> None:
        """Log `process PID: MESSAGE`, or count it, where lines of that level are wanted."""
        if not self._logger.isEnabledFor(level):
            return
        uid, pid = peer.uid, peer.pid
        line = printable(message, _MOST_CHARACTERS)
        now = time.monotonic()
        with self._lock:
            same = self._lines.pop((uid, pid, line, level), None) or _Bucket(
                _SAME_LINES, _SAME_LINES_PER_S
            )
            every = self._peers.pop((uid, pid), None) or _Bucket(_PEER_LINES, _PEER_LINES_PER_S)
            of_user = self._users.pop(uid, None) or _Bucket(_USER_LINES, _USER_LINES_PER_S)
            self._lines[uid, pid, line, level], self._peers[uid, pid] = same, every
            self._users[uid] = of_user
            # One without a number may be any of several.
            is_shown = pid == 0 or (same.take(now) and every.take(now))
            is_shown = is_shown and of_user.take(now)
            same.left_out += not is_shown
            if len(self._lines) > 2 * _MAX_KNOWN:
                # A peer may make up lines faster than anybody summarises.
                self._forget_old()
        if is_shown:
            self._logger.log(level, "process %d: %s", pid, line)

    def summarise(self, is_over: bool = False) -> None:
        """Log how often which lines were left out, at most every 5 s; at once if it is over."""
        now = time.monotonic()
        with self._lock:
            if now - self._summarised_at < SUMMARY_S and not is_over:
                return
            self._summarised_at = now
            found = [(*key, each.left_out) for key, each in self._lines.items() if each.left_out]
            for each in self._lines.values():
                each.left_out = 0
            self._forget_old()
            n_left_out, n_kinds = self._n_forgotten, self._n_kinds + len(found)
            self._n_forgotten = self._n_kinds = 0
        for _, pid, line, level, count in found[:_MAX_SUMMARY]:
            self._logger.log(level, "process %d: %d times more: %s", pid, count, line)
        n_left_out += sum(count for *_, count in found[_MAX_SUMMARY:])
        if n_left_out:
            self._logger.warning("%d more lines of %d kinds were left out", n_left_out, n_kinds)

    def _forget_old(self) -> None:
        """Holds the lock."""
        for key in list(self._lines)[:-_MAX_KNOWN]:
            left_out = self._lines.pop(key).left_out
            if left_out:
                self._n_forgotten += left_out
                self._n_kinds += 1
        _drop_old(self._peers)
        _drop_old(self._users)


class _Bucket:
    """How many lines may be written yet: `most` at once, and some more every second."""

    def __init__(self, most: float, per_s: float) -> None:
        self._most, self._per_s = most, per_s
        self._allowed, self._at = most, time.monotonic()
        self.left_out = 0

    def take(self, now: float) -> bool:
        """One more; False when it may not be written."""
        self._allowed = min(self._most, self._allowed + (now - self._at) * self._per_s)
        self._at = now
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True


def _drop_old(buckets: dict[_Key, _Bucket]) -> None:
    for key in list(buckets)[:-_MAX_KNOWN]:
        del buckets[key]
