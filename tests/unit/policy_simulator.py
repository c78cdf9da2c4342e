"""An engine and a worker that exchange messages in simulated time, to drive a Chooser."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeshm.dtypes import DType
from moeshm.policy import Choice, Chooser, Path, Shape, Times, Work

SHAPE = Shape(hidden_size=2048, intermediate_size=512)
NUM_EXPERTS = 128
TOP_K = 8
PATHS = {
    "shared": Path("shared", max_tokens=1024, buffer_bytes=16 << 20),
    "stream": Path("stream", max_tokens=1024, buffer_bytes=200 << 10),
}


class Link(NamedTuple):
    """True costs of a transport, in ns."""

    message_ns: float
    byte_ns: float
    wake_ns: float


LINKS = {"shared": Link(6e3, 0.06, 1.2e4), "stream": Link(1.8e4, 0.25, 3e4)}


class World(NamedTuple):
    """True costs of both sides, in ns."""

    links: dict[str, Link] = LINKS
    #: Of the worker: a message, a slot, an expert's weights.
    worker_message_ns: float = 8e3
    slot_ns: float = 2e4
    expert_ns: float = 1e5
    #: To convert a value from one dtype to another.
    convert_ns: float = 0.5
    #: How fast the worker is; the local part is not changed by it.
    speed: float = 1.0
    #: Standard deviation of each time, relative.
    noise: float = 0.0


class Slice(NamedTuple):
    """What a message holds."""

    rows: int
    slots: int
    experts: int


class Forward:
    """One forward as the router made it.

    `ids`: [n_tokens, TOP_K] of this worker's local ids, -1 for what is elsewhere.
    """

    def __init__(self, ids: npt.NDArray[np.int64], dtype: DType, local_ns: float) -> None:
        self._ids = ids
        self._slices: dict[int, list[Slice]] = {}
        self.dtype = dtype
        whole = self.slices(len(ids))[0]
        self.work = Work(len(ids), *whole, TOP_K, dtype, local_ns)

    def slices(self, slice_tokens: int) -> list[Slice]:
        """The messages that it is cut into."""
        found = self._slices.get(slice_tokens)
        if found is None:
            found = self._slices[slice_tokens] = []
            for start in range(0, len(self._ids), slice_tokens):
                ids = self._ids[start : start + slice_tokens]
                used = ids >= 0
                rows = int(used.any(axis=1).sum())
                if rows:
                    found.append(Slice(rows, int(used.sum()), len(set(ids[used].tolist()))))
        return found


def make_forward(
    random: np.random.Generator, n_tokens: int, local_ns: float, dtype: DType = DType.F32
) -> Forward:
    """About 40 % of the tokens have an expert here, like the original's workload; at least one."""
    ids = random.zipf(1.3, (n_tokens, TOP_K)) % NUM_EXPERTS
    ids[random.random(ids.shape) < 0.94] = -1
    ids[int(random.integers(n_tokens)), 0] = 5
    return Forward(ids, dtype, local_ns)


def make_work(n_tokens: int, local_ns: float = 1e6) -> Work:
    """Work of that many tokens, half of them with two experts here."""
    rows = -(-n_tokens // 2)
    experts = min(2 * rows, NUM_EXPERTS)
    return Work(n_tokens, rows, 2 * rows, experts, TOP_K, DType.F32, local_ns)


def play(world: World, forward: Forward, choice: Choice, random: Random) -> Times:
    """The times of one forward that goes this way."""
    link = world.links[choice.transport]

    def noisy(ns: float) -> float:
        return ns * math.exp(random.gauss(0, world.noise)) if world.noise else ns

    row_ns = link.byte_ns * SHAPE.hidden_size * choice.wire_dtype.itemsize
    if choice.wire_dtype is not forward.dtype:
        row_ns += world.convert_ns * SHAPE.hidden_size
    row_bytes = SHAPE.hidden_size * choice.wire_dtype.itemsize + TOP_K * 8
    now = worker_free = compute_total = 0.0
    pack = 0.0
    arrivals: list[float] = []
    unpacks: list[float] = []
    on_their_way: deque[tuple[float, int]] = deque()
    buffered = 0
    for rows, slots, experts in forward.slices(choice.slice_tokens):
        assert rows <= PATHS[choice.transport].max_tokens
        begun = now
        size = rows * row_bytes
        now += noisy(link.message_ns + rows * row_ns)
        # A message larger than the buffer is taken in while it is sent.
        while on_their_way and buffered + size > PATHS[choice.transport].buffer_bytes:
            freed, taken = on_their_way.popleft()
            now = max(now, freed)
            buffered -= taken
        pack += now - begun
        compute = noisy((1e4 + slots * world.slot_ns + experts * world.expert_ns) / world.speed)
        wake = noisy(link.wake_ns) if now > worker_free else 0.0
        worker_free = max(now, worker_free) + wake + world.worker_message_ns + compute
        compute_total += compute
        on_their_way.append((worker_free, size))
        buffered += size
        arrivals.append(worker_free)
        unpacks.append(noisy(link.message_ns + rows * row_ns))
    now += noisy(forward.work.local_ns)
    wait = unpack = 0.0
    for arrival, each in zip(arrivals, unpacks, strict=True):
        if arrival > now:
            woken = arrival + noisy(link.wake_ns)
            wait += woken - now
            now = woken
        unpack += each
        now += each
    return Times(len(arrivals), round(pack), round(wait), round(unpack), round(compute_total),
                 round(now))  # fmt: skip


def drive(
    chooser: Chooser,
    forwards: Iterable[Forward],
    world: World | Callable[[int], World],
    random: Random,
) -> tuple[list[Choice], list[int]]:
    """Play the forwards as the chooser says; its choices, and the elapsed times in ns."""
    choices, elapsed = [], []
    for number, forward in enumerate(forwards):
        now = world(number) if callable(world) else world
        work = forward.work
        choice = chooser.choose(SHAPE, work)
        times = play(now, forward, choice, random)
        chooser.observe(SHAPE, work, choice, times)
        choices.append(choice)
        elapsed.append(times.elapsed_ns)
    return choices, elapsed


def total_of_fixed(choice: Choice, forwards: Sequence[Forward], world: World, seed: int) -> int:
    """Elapsed time in ns of all forwards if they all go this way."""
    random = Random(seed)
    return sum(play(world, forward, choice, random).elapsed_ns for forward in forwards)


def calibrate(chooser: Chooser, world: World, random: Random) -> float:
    """Play the probes; what they took in ns."""
    spent = 0.0
    for choice, work in chooser.probes(SHAPE, NUM_EXPERTS, TOP_K, DType.F32, 1e8):
        slots = int(work.slots)
        ids = (np.arange(slots) % int(work.experts)).reshape(-1, TOP_K)
        times = play(world, Forward(ids, DType.F32, 0.0), choice, random)
        chooser.seed(SHAPE, work, choice, times)
        spent += times.elapsed_ns
    return spent
