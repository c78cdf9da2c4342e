"""Where a worker listens: in whose folder, with which mode, and in whose place."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moeshm import listening
from moeshm.errors import AddressInUse
from moeshm.listening import Listener
from tests.hostile.attacker import kernel_refuses_fds
from tests.users import GROUP, NOBODY, as_user, needs_root, shared_folder


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where workers listen."""
    yield tmp_path / "w.sock"
    assert os.listdir(tmp_path) in ([], ["w.sock"])


def listen(path: Path, group: int | None = None) -> Listener:
    """Listens there."""
    return Listener(path, group)


def close(served: Listener) -> None:
    """What a daemon does at the end."""
    served.close()


# --- the path -----------------------------------------------------------------------------


def test_only_the_owner_may_connect(path: Path) -> None:
    served = listen(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    close(served)
    assert not path.exists()


def test_a_live_worker_keeps_its_path(path: Path) -> None:
    served = listen(path)
    with pytest.raises(AddressInUse, match=f"a live process listens at {path}; stop it, or"):
        listen(path)
    assert path.exists()
    close(served)


def test_a_live_socket_of_another_kind_keeps_its_path(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(AddressInUse, match="a live process listens"):
            listen(path)
        assert path.exists()


def test_a_worker_whose_queue_is_full_keeps_its_path(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "_BACKLOG", 0)
    served = listen(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as waiting:
        waiting.connect(str(path))
        with pytest.raises(AddressInUse, match="a live process listens"):
            listen(path)
    close(served)


def test_a_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    close(listen(path))


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_left_alone(path: Path, tmp_path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/nowhere")
    with pytest.raises(AddressInUse, match=f"{path} exists and is no socket; choose another"):
        listen(path)
    assert os.listdir(tmp_path) == ["w.sock"]
    assert kind != "file" or path.read_text() == "precious"


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    """A path of 107 bytes can be connected to, but it is bound by the folder's fd."""
    with pytest.raises(AddressInUse, match=r"has 100 bytes, without its folder; at most \d+ can"):
        listen(tmp_path / ("x" * 100))
    close(listen(tmp_path / ("x" * 80)))


def test_what_fails_after_the_bind_leaves_no_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_it = os.open

    def fail(name: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if name == path.name and path.exists():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return open_it(name, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(AddressInUse, match="Too many open files"):
        listen(path)
    assert not path.exists()


def test_who_put_it_aside_meanwhile_hides_no_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_file: str, _mode: int) -> None:
        path.unlink()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "chmod", fail)
    with pytest.raises(AddressInUse, match="Input/output error"):
        listen(path)


def test_clients_cannot_send_fds_where_the_kernel_knows_that(path: Path) -> None:
    """On an older one it is as without this."""
    served = listen(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(path))
        with served.socket.accept()[0]:
            try:
                socket.send_fds(client, [b"x"], [0])
            except PermissionError:
                assert kernel_refuses_fds()
            else:
                assert not kernel_refuses_fds()
    close(served)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(AddressInUse, match=rf"{tmp_path}/none: .*make the folder first"):
        listen(tmp_path / "none" / "w.sock")


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(AddressInUse, match="Permission denied; choose another path"):
            listen(tmp_path / "w.sock")
    finally:
        tmp_path.chmod(0o700)


def test_a_path_that_another_took_over_stays(path: Path) -> None:
    served = listen(path)
    path.unlink()
    other = listen(path)
    close(served)
    assert path.exists()
    close(other)


def test_those_that_start_at_once_do_not_share_a_stale_path(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the path and its taking nobody else looks."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    served: list[Listener] = []
    refused: list[AddressInUse] = []
    inside = threading.Semaphore(0)
    remove_stale = listening._remove_stale
    n_together: list[bool] = []

    def look_and_linger(folder: int, at: Path) -> None:
        remove_stale(folder, at)
        inside.release()
        # As long as another could need to come in here, too.
        n_together.append(inside.acquire(timeout=0.05) and inside.acquire(timeout=0.05))

    monkeypatch.setattr(listening, "_remove_stale", look_and_linger)

    def try_to() -> None:
        try:
            served.append(listen(path))
        except AddressInUse as error:
            refused.append(error)

    threads = [threading.Thread(target=try_to) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert n_together == [False]
    assert (len(served), len(refused)) == (1, 3)
    close(served[0])


# --- other users --------------------------------------------------------------------------


def test_the_umask_takes_no_part_in_the_mode(path: Path) -> None:
    for umask in (0, 0o777):
        before = os.umask(umask)
        try:
            served = listen(path)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            close(served)
        finally:
            os.umask(before)


def test_nobody_else_may_connect_at_any_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between bind() and chmod() as little as after."""
    modes = []
    chmod = os.chmod

    def look(file: str, mode: int) -> None:
        modes.append(stat.S_IMODE(path.stat().st_mode))
        chmod(file, mode)

    monkeypatch.setattr(os, "chmod", look)
    before = os.umask(0)
    try:
        close(listen(path))
    finally:
        os.umask(before)
    assert modes == [0o600]


def test_a_group_owns_its_socket(path: Path) -> None:
    served = listen(path, os.getegid())
    found = path.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, os.getegid())
    close(served)


@needs_root
def test_a_socket_of_another_user_is_left_alone(tmp_path: Path) -> None:
    """In a folder where everybody may make one."""
    tmp_path.chmod(0o1777)
    path = tmp_path / "w.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(path))
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(AddressInUse, match=f"{path} belongs to user {NOBODY}; have it removed"):
        listen(path)
    assert path.exists()


@needs_root
def test_a_folder_of_another_user(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, NOBODY)
    with pytest.raises(AddressInUse, match=f"belongs to user {NOBODY} .*a folder of your own"):
        listen(tmp_path / "w.sock")
    assert os.listdir(tmp_path) == []


@needs_root
def test_a_folder_of_ones_own_that_may_not_be_read() -> None:
    with shared_folder(0o755) as folder:
        own = folder / "own"
        own.mkdir(0o300)
        os.chown(own, NOBODY, NOBODY)

        def try_it() -> None:
            with pytest.raises(AddressInUse, match=f"Permission denied; let user {NOBODY} read it"):
                listen(own / "w.sock")

        as_user(NOBODY, try_it)
        own.rmdir()


def test_a_folder_that_everybody_may_write(path: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(AddressInUse, match=r"may be written by every user \(mode 0777\)"):
        listen(path)
    tmp_path.chmod(0o1777)
    close(listen(path))


@needs_root
def test_a_folder_that_a_group_may_write(path: Path, tmp_path: Path) -> None:
    """This user's own group, which most often has no other member, and the one that is served."""
    tmp_path.chmod(0o770)
    close(listen(path))
    os.chown(tmp_path, -1, GROUP)
    with pytest.raises(AddressInUse, match=f"may be written by the group {GROUP}"):
        listen(path)
    close(listen(path, GROUP))


def test_links_of_ones_own_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "absolute").symlink_to(tmp_path / "here")
    (tmp_path / "link").symlink_to("absolute/../" + tmp_path.name + "/real")
    served = listen(tmp_path / "link" / "w.sock")
    assert (tmp_path / "real" / "w.sock").is_socket()
    close(served)
    assert os.listdir(tmp_path / "real") == []


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(AddressInUse, match="Too many levels of symbolic links"):
        listen(tmp_path / "a" / "w.sock")


@needs_root
def test_a_link_of_another_user_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to("real")
    os.chown(tmp_path / "link", NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(AddressInUse, match=f"link on the way is a link that user {NOBODY} made"):
        listen(tmp_path / "link" / "w.sock")
    assert os.listdir(tmp_path / "real") == []


def test_a_relative_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    served = listen(Path("w.sock"))
    assert path.is_socket()
    close(served)


def test_a_folder_that_is_locked_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may read it can do that."""
    monkeypatch.setattr(listening, "_LOCK_TIMEOUT_S", 0.05)
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(
            AddressInUse, match=r"another process has locked the folder for 0\.05 s"
        ):
            listen(path)
    finally:
        os.close(fd)
    close(listen(path))


# --- races: what was looked at is what is used --------------------------------------------


def swapping(monkeypatch: pytest.MonkeyPatch, before: str, swap: Callable[[], None]) -> None:
    """Something happens just before that step."""
    step = getattr(listening, before)

    def swap_and_go(*arguments: object) -> object:
        swap()
        return step(*arguments)

    monkeypatch.setattr(listening, before, swap_and_go)


@pytest.mark.parametrize("step", ["_remove_stale", "_is_live", "_listen"])
def test_a_folder_that_is_swapped_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Its path leads to a folder with a stale socket of ours, which is none of its business."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir(0o700)
    theirs.mkdir(0o700)
    for folder in (ours, theirs):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(str(folder / "w.sock"))
    inode = (theirs / "w.sock").stat().st_ino

    def swap() -> None:
        ours.rename(tmp_path / "moved")
        ours.symlink_to(theirs)

    swapping(monkeypatch, step, swap)
    served = listen(ours / "w.sock")
    assert (tmp_path / "moved" / "w.sock").is_socket()
    assert (theirs / "w.sock").stat().st_ino == inode
    close(served)
    assert os.listdir(tmp_path / "moved") == []
    assert os.listdir(theirs) == ["w.sock"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_that_comes_in_between_is_kept(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def come() -> None:
        if kind == "file":
            path.write_text("precious")
        else:
            path.symlink_to(tmp_path / "nowhere")

    swapping(monkeypatch, "_listen", come)
    with pytest.raises(AddressInUse, match=r"cannot listen at .*Address already in use"):
        listen(path)
    assert path.is_symlink() == (kind == "link")


def test_the_mode_of_nothing_else_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone who may write in the folder puts a link in the socket's place before chmod()."""
    victim = tmp_path / "victim"
    victim.touch(0o604)
    path = tmp_path / "w.sock"
    chown = os.chown

    def swap(file: str, uid: int, gid: int) -> None:
        chown(file, uid, gid)
        path.unlink()
        path.symlink_to(victim)

    monkeypatch.setattr(os, "chown", swap)
    served = listen(path, os.getegid())
    assert stat.S_IMODE(victim.stat().st_mode) == 0o604
    close(served)
    assert path.is_symlink()


def test_nothing_stays_open(path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    close(listen(path))
    for folder in (path.parent / "none", path.parent):
        path.parent.chmod(0o777)
        with pytest.raises(AddressInUse):
            listen(folder / "w.sock")
    assert os.listdir("/proc/self/fd") == before
