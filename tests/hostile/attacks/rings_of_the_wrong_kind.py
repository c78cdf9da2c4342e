"""Welcomes a client with fds that are no rings: a pipe, a file, a device, memory without seals.

Memory that its maker can still shrink ends the client by SIGBUS, whenever the maker likes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import moeshm
from moeshm.errors import MoeshmError, ProtocolError, SegmentError
from tests.hostile.attack import BOTH, Refusal, Variant
from tests.hostile.lying import listening, make_rings, own_fds, sending, welcome

SIDE, TRANSPORTS = "worker", BOTH[:1]
REFUSAL = Refusal(SegmentError, "is no shared memory")
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
#: Of a ring of 64 KiB: control page, data area and the page more.
_SIZE = (64 << 10) + 2 * 4096


def _memory(size: int = _SIZE, seals: int = _SIZE_SEALS, ring: bytes = b"") -> list[int]:
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.truncate(fd, size)
    os.pwrite(fd, ring, 0)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return [fd, os.dup(fd)]


def _unsealed_real() -> list[int]:
    """All right but for the seals: the very bytes of real rings."""
    fds = []
    for real in make_rings():
        fd, spare = _memory(seals=0, ring=os.pread(real, _SIZE, 0))
        fds.append(fd)
        for each in (spare, real):
            os.close(each)
    return fds


def _read_only() -> list[int]:
    writable = _memory()
    fds = [os.open(f"/proc/self/fd/{fd}", os.O_RDONLY) for fd in writable]
    for fd in writable:
        os.close(fd)
    return fds


def _sockets(kind: int) -> list[int]:
    return [each.detach() for each in socket.socketpair(socket.AF_UNIX, kind)]


VARIANTS: dict[str, Variant] = {
    "a pipe": Variant(lambda: list(os.pipe())),
    "a file": Variant(
        lambda: [os.open("/tmp", os.O_TMPFILE | os.O_RDWR) for _ in range(2)], "seals"
    ),
    "a file in memory": Variant(
        lambda: [os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR) for _ in range(2)], "seals"
    ),
    "a folder": Variant(lambda: [os.open("/", os.O_RDONLY) for _ in range(2)]),
    "/dev/zero": Variant(lambda: [os.open("/dev/zero", os.O_RDWR) for _ in range(2)]),
    "sockets": Variant(lambda: _sockets(socket.SOCK_STREAM)),
    "memory without seals": Variant(lambda: _memory(seals=0), "seals"),
    "memory that may shrink": Variant(lambda: _memory(seals=fcntl.F_SEAL_GROW), "seals 0x4"),
    "rings without seals": Variant(_unsealed_real, "seals"),
    "memory that may not be written": Variant(
        lambda: _memory(seals=_SIZE_SEALS | fcntl.F_SEAL_WRITE), "mapping"
    ),
    "memory opened for reading": Variant(_read_only, "mapping"),
    "memory of no size": Variant(lambda: _memory(0), "no ring has that size"),
    "memory of a page": Variant(lambda: _memory(4096), "no ring has that size"),
    "memory of an odd size": Variant(lambda: _memory(_SIZE + 1), "no ring has that size"),
    "memory of 2^40 bytes": Variant(lambda: _memory(1 << 40), "no ring has that size"),
    "empty memory": Variant(_memory, "is no ring"),
    "rings of another session": Variant(lambda: make_rings(epoch=1), "has epoch 1"),
    "rings the wrong way round": Variant(lambda: make_rings()[::-1], "has this end"),
    "one ring": Variant(lambda: make_rings(1, 0), "came with 1 fds", ProtocolError),
    "three rings": Variant(lambda: make_rings(1, 2), "came with 3 fds", ProtocolError),
    "five fds": Variant(lambda: make_rings(3, 2), "too many fds", ProtocolError),
    "none": Variant(list, "came with 0 fds", ProtocolError),
}


def scene(folder: Path, transport: str, make: Callable[[], list[int]], refusal: Refusal) -> None:
    """The client keeps none of them."""
    before = own_fds()
    with contextlib.ExitStack() as stack:
        fds = make()
        for fd in fds:
            stack.callback(os.close, fd)
        with (
            listening(folder, sending([welcome(transport)], fds)) as address,
            pytest.raises(refusal.error or MoeshmError, match=refusal.says),
        ):
            moeshm.connect(address, transport=transport)
    assert own_fds() == before
