"""Ctrl-C in every wait of a client: it ends, and the client can be used."""

from __future__ import annotations

import itertools
import random
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

import moeshm
from moeshm import link, outbox
from moeshm.errors import WorkerDied
from moeshm.transport import stream
from tests.crash.arithmetic import FREE, GATED, WIDE, assert_exact, make_inputs
from tests.crash.device_calls.calls import wait_until
from tests.crash.interrupted import WAITS, Scene, Wait
from tests.crash.processes import GatedWorker, running, within
from tests.interrupts import interrupted_at

#: Far below every deadline.
SOON_S = 15.0
#: Fewer moments than a call has.
FEWEST_MOMENTS = 10


@pytest.mark.parametrize("to_main", [True, False], ids=["", "another thread gets it"])
@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_an_interrupt_ends_the_wait(
    worker: GatedWorker,
    client: moeshm.ExpertClient,
    transport: str,
    wait: Wait,
    to_main: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moeshm.reconnect.FIRST_PAUSE_S", 0.0)
    scene = Scene(worker, client, transport, to_main)
    assert wait.meet(scene) < SOON_S
    if wait.has_worker:
        worker.let_go(100)
        inputs = make_inputs(FREE, 2)
        with within(SOON_S):
            assert_exact(client.compute(*inputs), inputs)
        client.hold({FREE: (1, 0)})
        assert client.stats().reconnects == 0
    client.close()
    scene.join()
    # Not joined: one that has hardly been started cannot be.
    wait_until(lambda: all(each.name != "moeshm-reconnect" for each in threading.enumerate()))


#: Is interrupted at random moments of its calls, and then makes sure that all is well.
STORM = """
import random, signal, sys, time
import moeshm
from moeshm.transport import stream
from tests.crash.arithmetic import FREE, assert_exact, make_inputs

TIMEOUT_S = 30
address, transport, seed = sys.argv[1:]
stream._SOCKET_BYTES = 1  # calls leave in parts
rng = random.Random(seed)
client = moeshm.connect(address, transport=transport)
armed = False

def draw(rng):
    return make_inputs(FREE, rng.randrange(1000), rng.choice((1, 400)))

def interrupt(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt

def call():
    global armed
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 3e-3))
        for _ in range(100):
            inputs = [draw(rng) for _ in range(3)]
            futures = [client.submit(*each, timeout_s=TIMEOUT_S) for each in inputs]
            assert_exact(client.compute(*inputs[0], timeout_s=TIMEOUT_S), inputs[0])
            for future, each in zip(futures, inputs, strict=True):
                assert_exact(future.result(), each)
    finally:
        armed = False

inputs = draw(rng)  # NumPy imports parts of it late, and an interrupted import stays half done
assert_exact(client.compute(*inputs, timeout_s=TIMEOUT_S), inputs)
signal.signal(signal.SIGALRM, interrupt)
start = time.monotonic()
for _ in range(400):
    try:
        call()
    except KeyboardInterrupt:
        pass
signal.setitimer(signal.ITIMER_REAL, 0)
for tag in range(20):
    inputs = make_inputs(FREE, tag)
    assert_exact(client.submit(*inputs, timeout_s=TIMEOUT_S).result(), inputs)
assert time.monotonic() - start < TIMEOUT_S, "calls waited for nobody"
assert client.stats().reconnects == 0, client.stats()
left = [each for each in client._link._pending.values() if type(each).__name__ != "Nobody"]
# An interrupt may come before all is undone.
assert len(left) < 5, left
client.close()
print("done", flush=True)
"""


#: Two threads call while the main thread, which does as well, is interrupted at random moments.
CROWD = """
import random, signal, sys, threading, time
import moeshm
from moeshm.transport import stream
from tests.crash.arithmetic import FREE, assert_exact, make_inputs

TIMEOUT_S = 30
address, transport, seed = sys.argv[1:]
stream._SOCKET_BYTES = 1  # calls leave in parts
rng = random.Random(seed)
client = moeshm.connect(address, transport=transport)
armed = is_over = False
wrong = []

def draw(rng):
    return make_inputs(FREE, rng.randrange(1000), rng.choice((1, 400)))

def interrupt(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt

def call(rng):
    inputs = [draw(rng) for _ in range(2)]
    futures = [client.submit(*each, timeout_s=TIMEOUT_S) for each in inputs]
    assert_exact(client.compute(*inputs[0], timeout_s=TIMEOUT_S), inputs[0])
    for future, each in zip(futures, inputs, strict=True):
        assert_exact(future.result(), each)

def go_on(seed):
    rng = random.Random(seed)
    try:
        while not is_over:
            call(rng)
    except BaseException as error:
        wrong.append(error)
        raise

call(rng)  # NumPy imports parts of it late, and an interrupted import leaves its lock taken
threads = [threading.Thread(target=go_on, args=(rng.random(),)) for _ in range(2)]
for thread in threads:
    thread.start()
signal.signal(signal.SIGALRM, interrupt)
start = time.monotonic()
n_interrupts = 0
while n_interrupts < 300 and not wrong:
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 5e-3))
        while armed:
            call(rng)
    except KeyboardInterrupt:
        n_interrupts += 1
    finally:
        armed = False
is_over = True
for thread in threads:
    thread.join(TIMEOUT_S)
    assert not thread.is_alive(), "a thread hangs"
assert not wrong, wrong
assert time.monotonic() - start < 2 * TIMEOUT_S, "calls waited for nobody"
call(rng)
assert client.stats().reconnects == 0, client.stats()
link = client._link
assert not (link._outbox.sending.is_taken or link._receiving.is_taken or link._n_waiting)
client.close()
print("done", flush=True)
"""


#: Tells nobody of its calls, which are many.
QUIET_WORKER = """
import sys
from moeshm.daemon import Daemon
from tests.crash.arithmetic import ArithmeticBackend

daemon = Daemon(ArithmeticBackend(), sys.argv[1])
print("listens", flush=True)
daemon.run()
"""


@pytest.mark.parametrize("program", [STORM, CROWD], ids=["alone", "other threads call, too"])
def test_many_interrupts_at_any_moment(tmp_path: Path, transport: str, program: str) -> None:
    seed = str(random.randrange(1 << 30))
    address = f"unix:{tmp_path}/w.sock"
    with running(["-c", QUIET_WORKER, address]) as worker:
        worker.output.read_until("listens")
        with running(["-c", program, address, transport, seed]) as process:
            assert process.wait(90) == 0, f"seed {seed}: {process.log.read_rest()}"
            assert process.output.read_rest() == "done\n"
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0


@pytest.mark.parametrize("how", ["compute", "submit"])
def test_an_interrupt_at_every_moment_of_a_call_costs_no_other(
    tmp_path: Path, transport: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_SOCKET_BYTES", 1)  # calls leave in parts
    files = link.__file__, outbox.__file__, stream.__file__
    first, other = make_inputs(WIDE, 1, 40), make_inputs(FREE, 2)
    address = f"unix:{tmp_path}/w.sock"
    with running(["-c", QUIET_WORKER, address]) as worker:
        worker.output.read_until("listens")
        with moeshm.connect(address, transport=transport) as client:
            for moment in itertools.count():
                before = client.submit(*other)
                try:
                    with interrupted_at(moment, files):
                        if how == "compute":
                            client.compute(*first)
                        else:
                            client.submit(*first).result()
                    break
                except KeyboardInterrupt:
                    pass
                with within(SOON_S):
                    assert_exact(client.compute(*other), other)
                    assert_exact(client.submit(*first).result(), first)
                    assert_exact(before.result(), other)
            assert moment > FEWEST_MOMENTS
            assert client.stats().reconnects == 0
            assert not client._link._pending


def test_an_interrupt_ends_an_idle_worker(worker: GatedWorker, client: moeshm.ExpertClient) -> None:
    inputs = make_inputs(FREE, 1)
    assert_exact(client.compute(*inputs), inputs)
    worker.process.signal(signal.SIGINT)
    with within(SOON_S):
        assert worker.process.wait() == 0


def test_an_interrupt_ends_a_worker_once_its_call_is_computed(
    worker: GatedWorker, client: moeshm.ExpertClient
) -> None:
    inputs = make_inputs(GATED, 1)
    future = client.submit(*inputs)
    worker.next_turn()
    worker.process.signal(signal.SIGINT)
    worker.process.log.read_until("SIGINT: draining")
    assert worker.process.is_running()
    worker.let_go()
    with within(SOON_S):
        assert_exact(future.result(), inputs)
        assert worker.process.wait() == 0


def test_parts_of_a_call_that_has_failed_are_not_taken(client: moeshm.ExpertClient) -> None:
    """Its `out` is the caller's again."""
    inputs = make_inputs(FREE, 1, 4)
    out = np.zeros_like(inputs.hidden_states)
    future = client.submit(*inputs, out=out, slice_tokens=2)
    future.fail(WorkerDied("as the test says"))
    with pytest.raises(WorkerDied, match="as the test says"):
        future.result()
    out[:] = 99
    after = make_inputs(FREE, 2)
    assert_exact(client.compute(*after), after)
    assert (out == 99).all()
