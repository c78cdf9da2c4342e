"""The socket that a worker listens at: its place in a folder, its mode, and its end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from . import access, foreign_fds
from .errors import AddressInUse

_BACKLOG = 128
#: Of sun_path, less the zero byte at its end.
_MOST_BYTES = 107
#: For others who start in the same folder. Whoever may read the folder may also lock it for ever.
_LOCK_TIMEOUT_S = 5.0
_LOCK_PAUSE_S = 0.02
#: How long closing the socket may take before it is left to itself.
_CLOSE_S = 1.0


class Listener:
    """Listens at a path, readable by its owner only, or by a group as well; in the place of a
    stale socket, if it is this user's.

    What is done there is done in the folder that was checked, wherever its path leads meanwhile.
    AddressInUse: the path or its folder is another's, or a live process listens there.
    """

    def __init__(self, path: Path, group: int | None = None) -> None:
        self.path = path
        self._folder = access.open_folder(path.parent, group)
        try:
            _check_length(self._folder, path.name)
            with _locked(self._folder, path.parent):
                _remove_stale(self._folder, path)
                #: Does not block.
                self.socket, self._file = _listen(self._folder, path, group)
        except BaseException:
            os.close(self._folder)
            raise

    def close(self) -> None:
        """Stop, and remove the socket's file unless another took the path over in the meantime."""
        with contextlib.suppress(OSError):
            # Its number is not given to another file as long as this one is open.
            found = os.stat(self.path.name, dir_fd=self._folder, follow_symlinks=False)
            if os.path.samestat(found, os.fstat(self._file)):
                os.unlink(self.path.name, dir_fd=self._folder)
        # What clients sent that were not accepted goes with it, and may keep who closes it
        # (`foreign_fds`).
        closing = threading.Thread(target=self.socket.close, name="moeshm-close", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)
        os.close(self._file)
        os.close(self._folder)


def _at(folder: int, name: str) -> str:
    """A path for calls that know no folder's fd."""
    return f"/proc/self/fd/{folder}/{name}"


def _check_length(folder: int, name: str) -> None:
    most = _MOST_BYTES - len(_at(folder, ""))
    if len(os.fsencode(name)) > most:
        raise AddressInUse(
            errno.ENAMETOOLONG,
            f"the socket's name {name} has {len(os.fsencode(name))} bytes, without its folder; at "
            f"most {most} can be: choose a shorter one",
        )


@contextlib.contextmanager
def _locked(folder: int, path: Path) -> Iterator[None]:
    """Between looking at a path and taking it, no other worker may take it."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise AddressInUse(
                    errno.EAGAIN,
                    f"cannot listen in {path}: another process has locked the folder for "
                    f"{_LOCK_TIMEOUT_S:g} s (lslocks names it); choose a folder of your own",
                ) from None
            time.sleep(_LOCK_PAUSE_S)
    try:
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)


def _remove_stale(folder: int, path: Path) -> None:
    """Remove a socket of ours that nobody listens at; AddressInUse for anything else."""
    try:
        # What is looked at is what is tried: another may be put in its place.
        file = os.open(path.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return
    try:
        found = os.fstat(file)
        if not stat.S_ISSOCK(found.st_mode):
            raise AddressInUse(errno.EEXIST, f"{path} exists and is no socket; choose another path")
        if found.st_uid != os.geteuid():
            raise AddressInUse(
                errno.EEXIST,
                f"the socket {path} belongs to user {access.user_name(found.st_uid)}; have it "
                "removed, or choose another path",
            )
        if _is_live(file, path):
            raise AddressInUse(
                errno.EADDRINUSE,
                f"a live process listens at {path}; stop it, or choose another path",
            )
    finally:
        os.close(file)
    with contextlib.suppress(FileNotFoundError):  # its owner was just removing it
        os.unlink(path.name, dir_fd=folder)


def _is_live(file: int, path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.setblocking(False)
        try:
            probe.connect(f"/proc/self/fd/{file}")
        except ConnectionRefusedError:
            return False
        except OSError as error:
            # Its queue is full, or it is of another kind.
            if error.errno not in (errno.EAGAIN, errno.EPROTOTYPE):
                raise AddressInUse(
                    error.errno, f"{path} cannot be taken over: {error.strerror}"
                ) from error
    return True


def _listen(folder: int, path: Path, group: int | None) -> tuple[socket.socket, int]:
    """A listening socket, and an fd of its file."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    file = -1
    is_bound = False
    try:
        foreign_fds.refuse(listener)
        # The file gets this mode, less the umask: at no time may others connect.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(_at(folder, path.name))
        is_bound = True
        file = os.open(path.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        if group is not None:
            os.chown(f"/proc/self/fd/{file}", -1, group)
        # Before listen(), so that nobody connects before the mode holds.
        os.chmod(f"/proc/self/fd/{file}", 0o600 if group is None else 0o660)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        return listener, file
    except OSError as error:
        listener.close()
        if file >= 0:
            os.close(file)
        if is_bound:
            with contextlib.suppress(OSError):
                os.unlink(path.name, dir_fd=folder)
        raise AddressInUse(
            error.errno, f"cannot listen at {path}: {error.strerror or error}; choose another path"
        ) from error
