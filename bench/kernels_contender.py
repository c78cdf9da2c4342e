"""What a contender of `moeshm bench kernels` is, and what it is given of the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from moeshm.backends.gpu.device import Device
from moeshm.dtypes import Array

from .kernels_work import Cell, Work


class Gpu(Protocol):
    """One device, and its stream, on which contenders are timed."""

    #: What moeshm's backend computes on.
    device: Device
    #: Of the stream, as libraries pass it on.
    stream_handle: int

    def wait(self) -> None:
        """Return when everything is done; raises what the device's work failed with."""
        ...

    def time_us(self, launch: Callable[[], None], rounds: int) -> float:
        """How long the device took for one of `rounds` launches on the stream, which follow
        another one, so that it does not wait for the first."""
        ...

    def record(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """A graph of what `enqueue` puts on the stream: call it to enqueue all of that again."""
        ...

    def poison(self, address: int, nbytes: int) -> None:
        """Fill memory with NaN, of whatever format."""
        ...

    def read(self, address: int, target: Array) -> None:
        """Copy memory to the host, when everything is done."""
        ...


class HostTimes(NamedTuple):
    """Medians of one call, as its caller sees it."""

    #: From the arrays of the host to those of the host.
    call_us: float
    #: As that: the first of this size, once.
    first_call_us: float
    #: Of later ones, each after a pause as that one.
    rested_call_us: float
    #: Of the calls to the driver alone, which return before the device is done.
    enqueue_us: float


class Prepared(NamedTuple):
    """A contender that is ready to compute one cell, again and again."""

    #: Enqueue all calls of the cell, on the stream that is timed.
    launch: Callable[[], None]
    #: Where the last call's output is: [n_tokens, hidden_size] in the format of the weights.
    out: int
    #: Which kernels, in which configuration.
    plan: str
    #: Give back what it took.
    close: Callable[[], None]
    measure_host: Callable[[], HostTimes] | None = None


class Contender(Protocol):
    """Someone who computes a layer; made with a device and the work."""

    def prepare(self, cell: Cell) -> Prepared:
        """Everything that is not timed: copies, compilers, graphs."""
        ...


class Entry(NamedTuple):
    """A contender's name in the tables, and how it is made."""

    make: Callable[[Gpu, Work, str], Contender]
    #: Why it cannot compute the work; None where it can.
    absence: Callable[[Work], str | None]
