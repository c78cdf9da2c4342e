"""What tests may leave behind: child processes, open fds, segments in /dev/shm, orphans."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import select
import signal
import struct
import sysconfig
from collections import Counter
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

#: Every process that a test starts inherits it, however far down; its value names the run.
#: (No MOESHM_ in front: that would make it a setting.)
RUN_VARIABLE = "TEST_RUN_OF_MOESHM"
_SHM = Path("/dev/shm")
_LIBRARIES = tuple(f"{sysconfig.get_path(name)}/" for name in ("purelib", "platlib"))
_PREFIX = "moeshm"
#: Where a segment's control page keeps its creator's pid.
_CREATOR_OFFSET = 64


class Snapshot(NamedTuple):
    """What this process holds at one moment; the fds by number, with what each points to."""

    children: frozenset[int]
    fds: dict[int, str]
    segments: frozenset[str]


def take_snapshot() -> Snapshot:
    """What this process holds now."""
    return Snapshot(
        _children(),
        _open_fds(),
        frozenset(name for name in os.listdir(_SHM) if name.startswith(_PREFIX)),
    )


def find_leaks(before: Snapshot, *, fds: bool = True) -> list[str]:
    """What came since `before` and is still there, a sentence each; `fds=False` passes over fds.

    Leaked children are killed, so that they do not disturb what runs next.
    """
    leaks = _compare(before, fds)
    if leaks:
        # What only a reference cycle keeps has no owner any more: it is not leaked.
        gc.collect()
        leaks = _compare(before, fds)
        for pid in _children() - before.children:
            _kill_and_reap(pid)
    return leaks


def find_orphans(limit_s: float = 5.0) -> list[str]:
    """Processes of this run whose parents died before them, each with the test it is from.

    They have `limit_s` to end by themselves and are killed then.
    """
    pidfds = [fd for pid in _living_orphans() if (fd := _open_pidfd(pid)) is not None]
    with select.epoll() as exits:
        for pidfd in pidfds:
            exits.register(pidfd, select.EPOLLIN | select.EPOLLONESHOT)
        for _ in pidfds:
            if not exits.poll(limit_s, maxevents=1):
                break
    for pidfd in pidfds:
        os.close(pidfd)
    orphans = _living_orphans()
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    return list(orphans.values())


def _compare(before: Snapshot, fds: bool) -> list[str]:
    after = take_snapshot()
    leaks = [f"child process {_describe(pid)}" for pid in sorted(after.children - before.children)]
    # By target: a number is reused at once, and the target is what tells whose it is.
    grown = Counter(after.fds.values()) - Counter(before.fds.values())
    for target, count in grown.items() if fds else ():
        numbers = [fd for fd, at in after.fds.items() if at == target]
        leaks.append(f"{count} more fd to {target}, one of {numbers}")
    leaks += [
        f"/dev/shm/{name}"
        for name in sorted(after.segments - before.segments)
        if not _is_of_another_run(name)
    ]
    return leaks


def _children() -> frozenset[int]:
    own = os.getpid()
    pids: set[int] = set()
    for thread in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{thread}/children", "rb") as file:
                pids.update(map(int, file.read().split()))
        except OSError:
            # A thread may end while we look. The first one cannot: this kernel lacks the file.
            if int(thread) == own:
                raise
    # Started once by multiprocessing for a process's whole life, like its pipe below.
    return frozenset(pids - {_tracker("_pid")})


def _open_fds() -> dict[int, str]:
    targets = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the listing's own
            continue
        # Libraries may keep their data files open for good, as matplotlib does its fonts.
        if not target.startswith(_LIBRARIES):
            targets[int(fd)] = target
    targets.pop(_tracker("_fd"), None)
    return targets


def _tracker(attribute: str) -> int:
    value = getattr(resource_tracker._resource_tracker, attribute)
    return -1 if value is None else int(value)


def _is_of_another_run(segment: str) -> bool:
    """True when its creator lives and has nothing to do with us: runs may go side by side."""
    creators = {int(number) for number in re.findall(r"\d{1,9}", segment)}
    try:
        with open(_SHM / segment, "rb") as file:
            signature = os.pread(file.fileno(), 8, _CREATOR_OFFSET)
    except OSError:
        return True  # gone by now, or another user's
    if len(signature) == 8:
        creators.add(int(struct.unpack("<Q", signature)[0]))
    if any(pid == os.getpid() or _environment(pid) for pid in creators):
        return False
    # Some numbers in names are no pids; a kernel thread, which has no command, is no creator.
    return any(pid > 1 and _state(pid) not in "ZX" and _command(pid) for pid in creators)


def _describe(pid: int) -> str:
    zombie = _state(pid) == "Z"
    return f"{pid} ({'a zombie that nobody waited for' if zombie else 'running ' + _command(pid)})"


def _command(pid: int) -> str:
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).replace("\0", " ").strip()
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """The fields of proc(5) from the state letter on; a process that is gone has state X."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["X", "0"]


def _state(pid: int) -> str:
    return _stat(pid)[0]


def _environment(pid: int) -> dict[str, str]:
    """The environment that a process of this test run was started with; else empty."""
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    words = [word.partition("=") for word in os.fsdecode(raw).split("\0")]
    environment = {name: value for name, _, value in words}
    is_ours = environment.get(RUN_VARIABLE) == os.environ[RUN_VARIABLE]
    return environment if is_ours else {}


def _living_orphans() -> dict[int, str]:
    orphans = {}
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        environment = _environment(pid)
        if environment and _state(pid) not in "ZX" and not _descends_from_us(pid):
            test = environment.get("PYTEST_CURRENT_TEST", "no test")
            orphans[pid] = f"process {_describe(pid)}, started by {test}"
    return orphans


def _descends_from_us(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = int(_stat(pid)[1])
    return False


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _kill_and_reap(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # a thread that waits for it was faster
        os.waitpid(pid, 0)
