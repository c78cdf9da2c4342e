"""Which process a pid stands for: never its successor."""

from __future__ import annotations

import os
import platform
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import moeshm
from moeshm import process


@pytest.fixture
def ended() -> int:
    """The pid of a process that was, and was waited for."""
    with subprocess.Popen([sys.executable, "-c", ""]) as popen:
        popen.wait()
    return popen.pid


def test_this_process_lives_since_its_start() -> None:
    pid, ticks = process.own_identity()
    assert pid == os.getpid()
    assert ticks == process.start_ticks(pid) > 0
    assert process.is_alive(pid)
    assert process.is_alive(pid, ticks)


def test_another_start_is_another_process() -> None:
    pid, ticks = process.own_identity()
    assert not process.is_alive(pid, ticks + 1)
    assert process.open_pidfd(pid, ticks + 1) == -1


@pytest.mark.parametrize("pid", [0, -1, -5])
def test_no_pid_is_nobody(pid: int) -> None:
    assert process.open_pidfd(pid) == -1
    assert not process.is_alive(pid)


def test_who_ended_is_gone(ended: int) -> None:
    assert process.start_ticks(ended) == 0
    assert not process.is_alive(ended)
    assert process.open_pidfd(ended) == -1


def test_a_zombie_is_gone_and_its_pidfd_says_so() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as popen:
        ticks = process.start_ticks(popen.pid)
        assert process.is_alive(popen.pid, ticks)
        pidfd = process.open_pidfd(popen.pid, ticks)
        assert pidfd >= 0
        assert not os.get_inheritable(pidfd)
        assert select.select([pidfd], [], [], 0) == ([], [], [])
        popen.kill()
        try:
            assert select.select([pidfd], [], [], 30)[0] == [pidfd]
        finally:
            os.close(pidfd)
        # Nobody has waited for it yet.
        assert not process.is_alive(popen.pid)


def test_a_name_full_of_parentheses_is_no_trouble() -> None:
    rename = "import ctypes; ctypes.CDLL(None).prctl(15, b') R 1 (x')"
    code = f"{rename}; print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as popen:
        assert popen.stdout is not None
        popen.stdout.readline()
        ticks = process.start_ticks(popen.pid)
        assert ticks >= process.start_ticks(os.getpid())
        assert process.is_alive(popen.pid, ticks)
        popen.kill()


def test_the_own_cgroup_and_those_around_it_limit_the_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("4:memory:/elsewhere\n0::/a/b\n")
    monkeypatch.setattr(process, "_CGROUPS", tmp_path)
    monkeypatch.setattr(process, "_OWN_CGROUP", tmp_path / "cgroup")
    assert process._own_cgroups() == [inner, tmp_path / "a", tmp_path]
    free = process.available_memory()
    for folder, limit, used in ((inner, "max", 5), (tmp_path / "a", "1000", 700)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 50\n")
    assert free > 350
    assert process.available_memory() == 350
    (inner / "memory.max").write_text("3\n")
    assert process.available_memory() == 48
    (tmp_path / "cgroup").write_text("0::/../../x\n")
    assert process._own_cgroups() == [tmp_path]


def test_one_cpu_at_least() -> None:
    assert 1 <= process.usable_cpus() <= (os.cpu_count() or 1)


#: Four threads allocate; how many heaps there are besides that of the process. Each is 64 MiB of
#: addresses, of which the end may not be used yet.
HEAPS = """
import sys, threading
from moeshm import process
if sys.argv[1:]:
    process.share_heap()
barrier, kept = threading.Barrier(4), []
def allocate():
    barrier.wait()
    kept.append(bytearray(100_000))
    barrier.wait()
threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
maps = [line.split() for line in open("/proc/self/maps")]
starts = [int(words[0].split("-")[0], 16) for words in maps if words[1] == "rw-p"]
ends = {int(words[0].split("-")[1], 16) for words in maps if words[1] == "---p"}
print(sum(start % (64 << 20) == 0 and start + (64 << 20) in ends for start in starts))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of other C libraries nobody asks it")
@pytest.mark.parametrize(
    ("arguments", "environment", "has_more"),
    [([], {}, True), (["share"], {}, False), (["share"], {"MALLOC_ARENA_MAX": "8"}, True)],
)
def test_threads_share_one_heap(
    arguments: list[str], environment: dict[str, str], has_more: bool
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", HEAPS, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(ran.stdout) > 0) is has_more


def test_who_is_stopped() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert not process.is_stopped(other.pid)
        other.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, other.pid, os.WSTOPPED)
        assert process.is_stopped(other.pid)
        other.kill()
    assert not process.is_stopped(other.pid)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 imports what lies here first")
def test_a_module_of_ours_is_not_the_one_that_lies_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a checkout, of which another moeshm was installed."""
    (tmp_path / "moeshm").mkdir()
    (tmp_path / "moeshm" / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    monkeypatch.chdir(tmp_path)
    root = str(Path(moeshm.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    command = process.python_module("moeshm", "--version")
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
