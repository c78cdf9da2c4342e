"""Measures one Python contender between two fresh processes; `harness` starts it.

    python -m moeshm.bench.pair CONTENDER SEED CLIENT_CPU SERVER_CPU SECONDS MESSAGES CELL...

This process is the client. It starts the server, opens a new link for each cell, and prints one
line of JSON per cell (`harness.CellSamples`).
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import msgspec
import numpy as np

from .contender import Cell, Contender, Endpoint
from .contenders import CONTENDERS
from .harness import CellSamples

#: The limit of single durations is bench.h's; a stream is one duration.
_MOST_ECHOES = 20_000
_MOST_STREAMED = 1_000_000
_LEAST_MESSAGES = 10
#: Messages, and tries, that show how long one takes.
_TRIAL_MESSAGES = 5
_TRIALS = 3


class Setup(NamedTuple):
    """What the server needs to know from the start."""

    contender: str
    seed: int
    cpu: int
    cells: Sequence[Cell]
    links: Sequence[Any]


class Order(NamedTuple):
    """What the client tells the server over the control pipe."""

    verb: str
    number: int = 0


def main(words: Sequence[str]) -> None:
    """Measure the cells that the command line names."""
    name, seed, client_cpu, server_cpu, seconds, messages, *texts = words
    os.sched_setaffinity(0, {int(client_cpu)})
    cells = [Cell.parse(text) for text in texts]
    contender = CONTENDERS[name]
    try:
        contender.check()
    except ImportError as error:
        problem = f"unavailable: {error}; install it with pip install 'moeshm[bench]'"
        for cell in cells:
            _print(CellSamples(str(cell), error=problem))
        return
    context = multiprocessing.get_context("spawn")
    links = [contender.link(context, cell) for cell in cells]
    control, far_control = context.Pipe()
    setup = Setup(name, int(seed), int(server_cpu), cells, links)
    # A daemon: should this process fail, it ends the server instead of waiting for it.
    server = context.Process(target=serve, args=(setup, far_control), daemon=True)
    server.start()
    gc.disable()
    with _fail_when_child_ends(server.pid):
        client = Client(contender, control, float(seconds), int(messages))
        for number, (cell, link) in enumerate(zip(cells, links, strict=True)):
            _print(client.measure(number, link, cell, make_payload(cell.size, int(seed))))
    control.send(Order("quit"))
    server.join()


def make_payload(size: int, seed: int) -> bytes:
    """The same random bytes on both sides, to check what arrived."""
    return random.Random(seed).randbytes(size)


class Client:
    """The measuring side."""

    def __init__(
        self, contender: Contender, control: Connection[Any, Any], seconds: float, messages: int
    ) -> None:
        self.contender = contender
        self.control = control
        self.seconds = seconds
        self.messages = messages

    def measure(self, number: int, link: Any, cell: Cell, payload: bytes) -> CellSamples:
        """Open a link, measure, close it; what fails while opening is the cell's error."""
        try:
            end = self.contender.open(link, cell, payload, True)
        except Exception as error:
            return CellSamples(str(cell), error=f"{type(error).__name__}: {error}")
        try:
            if problem := self._ask(Order("open", number)):
                return CellSamples(str(cell), error=problem)
            run = self._time_echoes if cell.mode == "latency" else self._time_stream
            messages, durations = run(end)
            if bytes(end.receive()) != payload:
                raise RuntimeError(f"{cell}: the client received other bytes than were sent")
            if problem := self._ask(Order("close")):
                raise RuntimeError(f"{cell}: {problem}")
        finally:
            end.close()
        return CellSamples(str(cell), messages, durations)

    def _ask(self, order: Order) -> str | None:
        self.control.send(order)
        answer: str | None = self.control.recv()
        return answer

    def _time_echoes(self, end: Endpoint) -> tuple[int, list[int]]:
        """Durations of single round trips, ns; one more reply is left unread."""
        count = self.messages
        if not count:
            trials = _TRIALS * _TRIAL_MESSAGES
            self.control.send(Order("echo", trials))
            count = self._fitting(float(np.median(time_echoes(end, trials))), _MOST_ECHOES)
        warm_up = count // 10 + 1
        self.control.send(Order("echo", warm_up + count))
        time_echoes(end, warm_up)
        durations = time_echoes(end, count)
        self.control.send(Order("echo", 1))
        end.send()
        return 1, durations

    def _time_stream(self, end: Endpoint) -> tuple[int, list[int]]:
        """One duration, from the first send to the reply that follows the last receive, ns."""
        count = self.messages
        if not count:
            trials = [self._stream(end, _TRIAL_MESSAGES) for _ in range(_TRIALS)]
            count = self._fitting(min(trials) / _TRIAL_MESSAGES, _MOST_STREAMED)
        self._stream(end, count // 10 + 1)
        elapsed = self._stream(end, count)
        self.control.send(Order("drain", 1))
        end.send()
        return count, [elapsed]

    def _stream(self, end: Endpoint, count: int) -> int:
        self.control.send(Order("drain", count))
        return time_stream(end, count)

    def _fitting(self, each_ns: float, most: int) -> int:
        """How many messages take the time of a cell."""
        wanted = int(self.seconds * 1e9 / max(1.0, each_ns))
        return min(most, max(_LEAST_MESSAGES, wanted))


def time_echoes(end: Endpoint, count: int) -> list[int]:
    """Durations of `count` round trips, in ns, the clock's own cost included."""
    send, receive, _ = end
    clock = time.perf_counter_ns
    stamps = [clock()] * (count + 1)
    for i in range(1, count + 1):
        send()
        receive()
        stamps[i] = clock()
    durations: list[int] = np.diff(stamps).tolist()
    return durations


def time_stream(end: Endpoint, count: int) -> int:
    """Nanoseconds from the first of `count` sends until the other side has read them all."""
    send, receive, _ = end
    start = time.perf_counter_ns()
    for _ in range(count):
        send()
    receive()
    return time.perf_counter_ns() - start


def serve(setup: Setup, control: Connection[Any, Any]) -> None:
    """The server process: does what the control pipe orders until it says `quit`."""
    os.sched_setaffinity(0, {setup.cpu})
    gc.disable()
    end: Endpoint | None = None
    payload = received = b""
    while (order := control.recv()).verb != "quit":
        if order.verb == "open":
            cell, link = setup.cells[order.number], setup.links[order.number]
            payload = make_payload(cell.size, setup.seed)
            try:
                end = CONTENDERS[setup.contender].open(link, cell, payload, False)
                control.send(None)
            except Exception as error:
                control.send(f"{type(error).__name__}: {error}")
            continue
        assert end is not None
        if order.verb == "close":
            is_intact = bytes(received) == payload
            end.close()
            control.send(None if is_intact else "the server received other bytes than were sent")
        else:
            received = _answer(order, end)


def _answer(order: Order, end: Endpoint) -> Any:
    send, receive, _ = end
    message = None
    if order.verb == "echo":
        for _ in range(order.number):
            message = receive()
            send()
    else:
        for _ in range(order.number):
            message = receive()
        send()
    return message


@contextlib.contextmanager
def _fail_when_child_ends(pid: int | None) -> Iterator[None]:
    """Turns the server's early end into an exception here, whatever this process waits in."""

    def on_child(_number: int, _frame: object) -> None:
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        if pid is not None and os.waitid(os.P_PID, pid, flags) is not None:
            raise RuntimeError("the server process ended early")

    previous: Callable[..., Any] | int | None = signal.signal(signal.SIGCHLD, on_child)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, previous)


def _print(samples: CellSamples) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(samples) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
