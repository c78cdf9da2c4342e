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
print(client.worker_pid, client._on_close.__self__._folder, flush=True)
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
    tmp_path: Path, transport: str, way: str
) -> None:
    """By itself, by Ctrl-C, by SIGKILL, and by SIGKILL while a forked child lives on."""
    with running(["-c", LEAVES, transport, way], environment={"TMPDIR": str(tmp_path)}) as process:
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
            assert os.listdir(tmp_path) == []


def test_a_forgotten_client_ends_its_worker(transport: str) -> None:
    client = moeshm.spawn_worker(tiny_moe_path(), threads=1, transport=transport)
    pidfd = os.pidfd_open(client.worker_pid)
    folder = client._on_close.__self__._folder  # type: ignore[attr-defined]
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
