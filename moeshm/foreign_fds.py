"""File descriptors that a peer sends along, of whatever kind: refused, left unread, or closed.

To close one may take as long as its sender likes: a TCP socket lingers over what it could not send,
and a file of FUSE, or a socket in whose queue the like lies, waits for others. A worker receives
none: what lies unread at the end is closed by a thread that ends, for which nothing lingers. A
client, who needs a welcome's, closes what else it received, sockets without lingering.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import socket
import struct
import threading

from .errors import ProtocolError

#: Linux 6.16; Python has no name for it.
_SO_PASSRIGHTS = 83
#: SCM_MAX_FD of the kernel. What finds no room, it would close itself, in this thread.
_MOST_FDS = 253
_FDS_BYTES = socket.CMSG_SPACE(_MOST_FDS * array.array("i").itemsize)
_NO_LINGER = struct.pack("ii", 0, 0)  # struct linger of socket(7)
#: close_range(2), of Linux 5.9; the same number on all machines.
_SYS_CLOSE_RANGE, _CLOSE_RANGE_UNSHARE, _LAST_FD = 436, 2, 0xFFFFFFFF
_libc = ctypes.CDLL(None)
#: What a socket's queue can hold by default is fewer.
_MOST_UNREAD = 1000


def refuse(sock: socket.socket) -> None:
    """From now on nobody can send fds to it, nor to those that are accepted from it (EPERM). Does
    nothing on a kernel that does not know how.

    Who has a copy of the fd can undo it, and what was sent before lies there still.
    """
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)


def receive(sock: socket.socket, n_bytes: int) -> tuple[bytes, list[int], bool]:
    """A packet, its fds, which are the caller's to close, and whether a part of it is lost.
    OSError."""
    # socket.recv_fds ignores its flags: children would inherit the fds.
    packet, ancillary, found, _ = sock.recvmsg(n_bytes, _FDS_BYTES, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, numbers in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(numbers[: len(numbers) - len(numbers) % fds.itemsize])
    return packet, list(fds), bool(found & (socket.MSG_TRUNC | socket.MSG_CTRUNC))


def receive_without(sock: socket.socket, n_bytes: int) -> tuple[bytes, list[int], bool]:
    """As `receive`, where none may come: ProtocolError if some did, and all stays unread for
    `hang_up`."""
    if _peek(sock)[1]:
        raise ProtocolError(
            "a handshake packet carries fds; the worker takes none: send it without any"
        )
    packet, _, found, _ = sock.recvmsg(n_bytes)
    return packet, [], bool(found & socket.MSG_TRUNC)


def _peek(sock: socket.socket) -> tuple[bytes, bool]:
    """A byte of the next packet, and whether it has fds. OSError."""
    # Without room for fds: only a flag tells of them.
    packet, _, found, _ = sock.recvmsg(1, 0, socket.MSG_PEEK)
    return packet, bool(found & socket.MSG_CTRUNC)


def close_fds(fds: list[int]) -> None:
    """Close and forget them."""
    while fds:
        fd = fds.pop()
        try:
            _end_lingering(fd)
            os.close(fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise


def _end_lingering(fd: int) -> None:
    try:
        sock = socket.socket(fileno=fd)
    except OSError:  # it is no socket
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    sock.detach()


def hang_up(sock: socket.socket) -> None:
    """Close a connection, and every fd in what lies unread; no one waits for those, from Linux 5.9.
    Closed already does nothing. No one else may have it: it is over for all."""
    with sock, contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RD)  # no more comes, and nothing is waited for
        if not _discard_bytes(sock) and not _let_a_thread_end_with(sock):
            _close_unread(sock)


def _discard_bytes(sock: socket.socket) -> bool:
    """What a peer said lies unread no more, or its read would fail before it has the last word.
    False: there are fds, or there may be some still."""
    for _ in range(_MOST_UNREAD):
        try:
            packet, has_fds = _peek(sock)
        except ConnectionResetError:  # it left something unread; told once
            continue
        if has_fds:
            return False
        if not packet:
            # The end, or a packet of no bytes, behind which there may be others.
            return _refuses(sock)
        with contextlib.suppress(ConnectionResetError):
            sock.recv(1)
    return False


def _refuses(sock: socket.socket) -> bool:
    try:
        return not sock.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS)
    except OSError:
        return False


def _let_a_thread_end_with(sock: socket.socket) -> bool:
    """Close it in such a way that a thread which ends has its last fd: what is closed then neither
    lingers (PF_EXITING, in inet_release) nor is flushed. False: this system has no way."""
    is_held, is_closed = threading.Event(), threading.Event()
    failed: list[int] = []

    def hold() -> None:
        # A table of fds of its own, without those above.
        first = ctypes.c_uint(sock.fileno() + 1)
        arguments = first, ctypes.c_uint(_LAST_FD), ctypes.c_uint(_CLOSE_RANGE_UNSHARE)
        if _libc.syscall(ctypes.c_long(_SYS_CLOSE_RANGE), *arguments):
            failed.append(1)
        is_held.set()
        is_closed.wait()

    thread = threading.Thread(target=hold, name="moeshm-hang-up", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no more threads
        return False
    try:
        is_held.wait()
        if not failed:
            sock.close()
    finally:
        is_closed.set()
    # Of Python's part of it, which waits for nothing: the rest is the system's.
    thread.join()
    return not failed


def _close_unread(sock: socket.socket) -> None:
    for _ in range(_MOST_UNREAD):
        packet, fds, _ = receive(sock, 1)
        close_fds(fds)
        if not packet and not fds:
            return
