"""A calling process of the soak: `python -m moeshm.soak.caller FD`, an engine that does all it may.

Its first line of standard input is its `Order`; then `go` and `rest`, by turns, until the input
ends, which also happens when the soak is killed. It tells of itself on FD.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import logging
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import msgspec

from .. import checkpoint, settings
from ..backends.cpu import CpuBackend
from ..connecting import connect
from ..supervisor import spawn_worker
from . import messages, pool
from .books import TICK_S, Books, Line, OwnWork
from .calls import OpenLine, Talk, close_line, open_whole
from .messages import Message, Order, Ready, Resting, Unexpected, shortened
from .moves import Moves

#: What a calling process may be: its calls go through an offload over a worker that others use as
#: well and one of its own, or to each of the former, or to one of its own.
ROLES = ("offload", "shared workers", "own worker")
_OPEN_S = 30.0
#: Closing a client that another takes the place of: a worker of one's own takes long to start.
_REOPEN_SHARE, _REOPEN_OWN_SHARE = 0.3, 0.02
_RETRY_S = 0.1

Step = Callable[[random.Random], None]


class Caller:
    """What one process does from `go` to `rest`."""

    def __init__(self, order: Order, tell: Callable[[Message], None]) -> None:
        self._order = order
        self._rng = random.Random(order.seed)
        self._cases = pool.load(order.cases)
        layers = checkpoint.load(order.model, order.layers).layers
        self._own_work = OwnWork(CpuBackend(layers, threads=1))
        self._tell = tell
        self._books = Books(tell, self._own_work)
        self._n_lines = 0
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def go(self) -> None:
        """Open clients and begin; returns at once."""
        self._over.clear()
        self._start(self._run)

    def rest(self) -> None:
        """End what is under way, close the clients, and return."""
        self._over.set()
        while self._threads:
            self._threads.pop().join()
        gc.collect()
        self._books.tick()

    def tick(self, is_over: threading.Event) -> None:
        """Send the books on until then."""
        while not is_over.wait(TICK_S):
            self._books.tick()
        self._books.tick()

    def _start(self, run: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                run()
            except Exception as error:  # a finding, wherever it comes from
                trace = shortened(traceback.format_exc())
                self._tell(Unexpected(type(error).__name__, "a thread of a caller", trace))

        thread = threading.Thread(target=guarded)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            with contextlib.ExitStack() as stack:
                steps = self._steps(stack)
                if steps:
                    self._tell(Ready())
                    self._repeat_all(steps)
            self._over.wait(_RETRY_S)

    def _repeat_all(self, steps: list[Step]) -> None:
        """Each in a thread of its own, until it is over."""
        threads = [
            threading.Thread(target=self._repeat, args=(step, self._rng.getrandbits(64)))
            for step in steps
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _repeat(self, step: Step, seed: int) -> None:
        rng = random.Random(seed)
        while not self._over.is_set():
            try:
                step(rng)
            except Exception as error:  # of the soak itself, or what no call may raise
                trace = shortened(traceback.format_exc())
                self._tell(Unexpected(type(error).__name__, "a step of a caller", trace))
                return

    def _steps(self, stack: contextlib.ExitStack) -> list[Step]:
        """What its threads repeat; nothing, if it is over before a worker was there."""
        if self._order.role == "offload":
            return self._offload_steps(stack)
        talks = [
            talk
            for open_line, share in self._talked_to()
            if (talk := self._talk(open_line, share)) is not None
        ]
        for talk in talks:
            stack.callback(talk.close)
        for talk in talks:  # before any of them is closed
            stack.callback(talk.recover)
        return (
            [talks[n % len(talks)].step for n in range(max(self._order.threads, len(talks)))]
            if talks
            else []
        )

    def _talked_to(self) -> list[tuple[Callable[[], OpenLine | None], float]]:
        """How each of its clients is opened, and how often it is opened anew."""
        if self._order.role == "own worker":
            return [(self._open_own, _REOPEN_OWN_SHARE)]
        return [
            (functools.partial(self._open_at, target), _REOPEN_SHARE)
            for target in self._order.addresses
        ]

    def _talk(self, open_line: Callable[[], OpenLine | None], share: float) -> Talk | None:
        opened = self._insist(open_line)
        return None if opened is None else Talk(self._books, self._cases, opened, open_line, share)

    def _insist(self, open_line: Callable[[], OpenLine | None]) -> OpenLine | None:
        """Try until it is there; None when it is over before."""
        while not self._over.is_set():
            opened = open_line()
            if opened is not None:
                return opened
            self._over.wait(_RETRY_S)
        return None

    def _line(self, *targets: str) -> Line:
        self._n_lines += 1
        return Line(f"{targets[0]}, client {os.getpid()}.{self._n_lines}", targets)

    def _open_at(
        self, target: str, transport: str | None = None, may_fall_back: bool = True
    ) -> OpenLine | None:
        transport = transport or self._rng.choice(_ways())
        falls_back = may_fall_back and self._rng.random() < 0.5
        return open_whole(
            self._books,
            self._line(target),
            lambda: connect(
                self._order.addresses[target],
                transport=transport,
                timeout_s=_OPEN_S,
                fallback=self._own_work if falls_back else None,
            ),
            _OPEN_S,
        )

    def _open_own(self, may_fall_back: bool = True) -> OpenLine | None:
        falls_back = may_fall_back and self._rng.random() < 0.5
        transport = self._rng.choice(_ways())
        return open_whole(
            self._books,
            self._line(self._order.own),
            lambda: spawn_worker(
                self._order.model,
                device=self._order.device,
                layers=self._order.layers,
                threads=1,
                transport=transport,
                timeout_s=_OPEN_S,
                fallback=self._own_work if falls_back else None,
            ),
            10 * _OPEN_S,
        )

    def _offload_steps(self, stack: contextlib.ExitStack) -> list[Step]:
        target = self._rng.choice(sorted(self._order.addresses))
        lines: dict[str, list[OpenLine]] = {"a": [], "b": []}
        opens = [("a", functools.partial(self._open_at, target, way, False)) for way in _ways()]
        for name, open_line in [*opens, ("b", functools.partial(self._open_own, False))]:
            opened = self._insist(open_line)
            if opened is None:
                return []
            stack.callback(close_line, self._books, opened)
            # Another engine may have moved experts since the first way was opened.
            experts = opened.client.view.experts
            if all(experts == each.client.view.experts for each in lines[name]):
                lines[name].append(opened)
        line = self._line(target, self._order.own)
        call = self._books.begin(line, f"make {line.name}", _OPEN_S)
        has_fallback = self._rng.random() < 0.5
        moves = self._books.attempt(
            call,
            lambda: Moves(self._books, self._cases, line, lines, self._own_work, has_fallback),
        )
        if moves is None:
            return []
        stack.callback(moves.close)
        forwards: list[Step] = [moves.forward] * max(1, self._order.threads - 1)
        return [*forwards, moves.move]


def _ways() -> tuple[str, ...]:
    """How activations may travel: both ways, unless MOESHM_TRANSPORT names one."""
    wanted = settings.current().transport
    return ("shared", "stream") if wanted == "auto" else (wanted,)


def main(fd: int) -> None:
    """Until standard input ends."""
    faulthandler.enable()
    logging.basicConfig(level=logging.ERROR)
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    tell: Callable[[Any], None] = functools.partial(messages.send, fd)
    caller = Caller(order, tell)
    is_over = threading.Event()
    ticking = threading.Thread(target=caller.tick, args=(is_over,))
    ticking.start()
    try:
        for line in sys.stdin.buffer:
            if line == b"go\n":
                caller.go()
            else:
                caller.rest()
                tell(Resting())
    finally:
        caller.rest()
        is_over.set()
        ticking.join()


if __name__ == "__main__":
    # Whoever reads is gone when the soak was killed.
    with contextlib.suppress(BrokenPipeError):
        main(int(sys.argv[1]))
