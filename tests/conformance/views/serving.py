"""A worker in threads of this process, whose views grow and are dropped, and calls of them."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np

import moeshm
from moeshm import session
from moeshm.checkpoint import ExpertLayer
from moeshm.errors import CheckpointError, MoeshmError
from moeshm.held import HeldView
from moeshm.holdings import Holdings
from moeshm.session import ControlSocket, Session
from moeshm.turns import Turns
from moeshm.views import SessionViews
from moeshm.worker import SessionServer
from tests import growing
from tests.growing import Experts, GrowingArithmetic, draw, expected, globally
from tests.wire import PATIENCE_S

FIRST = {0: (0, 1, 2), 1: (5, 1)}
MAX_TOKENS = 8


class Worker:
    """Serves any number of sessions in threads of this process; its loads wait if told to."""

    def __init__(self, path: Path) -> None:
        self.address = f"unix:{path}"
        self.backend = GrowingArithmetic(FIRST)
        self.sessions: list[Session] = []
        self.error: Exception | None = None
        #: What was read from the checkpoint.
        self.loaded: list[Experts] = []
        self.is_gated = False
        self.load_begun = threading.Semaphore(0)
        self.load_may_end = threading.Semaphore(0)
        #: A session is over, and released everything.
        self.ended = threading.Semaphore(0)
        self._holdings = Holdings(self.backend, self._load)
        self._turns = Turns()
        self._draining = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def held(self) -> list[tuple[int, int]]:
        """Layer and expert of each that the backend holds."""
        return sorted((layer, expert) for (layer, _), expert in self.backend.slots.items())

    def close(self) -> None:
        """End every session, once it has answered what came; again does nothing."""
        if self._draining.is_set():
            return
        self._draining.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for _ in range(10):
            self.load_may_end.release()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        self._listener.close()

    def _start(self, work: Any, *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=work, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        control = ControlSocket(connection)
        with SessionViews(self._holdings) as views, contextlib.suppress(MoeshmError):
            name = self.backend.name
            with session.accept(control, views.layers, name, MAX_TOKENS, PATIENCE_S) as opened:
                self.sessions.append(opened)
                SessionServer(opened, views, self._turns, self._draining).serve()
        control.close()
        self.ended.release()

    def _load(self, experts: Experts) -> dict[int, ExpertLayer]:
        self.load_begun.release()
        if self.is_gated:
            assert self.load_may_end.acquire(timeout=PATIENCE_S)
        if self.error is not None:
            raise self.error
        if not experts.keys() <= set(growing.LAYERS):
            raise CheckpointError(f"layers {sorted(experts)} cannot be loaded")
        self.loaded.append(experts)
        return growing.load(experts)


def assert_means(
    client: moeshm.ExpertClient, experts: Experts, view: HeldView | None = None, **named: Any
) -> None:
    """Calls of this view are of these experts, in one message and in several."""
    rng = np.random.default_rng(5)
    layers = client.layers if view is None else view.layers
    assert {n: info.experts for n, info in layers.items()} == {
        n: tuple(ids) for n, ids in experts.items()
    }
    for layer, ids in experts.items():
        for n_tokens in (1, 3, 3 * MAX_TOKENS + 1):
            hidden, local, weights = draw(rng, len(ids), n_tokens)
            wanted = expected(layer, hidden, globally(local, ids), weights)
            found = client.compute(layer, hidden, local, weights, view=view, **named)
            np.testing.assert_array_equal(found, wanted)
            found = client.submit(layer, hidden, local, weights, view=view, **named).result()
            np.testing.assert_array_equal(found, wanted)
            found = client.compute(
                layer, hidden, globally(local, ids), weights, view=view, global_ids=True, **named
            )
            np.testing.assert_array_equal(found, wanted)


def listed(experts: Experts) -> list[tuple[int, int]]:
    """Layer and expert of each, as `Worker.held`."""
    return sorted((layer, each) for layer, ids in experts.items() for each in ids)


def some_call(client: moeshm.ExpertClient, view: HeldView | None = None) -> Any:
    """One token for layer 0."""
    hidden, _, weights = draw(np.random.default_rng(1), 1, 1)
    return client.compute(0, hidden, np.zeros_like(weights, np.int32), weights, view=view)


NEWER = {0: (5, 1, 0), 2: (3,)}
