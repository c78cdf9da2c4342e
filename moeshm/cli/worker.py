"""`moeshm worker`: load a model's experts and serve them until SIGTERM."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from ..errors import DeviceError, DeviceLost
from ..process import open_pidfd, share_heap, usable_cpus
from .devices import device_of

if TYPE_CHECKING:
    from ..backends import Backend
    from ..backends.gpu.cupy_device import CupyDevice
    from ..checkpoint import ExpertLayer, ModelDirectory

_log = logging.getLogger("moeshm")
#: The worker's own threads take whole experts; a BLAS need not even start any of its own.
_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def _ranges(
    _context: click.Context, _option: click.Parameter, text: str | None
) -> tuple[int, ...] | None:
    from ..layers import parse_ranges

    if text is None:
        return None
    try:
        return parse_ranges(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.option("--model", required=True, metavar="DIR", help="A Hugging Face model directory.")
@click.option("--listen", required=True, metavar="unix:PATH", help="Where engines connect.")
@click.option(
    "--device",
    callback=device_of("cpu", "auto"),
    default="cpu",
    show_default=True,
    metavar="cpu|cuda:N|hip:N|auto",
    help="Computes here; auto is the first GPU, else the CPU.",
)
@click.option(
    "--resident",
    "is_resident",
    is_flag=True,
    help="For a GPU that nobody else uses: a kernel that stays computes calls of few tokens.",
)
@click.option("--layers", callback=_ranges, metavar="0-23", help="MoE layers to hold; all.")
@click.option(
    "--experts",
    metavar="FILE",
    help='Experts to hold, as JSON like {"3": "0-7,12", "4": [0, 1, 2]}; all of each layer.',
)
@click.option("--placement", metavar="FILE", help="Hold what this placement gives --name.")
@click.option("--name", metavar="NAME", help="This worker's name in the placement.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; one per usable CPU.")
@click.option("--json-logs", is_flag=True, help="Log JSON objects, one a line.")
@click.option("--quiet", is_flag=True, help="Log warnings and errors only.")
@click.option(
    "--group",
    metavar="NAME",
    help="Serve this group's members, too; by default this user and root only.",
)
@click.option("--until-exit-of", type=int, hidden=True)
def worker(
    model: str,
    listen: str,
    device: str,
    is_resident: bool,
    layers: tuple[int, ...] | None,
    experts: str | None,
    placement: str | None,
    name: str | None,
    threads: int | None,
    json_logs: bool,
    quiet: bool,
    group: str | None,
    until_exit_of: int | None,
) -> None:
    """Serve a model's routed experts to engines on this machine until SIGTERM.

    SIGTERM lets the calls that are on their way finish, and exits with 0; a second one ends it at
    once. It exits with 70 when its GPU computes no more in this process: start it anew.
    """
    threads = threads or usable_cpus()
    if "numpy" not in sys.modules:
        for variable in _BLAS_THREADS:
            os.environ.setdefault(variable, "1")
    from ..access import own_group
    from ..checkpoint import ModelDirectory
    from ..daemon import Daemon
    from ..limits import allow_fds
    from ..logs import configure
    from ..settings import current

    configure("warning" if quiet else current().log_level, json_logs)
    gid = None if group is None else own_group(group)
    share_heap()
    if short := allow_fds(current()):
        _log.warning("%s", short)
    lifeline = -1 if until_exit_of is None else _open_parent(until_exit_of)
    chosen = _choose_experts(experts, placement, name, layers)
    directory = ModelDirectory(model)
    gpu = _open_gpu(device)
    if is_resident and gpu is None:
        raise click.UsageError("--resident is for a GPU; name it by --device, like cuda:0")
    load = functools.partial(load_more, directory, touches=gpu is None)
    try:
        backend = load_backend(
            directory,
            gpu,
            layers,
            chosen,
            threads,
            show_progress=not quiet,
            is_resident=is_resident,
        )
        Daemon(backend, listen, lifeline, load, gid).run()
        _log_resident(backend)
    except DeviceLost as error:
        _log.critical("%s", error)
        sys.exit(os.EX_SOFTWARE)


def _open_gpu(device: str) -> CupyDevice | None:
    """The GPU to compute on; None for the CPU."""
    if device == "cpu":
        return None
    from ..backends.gpu.cupy_device import open_device

    try:
        gpu = open_device(device)
    except DeviceError as error:
        if device != "auto":
            raise
        _log.info("device auto is the CPU: %s", error)
        return None
    features = gpu.features
    _log.info("device %s is %s: %s, %s", device, gpu.name, features.name, features.arch)
    return gpu


def _log_resident(backend: Backend) -> None:
    """What its kernel did that was to stay, if there was one."""
    stats = getattr(backend, "resident_stats", None)
    if stats is not None:
        _log.info(
            "the resident kernel computed %d calls in %d launches%s",
            stats.n_calls,
            stats.n_launched,
            f"; it has stepped aside: {stats.why_not}" if stats.why_not else "",
        )


def _open_parent(pid: int) -> int:
    """A pidfd of the process that started this one.

    Not the end of a pipe: a child that this process forks would hold it open. ConnectError: it
    is gone already.
    """
    from ..errors import ConnectError

    pidfd = open_pidfd(pid)
    # Its number may be another's by now.
    if pidfd < 0 or os.getppid() != pid:
        raise ConnectError(f"process {pid}, for which this worker was started, is gone")
    return pidfd


def _choose_experts(
    experts: str | None, placement: str | None, name: str | None, layers: tuple[int, ...] | None
) -> Mapping[int, tuple[int, ...]] | None:
    """By layer, the global ids to hold in local order; None for all."""
    if (placement is None) != (name is None):
        raise click.UsageError("--placement and --name go together: which file, and who in it")
    if placement is None or name is None:
        from ..checkpoint import read_experts_file

        return None if experts is None else read_experts_file(experts)
    if experts is not None or layers is not None:
        raise click.UsageError("--placement says which layers and experts; leave the others out")
    from ..placement import Placement, PlacementError

    held = Placement.load(placement).experts_of(name)
    if not held:
        raise PlacementError(f"placement {placement} gives {name!r} no expert; leave it out")
    return held


def load_backend(
    model: ModelDirectory,
    gpu: CupyDevice | None,
    layers: tuple[int, ...] | None,
    experts: Mapping[int, tuple[int, ...]] | None,
    threads: int,
    show_progress: bool,
    is_resident: bool = False,
) -> Backend:
    """The experts where they are computed, read layer by layer: a bar on a terminal, plain lines
    elsewhere. `gpu`: None for the CPU."""
    from rich.console import Console
    from rich.progress import Progress

    start = time.monotonic()
    loaded = model.load(layers, experts).layers
    console = Console(stderr=True)
    if console.is_terminal and show_progress:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("loading", total=len(loaded))
            backend = _build(
                loaded,
                gpu,
                threads,
                is_resident,
                lambda n: progress.update(task, advance=1, description=f"layer {n}"),
            )
    else:
        level = logging.INFO if show_progress else logging.DEBUG
        done = itertools.count(1)
        backend = _build(
            loaded,
            gpu,
            threads,
            is_resident,
            lambda n: _log.log(level, "layer %d loaded (%d of %d)", n, next(done), len(loaded)),
        )
    _log.info(
        "%s: %d layers, %d experts, %.1f MiB on %s, in %.1f s",
        model.path,
        len(loaded),
        sum(map(len, loaded.values())),
        sum(layer.nbytes for layer in loaded.values()) / 2**20,
        f"cpu with {threads} threads" if gpu is None else gpu.name,
        time.monotonic() - start,
    )
    return backend


def _build(
    loaded: Mapping[int, ExpertLayer],
    gpu: CupyDevice | None,
    threads: int,
    is_resident: bool,
    on_layer: Callable[[int], None],
) -> Backend:
    """The backend; `on_layer` is told each layer's number once its weights are there."""
    if gpu is None:
        from ..backends.cpu import CpuBackend

        for number in _touch(loaded):
            on_layer(number)
        return CpuBackend(loaded, threads)
    from ..backends.gpu.backend import GpuBackend
    from ..settings import current, parse_kernels

    backend = GpuBackend(loaded, gpu, parse_kernels(current().kernels), on_layer, is_resident)
    backend.warm_up()
    return backend


def load_more(
    model: ModelDirectory, experts: Mapping[int, Sequence[int]], touches: bool
) -> Mapping[int, ExpertLayer]:
    """What clients ask for while the worker serves; each layer shows in the log.

    `touches`: bring the weights into memory here; else whoever uploads them does.
    """
    from ..logs import limited

    log = limited("moeshm.load")
    loaded = model.load(experts=experts).layers
    for number in _touch(loaded) if touches else loaded:
        log.info("layer %d: %d more experts loaded", number, len(loaded[number]))
    return loaded


def _touch(loaded: Mapping[int, ExpertLayer]) -> Iterator[int]:
    """Bring the mapped weights into the page cache, so that the first calls do not wait for the
    disk; each layer's number once it is there. The kernel may drop them again when memory is
    short."""
    for number, layer in loaded.items():
        for local_id in range(len(layer)):
            layer.expert(local_id).touch()
        yield number
