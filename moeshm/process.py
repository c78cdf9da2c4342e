"""Processes: which one is at the other end and whether it still lives, by pidfds that survive pid
reuse; what this one may have; and how one of ours is started."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import sys
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_M_ARENA_MAX = -8
#: This process's id, for what looks at it in every call: to ask for it is a system call.
own_pid = os.getpid()


def _remember_own_pid() -> None:
    global own_pid  # noqa: PLW0603
    own_pid = os.getpid()


os.register_at_fork(after_in_child=_remember_own_pid)


def _stat(pid: int) -> list[str]:
    """What proc(5) has of the process after its name: the state first, its start 20th. OSError."""
    # The command name in parentheses may itself hold spaces and parentheses.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot; 0 when it cannot be read.

    Together with the pid it names a process for the time of one boot.
    """
    try:
        return int(_stat(pid)[19])
    except OSError:
        return 0


@functools.cache
def _own_start_ticks(pid: int) -> int:
    return start_ticks(pid)


def own_identity() -> tuple[int, int]:
    """The pid and start time of this process."""
    pid = os.getpid()
    return pid, _own_start_ticks(pid)


def open_pidfd(pid: int, ticks: int = 0) -> int:
    """A pidfd of the process, or -1 when it is gone or is another process by now.

    `ticks`, when not 0, must be its start time: a recycled pid is not mistaken for it.
    """
    if pid <= 0:
        return -1
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, OverflowError):  # the pid may be what a hostile peer wrote
        return -1
    if ticks and start_ticks(pid) != ticks:
        os.close(pidfd)
        return -1
    return pidfd


def is_alive(pid: int, ticks: int = 0) -> bool:
    """True while that very process runs, or nobody can tell; a zombie counts as gone."""
    try:
        fields = _stat(pid)
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:  # like too many open files
        return True
    return fields[0] not in ("Z", "X") and ticks in (0, int(fields[19]))


def is_stopped(pid: int) -> bool:
    """True while a signal, or a debugger, keeps that process from running; False when nobody can
    tell."""
    try:
        return _stat(pid)[0] in ("T", "t")
    except OSError:
        return False


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def available_memory() -> int:
    """Bytes that may still be taken: page cache counts as free, and a cgroup's limit holds.

    MemAvailable of proc(5); memory.max, memory.current and memory.stat of this process's cgroup
    (v2), and of those that it is in.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) << 10
    return int(max(0, min([free, *map(_left_in, _own_cgroups())])))


def _own_cgroups() -> list[Path]:
    """The folders of this process's cgroup, and of those around it."""
    root = _CGROUPS
    try:
        lines = _OWN_CGROUP.read_text().splitlines()
    except OSError:
        return [root]
    inner = next((line[3:] for line in lines if line.startswith("0::/")), "/")
    # In a container its path may be written as seen from outside: what is not there has no limit.
    group = Path(os.path.normpath(root / inner.lstrip("/")))
    return [each for each in (group, *group.parents) if each.is_relative_to(root)] or [root]


def _left_in(group: Path) -> float:
    """Bytes that a cgroup may still take; infinite without a limit."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup v2, or no limit
        return math.inf
    return limit - used + int(stat.get("inactive_file", 0))


def share_heap() -> None:
    """Let all threads of this process allocate from one heap, where the C library is glibc.

    By default it makes a heap for each thread, up to eight for a CPU, and keeps what a thread freed
    for who comes to use that heap: a worker's sessions come and go, and one that had served for
    23 minutes kept 35 MiB that way and used 14. Call it before there are other threads. A
    MALLOC_ARENA_MAX in the environment stays. Source: mallopt(3).
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def python_module(name: str, *words: str) -> list[str]:
    """The command that runs a module of ours in a fresh interpreter.

    What lies in the current folder is not imported there, as a checkout beside the moeshm that is
    installed; unless moeshm is. (Python 3.10 cannot be told so.)
    """
    is_here = Path(__file__).resolve().parents[1] == Path.cwd()
    flags = ["-P"] if sys.version_info >= (3, 11) and not is_here else []
    return [sys.executable, *flags, "-m", name, *words]
