"""Shared memory for one ring: anonymous (memfd, sealed) or named (POSIX shm).

Memory is committed when the segment is made: with ftruncate alone a small limit shows only at
the first touch, as SIGBUS. A segment is one control page and then the data area.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

import posix_ipc

from . import process
from .errors import SegmentError

PAGE_BYTES = 4096
#: Seals that an anonymous segment carries: its size can never change under a reader.
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
#: The control page up to its creator's pid and start time (see `_mapping.pyx`).
_CONTROL = struct.Struct("<8s56xQQ")
_MAGIC = b"moeshm1\0"
_SHM_FOLDER = "/dev/shm"


def create_anonymous(size: int) -> int:
    """A sealed memfd of `size` committed bytes; SegmentError when memory is short."""
    fd = os.memfd_create("moeshm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        _commit(fd, size, "anonymous shared memory")
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SIZE_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def create_named(name: str, size: int) -> int:
    """A new POSIX segment, mode 0600; replaces one whose creator is dead.

    SegmentError when the name is taken by a living process, or memory is short.
    """
    check_name(name)
    for attempt in (1, 2):
        try:
            shm = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
            break
        except posix_ipc.ExistentialError:
            if attempt == 2 or not _unlink_if_stale(name):
                raise SegmentError(
                    errno.EEXIST,
                    f"segment {name!r} exists, and its creator lives or it is no ring's; "
                    "choose another",
                ) from None
    try:
        os.set_inheritable(shm.fd, False)
        _commit(shm.fd, size, f"segment {name!r}")
    except BaseException:
        os.close(shm.fd)
        unlink(name)
        raise
    return int(shm.fd)


def open_named(name: str) -> int:
    """The fd of an existing POSIX segment; SegmentError when there is none."""
    check_name(name)
    try:
        shm = posix_ipc.SharedMemory(name)
    except posix_ipc.ExistentialError:
        raise SegmentError(
            errno.ENOENT, f"no segment {name!r}; its creator must make it first"
        ) from None
    except posix_ipc.PermissionsError:
        raise SegmentError(
            errno.EACCES, f"segment {name!r} belongs to another user; run as its owner"
        ) from None
    os.set_inheritable(shm.fd, False)
    return int(shm.fd)


def unlink(name: str) -> None:
    """Remove the name; a name that is gone already is no error."""
    try:
        posix_ipc.unlink_shared_memory(name)
    except posix_ipc.ExistentialError:
        return


def check_received(fd: int) -> None:
    """Refuse an fd that is no sealed shared memory: its size could change under the reader."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        raise SegmentError(errno.EBADF, f"fd {fd} is not open") from None
    if not stat.S_ISREG(mode):
        raise SegmentError(errno.EINVAL, f"fd {fd} is no shared memory (file mode {mode:#o})")
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise SegmentError(errno.EINVAL, f"fd {fd} is no memfd: it has no seals") from None
    if seals & SIZE_SEALS != SIZE_SEALS:
        raise SegmentError(
            errno.EINVAL, f"fd {fd} has seals {seals:#x}; SHRINK, GROW and SEAL are required"
        )


def sweep(prefix: str) -> list[str]:
    """Unlink every named segment under the prefix whose creator is dead; returns their names."""
    check_name(prefix)
    names = [f"/{entry}" for entry in os.listdir(_SHM_FOLDER) if entry.startswith(prefix[1:])]
    return [name for name in names if _unlink_if_stale(name)]


def check_name(name: str) -> None:
    """POSIX names: one leading slash, no other, at most 255 bytes."""
    if not (2 <= len(os.fsencode(name)) <= 255 and name[0] == "/" and "/" not in name[1:]):
        raise SegmentError(
            errno.EINVAL, f"segment name {name!r}; write one slash and then a name, like '/ring'"
        )


def _commit(fd: int, size: int, what: str) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        raise SegmentError(
            error.errno,
            f"{what} of {size} bytes cannot be had ({error.strerror}); "
            f"free on {_SHM_FOLDER}: {_free_bytes()} bytes; "
            "ask for a smaller capacity or raise the limit (docker: --shm-size)",
        ) from error


def _free_bytes() -> int:
    try:
        space = os.statvfs(_SHM_FOLDER)
    except OSError:
        return 0
    return space.f_bavail * space.f_frsize


def _unlink_if_stale(name: str) -> bool:
    try:
        fd = open_named(name)
    except (OSError, ValueError):  # gone, another user's, or a folder
        return False
    try:
        # Of two processes that find the same segment stale, the second must not remove what the
        # first put in its place.
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        control = os.pread(fd, _CONTROL.size, 0)
        if not os.path.samestat(os.fstat(fd), os.stat(_SHM_FOLDER + name)):
            return False
        if not _is_stale(control):
            return False
        unlink(name)
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(fd)
    return True


def _is_stale(control: bytes) -> bool:
    """Whether it is of a ring whose creator is dead; unfinished ones are not known to be."""
    if len(control) < _CONTROL.size:
        return False
    magic, pid, ticks = _CONTROL.unpack(control)
    return bool(magic == _MAGIC) and not process.is_alive(pid, ticks)
