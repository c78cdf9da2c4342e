"""A socket where a worker would listen, and a machine without shared memory."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moeshm.errors import SegmentError
from moeshm.transport.shared import SharedTransport


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    """Where a worker would listen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        yield sock


@pytest.fixture
def no_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were no shared memory."""

    def create(*_: Any) -> Any:
        raise SegmentError(errno.ENOSPC, "4096 bytes cannot be had")

    monkeypatch.setattr(SharedTransport, "create", create)
