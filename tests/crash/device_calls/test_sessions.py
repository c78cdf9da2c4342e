"""Sessions for a GPU's arrays: how they are opened, what ends them, and what is left then."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import moeshm
from moeshm import engine_device
from moeshm.errors import ClientClosed, DeviceError, ForkedProcess
from tests.crash.arithmetic import FREE, GATED, make_inputs
from tests.crash.device_calls.calls import SOON_S, GpuCall, Kind, connected
from tests.crash.processes import GatedWorker, gated_worker, mapped_rings, open_fds, within
from tests.crash.slab_arithmetic import SlabArithmetic
from tests.engine_gpu import PATIENCE_S, Movers, Stream


def test_a_client_that_closes(
    worker: GatedWorker, client: moeshm.ExpertClient, stream: Stream, movers: Movers
) -> None:
    future = GpuCall.of(make_inputs(GATED, 1)).submit(client, stream)
    worker.next_turn()
    with within(SOON_S):
        client.close()
    with pytest.raises(ClientClosed):
        future.wait(PATIENCE_S)
    stream.synchronize()
    assert movers.opened[0].is_closed
    worker.let_go()


def test_a_client_that_is_forgotten(
    worker: GatedWorker, movers: Movers, kind: Kind, stream: Stream
) -> None:
    """What is on its way is finished, and then the slab is let go of."""
    client = moeshm.connect(worker.address, transport=kind.transport, engine_device="cuda:0")
    call = GpuCall.of(make_inputs(FREE, 1))
    held = stream.hold()
    future = call.submit(client, stream)
    watch = future._parts[0].watch
    del client
    held.set()
    future.wait(PATIENCE_S)
    call.check()
    del future
    watch.join(PATIENCE_S)
    assert movers.opened[0].is_closed


def test_nothing_is_left(worker: GatedWorker, movers: Movers, kind: Kind, stream: Stream) -> None:
    before, fds = mapped_rings(worker.process.pid), open_fds(worker.process.pid)
    for tag in range(3):
        with connected(worker, kind) as client:
            call = GpuCall.of(make_inputs(FREE, tag))
            call.submit(client, stream).wait(PATIENCE_S)
        worker.process.log.read_until("session ended after 1 calls, 3 rows")
    assert mapped_rings(worker.process.pid) == before
    assert open_fds(worker.process.pid) == fds
    assert all(mover.is_closed for mover in movers.opened)
    # A worker on the CPU is nowhere.
    assert set(movers.worker_bus_ids) == {SlabArithmetic.bus_id if kind.has_gpu else ""}


def test_a_gpu_that_cannot_open_the_workers_memory(
    tmp_path: Path, movers: Movers, stream: Stream
) -> None:
    """`auto` goes through the host's memory, and says so; `device` insists."""
    movers.refuses_device_memory = True
    with gated_worker(tmp_path, has_gpu=True) as worker:
        with moeshm.connect(worker.address, engine_device="cuda:0") as client:
            assert client.slab == "pinned"
            assert client.stats().stepped_down == {"no peer access between these GPUs": 1}
            call = GpuCall.of(make_inputs(FREE, 1))
            call.submit(client, stream).wait(PATIENCE_S)
            call.check()
        with pytest.raises(DeviceError, match="no peer access"):
            moeshm.connect(worker.address, engine_device="cuda:0", transport="device")


def test_another_vendors_worker(tmp_path: Path, movers: Movers) -> None:
    assert not movers.opened
    with gated_worker(tmp_path, has_gpu=True) as worker:
        with moeshm.connect(worker.address, engine_device="hip:0") as client:
            assert client.slab == "pinned"
        with pytest.raises(DeviceError, match="only GPUs of the same vendor"):
            moeshm.connect(worker.address, engine_device="hip:0", transport="device")


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise DeviceError("no GPU cuda:7; CuPy sees cuda:0")

    monkeypatch.setattr(engine_device, "open_mover", refuse)
    with (
        gated_worker(tmp_path, has_gpu=True) as worker,
        pytest.raises(DeviceError, match="no GPU cuda:7"),
    ):
        moeshm.connect(worker.address, engine_device="cuda:7")


# A child may only end, which Python 3.12 and later cannot know.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child(client: moeshm.ExpertClient, stream: Stream) -> None:
    """Neither waits for the parent's calls, nor makes any."""
    held = stream.hold()
    future = GpuCall.of(make_inputs(FREE, 1)).submit(client, stream)
    pid = os.fork()
    if pid == 0:
        n_refused = 0
        for attempt in (
            lambda: future.wait(1.0),
            lambda: GpuCall.of(make_inputs(FREE, 2)).submit(client, stream),
        ):
            try:
                attempt()
            except ForkedProcess:
                n_refused += 1
        os._exit(n_refused)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    held.set()
    future.wait(PATIENCE_S)
