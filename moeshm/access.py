"""Who may talk to whom over a worker's socket, and in which folder that socket may lie."""

from __future__ import annotations

import collections
import errno
import grp
import os
import pwd
import socket
import stat
import struct
from pathlib import Path
from typing import NamedTuple

from .errors import AddressInUse, ConnectError, HandshakeRefused, SettingError
from .printable import printable

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred of unix(7)
#: socket(7); Python has no name for it.
_SO_PEERGROUPS = 59
#: What Python's getsockopt takes at most, in bytes of gid_t.
_MAX_GROUPS_BYTES = 1024
_MAX_LINKS = 40
_ROOT = 0


class Peer(NamedTuple):
    """The process at the other end when it connected, or when it began to listen."""

    #: 0 for one that this process cannot see, in another container.
    pid: int
    uid: int
    gid: int


def peer_of(sock: socket.socket) -> Peer:
    """What the kernel says (SO_PEERCRED)."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return Peer(*_CREDENTIALS.unpack(credentials))


def check_client(sock: socket.socket, peer: Peer, group: int | None) -> None:
    """HandshakeRefused unless the client is of this process's user, root, or in the group."""
    if peer.uid in (os.geteuid(), _ROOT):
        return
    if group is None:
        raise HandshakeRefused(
            f"user {user_name(peer.uid)} may not use this worker, which serves "
            f"{user_name(os.geteuid())}; start it with --group, or run as that user"
        )
    if peer.gid == group:
        return
    try:
        groups = _supplementary_groups(sock)
    except OSError as error:
        raise HandshakeRefused(
            f"the groups of user {user_name(peer.uid)} cannot be read ({error.strerror}); at most "
            f"{_MAX_GROUPS_BYTES // 4} are looked at: run with {group_name(group)} as its own group"
        ) from None
    if group not in groups:
        raise HandshakeRefused(
            f"user {user_name(peer.uid)} may not use this worker, which serves "
            f"{user_name(os.geteuid())} and the group {group_name(group)}; have the user added to "
            "it, and log in anew"
        )


def check_worker(peer: Peer, path: str, named: str) -> None:
    """ConnectError unless the worker runs as this process's user, as root, or as the user that
    MOESHM_WORKER_USER names; empty for none."""
    if peer.uid in (os.geteuid(), _ROOT) or (named and peer.uid == user_id(named)):
        return
    own, root = user_name(os.geteuid()), user_name(_ROOT)
    others = [name for name in dict.fromkeys((own, named)) if name not in ("", root)]
    raise ConnectError(
        f"who listens at {path} runs as user {user_name(peer.uid)}, not as "
        f"{' or '.join([*others, root])}; if that is your worker, set "
        f"MOESHM_WORKER_USER={user_name(peer.uid)}"
    )


def _supplementary_groups(sock: socket.socket) -> tuple[int, ...]:
    found = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_GROUPS_BYTES)
    return struct.unpack(f"{len(found) // 4}I", found)


# --- names ----------------------------------------------------------------------------------


def user_id(name: str) -> int:
    """Of a user's name, or of its number in digits; SettingError."""
    try:
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except (KeyError, ValueError):
        raise SettingError(
            f"MOESHM_WORKER_USER={name!r:.80} is no user here; write a user's name or number"
        ) from None


def user_name(uid: int) -> str:
    """Its name, or its number where it has none."""
    try:
        return printable(pwd.getpwuid(uid).pw_name)
    except (KeyError, OverflowError):
        return str(uid)


def group_name(gid: int) -> str:
    """Its name, or its number where it has none."""
    try:
        return printable(grp.getgrgid(gid).gr_name)
    except (KeyError, OverflowError):
        return str(gid)


def own_group(name: str) -> int:
    """The number of a group that this process may give its socket to: one that it is in, any for
    root. SettingError."""
    try:
        gid = int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise SettingError(f"--group {name!r:.80}: there is no such group here") from None
    own = {os.getegid(), *os.getgroups()}
    if gid not in own and os.geteuid() != _ROOT:
        user = user_name(os.geteuid())
        raise SettingError(
            f"--group {name}: user {user} is not a member; choose of "
            f"{', '.join(map(group_name, sorted(own)))}, or have an administrator run "
            f"`usermod --append --groups {name} {user}` and log in anew"
        )
    return gid


# --- folders --------------------------------------------------------------------------------


def open_folder(path: Path, group: int | None) -> int:
    """An fd of a folder in which nobody else can put a socket of this process's aside.

    It is owned by this process's user or by root, and others may not write in it, or may and it is
    sticky; a group may if it is this process's own, or `group`. No link that another user made
    leads there. AddressInUse says which folder is not so, and what to do.
    """
    fd = _walk(path)
    try:
        found = os.fstat(fd)
        why = ""
        if found.st_uid not in (os.geteuid(), _ROOT):
            why = f"belongs to user {user_name(found.st_uid)}"
        elif not found.st_mode & stat.S_ISVTX:
            if found.st_mode & stat.S_IWOTH:
                why = "may be written by every user"
            elif found.st_mode & stat.S_IWGRP and found.st_gid not in (os.getegid(), group):
                why = f"may be written by the group {group_name(found.st_gid)}"
        if why:
            raise AddressInUse(
                errno.EACCES,
                f"cannot listen in {path}: it {why} (mode {stat.S_IMODE(found.st_mode):04o}), who "
                "could take the socket's place; choose a folder of your own; in a container, "
                "not one that is mounted as another user's, or run as that user",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _walk(path: Path) -> int:
    """An fd of the folder, reached name by name, so that nothing that was looked at is swapped
    before it is used."""
    left = collections.deque((Path.cwd() / path).parts)
    n_links = 0
    fd = _open_folder_at(None, left.popleft())
    try:
        while left:
            name = left.popleft()
            link = _link_at(fd, name)
            if link is None:
                folder = _open_folder_at(fd, name)
            else:
                target, owner = link
                if owner not in (os.geteuid(), _ROOT):
                    raise AddressInUse(
                        errno.ELOOP,
                        f"cannot listen in {path}: {name} on the way is a link that user "
                        f"{user_name(owner)} made; write the path without it",
                    )
                n_links += 1
                if n_links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                left.extendleft(reversed(Path(target).parts))
                folder = _open_folder_at(fd, left.popleft() if target.startswith("/") else ".")
            os.close(fd)
            fd = folder
        # One that can be locked.
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
    except AddressInUse:
        raise
    except OSError as error:
        remedy = "make the folder first"
        if isinstance(error, PermissionError):
            user = user_name(os.geteuid())
            remedy = f"let user {user} read it, write in it, and pass the folders on the way"
        raise AddressInUse(
            error.errno, f"cannot listen in {path}: {error.strerror}; {remedy}"
        ) from error
    finally:
        os.close(fd)


def _open_folder_at(folder: int | None, name: str) -> int:
    # One that is only passed through need not be readable.
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=folder)


def _link_at(folder: int, name: str) -> tuple[str, int] | None:
    """Where the symbolic link of that name leads, and who made it; None for anything else."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        found = os.fstat(fd)
        return (os.readlink("", dir_fd=fd), found.st_uid) if stat.S_ISLNK(found.st_mode) else None
    finally:
        os.close(fd)
