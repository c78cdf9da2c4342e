"""Ways that are lost while an offload goes on: others are taken, and it is shown."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import msgspec
import pytest

import moeshm
from moeshm import engine_device
from moeshm.errors import DeviceError, DeviceLost, InvalidCall, WorkerDied
from moeshm.link import Link
from moeshm.offload import ExpertOffload, cold, remote
from moeshm.offload.gpu_activations import EngineGpu, _Unfinished
from moeshm.placement import Placement
from moeshm.policy import Choice, Chooser, Policy, Times
from tests.crash.arithmetic import FREE, ArithmeticBackend, make_inputs
from tests.crash.device_calls.calls import GpuCall
from tests.crash.processes import GatedWorker, gated_worker, within
from tests.engine_gpu import Movers, Stream
from tests.integration.placed import EXPERTS, placed_worker

from ..host_lanes import HostLanes
from .offloads import SOON_S, draw, expected, forward, on_gpu, only, placement

#: What forwards are said to take, each way.
_TIMES_NS = {"device": 1_000_000, "pinned": 8_000_000, "shared": 9_000_000, "stream": 10_000_000}


@pytest.fixture
def _device_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as an offload can tell; and what is lost is not tried again within the test."""

    def times_of(_taken: object, choice: Choice) -> Times:
        ns = _TIMES_NS[choice.transport]
        return Times(1, 10_000, ns - 10_000, 0, None, ns)

    monkeypatch.setattr(cold, "times_of", times_of)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 60.0)


def chosen(offload: ExpertOffload) -> str:
    """The way that most rows take."""
    (explanation,) = offload.explain(FREE)
    (way,) = (each.transport for each in explanation.verdicts if each.is_chosen)
    return way


def learn(offload: ExpertOffload, stream: Stream) -> None:
    """That the device slab is best."""
    for _ in range(200):
        assert_exact(offload, stream)
        if chosen(offload) == "device":
            return
    raise AssertionError(str(offload.explain(FREE)[0]))


def assert_exact(offload: ExpertOffload, stream: Stream) -> None:
    call = draw(1)
    assert (forward(offload, FREE, call, stream) == expected(FREE, call)).all()


def lose_sessions(offload: ExpertOffload) -> None:
    """Their worker was killed, and each has seen that."""
    for client in offload._remotes["w"].sessions:
        client._link.lose(WorkerDied("its process is gone"))


# --- a way that cannot be opened again --------------------------------------------------------


@pytest.mark.parametrize("has_fallback", [False, True])
@pytest.mark.usefixtures("_uncalibrated", "_device_is_best", "lanes")
def test_a_way_that_cannot_be_opened_again_is_left(
    tmp_path: Path, movers: Movers, stream: Stream, has_fallback: bool
) -> None:
    """The forward that finds out goes another way, like all that follow; and back in time."""
    with contextlib.ExitStack() as stack:
        with gated_worker(tmp_path, has_gpu=True) as worker:
            offload = stack.enter_context(
                ExpertOffload(
                    {"w": worker.address},
                    placement("w"),
                    fallback=ArithmeticBackend() if has_fallback else None,
                    engine_device="cuda:0",
                )
            )
            learn(offload, stream)
            worker.process.kill()
        lose_sessions(offload)
        movers.refuses_device_memory = True
        stack.enter_context(gated_worker(tmp_path, has_gpu=True))
        for _ in range(30):
            assert_exact(offload, stream)
        stats = offload.stats()
        assert (stats.losses, stats.fallback_calls) == ({"w": 1}, 0)
        why = "device: the worker was lost and cannot be reached: no peer access between these GPUs"
        assert stats.stepped_down == {"w": why}
        assert chosen(offload) != "device"
        assert "left alone after a loss" in str(offload.explain(FREE)[0])
        # Once it can be opened, and is tried again.
        movers.refuses_device_memory = False
        offload._remotes["w"]._health["device"]._until = 0.0
        offload._remotes["w"].clients["device"]._sessions._reconnector._retry_at = 0.0
        learn(offload, stream)
        assert offload.stats().stepped_down == {}
        assert offload.stats().losses == {"w": 1}


@pytest.mark.parametrize("slab", ["none", "pinned"])
@pytest.mark.usefixtures("_uncalibrated", "_device_is_best", "movers", "lanes")
def test_a_client_that_was_lent_and_has_another_slab_now(
    tmp_path: Path, stream: Stream, monkeypatch: pytest.MonkeyPatch, slab: str
) -> None:
    """No call travels under a wrong name, and none is refused for it."""
    with contextlib.ExitStack() as stack:
        with gated_worker(tmp_path, has_gpu=True) as worker:
            client = stack.enter_context(moeshm.connect(worker.address, engine_device="cuda:0"))
            offload = stack.enter_context(
                ExpertOffload({"w": client}, placement("w"), engine_device="cuda:0")
            )
            learn(offload, stream)
            worker.process.kill()
        lose_sessions(offload)
        if slab == "none":
            open_slab = engine_device.Engine.open_slab

            def open_none(engine: engine_device.Engine, link: Link) -> bool:
                welcome = msgspec.structs.replace(link.session.welcome, slab=None)
                link.session.welcome = welcome
                return open_slab(engine, link)

            monkeypatch.setattr(engine_device.Engine, "open_slab", open_none)
        stack.enter_context(gated_worker(tmp_path, has_gpu=slab == "none"))
        for _ in range(5):
            assert_exact(offload, stream)
        stats = offload.stats()
        assert client.slab == (None if slab == "none" else slab)
        assert stats.losses == {"w": 1}
        assert stats.stepped_down["w"].startswith(f"device: the client's slab is {slab} now: ")
        assert chosen(offload) == "shared"


@pytest.mark.usefixtures("_uncalibrated", "_device_is_best", "movers", "lanes")
def test_a_worker_that_is_back_is_so_for_every_way(tmp_path: Path, stream: Stream) -> None:
    """Whichever is tried first, and although each is left alone while nobody answers."""
    with contextlib.ExitStack() as stack:
        with gated_worker(tmp_path, has_gpu=True) as worker:
            offload = stack.enter_context(
                ExpertOffload(
                    {"w": worker.address},
                    placement("w"),
                    fallback=ArithmeticBackend(),
                    engine_device="cuda:0",
                )
            )
            learn(offload, stream)
            worker.process.kill()
        lose_sessions(offload)
        assert_exact(offload, stream)
        remote = offload._remotes["w"]
        assert remote.down_ways() == remote.clients.keys()
        assert (offload.stats().losses, offload.stats().stepped_down) == ({"w": 1}, {})
        stack.enter_context(gated_worker(tmp_path, has_gpu=True))
        for client in remote.sessions:
            client._sessions._reconnector._retry_at = 0.0
        remote._health["shared"]._until = 0.0
        assert_exact(offload, stream)
        assert remote.down_ways() == set()
        assert_exact(offload, stream)
        assert chosen(offload) == "device"
        assert offload.stats().fallback_calls == 1


# --- a way that refuses a call ----------------------------------------------------------------


def refuse(error: Exception) -> Any:
    def fail(*_arguments: object) -> None:
        # Not itself, which would keep the frames of each time.
        raise type(error)(str(error))

    return fail


@pytest.mark.parametrize("has_others", [True, False])
@pytest.mark.usefixtures("_uncalibrated", "_device_is_best", "lanes")
def test_a_launch_that_is_refused(
    worker: GatedWorker, movers: Movers, stream: Stream, has_others: bool
) -> None:
    """It is a loss of the way, of which the policy is told."""
    with ExpertOffload(
        {"w": worker.address},
        placement("w"),
        policy=Policy(transport="auto" if has_others else "device"),
        fallback=ArithmeticBackend(),
        engine_device="cuda:0",
    ) as offload:
        learn(offload, stream)
        for mover in movers.opened:
            mover.give = refuse(DeviceError("not today"))  # type: ignore[method-assign]
        assert_exact(offload, stream)
        stats = offload.stats()
        assert stats.losses == {"w": 1}
        assert stats.choices["w"].losses == (2 if has_others else 1)
        assert stats.stepped_down["w"].startswith("device: not today")
        n_slots = int((draw(1)[1] >= 0).sum())
        assert stats.fallback_slots == ({} if has_others else {"worker_died": n_slots})


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (DeviceError("not today"), WorkerDied),
        (DeviceLost("no more"), DeviceLost),
        (InvalidCall("so wrong"), InvalidCall),
    ],
)
@pytest.mark.usefixtures("_uncalibrated", "lanes")
def test_what_a_launch_may_raise(
    worker: GatedWorker, movers: Movers, stream: Stream, error: Exception, told: type[Exception]
) -> None:
    with ExpertOffload(
        {"w": worker.address},
        placement("w"),
        policy=Policy(transport="device"),
        engine_device="cuda:0",
    ) as offload:
        assert_exact(offload, stream)
        movers.opened[0].give = refuse(error)  # type: ignore[method-assign]
        with pytest.raises(told, match=str(error)):
            forward(offload, FREE, draw(1), stream)


@pytest.mark.usefixtures("lanes")
def test_calibration_ends_for_the_way_alone_that_fails(
    tmp_path: Path, movers: Movers, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded: set[str] = set()
    seed, open_mover = Chooser.seed, movers.open

    def note(chooser: Chooser, shape: Any, work: Any, choice: Choice, times: Times) -> None:
        seeded.add(choice.transport)
        seed(chooser, shape, work, choice, times)

    def open_bad(*arguments: Any) -> Any:
        mover = open_mover(*arguments)
        mover.give = refuse(DeviceError("not today"))  # type: ignore[method-assign]
        return mover

    monkeypatch.setattr(Chooser, "seed", note)
    monkeypatch.setattr(engine_device, "open_mover", open_bad)
    everything = Placement.by_rule(["a"], {0: EXPERTS}, lambda *_: False)
    with (
        placed_worker(tmp_path, "a", everything) as (_, address),
        ExpertOffload({"a": address}, everything, engine_device="cuda:0") as offload,
    ):
        assert list(offload._remotes["a"].clients) == ["shared", "pinned", "stream"]
        assert seeded == {"shared", "stream"}


# --- deadlines --------------------------------------------------------------------------------


@pytest.mark.usefixtures("_uncalibrated", "movers", "lanes")
def test_the_deadline_holds_where_another_stream_holds_up_the_slab(
    worker: GatedWorker, stream: Stream
) -> None:
    """The worker waits for that one's arrays. What the late call uses is kept until it is over."""
    other = Stream()
    with ExpertOffload(
        {"w": worker.address},
        placement("w"),
        policy=Policy(transport="device"),
        fallback=ArithmeticBackend(),
        engine_device="cuda:0",
    ) as offload:
        assert offload._gpu is not None
        assert_exact(offload, stream)
        gate = other.hold()
        arrays = on_gpu(*draw(3))
        first = (
            offload._remotes["w"]
            .clients["device"]
            .submit(FREE, *arrays, out=on_gpu(arrays[0].host)[0], stream=other)
        )
        call = draw(2)
        with within(SOON_S):
            result = offload.forward(FREE, *on_gpu(*call), timeout_s=0.3, stream=stream)
        assert not first.done()
        assert len(offload._gpu._unfinished) == 1
        gate.set()
        first.wait(SOON_S)
        stream.synchronize()
        assert (result.host == expected(FREE, call)).all()
        stats = offload.stats()
        assert stats.losses == {"w": 1}
        assert stats.fallback_slots == {"deadline": int((call[1] >= 0).sum())}
        # With the next that needs a lane.
        assert_exact(offload, stream)
        assert offload._gpu._unfinished == []
    other.close()


@pytest.mark.usefixtures("_uncalibrated", "movers")
def test_a_lane_with_a_late_call_is_lent_to_nobody(
    worker: GatedWorker, lanes: HostLanes, stream: Stream
) -> None:
    gpu = EngineGpu(engine_device.EngineDevice("cuda:0", "cuda", 0, "auto"))
    lane = gpu.lend(lanes.new())
    with moeshm.connect(worker.address, engine_device="cuda:0") as client:
        gate = stream.hold()
        future = GpuCall.of(make_inputs(FREE, 1)).submit(client, stream)
        gpu.keep(_Unfinished(future, (), lane))
        other = gpu.lend(lane)
        assert other is not lane
        gate.set()
        future.wait(SOON_S)
        assert gpu.lend(lane) is lane


@pytest.mark.usefixtures("_uncalibrated", "movers")
def test_a_lane_comes_back_from_a_copy_that_fails(
    worker: GatedWorker, lanes: HostLanes, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExpertOffload({"w": worker.address}, placement("w"), engine_device="cuda:0") as offload:
        assert offload._gpu is not None
        only(offload, "shared")
        assert_exact(offload, stream)
        (lane,) = offload._gpu._idle
        with monkeypatch.context() as patch:
            patch.setattr(lane, "fetch", refuse(RuntimeError("an illegal address")))
            with pytest.raises(RuntimeError, match="illegal"):
                forward(offload, FREE, draw(1), stream)
        assert offload._gpu._idle == [lane]
        assert lane in lanes.made


# --- clients that are lent --------------------------------------------------------------------


@pytest.mark.usefixtures("_uncalibrated", "lanes")
def test_slabs_that_lent_clients_lack_are_shown(
    worker: GatedWorker, movers: Movers, stream: Stream
) -> None:
    movers.refuses_device_memory = True
    with (
        moeshm.connect(worker.address, engine_device="cuda:0") as client,
        ExpertOffload({"w": client}, placement("w"), engine_device="cuda:0") as offload,
    ):
        why = "no peer access between these GPUs"
        assert offload.stats().stepped_down == {"w": f"device: {why}"}
        assert_exact(offload, stream)
        assert f"not device: {why}" in str(offload.explain(FREE)[0])
    movers.refuses_device_memory = False
    with moeshm.connect(worker.address, engine_device="cuda:1") as client:
        with ExpertOffload({"w": client}, placement("w"), engine_device="cuda:0") as offload:
            why = "device: the client that was lent is for arrays on cuda:1"
            assert offload.stats().stepped_down == {"w": why}
        with ExpertOffload({"w": client}, placement("w")) as offload:
            assert offload.stats().stepped_down == {}


@pytest.mark.usefixtures("_uncalibrated", "movers", "lanes")
def test_a_gpu_without_a_number_is_the_first(worker: GatedWorker) -> None:
    with (
        moeshm.connect(worker.address, engine_device="cuda") as client,
        ExpertOffload({"w": client}, placement("w"), engine_device="cuda") as offload,
    ):
        assert client.engine_device == "cuda:0"
        assert set(offload._remotes["w"].clients) == {"shared", "device"}
