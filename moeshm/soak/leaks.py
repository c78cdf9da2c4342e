"""What processes hold, seen from outside through /proc, and what of it should be gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from .. import process

#: In the environment of every process of a run, whose name is its value. Not MOESHM_…: that would
#: be a setting.
RUN_VARIABLE = "SOAK_OF_MOESHM"
#: A long-lived process may grow by so much after its warm-up: allocators keep what they had.
MOST_GROWTH_BYTES = 64 << 20
_SHM = Path("/dev/shm")
_PREFIX = "moeshm"
#: Where a segment's control page keeps its creator's pid (segment.py).
_CREATOR_OFFSET = 64


class Holding(NamedTuple):
    """What a process has: fds by what they point to, threads, mapped rings, and bytes in memory of
    its own, without files' and shared ones."""

    fds: Counter[str]
    threads: int
    rings: int
    anonymous_bytes: int


def holding(pid: int) -> Holding:
    """Of a process of this user; OSError when it is gone or a zombie."""
    fds: Counter[str] = Counter()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:  # closed meanwhile
            continue
        fds[_kind(target)] += 1
    rings = Path(f"/proc/{pid}/maps").read_text().count(f"memfd:{_PREFIX}")
    threads = len(os.listdir(f"/proc/{pid}/task"))
    status = Path(f"/proc/{pid}/status").read_text()
    anonymous = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    if anonymous is None:
        raise ProcessLookupError(f"process {pid} has no memory any more")
    return Holding(fds, threads, rings, int(anonymous[1]) << 10)


def _kind(target: str) -> str:
    """Alike for processes that do the same: sockets and pipes have a number, and files a name, that
    others do not have."""
    if target.startswith(("/", "@")) and not target.startswith(("/dev/", "/memfd:")):
        return f"a {Path(target).suffix or 'nameless'} file"
    return target.partition(":[")[0]


def grown(before: Holding, after: Holding) -> list[str]:
    """What is more than before, memory aside, in words."""
    found = [
        f"{count} more fd{'s' * (count > 1)} to {target}"
        for target, count in sorted((after.fds - before.fds).items())
    ]
    for what, now, then in (
        ("threads", after.threads, before.threads),
        ("mapped rings", after.rings, before.rings),
    ):
        if now > then:
            found.append(f"{now - then} more {what} than {then}")
    return found


def processes_of(run: str) -> dict[int, str]:
    """The living processes of a run but this one, with their commands."""
    mark = f"{RUN_VARIABLE}={run}".encode()
    found = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        pid = int(name)
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # gone, or another user's
            continue
        if mark in environment and pid != os.getpid() and process.is_alive(pid):
            found[pid] = os.fsdecode(command).replace("\0", " ").strip()
    return found


def children_of(pid: int) -> list[int]:
    """Of all its threads; none when it is gone."""
    children: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            children += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    except OSError:
        pass
    return children


def zombies_of(pid: int) -> list[int]:
    """Its children that have ended and that it has not waited for."""
    return [child for child in children_of(pid) if not process.is_alive(child)]


def worker_folders(folder: Path) -> frozenset[str]:
    """Those that callers made for workers of their own (supervisor.py), and whose lock nobody
    has."""
    found = set()
    for path in folder.glob("moeshm-worker-*"):
        with contextlib.suppress(OSError):
            fd = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.add(path.name)
            finally:
                os.close(fd)
    return frozenset(found)


def segments() -> frozenset[str]:
    """Named segments of moeshm's, of anyone."""
    try:
        return frozenset(name for name in os.listdir(_SHM) if name.startswith(_PREFIX))
    except OSError:
        return frozenset()


def left_segments(before: Collection[str], ours: Iterable[int]) -> list[str]:
    """Those that came since and that one of our processes made, which may have ended."""
    own = set(ours)
    return [
        f"/dev/shm/{name}"
        for name in sorted(segments().difference(before))
        if not own.isdisjoint(_creators(name))
    ]


def _creators(name: str) -> set[int]:
    """Who may have made it: whom its first page names, and the numbers in its name."""
    pids = {int(number) for number in re.findall(r"\d{1,7}", name)}
    try:
        with (_SHM / name).open("rb") as file:
            page = os.pread(file.fileno(), 8, _CREATOR_OFFSET)
    except OSError:  # gone by now, or another user's
        return {1}
    if len(page) == 8:
        pids.add(int(struct.unpack("<Q", page)[0]))
    return pids
