"""Other users, for tests of who may do what: only root can be them."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

#: Nobody's, whether or not there are names for them.
NOBODY, SOMEBODY = 64001, 64002
GROUP = 64003

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as other users")


def as_user(uid: int, act: Callable[[], None], groups: Sequence[int] = ()) -> None:
    """Do it in a child of that user, in the group of its number and in these; AssertionError with
    the traceback where it fails."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            become(uid, groups)
            act()
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[:60_000])
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, said


def become(uid: int, groups: Sequence[int] = ()) -> None:
    """Be that user for good, and of no other group than these. Who is that need not be root."""
    if os.getresuid() == (uid, uid, uid) and sorted(os.getgroups()) == sorted(groups):
        return
    os.setgroups(list(groups))
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


@contextlib.contextmanager
def shared_folder(mode: int = 0o1777) -> Iterator[Path]:
    """A folder that every user can reach, which pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="moeshm-test-", dir="/tmp"))
    folder.chmod(mode)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
