"""An expert worker on a GPU, and how long its kernels take by themselves.

    python -m moeshm.bench.gpu_worker unix:PATH SETUP

SETUP is a `WorkerSetup` as JSON. It prints one `Word` as JSON, when it listens or cannot serve.
"""

from __future__ import annotations

import contextlib
import gc
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import msgspec

from moeshm import settings
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.gpu.cupy_device import open_device
from moeshm.backends.gpu.device import Device
from moeshm.dtypes import DType
from moeshm.errors import MoeshmError, UnsupportedPlatform, WorkerFailed

from . import harness
from .kernels_contender import Gpu
from .kernels_gpu import CupyGpu
from .kernels_moeshm import Unwaiting, to_device
from .kernels_shapes import KERNEL_SHAPES
from .kernels_work import CALLS, Cell, Work
from .schema import GpuInfo

#: The one that it serves.
LAYER = 0
#: Launches that are timed take about as long together.
_TIMED_US = 20_000.0
_MOST_ROUNDS = 50
_END_LIMIT_S = 10.0


class WorkerSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker serves, and where."""

    #: Of `KERNEL_SHAPES`.
    shape: str
    dtype: str
    device: str
    #: Of the calls whose kernels are timed.
    n_tokens: list[int]
    seed: int
    is_resident: bool = False

    def work(self) -> Work:
        """The layer, and the calls that are made."""
        return Work(KERNEL_SHAPES[self.shape], DType.parse(self.dtype), self.seed)


class Ready(msgspec.Struct, tag=True):
    """It listens."""

    #: As `open_device` names it.
    device: str
    gpu: GpuInfo
    #: Of one call by its kernels alone, by number of tokens.
    kernels_us: dict[int, float]


class Refused(msgspec.Struct, tag=True):
    """It cannot serve."""

    why: str


Word = Ready | Refused


def main(words: Sequence[str]) -> None:
    """Serve until SIGTERM."""
    address, text = words
    setup = msgspec.json.decode(text, type=WorkerSetup)
    try:
        device = open_device(setup.device)
        gpu = CupyGpu(device)
        found, work = gpu.describe(), setup.work()
        kernels_us = time_kernels(gpu, work, setup.n_tokens)
        # The experts are about to be uploaded once more.
        gc.collect()
        backend = _make_backend(device, work, setup.is_resident)
    except MoeshmError as error:
        _say(Refused(str(error)))
        return
    # Here, as who starts a worker needs only the setup.
    from moeshm.daemon import Daemon

    daemon = Daemon(backend, listen=address)
    _say(Ready(device.name, found, kernels_us))
    daemon.run()


def _say(word: Word) -> None:
    print(msgspec.json.encode(word).decode(), flush=True)


def _make_backend(device: Device, work: Work, is_resident: bool = False) -> GpuBackend:
    """As `moeshm worker` does."""
    kernels = settings.parse_kernels(settings.current().kernels)
    backend = GpuBackend({LAYER: work.layer}, device, kernels, is_resident=is_resident)
    backend.warm_up()
    return backend


# --- the kernels' own time ----------------------------------------------------------------


def time_kernels(gpu: Gpu, work: Work, n_tokens: Sequence[int]) -> dict[int, float]:
    """How long one call takes by the device's clock, µs, by number of tokens.

    As `moeshm bench kernels` times moeshm: arrays are on the device, and calls, each with a routing
    of its own, follow each other directly.
    """
    # Not the backend that serves: what makes its calls recordable takes time in each of them.
    device = Unwaiting(gpu.device)
    backend = _make_backend(cast(Device, device), work)
    return {n: _call_us(gpu, device, backend, work.cell(n)) for n in n_tokens}


def _call_us(gpu: Gpu, device: Unwaiting, backend: GpuBackend, cell: Cell) -> float:
    hidden_states, out = (to_device(gpu.device, cell.hidden_states) for _ in range(2))
    routings = [tuple(to_device(gpu.device, each) for each in pair) for pair in cell.routings]
    ffn: Callable[..., None] = backend.ffn

    def enqueue() -> None:
        for ids, weights in routings:
            ffn(LAYER, hidden_states, ids, weights, out)

    enqueue()
    with device.unwaited():
        launch = gpu.record(enqueue)
    once_us = max(gpu.time_us(launch, 1), 1.0)
    us = gpu.time_us(launch, min(_MOST_ROUNDS, math.ceil(_TIMED_US / once_us)))
    for array in (hidden_states, out, *(each for pair in routings for each in pair)):
        array.memory.close()
    return us / CALLS


# --- starting it --------------------------------------------------------------------------


@contextlib.contextmanager
def ready_worker(setup: WorkerSetup) -> Iterator[tuple[str, Ready]]:
    """The address of a fresh process that listens, however long compiling takes, and what it said;
    SIGTERM ends it. UnsupportedPlatform: it said why it cannot; WorkerFailed: it said nothing."""
    with tempfile.TemporaryDirectory(prefix="moeshm-bench-") as folder:
        address = f"unix:{Path(folder, 'worker.sock')}"
        with subprocess.Popen(
            _command(address, setup), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        ) as worker:
            try:
                yield address, _first_word(worker)
            finally:
                worker.terminate()
                try:
                    worker.wait(_END_LIMIT_S)
                except subprocess.TimeoutExpired:
                    worker.kill()


def _command(address: str, setup: WorkerSetup) -> list[str]:
    return harness.python_program("gpu_worker", address, msgspec.json.encode(setup).decode())()


def _first_word(worker: subprocess.Popen[bytes]) -> Ready:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise WorkerFailed(
            f"the worker ended with exit status {worker.wait()} before it listened; its words are "
            "above"
        )
    word: Word = msgspec.json.decode(line, type=Word)
    if isinstance(word, Refused):
        raise UnsupportedPlatform(f"the worker cannot serve: {word.why}")
    return word


if __name__ == "__main__":
    main(sys.argv[1:])
