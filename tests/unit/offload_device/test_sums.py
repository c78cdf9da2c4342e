"""An offload with arrays on the engine's GPU: whichever way they go, the sum is the host's."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moeshm
from moeshm import settings
from moeshm.backends.cpu import CpuBackend
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.reference import reference_ffn
from moeshm.dtypes import DType, narrow
from moeshm.errors import DeviceError, InvalidCall, RingFull, SettingError, WorkerDied
from moeshm.offload import ExpertOffload
from moeshm.placement import LayerPlacement, Placement
from moeshm.policy import Policy
from tests.checkpoints import random_layer
from tests.crash.arithmetic import FREE, GATED, TOP_K, ArithmeticBackend
from tests.crash.processes import GatedWorker, gated_worker, within
from tests.engine_gpu import GpuArray, Movers, Stream
from tests.integration.placed import (
    CHECKPOINT,
    EXPERTS,
    PLACEMENT,
    draw_call,
    placed_worker,
)
from tests.simt.device import FEATURES, SimtDevice
from tests.wire import meanwhile

from ..host_lanes import BUS_ID, HostLanes
from .offloads import SOON_S, WAYS, draw, expected, forward, on_gpu, only, placement


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("movers")
def test_every_way_gives_the_sum(
    worker: GatedWorker, lanes: HostLanes, stream: Stream, way: str
) -> None:
    policy = Policy(transport=WAYS[way])
    with ExpertOffload(
        {"w": worker.address}, placement("w"), policy=policy, engine_device="cuda:0"
    ) as offload:
        only(offload, way)
        for seed in range(4):
            call = draw(seed)
            np.testing.assert_array_equal(
                forward(offload, FREE, call, stream), expected(FREE, call)
            )
        stats = offload.stats()
        assert (stats.forwards, stats.gpu_forwards, stats.calls) == (4, 4, 4)
        assert stats.brought == (0 if way in ("device", "pinned") else 4)
        assert stats.rows == 16
        assert stats.stepped_down == {}
        (explanation,) = offload.explain(FREE)
        assert {verdict.transport for verdict in explanation.verdicts} == {way}
        assert "on the engine's GPU" in str(explanation)
    takes = [lane.calls.count("take") for lane in lanes.made]
    assert sum(takes) == (4 if way in ("device", "pinned") else 0)


@pytest.mark.parametrize("way", ["pinned", "shared", "stream"])
@pytest.mark.usefixtures("_uncalibrated", "movers", "lanes")
def test_hot_experts_and_several_workers_give_what_host_arrays_give(
    tmp_path: Path, stream: Stream, way: str
) -> None:
    """Exactly."""
    backend = CpuBackend(CHECKPOINT.layers, threads=1)
    with (
        placed_worker(tmp_path, "a") as (_, a),
        placed_worker(tmp_path, "b") as (_, b),
        ExpertOffload({"a": a, "b": b}, PLACEMENT, local=backend) as of_host,
        ExpertOffload(
            {"a": a, "b": b}, PLACEMENT, local=backend, engine_device="cuda:0"
        ) as offload,
    ):
        only(offload, way)
        only(of_host, "shared")
        for seed in range(6):
            call = draw_call(seed, n_tokens=1 + seed)
            np.testing.assert_array_equal(
                forward(offload, seed % 4, call, stream), of_host.forward(seed % 4, *call)
            )
        stats = offload.stats()
        assert stats.hot_slots > 0
        assert stats.cold_slots.keys() == {"a", "b"}
        # Once for all who need them.
        assert stats.brought == 6


@pytest.mark.usefixtures("_uncalibrated")
def test_calls_of_several_workers_are_on_several_streams(
    tmp_path: Path, movers: Movers, lanes: HostLanes, stream: Stream
) -> None:
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(gated_worker(tmp_path, has_gpu=True, name=name))
            for name in "ab"
        }
        addresses = {name: each.address for name, each in workers.items()}
        offload = stack.enter_context(
            ExpertOffload(
                addresses,
                placement("a", "b"),
                policy=Policy(transport="device"),
                engine_device="cuda:0",
            )
        )
        call = draw(3, 8)

        def let_go() -> None:
            for each in workers.values():
                assert each.next_turn()[0] == GATED
            for each in workers.values():
                each.let_go()

        # Each begins before the other has answered.
        with meanwhile(let_go):
            found = forward(offload, GATED, call, stream)
        np.testing.assert_array_equal(found, expected(GATED, call))
        assert offload.stats().cold_slots.keys() == {"a", "b"}
        used = [lane for lane in lanes.made if "take" in lane.calls]
        assert len({lane.stream for lane in used[-2:]}) == 2
        assert sum("follow" in lane.calls for lane in lanes.made) >= 1
        assert len(movers.opened) == 2


@pytest.mark.usefixtures("_uncalibrated", "movers")
def test_bfloat16_and_wide_ids(worker: GatedWorker, lanes: HostLanes, stream: Stream) -> None:
    del lanes
    with ExpertOffload(
        {"w": worker.address},
        placement("w"),
        policy=Policy(transport="device"),
        engine_device="cuda:0",
    ) as offload:
        x, ids, weights = draw(1)
        half = x.astype(np.float16), ids.astype(np.int64), weights.astype(np.float16)
        found = forward(offload, FREE, half, stream)
        assert found.dtype == np.float16
        np.testing.assert_array_equal(found, expected(FREE, (x, ids, weights)))
        (explanation,) = offload.explain(FREE)
        assert explanation.verdicts[0].wire_dtype is DType.F16


@pytest.mark.usefixtures("_uncalibrated", "movers")
def test_no_tokens_and_no_experts(worker: GatedWorker, lanes: HostLanes, stream: Stream) -> None:
    del lanes
    with ExpertOffload({"w": worker.address}, placement("w"), engine_device="cuda:0") as offload:
        x, ids, weights = draw(1)
        assert forward(offload, FREE, (x[:0], ids[:0], weights[:0]), stream).shape == (0, 16)
        found = forward(offload, FREE, (x, np.full_like(ids, -1), weights), stream)
        np.testing.assert_array_equal(found, np.zeros_like(x))
        assert offload.stats().calls == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("_uncalibrated", "movers")
def test_a_worker_that_is_killed(
    worker: GatedWorker, lanes: HostLanes, stream: Stream, way: str
) -> None:
    """In the midst of a forward: the fallback computes it, and the next one."""
    del lanes
    with ExpertOffload(
        {"w": worker.address},
        placement("w"),
        policy=Policy(transport=WAYS[way]),
        fallback=ArithmeticBackend(),
        engine_device="cuda:0",
    ) as offload:
        only(offload, way)
        call = draw(2)

        def kill() -> None:
            worker.next_turn()
            worker.process.kill()

        with within(SOON_S), meanwhile(kill):
            np.testing.assert_array_equal(
                forward(offload, GATED, call, stream), expected(GATED, call)
            )
        np.testing.assert_array_equal(forward(offload, FREE, call, stream), expected(FREE, call))
        stats = offload.stats()
        n_slots = int((call[1] >= 0).sum())
        assert stats.losses == {"w": 1}
        assert stats.fallback_slots == {"worker_died": n_slots, "worker_down": n_slots}
        assert stats.brought == 2


@pytest.mark.usefixtures("_uncalibrated", "movers")
def test_without_a_fallback_a_killed_worker_is_told(
    worker: GatedWorker, lanes: HostLanes, stream: Stream
) -> None:
    del lanes
    with ExpertOffload(
        {"w": worker.address},
        placement("w"),
        policy=Policy(transport="device"),
        engine_device="cuda:0",
    ) as offload:
        worker.process.kill()
        with within(SOON_S), pytest.raises(WorkerDied):
            forward(offload, FREE, draw(2), stream)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.usefixtures("lanes")
def test_hot_experts_on_the_engine_s_gpu(stream: Stream, dtype: DType, is_there: bool) -> None:
    """Their backend takes the arrays in place; one on another GPU, by way of the host."""
    layer = random_layer(1, weight_dtype=dtype)
    info = layer.info
    bus_id = BUS_ID if is_there else "0000:1c:00.0"
    backend = GpuBackend({0: layer}, SimtDevice(FEATURES._replace(bus_id=bus_id)))
    backend.vendor = "cuda"
    hot = Placement([], {0: LayerPlacement(info.num_experts, info.experts, {})})
    with ExpertOffload({}, hot, local=backend, engine_device="cuda:0") as offload:
        rng = np.random.default_rng(2)
        x = narrow(rng.standard_normal((5, info.hidden_size), np.float32), dtype)
        ids = rng.integers(-1, info.num_experts, (5, info.top_k), dtype=np.int32)
        call = x, ids, rng.random(ids.shape, np.float32)
        found = forward(offload, 0, call, stream)
        assert found.dtype == dtype.numpy
        np.testing.assert_array_equal(found, offload.forward(0, *call))
        assert offload.stats().brought == (0 if is_there else 1)


@pytest.mark.usefixtures("_uncalibrated", "movers", "lanes")
def test_experts_that_move(tmp_path: Path, stream: Stream) -> None:
    """Every way's calls name the view that they are of."""
    backend = CpuBackend(CHECKPOINT.layers, threads=1)
    everything = Placement.by_rule(["a"], {0: EXPERTS}, lambda *_: False)
    half_hot = Placement.by_rule(["a"], {0: EXPERTS}, lambda _, expert: expert % 2 == 0)
    with (
        placed_worker(tmp_path, "a", everything) as (_, address),
        ExpertOffload({"a": address}, everything, local=backend, engine_device="cuda:0") as offload,
    ):
        only(offload, "pinned")
        call = draw_call(1)
        for placement in (half_hot, everything):
            offload.apply(placement).result(SOON_S)
            np.testing.assert_allclose(
                forward(offload, 0, call, stream),
                reference_ffn(CHECKPOINT.layers[0], *call),
                rtol=1e-4,
                atol=1e-5,
            )


@pytest.mark.usefixtures("_uncalibrated", "movers", "lanes")
def test_a_slab_without_room(
    worker: GatedWorker, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the deadline: as if the worker were late."""

    def refuse(*_arguments: Any, **_named: Any) -> None:
        raise RingFull("the slab was full of earlier calls")

    with ExpertOffload(
        {"w": worker.address},
        placement("w"),
        policy=Policy(transport="device"),
        fallback=ArithmeticBackend(),
        engine_device="cuda:0",
    ) as offload:
        call = draw(3)
        with monkeypatch.context() as patch:
            patch.setattr(offload._remotes["w"].clients["device"], "submit", refuse)
            found = forward(offload, FREE, call, stream)
        np.testing.assert_array_equal(found, expected(FREE, call))
        assert offload.stats().fallback_slots == {"deadline": int((call[1] >= 0).sum())}


# --- which ways there are --------------------------------------------------------------------


@pytest.mark.usefixtures("_uncalibrated")
def test_a_slab_that_is_refused_is_left_out_and_shown(
    worker: GatedWorker, movers: Movers, lanes: HostLanes, stream: Stream
) -> None:
    del lanes
    movers.refuses_device_memory = True
    with ExpertOffload({"w": worker.address}, placement("w"), engine_device="cuda:0") as offload:
        call = draw(1)
        np.testing.assert_array_equal(forward(offload, FREE, call, stream), expected(FREE, call))
        why = "no peer access between these GPUs"
        assert offload.stats().stepped_down == {"w": f"device: {why}"}
        (explanation,) = offload.explain(FREE)
        ways = {verdict.transport for verdict in explanation.verdicts}
        assert ways == {"shared", "stream", "pinned"}
        assert str(explanation).endswith(f"not device: {why}")
        # Arrays of the host's miss nothing.
        offload.forward(FREE, *call)
        of_host, _ = offload.explain(FREE)
        assert "not device" not in str(of_host)
        assert {verdict.transport for verdict in of_host.verdicts} == {"shared", "stream"}


@pytest.mark.usefixtures("_uncalibrated", "lanes")
def test_a_worker_that_gives_no_device_memory(tmp_path: Path, movers: Movers) -> None:
    """`device` insists; `shared` does with rings."""
    with gated_worker(tmp_path) as worker:
        workers, all_cold = {"w": worker.address}, placement("w")
        with pytest.raises(DeviceError, match="slab"):
            ExpertOffload(
                workers, all_cold, policy=Policy(transport="device"), engine_device="cuda:0"
            )
        with ExpertOffload(
            workers, all_cold, policy=Policy(transport="shared"), engine_device="cuda:0"
        ) as offload:
            assert list(offload._remotes["w"].clients) == ["shared", "pinned"]
    assert len(movers.opened) == 1


@pytest.mark.usefixtures("_uncalibrated", "movers")
def test_clients_that_are_lent(worker: GatedWorker, lanes: HostLanes, stream: Stream) -> None:
    """One serves both ways, and counts once."""
    del lanes
    with moeshm.connect(worker.address, engine_device="cuda:0") as client:
        with ExpertOffload({"w": client}, placement("w"), engine_device="cuda:0") as offload:
            remote = offload._remotes["w"]
            assert set(remote.clients) == {"shared", "device"}
            assert remote.sessions == [client]
            call = draw(4)
            np.testing.assert_array_equal(
                forward(offload, FREE, call, stream), expected(FREE, call)
            )
        with ExpertOffload({"w": client}, placement("w")) as offload:
            assert set(offload._remotes["w"].clients) == {"shared"}
        with pytest.raises(SettingError, match="transport='device', but this worker offers"):
            ExpertOffload(
                {"w": client},
                placement("w"),
                policy=Policy(transport="device"),
                engine_device="cuda:1",
            )


@pytest.mark.usefixtures("_uncalibrated", "movers")
def test_the_setting(
    worker: GatedWorker, lanes: HostLanes, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MOESHM_TRANSPORT=device needs a GPU, of connect and of an offload."""
    del lanes
    monkeypatch.setattr(settings, "current", lambda: settings.Settings(transport="device"))
    remedy = "='device' is for arrays on the engine's GPU; say which: engine_device='cuda:0'"
    with pytest.raises(SettingError, match="MOESHM_TRANSPORT" + remedy):
        moeshm.connect(worker.address)
    with pytest.raises(SettingError, match=remedy):
        ExpertOffload({"w": worker.address}, placement("w"))
    with moeshm.connect(worker.address, engine_device="cuda:0") as client:
        # Arrays of the host's go through rings.
        assert (client.slab, client.transport) == ("device", "shared")
    with ExpertOffload({"w": worker.address}, placement("w"), engine_device="cuda:0") as offload:
        assert list(offload._remotes["w"].clients) == ["device"]
        call = draw(5)
        np.testing.assert_array_equal(forward(offload, FREE, call, stream), expected(FREE, call))
        with pytest.raises(InvalidCall, match="transport='device' carries those on a GPU"):
            offload.forward(FREE, *call)


@pytest.mark.usefixtures("_uncalibrated", "movers")
def test_what_is_refused(worker: GatedWorker, lanes: HostLanes, stream: Stream) -> None:
    """Before anything is sent."""
    del lanes
    workers, call = {"w": worker.address}, draw(1)
    with pytest.raises(SettingError, match="write cuda:N or hip:N"):
        ExpertOffload(workers, placement("w"), engine_device="gpu")
    with (
        ExpertOffload(workers, placement("w")) as offload,
        pytest.raises(InvalidCall, match="engine_device='cuda:0'"),
    ):
        forward(offload, FREE, call, stream)
    policy = Policy(transport="device", wire_dtype="bf16")
    with (
        ExpertOffload(workers, placement("w"), policy=policy, engine_device="cuda:0") as offload,
        pytest.raises(SettingError, match="wire_dtype='bf16' and rows of f32 on the engine's GPU"),
    ):
        forward(offload, FREE, call, stream)
    with ExpertOffload(workers, placement("w"), engine_device="cuda:0") as offload:
        x, ids, weights = on_gpu(*call)
        wrong = GpuArray(np.full((len(call[0]), TOP_K), 99, np.int32))
        with pytest.raises(InvalidCall, match="99"):
            offload.forward(FREE, x, wrong, weights, stream=stream)
        with pytest.raises(InvalidCall, match="an array in the host's memory"):
            offload.forward(FREE, x, call[1], weights, stream=stream)
        stream.is_capturing = True
        with pytest.raises(InvalidCall, match="captured into a graph"):
            offload.forward(FREE, x, ids, weights, stream=stream)
        assert offload.stats().forwards == 0


@pytest.mark.usefixtures("movers")
def test_an_engine_without_its_gpu(worker: GatedWorker, lanes: HostLanes) -> None:
    lanes.has_gpu = False
    with pytest.raises(DeviceError, match="no GPU here"):
        ExpertOffload({"w": worker.address}, placement("w"), engine_device="cuda:0")
