"""Measures calls to a worker on a GPU, by each way there is, in a fresh process.

    python -m moeshm.bench.device_calls_client SETUP

SETUP is a `Setup` as JSON. It starts the worker, and prints one `Line` as JSON after the other:
what was found, and then the samples of each cell, as they come.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

import moeshm
from moeshm import DeviceFuture, ExpertClient
from moeshm.dtypes import Array, DType
from moeshm.errors import DeviceError, MoeshmError, UnsupportedPlatform
from moeshm.layers import LayerInfo

from . import gpu_worker
from .device_calls_gpu import CupyEngine
from .gpu_worker import LAYER, Refused, WorkerSetup
from .harness import CellSamples
from .kernels_work import CALLS, Cell, Work, judge
from .schema import GpuInfo

#: How a call's arrays get to the worker, and which `transport` says so.
WAYS = {"rings": "shared", "pinned": "shared", "device": "device"}
WHATS = ("compute", "submit", "stream")
#: By format, how far outputs may be from float64: kernels round differently, garbage is farther.
_TOLERANCES = {DType.F32: 1e-4, DType.F16: 1e-2, DType.BF16: 3e-2}
#: How many times as long as a cell each way is called before anything is measured.
WARM_UP = 2.5
#: Laps over all calls of a cell that are timed, however long they take, and at most.
_LEAST_LAPS, _MOST_LAPS = 2, 1000


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What one process measures."""

    #: Of `KERNEL_SHAPES`.
    shape: str
    dtype: str
    n_tokens: list[int]
    engine_device: str
    #: Or "auto".
    worker_device: str
    #: How long a cell is measured.
    seconds: float
    seed: int
    #: The worker is to have a resident kernel.
    is_resident: bool = False
    #: Decides, with the seed, in which order the ways take turns.
    repeat: int = 0


class Found(msgspec.Struct, tag=True):
    """The first line: the two sides, and what the worker's kernels take by themselves."""

    engine_device: str
    worker_device: str
    engine_gpu: GpuInfo
    worker_gpu: GpuInfo
    #: Of one call, by number of tokens.
    kernels_us: dict[int, float]


class Sampled(msgspec.Struct, tag=True):
    """A cell is done."""

    samples: CellSamples


#: `Refused` is the only line where nothing can be measured.
Line = Refused | Found | Sampled
Say = Callable[[Line], None]


class Engine(Protocol):
    """The engine's GPU."""

    #: As `moeshm.connect` takes it.
    name: str
    #: What calls go on; the current one of the arrays' library.
    stream: Any

    def put(self, array: Array) -> Any:
        """A copy in its memory."""
        ...

    def read(self, values: Any) -> Array:
        """A copy in the host's."""
        ...

    def describe(self) -> GpuInfo:
        """What it is."""
        ...

    def worker_device(self, wanted: str) -> str:
        """The name of the worker's GPU, also for "auto"."""
        ...

    def stream_ns(self, begin: Callable[[], Any]) -> tuple[int, Any]:
        """How long, by the GPU's clock, what that enqueues on the stream takes, from before it
        begins to enqueue, in ns; and what it returned."""
        ...

    def peer_copy(self, worker_device: str, n_bytes: int) -> Callable[[], None]:
        """What copies so many bytes to that GPU's memory and back, and waits for both at once."""
        ...


def cell_name(what: str, n_tokens: int, way: str = "") -> str:
    """Of its samples: `compute:4:pinned`, `peer_copy:4:`."""
    return f"{what}:{n_tokens}:{way}"


def whats_of(way: str) -> tuple[str, ...]:
    """Of WHATS, those that it has: arrays of the host's are on no stream."""
    return WHATS[:2] if way == "rings" else WHATS


def cell_names(n_tokens: Sequence[int]) -> list[str]:
    """Of all cells that a process measures."""
    calls = [cell_name(what, n, way) for n in n_tokens for way in WAYS for what in whats_of(way)]
    return calls + [cell_name("peer_copy", n) for n in n_tokens]


def activation_bytes(info: LayerInfo, n_tokens: int) -> int:
    """Of hidden_states, and of the output."""
    return n_tokens * info.hidden_size * info.weight_dtype.itemsize


def main(words: Sequence[str]) -> None:
    """Measure what the words ask for."""
    setup = msgspec.json.decode(words[0], type=Setup)
    try:
        run(setup, CupyEngine(setup.engine_device), _print)
    except (DeviceError, UnsupportedPlatform) as error:
        _print(Refused(str(error)))


def _print(line: Line) -> None:
    print(msgspec.json.encode(line).decode(), flush=True)


def run(setup: Setup, engine: Engine, say: Say) -> None:
    """Start the worker and say a `Found`, and a `Sampled` for each cell.

    UnsupportedPlatform: the worker cannot serve, as where its GPU is not there; WorkerFailed.
    """
    worker = WorkerSetup(
        shape=setup.shape,
        dtype=setup.dtype,
        device=engine.worker_device(setup.worker_device),
        n_tokens=setup.n_tokens,
        seed=setup.seed,
        is_resident=setup.is_resident,
    )
    with gpu_worker.ready_worker(worker) as (address, ready):
        device = ready.device
        say(Found(engine.name, device, engine.describe(), ready.gpu, ready.kernels_us))
        work = worker.work()
        gc.disable()
        _measure_calls(setup, engine, address, work, say)
        # At the end: from now on this process uses the worker's GPU, too.
        for n_tokens in setup.n_tokens:
            n_bytes = activation_bytes(work.info, n_tokens)
            _measure_copy(setup, engine, device, n_bytes, n_tokens, say)


# --- calls --------------------------------------------------------------------------------


class _Calls(NamedTuple):
    """The calls of one cell, with arrays where one way has them."""

    client: ExpertClient
    #: hidden_states, topk_ids and topk_weights of each.
    arrays: list[tuple[Any, Any, Any]]
    #: Of all of them; NaN until one was made.
    out: Any
    #: None for arrays in the host's memory.
    stream: Any
    read: Callable[[Any], Array]

    def compute(self, number: int) -> None:
        """That call, until its result is there."""
        self.client.compute(LAYER, *self.arrays[number], out=self.out)

    def submit(self, number: int) -> Any:
        """That call's future."""
        return self.client.submit(LAYER, *self.arrays[number], out=self.out, stream=self.stream)

    def output(self) -> Array:
        """Of the last call that was made."""
        return self.read(self.out)


def _measure_calls(setup: Setup, engine: Engine, address: str, work: Work, say: Say) -> None:
    random = np.random.default_rng([setup.seed, setup.repeat])
    with contextlib.ExitStack() as stack:
        clients: dict[str, ExpertClient] = {}
        for way in WAYS:
            try:
                clients[way] = stack.enter_context(_connect(way, address, engine.name))
            except MoeshmError as error:
                for n_tokens in setup.n_tokens:
                    _fail(way, n_tokens, str(error), say)
        for way, client in clients.items():
            # GPUs and processors that have rested are slower at first.
            calls = _calls(way, client, engine, work.cell(setup.n_tokens[0]))
            with contextlib.suppress(MoeshmError):  # it fails again where it counts
                time_calls(calls.compute, _nothing, WARM_UP * setup.seconds)
        for n_tokens in setup.n_tokens:
            cell = work.cell(n_tokens)
            outputs: list[Array] = []
            for index in random.permutation(len(clients)):
                way = list(clients)[index]
                calls = _calls(way, clients[way], engine, cell)
                try:
                    found = list(_measure_cell(calls, cell, work, outputs, engine, setup.seconds))
                except (MoeshmError, ValueError) as error:
                    _fail(way, n_tokens, f"{type(error).__name__}: {error}", say)
                    continue
                for what, durations_ns in zip(whats_of(way), found, strict=True):
                    name = cell_name(what, n_tokens, way)
                    say(Sampled(CellSamples(name, durations_ns=durations_ns)))


def _connect(way: str, address: str, engine_device: str) -> ExpertClient:
    device = None if way == "rings" else engine_device
    return moeshm.connect(address, transport=WAYS[way], engine_device=device)


def _fail(way: str, n_tokens: int, error: str, say: Say) -> None:
    for what in whats_of(way):
        say(Sampled(CellSamples(cell_name(what, n_tokens, way), error=error)))


def _calls(way: str, client: ExpertClient, engine: Engine, cell: Cell) -> _Calls:
    put: Callable[[Array], Any] = engine.put
    read: Callable[[Any], Array] = engine.read
    stream = engine.stream
    if way == "rings":
        put, read, stream = np.array, np.array, None
    hidden_states = put(cell.hidden_states)
    arrays = [(hidden_states, put(ids), put(weights)) for ids, weights in cell.routings]
    nothing = np.full(cell.hidden_states.nbytes, 0xFF, np.uint8)
    out = put(nothing.view(cell.hidden_states.dtype).reshape(cell.hidden_states.shape))
    return _Calls(client, arrays, out, stream, read)


def _measure_cell(
    calls: _Calls, cell: Cell, work: Work, outputs: list[Array], engine: Engine, seconds: float
) -> Iterator[list[int]]:
    """Durations of each of the way's `WHATS`, ns. ValueError: what was computed is wrong.

    `outputs`: of the last call, by the ways before this one, which adds its own.
    """
    calls.compute(CALLS - 1)
    right = calls.output()
    error = judge(right, right, cell).relative_error
    tolerance = _TOLERANCES[work.info.weight_dtype]
    if error > tolerance:
        raise ValueError(f"error {error:.2g} of the output; at most {tolerance:g} is right")
    outputs.append(right)
    if right.tobytes() != outputs[0].tobytes():
        raise ValueError("the output has other bits than that of another way")
    for what in WHATS:
        if what == "compute":
            yield time_calls(calls.compute, _nothing, seconds)
        elif what == "submit":
            yield time_calls(calls.submit, _wait, seconds)
        elif calls.stream is not None:
            yield time_on_stream(calls.submit, engine, seconds)
        # Laps end with the same call.
        if calls.output().tobytes() != right.tobytes():
            raise ValueError("the output has other bits after it was timed than before")


def _nothing(_result: Any) -> None:
    pass


def _wait(future: Any) -> None:
    if isinstance(future, DeviceFuture):
        future.wait()
    else:
        future.result()


def time_calls(
    begin: Callable[[int], Any], finish: Callable[[Any], object], seconds: float
) -> list[int]:
    """Durations of `begin` alone, ns, of each call of a cell in turn; `finish` gets what it
    returned. As many laps as fit in `seconds`, after one that is not counted."""
    clock = time.perf_counter_ns
    first_ns = clock()
    for number in range(CALLS):
        finish(begin(number))
    lap_ns = clock() - first_ns
    n_laps = min(_MOST_LAPS, max(_LEAST_LAPS, int(seconds * 1e9 / lap_ns)))
    durations_ns = []
    for _ in range(n_laps):
        for number in range(CALLS):
            start_ns = clock()
            begun = begin(number)
            durations_ns.append(clock() - start_ns)
            finish(begun)
    return durations_ns


def time_on_stream(submit: Callable[[int], Any], engine: Engine, seconds: float) -> list[int]:
    """As `time_calls`, by the clock of the engine's GPU: until the output is there."""
    durations_ns: list[int] = []

    def timed(number: int) -> Any:
        duration_ns, future = engine.stream_ns(lambda: submit(number))
        durations_ns.append(duration_ns)
        return future

    time_calls(timed, _wait, seconds)
    # The first lap is not counted.
    return durations_ns[CALLS:]


# --- the floor ----------------------------------------------------------------------------


def _measure_copy(
    setup: Setup, engine: Engine, worker_device: str, n_bytes: int, n_tokens: int, say: Say
) -> None:
    name = cell_name("peer_copy", n_tokens)
    try:
        copy = engine.peer_copy(worker_device, n_bytes)
        durations_ns = time_calls(lambda _: copy(), _nothing, setup.seconds)
    except DeviceError as error:
        say(Sampled(CellSamples(name, error=str(error))))
    else:
        say(Sampled(CellSamples(name, durations_ns=durations_ns)))


if __name__ == "__main__":
    main(sys.argv[1:])
