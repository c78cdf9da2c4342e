"""File descriptors that a peer sends along, of whatever kind: received, and closed again.

To close one may take as long as its sender likes: a TCP socket lingers over what it could not send,
and a file of FUSE, or a socket in whose queue the like lies, waits for others. Sockets are told not
to linger; for the rest, nobody but the thread that serves the sender may have to wait.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct

#: SCM_MAX_FD of the kernel. What finds no room, it would close itself, in this thread.
_MOST_FDS = 253
_FDS_BYTES = socket.CMSG_SPACE(_MOST_FDS * array.array("i").itemsize)
_NO_LINGER = struct.pack("ii", 0, 0)  # struct linger of socket(7)
#: What a socket's queue can hold by default is fewer.
_MOST_UNREAD = 1000


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
    """Close a connection, and before that every fd in what lies unread; closed already does
    nothing. Nobody else may have the connection: it is over for all."""
    with sock, contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RD)  # no more comes, and nothing is waited for
        for _ in range(_MOST_UNREAD):
            packet, fds, _ = receive(sock, 1)
            close_fds(fds)
            if not packet and not fds:
                return
