"""What a client does in a crash matrix: rounds of calls of every kind, each checked."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import msgspec
import numpy as np

import moeshm
from moeshm.errors import (
    ConnectError,
    DeadlineExceeded,
    MoeshmError,
    PeerDied,
    SessionError,
    WorkerDied,
    WorkerFailed,
)
from tests.crash.matrix.backend import BROKEN, MOST_TOKENS, SMALL, WIDE, expected
from tests.crash.matrix.players import resident_bytes
from tests.crash.matrix.shots import Load
from tests.crash.processes import PATIENCE_S, mapped_rings, open_fds
from tests.growing import NUM_EXPERTS, TOP_K

#: How a call, a hold or a connect may end when the worker does.
_TYPED = (ConnectError, SessionError, PeerDied, WorkerDied, DeadlineExceeded)


class Play(NamedTuple):
    """An order to a caller: rounds until it is told to stop, or until each of its clients met a
    typed error; then it waits until it is told so."""

    load: Load
    timeout_s: float
    #: 0: as many as it can.
    n_rounds: int = 0


class Played(NamedTuple):
    """What came of it: calls by outcome, "exact", "refused", "wrong …", or a type of error; when
    the last of them ended (time.monotonic)."""

    tally: Counter[str]
    ended_at: float
    n_reconnects: int


class Caller:
    """One client, its worker's address, and what became of its calls."""

    def __init__(self, address: str, transport: str) -> None:
        self._address = address
        self._transport = transport
        self.client: moeshm.ExpertClient | None = None
        self.tally: Counter[str] = Counter()
        self._lock = threading.Lock()

    def round(self, load: Load, timeout_s: float) -> bool:
        """Connect if need be, hold a view, call, release it; False after a typed error, when every
        call that was on its way has ended."""
        rng = np.random.default_rng(load.seed)
        client = self._connected(timeout_s)
        if client is None:
            return False
        failed = threading.Event()
        views = [client.view]
        with self._counted("hold", failed):
            views.append(client.hold(_draw_view(rng), timeout_s=timeout_s))
        threads = [
            threading.Thread(target=self._call, args=(client, load, seed, timeout_s, failed))
            for seed in range(load.n_threads)
        ]
        for thread in threads:
            thread.start()
        self._submit(client, rng, views, load, timeout_s, failed)
        for thread in threads:
            thread.join()
        with self._counted("compute", failed):
            if not failed.is_set():
                self._check(*_compute(client, WIDE, rng, views[-1], timeout_s))
        if len(views) > 1:
            client.release(views[1])
        return not failed.is_set()

    def _connected(self, timeout_s: float) -> moeshm.ExpertClient | None:
        with self._counted("connect"):
            self.client = self.client or moeshm.connect(
                self._address,
                transport=self._transport,
                batch_capacity=MOST_TOKENS,
                timeout_s=timeout_s,
            )
        return self.client

    def notice(self) -> None:
        """Hear that the worker is another by now, where an order's deadline left the session."""
        client = self.client
        if client is not None:
            with self._counted("compute"):
                rng = np.random.default_rng(0)
                self._check(*_compute(client, SMALL, rng, client.view, PATIENCE_S))

    def close(self) -> None:
        """Close the client, if there is one."""
        if self.client is not None:
            self.client.close()
            self.client = None
            gc.collect()

    def _submit(
        self,
        client: moeshm.ExpertClient,
        rng: np.random.Generator,
        views: list[Any],
        load: Load,
        timeout_s: float,
        failed: threading.Event,
    ) -> None:
        layers = [SMALL] * load.n_small + [BROKEN] + [WIDE] * load.n_wide
        # With the large ones last there is no room for the replies while the engine computes.
        if load.seed % 2:
            rng.shuffle(layers)
        futures = []
        for layer in layers:
            if failed.is_set():
                break
            view = views[0] if layer == BROKEN else views[rng.integers(len(views))]
            inputs, wanted = _draw_call(layer, rng, view)
            with self._counted("submit", failed):
                future = client.submit(layer, *inputs, view=view, timeout_s=timeout_s)
                futures.append((layer, future, wanted))
        time.sleep(load.engine_s)
        for layer, future, wanted in futures:
            with self._counted("result", failed):
                try:
                    self._check(future.result(), wanted)
                except WorkerFailed:
                    if layer != BROKEN:
                        raise
                    self._count("refused")

    def _call(
        self,
        client: moeshm.ExpertClient,
        load: Load,
        seed: int,
        timeout_s: float,
        failed: threading.Event,
    ) -> None:
        """Another thread of the engine's."""
        rng = np.random.default_rng((load.seed, seed))
        for _ in range(load.n_small):
            with self._counted("compute", failed):
                if not failed.is_set():
                    self._check(*_compute(client, SMALL, rng, client.view, timeout_s))

    def _check(self, result: Any, wanted: Any) -> None:
        self._count("exact" if np.array_equal(result, wanted) else "wrong result")

    def _count(self, outcome: str) -> None:
        with self._lock:
            self.tally[outcome] += 1

    @contextlib.contextmanager
    def _counted(self, what: str, failed: threading.Event | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # Subclasses say more than is allowed here: a worker that dies breaks no protocol.
            is_typed = type(error) in _TYPED
            name = type(error).__name__
            self._count(name if is_typed else f"wrong error of {what}: {name}: {error}")
            if not isinstance(error, MoeshmError):
                raise
            if failed is not None:
                failed.set()


def _draw_view(rng: np.random.Generator) -> dict[int, tuple[int, ...]]:
    return {
        layer: tuple(rng.permutation(NUM_EXPERTS)[: rng.integers(2, NUM_EXPERTS)].tolist())
        for layer in (SMALL, WIDE)
    }


def _draw_call(layer: int, rng: np.random.Generator, view: Any) -> tuple[tuple[Any, ...], Any]:
    info = view.layers[layer]
    n_tokens = MOST_TOKENS if layer == WIDE else int(rng.integers(1, 4))
    hidden_states = rng.integers(-8, 8, (n_tokens, info.hidden_size)).astype(np.float32)
    ids = rng.integers(0, len(info.experts), (n_tokens, TOP_K), dtype=np.int32)
    weights = rng.integers(1, 4, (n_tokens, TOP_K)).astype(np.float32)
    wanted = expected(layer, hidden_states, np.array(info.experts)[ids], weights)
    return (hidden_states, ids, weights), wanted


def _compute(
    client: moeshm.ExpertClient, layer: int, rng: np.random.Generator, view: Any, timeout_s: float
) -> tuple[Any, Any]:
    inputs, wanted = _draw_call(layer, rng, view)
    return client.compute(layer, *inputs, view=view, timeout_s=timeout_s), wanted


# --- the process --------------------------------------------------------------------------


def serve(pipe: Connection, address: str, transports: tuple[str, ...], stays: bool) -> None:
    """A process with a client of each transport: plays what it is told, until it hears None.

    `stays`: clients live on from one round to the next; else a round that ends well ends with its
    client's close.
    """
    before = held()
    callers = [Caller(address, transport) for transport in transports]
    while (order := pipe.recv()) is not None:
        if order == "close":
            for caller in callers:
                caller.close()
            pipe.send(_grown(before))
            continue
        if order == "notice":
            for caller in callers:
                caller.notice()
            pipe.send("noticed")
            continue
        if order == "memory":
            pipe.send(_own_bytes())
            continue
        _play(callers, order, pipe, stays)
    for caller in callers:
        caller.close()
    pipe.send(_grown(before))


def _play(callers: list[Caller], order: Play, pipe: Connection, stays: bool) -> None:
    for caller in callers:
        caller.tally = Counter()
    n_rounds = 0
    load = order.load
    is_told = False
    # Each goes on until it has met the fault.
    well = callers
    while well and not is_told and (n_rounds == 0 or n_rounds != order.n_rounds):
        rounds = [
            _Round(caller, seeded(load, 2 * n), order.timeout_s) for n, caller in enumerate(well)
        ]
        for each in rounds:
            each.start()
        for each in rounds:
            each.join()
        well = [each.caller for each in rounds if each.is_well]
        for caller in () if stays else well:
            caller.close()
        n_rounds += 1
        load = seeded(load, 1001)
        if order.n_rounds == 0:
            pipe.send(n_rounds)
            is_told = pipe.poll(0) and pipe.recv() == "stop"
    reconnects = (each.client.stats().reconnects for each in callers if each.client is not None)
    tally = sum((caller.tally for caller in callers), Counter())
    pipe.send(Played(tally, time.monotonic(), sum(reconnects)))
    if order.n_rounds == 0 and not is_told:
        pipe.recv()


def seeded(load: Load, step: int) -> Load:
    """The same with other numbers."""
    return msgspec.structs.replace(load, seed=load.seed + step)


class _Round(threading.Thread):
    def __init__(self, caller: Caller, load: Load, timeout_s: float) -> None:
        super().__init__()
        self._arguments = load, timeout_s
        self.caller = caller
        self.is_well = False

    def run(self) -> None:
        """As `Caller.round`."""
        self.is_well = self.caller.round(*self._arguments)


def held() -> tuple[list[str], int, int]:
    """What sessions cost this process: fds, mappings, threads."""
    return open_fds(os.getpid()), mapped_rings(os.getpid()), threading.active_count()


def _own_bytes() -> int:
    """What is neither garbage nor kept by the allocator for later."""
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if malloc_trim is not None:
        malloc_trim(0)
    return resident_bytes(os.getpid())


def _grown(before: tuple[list[str], int, int]) -> str:
    """What is more than before; empty for nothing."""
    after = held()
    return "" if after == before else f"a client left {after}, and began with {before}"
