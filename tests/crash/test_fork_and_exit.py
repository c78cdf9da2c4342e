"""Forks, interrupts and interpreter exits around a client: no harm, and nothing left."""

from __future__ import annotations

import os
import select
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import moeshm
from moeshm.demo import tiny_moe_path
from tests.crash.arithmetic import FREE, GATED, assert_exact, make_inputs
from tests.crash.processes import GatedWorker, open_fds, running, wait_for_end, within

#: A child that tries everything with its parent's client, and then lets it go.
FORKS = """
import gc, os, sys
import moeshm
from moeshm.errors import ForkedProcess
from tests.crash.arithmetic import assert_exact, make_inputs, FREE

inputs = make_inputs(FREE, 1)
client = moeshm.connect(sys.argv[1], transport=sys.argv[2])
on_its_way = client.submit(*inputs)
pid = os.fork()
if pid == 0:
    try:
        client.compute(*inputs)
    except ForkedProcess as error:
        assert str(os.getppid()) in str(error) and str(os.getpid()) in str(error), error
        try:
            on_its_way.result(timeout_s=1)
        except ForkedProcess:
            client.close()
            del client, on_its_way
            gc.collect()
            with moeshm.connect(sys.argv[1], transport=sys.argv[2]) as own:
                assert_exact(own.compute(*inputs), inputs)
            sys.exit(7)
    os._exit(1)
_, status = os.waitpid(pid, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
assert_exact(on_its_way.result(), inputs)
assert_exact(client.compute(*inputs), inputs)
assert client.stats().reconnects == 0
client.close()
print("done")
"""

#: The same with a worker of one's own, which the child's exit must not end.
FORKS_WITH_OWN_WORKER = """
import os, sys
import numpy as np
import moeshm
from moeshm.demo import tiny_moe_path
from moeshm.errors import ForkedProcess

call = 0, np.ones((1, 128), np.float32), np.zeros((1, 4), np.int32), np.ones((1, 4), np.float32)
with moeshm.spawn_worker(tiny_moe_path(), threads=1, transport=sys.argv[1]) as client:
    expected = client.compute(*call)
    pid = os.fork()
    if pid == 0:
        try:
            client.compute(*call)
        except ForkedProcess:
            client.close()
            sys.exit(7)  # runs what is registered with atexit
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 7, status
    assert np.array_equal(client.compute(*call), expected)
    assert client.stats().reconnects == 0
print("done")
"""


def test_a_forked_child_is_refused_and_harms_nobody(worker: GatedWorker, transport: str) -> None:
    with running(["-c", FORKS, worker.address, transport]) as process:
        assert process.wait() == 0, process.log.read_rest()
        assert process.output.read_rest() == "done\n"


def test_a_forked_child_does_not_end_the_worker(transport: str) -> None:
    with running(["-c", FORKS_WITH_OWN_WORKER, transport]) as process:
        assert process.wait() == 0, process.log.read_rest()
        assert process.output.read_rest() == "done\n"


# --- exits --------------------------------------------------------------------------------

#: Leaves as its last argument says, with calls in flight and nothing closed.
LEAVES = """
import os, sys
import numpy as np
import moeshm
from moeshm.demo import tiny_moe_path

client = moeshm.spawn_worker(tiny_moe_path(), threads=1, transport=sys.argv[1])
call = 0, np.ones((64, 128), np.float32), np.zeros((64, 4), np.int32), np.ones((64, 4), np.float32)
calls = [client.submit(*call) for _ in range(20)]
print(client.worker_pid, client._sessions._on_close.__self__._folder, flush=True)
if sys.argv[2] == "fork" and os.fork() == 0:
    os.close(1); os.close(2)
    sys.stdin.readline()
    os._exit(0)
print("ready", flush=True)
if sys.argv[2] != "exit":
    signal = __import__("signal")
    signal.pause()
"""


@pytest.mark.parametrize("way", ["exit", "sigint", "sigkill", "fork"])
def test_the_end_of_the_interpreter_ends_its_worker(
    short_folder: Path, transport: str, way: str
) -> None:
    """By itself, by Ctrl-C, by SIGKILL, and by SIGKILL while a forked child lives on."""
    with running(
        ["-c", LEAVES, transport, way], environment={"TMPDIR": str(short_folder)}
    ) as process:
        worker_pid, folder = process.output.read_until("\n").split()
        process.output.read_until("ready")
        if way == "sigint":
            process.signal(signal.SIGINT)
        elif way in ("sigkill", "fork"):
            process.kill()
        assert process.wait() == {"exit": 0, "sigint": -signal.SIGINT}.get(way, -signal.SIGKILL)
        wait_for_end(int(worker_pid))
        if way != "fork":
            rest = process.log.read_rest()
            assert "Exception ignored" not in rest
            assert way == "sigint" or not rest
        assert not Path(folder, "worker.sock").exists()
        if way in ("exit", "sigint"):
            assert os.listdir(short_folder) == []


def test_a_forgotten_client_ends_its_worker(transport: str) -> None:
    client = moeshm.spawn_worker(tiny_moe_path(), threads=1, transport=transport)
    pidfd = os.pidfd_open(client.worker_pid)
    folder = client._sessions._on_close.__self__._folder  # type: ignore[attr-defined]
    try:
        assert folder.exists()
        del client
        assert select.select([pidfd], [], [], 0)[0]
        assert not folder.exists()
    finally:
        os.close(pidfd)


def test_a_forgotten_client_leaves_nothing(worker: GatedWorker, transport: str) -> None:
    client = moeshm.connect(worker.address, transport=transport)
    assert_exact(client.compute(*make_inputs(FREE, 1)), make_inputs(FREE, 1))
    before = open_fds(os.getpid())
    del client
    assert len(open_fds(os.getpid())) < len(before)
    worker.process.log.read_until("session ended after 1 calls")


# --- interrupts ---------------------------------------------------------------------------


def test_an_interrupt_leaves_the_client_usable(
    worker: GatedWorker, client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs(GATED, 1)
    future = client.submit(*inputs)
    transport: Any = client._link.session.transport
    acquire = transport.acquire
    waits = threading.Event()

    def acquire_and_tell(timeout_s: float) -> Any:
        waits.set()
        return acquire(timeout_s)

    monkeypatch.setattr(client._link._transport, "acquire", acquire_and_tell)

    def interrupt() -> None:
        waits.wait()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with within(15), pytest.raises(KeyboardInterrupt):
        future.result()
    thread.join()
    assert not future.done()
    worker.let_go()
    assert_exact(future.result(), inputs)
    after = make_inputs(FREE, 2)
    assert_exact(client.compute(*after), after)
    assert client.stats().reconnects == 0


# --- inherited fds ------------------------------------------------------------------------

#: Starts a program that would inherit whatever may be inherited, says its pid, and waits.
EXECS = """
import subprocess, sys
def start():
    program = [sys.executable, "-c", "import sys; print('there', flush=True); sys.stdin.read()"]
    child = subprocess.Popen(
        program, close_fds=False, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child.stdout.readline()
    return child
"""
CLIENT_EXECS = (
    EXECS
    + """
import moeshm
from tests.crash.arithmetic import GATED, make_inputs

before = start()
client = moeshm.connect(sys.argv[1], transport=sys.argv[2])
calls = [client.submit(*make_inputs(GATED, 1)) for _ in range(3)]
print(before.pid, start().pid, flush=True)
sys.stdin.read()
"""
)
WORKER_EXECS = (
    EXECS
    + """
from moeshm.daemon import Daemon
from tests.crash.arithmetic import GATED, ArithmeticBackend

def on_turn(layer, tag):
    if layer == GATED:
        print(start().pid, flush=True)
        sys.stdin.read()

before = start()
daemon = Daemon(ArithmeticBackend(on_turn), sys.argv[1])
print(before.pid, flush=True)
daemon.run()
"""
)


def test_a_program_that_a_client_starts_has_none_of_its_fds(
    worker: GatedWorker, transport: str
) -> None:
    """And the client's death is seen while that program lives."""
    with running(["-c", CLIENT_EXECS, worker.address, transport]) as process:
        before, child = map(int, process.output.read_until("\n").split())
        try:
            assert set(open_fds(child)) <= set(open_fds(before))
            assert len(open_fds(child)) <= len(open_fds(before)) + 2  # pipes to the first one
            process.kill()
            worker.let_go(3)
            worker.process.log.read_until("session ended after")
        finally:
            os.kill(before, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)


def test_a_program_that_a_worker_starts_has_none_of_its_fds(tmp_path: Path, transport: str) -> None:
    """And the worker's death is seen while that program lives."""
    address = f"unix:{tmp_path}/w.sock"
    with running(["-c", WORKER_EXECS, address]) as worker:
        before = int(worker.output.read_until("\n"))
        with moeshm.connect(address, transport=transport) as client:
            future = client.submit(*make_inputs(GATED, 1))
            child = int(worker.output.read_until("\n"))
            try:
                assert set(open_fds(child)) <= set(open_fds(before))
                assert len(open_fds(child)) <= len(open_fds(before)) + 2
                worker.kill()
                with within(15), pytest.raises(moeshm.errors.WorkerDied):
                    future.result()
                assert Path(f"/proc/{child}").exists()
            finally:
                os.kill(before, signal.SIGKILL)
                os.kill(child, signal.SIGKILL)


# --- ends that come twice -----------------------------------------------------------------


def test_a_client_is_closed_by_many_threads_at_once(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    futures = [client.submit(*make_inputs(GATED, tag)) for tag in range(3)]
    worker.next_turn()
    threads = [threading.Thread(target=client.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(15)
        assert not thread.is_alive()
    client.close()
    for future in futures:
        with pytest.raises(moeshm.errors.ClientClosed):
            future.result()
    worker.let_go(3)
    worker.process.log.read_until("session ended after")


#: Ends with calls in flight and threads that wait for them, at a worker that is somebody else's.
LEAVES_WAITING = """
import sys, threading
import moeshm
from tests.crash.arithmetic import GATED, make_inputs

client = moeshm.connect(sys.argv[1], transport=sys.argv[2])
calls = [client.submit(*make_inputs(GATED, tag)) for tag in range(5)]
for call in calls[:3]:
    threading.Thread(target=call.result, daemon=True).start()
print("ready", flush=True)
sys.stdin.readline()
"""


def test_an_exit_with_threads_that_wait_is_quiet(worker: GatedWorker, transport: str) -> None:
    with running(["-c", LEAVES_WAITING, worker.address, transport]) as process:
        process.output.read_until("ready")
        worker.next_turn()
        process.say()
        assert process.wait() == 0
        assert not process.log.read_rest()
    worker.let_go(5)
    worker.process.log.read_until("session ended after")
