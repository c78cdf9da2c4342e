"""Every wait of a client that Ctrl-C must end.

`python -m tests.crash.interrupted [TIMES]` measures how long that takes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import moeshm
from moeshm import reconnect
from moeshm.call import CallFuture
from moeshm.errors import MoeshmError
from tests.crash.arithmetic import FREE, GATED, MANY_TOKENS, WIDE, make_inputs
from tests.crash.processes import PATIENCE_S, GatedWorker, gated_worker

LONG_S = 60.0


class Scene:
    """A worker that computes GATED calls when it is let go, and a client."""

    def __init__(
        self,
        worker: GatedWorker,
        client: moeshm.ExpertClient,
        transport: str,
        to_main: bool = True,
    ) -> None:
        self.worker = worker
        #: Which thread gets the signal: the main one, or another, which wakes nobody.
        self._to_main = to_main
        self.client = client
        self.transport = transport
        self._threads: list[threading.Thread] = []

    def gated(self) -> CallFuture:
        """A call on its way."""
        return self.client.submit(*make_inputs(GATED, 1))

    def elsewhere(self, body: Callable[[], object], function: str) -> None:
        """Let another thread do it, and wait until it is there."""
        thread = threading.Thread(target=_suppressed(body))
        thread.start()
        self._threads.append(thread)
        _wait_until_in(thread, function)

    def interrupt(self, body: Callable[[], object], function: str) -> float:
        """SIGINT while the main thread sleeps somewhere below the function; seconds until it is
        here as KeyboardInterrupt."""
        sent_at: list[float] = []

        def send() -> None:
            if _wait_until_in(threading.main_thread(), function):
                sent_at.append(time.perf_counter())
                if self._to_main:
                    os.kill(os.getpid(), signal.SIGINT)
                else:
                    signal.pthread_kill(threading.get_ident(), signal.SIGINT)

        thread = threading.Thread(target=send)
        thread.start()
        try:
            body()
        except KeyboardInterrupt:
            return time.perf_counter() - sent_at[0]
        finally:
            thread.join()
        raise AssertionError(f"{function} did not wait")

    def join(self) -> None:
        """Wait for the other threads."""
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def _suppressed(body: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with contextlib.suppress(MoeshmError):
            body()

    return run


def _wait_until_in(thread: threading.Thread, function: str) -> bool:
    """Until a thread sleeps below the function; False when it never does."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and thread.is_alive():
        frame = sys._current_frames().get(thread.ident or 0)
        while frame is not None and frame.f_code.co_name != function:
            frame = frame.f_back
        if frame is not None and _sleeps(thread):
            return True
        time.sleep(0.001)
    return False


def _sleeps(thread: threading.Thread) -> bool:
    stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "S"


# --- waits --------------------------------------------------------------------------------


def result(scene: Scene) -> float:
    """Of a call; this thread receives."""
    future = scene.gated()
    return scene.interrupt(future.result, "_receive")


def result_of_another_receiver(scene: Scene) -> float:
    """Another thread receives."""
    scene.elsewhere(scene.gated().result, "_receive")
    return scene.interrupt(scene.gated().result, "_leave_it_to_others")


def compute(scene: Scene) -> float:
    """Sends and receives at once."""
    return scene.interrupt(lambda: scene.client.compute(*make_inputs(GATED, 1)), "_receive_answer")


def _fill(scene: Scene) -> None:
    wide = make_inputs(WIDE, 1, MANY_TOKENS)
    while True:
        scene.client.submit(*wide, timeout_s=LONG_S)


#: Where a sender waits for room. Over a socket a large record has left in part by then.
_NO_ROOM = {"shared": "_write_parts", "stream": "_wait_for_room"}


def submit(scene: Scene) -> float:
    """There is no room."""
    scene.gated()
    return scene.interrupt(lambda: _fill(scene), _NO_ROOM[scene.transport])


def submit_behind_another(scene: Scene) -> float:
    """Another thread waits for room."""
    scene.gated()
    scene.elsewhere(lambda: _fill(scene), _NO_ROOM[scene.transport])
    return scene.interrupt(lambda: scene.client.submit(*make_inputs(FREE, 1)), "_post")


def hold(scene: Scene) -> float:
    """The worker does not answer."""
    scene.gated()
    return scene.interrupt(
        lambda: scene.client.hold({FREE: (1, 0)}, timeout_s=LONG_S), "await_order"
    )


def connect(scene: Scene) -> float:
    """The worker does not answer."""
    scene.worker.process.stop()
    try:
        return scene.interrupt(
            lambda: _connect(scene.worker.address, scene.transport), "_receive_packet"
        )
    finally:
        scene.worker.process.signal(signal.SIGCONT)


def _connect(address: str, transport: str) -> None:
    moeshm.connect(address, transport=transport, timeout_s=LONG_S).close()


@contextlib.contextmanager
def _deaf() -> Iterator[str]:
    """An address where somebody listens and nobody accepts."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
    ):
        listener.bind(f"{folder}/deaf.sock")
        listener.listen(0)
        yield f"{folder}/deaf.sock"


def connect_to_a_full_queue(scene: Scene) -> float:
    """Nobody accepts."""
    with _deaf() as path, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
        first.connect(path)
        return scene.interrupt(lambda: _connect(f"unix:{path}", scene.transport), "_connect")


def reconnect_(scene: Scene) -> float:
    """The worker was lost, and what is there now does not answer."""
    inputs = make_inputs(FREE, 1)
    scene.worker.process.kill()
    with contextlib.suppress(MoeshmError):
        scene.client.compute(*inputs)
    scene.worker.path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(scene.worker.path))
        listener.listen()
        return scene.interrupt(lambda: scene.client.compute(*inputs), "live")


class Wait(NamedTuple):
    """One of them, and whether the client's worker lives afterwards."""

    meet: Callable[[Scene], float]
    has_worker: bool = True


WAITS = {
    "result": Wait(result),
    "result, another thread receives": Wait(result_of_another_receiver),
    "compute": Wait(compute),
    "submit, no room": Wait(submit),
    "submit, another thread waits for room": Wait(submit_behind_another),
    "hold": Wait(hold),
    "connect": Wait(connect),
    "connect, full queue": Wait(connect_to_a_full_queue),
    "call, the worker is looked for": Wait(reconnect_, has_worker=False),
}


# --- figures ------------------------------------------------------------------------------


def main() -> None:
    """Print them, in milliseconds."""
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    reconnect.FIRST_PAUSE_S = 0.0
    print(f"{'wait':40} {'transport':10} {'median':>8} {'longest':>8}")
    for name, wait in WAITS.items():
        for transport in ("shared", "stream"):
            found = sorted(_measure(wait, transport) * 1e3 for _ in range(times))
            print(f"{name:40} {transport:10} {statistics.median(found):8.2f} {found[-1]:8.2f}")


def _measure(wait: Wait, transport: str) -> float:
    with (
        tempfile.TemporaryDirectory() as folder,
        gated_worker(Path(folder)) as worker,
        moeshm.connect(worker.address, transport=transport) as client,
    ):
        scene = Scene(worker, client, transport)
        elapsed_s = wait.meet(scene)
        client.close()
        scene.join()
        return elapsed_s


if __name__ == "__main__":
    main()
