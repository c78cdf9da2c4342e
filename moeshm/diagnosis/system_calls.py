"""What moeshm asks of the kernel, each really tried: segments, futexes, a ring, sockets."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import secrets
import socket

from ..errors import MoeshmError
from .finding import Finding, describe

_SECCOMP = "allow it in the container's seccomp profile"
#: futex(2) has no libc wrapper, and its number is each architecture's own.
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}
_FUTEX_WAIT = 0


def check_memfd() -> Finding:
    """Make an anonymous segment and try to resize it against its seals."""
    from .. import segment

    try:
        fd = segment.create_anonymous(segment.PAGE_BYTES)
    except (OSError, AttributeError) as error:
        return _missing("memfd", error, f"free some memory, or {_SECCOMP} (memfd_create, fcntl)")
    try:
        segment.check_received(fd)
        os.ftruncate(fd, 2 * segment.PAGE_BYTES)
    except PermissionError:
        return Finding("memfd", "ok", "memfd_create works, its seals hold")
    except OSError as error:
        return _missing("memfd", error, "use a kernel whose memfds can be sealed")
    finally:
        os.close(fd)
    remedy = "use a kernel that honours the seals of a memfd"
    return Finding("memfd", "missing", "a sealed memfd could be resized", remedy)


def check_posix_shm() -> Finding:
    """Make, open and unlink a named segment."""
    import posix_ipc

    from .. import segment

    name = f"/moeshm-doctor-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        fd = segment.create_named(name, segment.PAGE_BYTES)
        try:
            os.close(segment.open_named(name))
        finally:
            os.close(fd)
            segment.unlink(name)
    except (OSError, posix_ipc.Error) as error:
        remedy = "make /dev/shm writable; only rings by name and benchmarks need it"
        return _missing("posix_shm", error, remedy)
    return Finding("posix_shm", "ok", "created, opened, unlinked")


def check_pidfd() -> Finding:
    """Open a pidfd of this process."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as error:
        return Finding(
            "pidfd",
            "degraded",
            f"{describe(error)}: the end of a peer shows only on its socket or in /proc",
            f"use Linux 5.3 or newer, or {_SECCOMP} (pidfd_open)",
        )
    return Finding("pidfd", "ok", "pidfd_open works")


def check_futex() -> Finding:
    """Wait on a shared word that already differs: the kernel must look at it and refuse."""
    number = _SYS_FUTEX.get(platform.machine())
    if number is None:
        return Finding("futex", "ok", f"not tried: unknown call number on {platform.machine()}")
    code = _futex_errno(number)
    if code != errno.EAGAIN:
        return _missing("futex", OSError(code, os.strerror(code)), f"{_SECCOMP} (futex)")
    return Finding("futex", "ok", "the kernel waits on shared words")


def _futex_errno(number: int) -> int:
    """What FUTEX_WAIT for a 1 in a shared word that holds 0 fails with."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        word = ctypes.c_uint32.from_buffer(page)
        operation = (ctypes.byref(word), ctypes.c_int(_FUTEX_WAIT), ctypes.c_uint32(1))
        ctypes.set_errno(0)
        libc.syscall(ctypes.c_long(number), *operation, None, None, ctypes.c_uint32(0))
        code = ctypes.get_errno()
        del word, operation  # the page cannot be unmapped while it is viewed
    return code


def check_ring() -> Finding:
    """Send one cache line through a ring in anonymous memory."""
    try:
        from .._ring import RingConsumer, RingProducer
    except ImportError:
        return Finding("ring", "missing", "extension not built", "see extension")
    payload = secrets.token_bytes(64)
    try:
        with (
            RingProducer.create(None, mmap.PAGESIZE, spin_us=0) as producer,
            RingConsumer.attach(producer.fileno(), spin_us=0) as consumer,
        ):
            producer.write([payload], timeout_s=1)
            with consumer.acquire(timeout_s=1) as record:
                received = bytes(record)
    except (MoeshmError, OSError) as error:
        return _missing("ring", error, "see memfd, memory and address_space")
    if received != payload:
        remedy = "build moeshm anew on this machine"
        return Finding("ring", "missing", "64 bytes did not arrive as they were sent", remedy)
    return Finding("ring", "ok", "64 bytes arrived as they were sent")


def check_unix_socket() -> Finding:
    """Pass a file descriptor through a SEQPACKET pair."""
    try:
        left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        return _missing("unix_socket", error, f"{_SECCOMP} (socketpair, socket)")
    with left, right:
        problem = _descriptor_problem(left, right)
    if problem:
        return Finding(
            "unix_socket",
            "degraded",
            f"SEQPACKET works, passing descriptors does not: {problem}",
            f"{_SECCOMP} or in the security module (sendmsg, recvmsg with SCM_RIGHTS)",
        )
    return Finding("unix_socket", "ok", "SEQPACKET works and passes descriptors")


def _descriptor_problem(left: socket.socket, right: socket.socket) -> str:
    """Why `left` cannot pass its own descriptor to `right`; empty when it can."""
    try:
        socket.send_fds(left, [b"fd"], [left.fileno()])
        _, fds, _, _ = socket.recv_fds(right, 2, 1)
    except OSError as error:
        return describe(error)
    try:
        arrived = [os.path.sameopenfile(fd, left.fileno()) for fd in fds]
    finally:
        for fd in fds:
            os.close(fd)
    return "" if arrived == [True] else "it did not arrive"


def _missing(name: str, error: Exception, remedy: str) -> Finding:
    return Finding(name, "missing", describe(error), remedy)
