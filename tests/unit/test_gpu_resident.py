"""Calls to the kernel that stays on a GPU, which the shim runs beside the host."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moeshm._claims import Claim
from moeshm._words import load_word, store_word, wait_for_word
from moeshm.backends import Ids, Weights
from moeshm.backends.gpu import backend as gpu_backend
from moeshm.backends.gpu import resident
from moeshm.backends.gpu._mailbox import ENDED, FINISHED, Mailbox
from moeshm.backends.gpu.abi import Command
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.gpu.choice import Shape
from moeshm.backends.gpu.compiled import Kernels
from moeshm.backends.gpu.device import Features
from moeshm.backends.gpu.resident import Resident
from moeshm.backends.reference import reference_ffn
from moeshm.checkpoint import ExpertLayer
from moeshm.dtypes import Array, DType, narrow
from moeshm.errors import DeviceError, DeviceLost
from moeshm.transport.slab import DONE, REFUSED
from tests.checkpoints import random_layer
from tests.conformance.test_backends import TOLERANCE, assert_close, compute, draw_call
from tests.simt.device import FEATURES, IdleDevice, SimtDevice
from tests.simt.resident_device import ResidentDevice
from tests.unit.test_gpu_backend import OnDevice, aligned
from tests.unit.test_gpu_experts import part
from tests.unit.test_gpu_registered import rings, serve
from tests.wire import meanwhile

from .gpu_slabs import Engine, call_of, each_kind, engine, table

BF16, F16, F32 = DType.BF16, DType.F16, DType.F32
Inputs = tuple[Array, Ids, Weights]

LAYER = random_layer(1, hidden_size=64, intermediate_size=72, weight_dtype=BF16)
OTHER = random_layer(2, hidden_size=72, intermediate_size=64, top_k=4, weight_dtype=BF16)
#: More tokens than the kernel takes, of the same kernels otherwise.
MANY = 70
PATIENCE_NS = 30 * 10**9


class Others:
    """Processes that use the GPU, as a driver tells of them."""

    def __init__(self) -> None:
        self.n = 0
        self.error = ""

    def count(self) -> int:
        """As `Neighbours.count`."""
        if self.error:
            raise DeviceError(self.error)
        return self.n


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> Others:
    """None at first; and kernels stay until they are told to end."""
    made = Others()
    monkeypatch.setattr(resident, "Neighbours", lambda _bus_id: made)
    monkeypatch.setattr(resident, "IDLE_NS", PATIENCE_NS)
    monkeypatch.setattr(resident, "_LONGEST_S", 1e9)
    monkeypatch.setattr(resident, "_LOOK_S", 0)
    return made


class Served:
    """A backend with a kernel that stays."""

    def __init__(self, layers: Mapping[int, ExpertLayer], device: SimtDevice) -> None:
        self.device = device
        self.backend = GpuBackend(layers, device, is_resident=True)
        assert self.backend._resident is not None
        self.resident: Resident = self.backend._resident

    @property
    def counts(self) -> tuple[int, int]:
        """Of calls, and of launches."""
        return self.resident.n_calls, self.resident.n_launched

    def call(self, seed: int, n_tokens: int = 1, number: int = 0, dtype: DType = BF16) -> None:
        """One that is right."""
        layer = {0: LAYER, 1: OTHER}[number]
        inputs = draw(seed, layer, n_tokens, dtype)
        out = narrow(np.full(inputs[0].shape, np.nan, np.float32), dtype)
        self.backend.ffn(number, *inputs, out)
        assert_close(out, reference_ffn(layer, *inputs), TOLERANCE[BF16])

    def end(self) -> None:
        """No kernel is there any more."""
        with self.backend._turn:
            self.device.wait()


@contextlib.contextmanager
def serving(
    layers: Mapping[int, ExpertLayer] | None = None, device: SimtDevice | None = None
) -> Iterator[Served]:
    """One that is ended afterwards."""
    made = Served(layers or {0: LAYER}, device or ResidentDevice())
    try:
        yield made
    finally:
        made.end()


def draw(seed: int, layer: ExpertLayer, n_tokens: int, dtype: DType = BF16) -> Inputs:
    """A call of the layer."""
    hidden, ids, weights = draw_call(seed, layer, n_tokens, layer.info.top_k)
    return narrow(hidden, dtype), ids, weights


# --- results ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight_dtype", "dtype"), [(BF16, BF16), (BF16, F32), (F16, F16)], ids=str
)
def test_calls_give_what_the_reference_gives(weight_dtype: DType, dtype: DType) -> None:
    """And the same bits when they are made again."""
    layer = random_layer(1, hidden_size=64, intermediate_size=72, weight_dtype=weight_dtype)
    first: dict[int, Array] = {}
    with serving({0: layer}) as served:
        for n_tokens in (*range(1, 17), 16, 1, 5, 1):
            hidden, ids, weights = draw(n_tokens, layer, n_tokens, dtype)
            weights[ids < 0] = np.nan
            found = compute(served.backend, hidden, ids, weights, dtype)
            expected = reference_ffn(layer, hidden, ids, np.nan_to_num(weights))
            assert_close(found, expected, TOLERANCE[weight_dtype])
            np.testing.assert_array_equal(found, first.setdefault(n_tokens, found))
        # A kernel for each kind of call that was new, as these have it end.
        assert served.counts == (20, 16)


def test_calls_that_are_not_for_it() -> None:
    """Of formats that matrix instructions do not take, of too many tokens, of none."""
    layer = random_layer(1, hidden_size=64)
    with serving({0: layer, 1: LAYER}) as served:
        for n_tokens in (0, 1, 4):
            call = draw(n_tokens, layer, n_tokens, F32)
            assert_close(compute(served.backend, *call), reference_ffn(layer, *call), 1e-5)
        call = draw(1, LAYER, MANY)
        out = np.empty_like(call[0])
        served.backend.ffn(1, *call, out)
        assert_close(out, reference_ffn(LAYER, *call), TOLERANCE[BF16])
        assert served.counts == (0, 0)


def test_hidden_sizes_that_kernels_take_padded() -> None:
    layer = random_layer(3, hidden_size=33, intermediate_size=7, weight_dtype=BF16)
    with serving({0: layer}) as served:
        for seed in range(2):
            for n_tokens in (1, 3):
                call = draw(seed, layer, n_tokens)
                found = compute(served.backend, *call, BF16)
                assert_close(found, reference_ffn(layer, *call), TOLERANCE[BF16])
        assert served.resident.n_calls == 4


@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_arrays_in_device_memory(dtype: DType, n_tokens: int) -> None:
    with serving() as served:
        for seed in range(2):
            inputs = draw(seed, LAYER, n_tokens, dtype)
            out = OnDevice(aligned(narrow(np.full(inputs[0].shape, np.nan, np.float32), dtype)))
            given: list[Any] = [*(OnDevice(aligned(each)) for each in inputs), out]
            served.backend.ffn(0, *given)
            assert_close(out.array, reference_ffn(LAYER, *inputs), TOLERANCE[BF16])
        assert served.counts == (2, 1)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_arrays_in_registered_rings(monkeypatch: pytest.MonkeyPatch, dtype: DType) -> None:
    monkeypatch.setattr(gpu_backend, "DIRECT_BYTES", 0)
    with serving() as served, rings(served.backend) as ends:
        for n_tokens in (1, 5, 5, 1):
            inputs = draw(n_tokens, LAYER, n_tokens, dtype)
            found = serve(ends, LAYER, served.backend, *inputs)
            assert_close(found, reference_ffn(LAYER, *inputs), TOLERANCE[BF16])
        assert served.resident.n_calls == 4
        served.end()


# --- how long it stays ------------------------------------------------------------------------


def test_one_kernel_computes_many_calls() -> None:
    """More than the mailbox has room for."""
    with serving() as served:
        for seed in range(40):
            served.call(seed)
        assert served.counts == (40, 1)


def test_calls_of_many_tokens_have_it_end() -> None:
    with serving() as served:
        for n_launched in (1, 2, 3):
            for seed in range(3):
                served.call(seed)
            assert served.resident.n_launched == n_launched
            served.call(7, MANY)
            # Ended, and not only asked to.
            assert served.resident._mailbox.n_ended == n_launched
        assert served.resident.n_calls == 9


@pytest.mark.parametrize("idle_ns", [0, 50_000])
def test_nothing_is_lost_when_it_ends_by_itself(
    monkeypatch: pytest.MonkeyPatch, idle_ns: int
) -> None:
    monkeypatch.setattr(resident, "IDLE_NS", idle_ns)
    with serving() as served:
        for seed in range(30):
            served.call(seed)
        assert served.resident.n_calls == 30
        n_launched = served.resident.n_launched
        served.device.wait()
        assert served.resident._mailbox.n_ended == served.resident.n_launched
        served.call(1)
        assert served.resident.n_launched > n_launched


def test_layers_of_two_shapes() -> None:
    """Each has a kernel of its own, and never finds what is for the other."""
    with serving({0: LAYER, 1: OTHER}) as served:
        for seed in range(3):
            for number in (0, 1, 1, 0):
                served.call(seed, number=number)
        # Of 0 1 1 0, three times.
        assert served.counts == (12, 7)


def test_it_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for the whole device has a turn."""
    with serving() as served:
        served.call(0)
        monkeypatch.setattr(resident, "_LONGEST_S", 0)
        for seed in range(3):
            served.call(seed)
        monkeypatch.setattr(resident, "_LONGEST_S", 1e9)
        served.call(3)
        assert served.counts == (5, 4)


def test_threads_with_calls_of_few_and_of_many_tokens() -> None:
    with serving() as served:
        served.call(0)

        def serve_small() -> None:
            for seed in range(12):
                served.call(seed, 1 + seed % 2)

        def serve_large() -> None:
            for seed in range(4):
                served.call(seed, MANY)

        with meanwhile(serve_small, serve_small, serve_large):
            pass
        assert served.resident.n_calls == 25


def test_after_warm_up_nothing_is_compiled_or_allocated() -> None:
    device = ResidentDevice()
    with serving(device=device) as served:
        served.backend.warm_up()
        assert "resident.cu" in device.compiled
        before = [*device.compiled], [*device.loaded], device.n_allocations
        n_launched = served.resident.n_launched
        for n_tokens in (1, 2, 9, 1):
            for dtype in (BF16, F32):
                served.call(n_tokens, n_tokens, dtype=dtype)
        assert ([*device.compiled], [*device.loaded], device.n_allocations) == before
        # The last thing that it did was for the whole device.
        assert served.resident.n_launched == n_launched + 1


# --- slabs ------------------------------------------------------------------------------------


def begin(slab: Engine, inputs: Inputs, number: int = 0, **how: Any) -> Claim:
    """A call, enqueued."""
    return slab.begin(*inputs, layer=number, n_ids=how.pop("n_ids", 6), **how)


def finish(slab: Engine, claim: Claim, inputs: Inputs, layer: ExpertLayer = LAYER) -> None:
    """It comes, and is right."""
    memory = slab.segment.memory
    assert wait_for_word(memory, claim.flag(DONE), claim.sequence, PATIENCE_NS, 0)
    found = slab.take(claim, inputs[0])
    assert_close(found, reference_ffn(layer, *inputs), TOLERANCE[BF16])


@each_kind
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_calls_from_slabs(kind: str, dtype: DType) -> None:
    with serving() as served, engine(served.backend, kind) as slab:
        for n_tokens in (1, 4, 16, 4, 1, 1):
            inputs = draw(n_tokens, LAYER, n_tokens, dtype)
            claim = begin(slab, inputs)
            finish(slab, claim, inputs)
            assert slab.flag(claim, REFUSED) == 0
        # New kinds end it, of which there were three.
        assert served.counts == (6, 3)


@each_kind
def test_calls_are_begun_before_others_are_done(kind: str) -> None:
    """More than the mailbox has room for, of two shapes, with one in between that is waited for."""
    with serving({0: LAYER, 1: OTHER}) as served, engine(served.backend, kind) as slab:
        for seed in range(2):
            calls = []
            for index in range(24):
                layer = OTHER if index % 5 == 4 else LAYER
                inputs = draw(seed + index, layer, 1 + index % 2)
                calls.append((begin(slab, inputs, number=int(layer is OTHER)), inputs, layer))
            served.call(99)
            served.call(98, MANY)
            for each in calls:
                finish(slab, *each)
        assert served.resident.n_calls == 50


@each_kind
@pytest.mark.parametrize("n_tokens", [1, 4])
@pytest.mark.parametrize("wrong", [6, -2])
def test_ids_that_are_wrong(kind: str, n_tokens: int, wrong: int) -> None:
    with serving() as served, engine(served.backend, kind) as slab:
        hidden, ids, weights = draw(5, LAYER, n_tokens)
        ids[-1, 1] = wrong
        claim = begin(slab, (hidden, ids, weights))
        ids[-1, 1] = -1
        finish(slab, claim, (hidden, ids, weights))
        assert slab.flag(claim, REFUSED) == 2 * n_tokens
        inputs = draw(6, LAYER, n_tokens)
        claim = begin(slab, inputs)
        finish(slab, claim, inputs)
        assert served.resident.n_calls == 2


@each_kind
def test_ids_that_stand_for_slots(kind: str) -> None:
    with serving({0: part(LAYER, [2, 4, 5])}) as served, engine(served.backend, kind) as slab:
        hidden, ids, weights = draw(5, LAYER, 6)
        there = np.where(np.isin(ids, (2, 4, 5)), ids, -1)
        inputs = hidden, there, weights
        for slots in (table(-1, -1, 0, -1, 1, 2), table(-1, -1, 0, -1, 1, 2, -1)):
            claim = begin(slab, inputs, slots=slots)
            finish(slab, claim, inputs)
        assert served.resident.n_calls == 2


@each_kind
def test_a_slab_is_closed_while_calls_are_on_their_way(kind: str) -> None:
    """After they are done."""
    with serving() as served:
        made = Engine(served.backend, kind)
        calls = []
        for seed in range(5):
            inputs = draw(seed, LAYER, 1)
            calls.append((begin(made, inputs), inputs))
        # Read once they are waited for, before the memory is gone.
        close = functools.partial(assert_all_done, made, calls)
        made.slab._closers.insert(0, close)
        made.slab.close()
        assert not made.claims


def assert_all_done(slab: Engine, calls: list[tuple[Claim, Inputs]]) -> None:
    for claim, inputs in calls:
        found = slab.take(claim, inputs[0])
        assert_close(found, reference_ffn(LAYER, *inputs), TOLERANCE[BF16])


# --- what it uses changes ---------------------------------------------------------------------


@each_kind
def test_the_workspace_grows_while_it_is_there(kind: str) -> None:
    """And a call was prepared for the one before."""
    with serving() as served, engine(served.backend, kind) as slab:
        served.call(0)
        before = served.backend._workspace.address
        inputs = draw(1, LAYER, 2)
        claim = slab.give(*inputs)
        call = call_of(claim, *inputs[:2])
        slab.slab.prepare(call)
        running = [(begin(slab, each), each) for each in (draw(2, LAYER, 1), draw(3, LAYER, 1))]
        slab.slab.prepare(call)
        wide = random_layer(7, hidden_size=200, intermediate_size=136, top_k=6, weight_dtype=BF16)
        served.backend.add(1, wide)
        assert served.backend._workspace.address != before
        slab.slab.enqueue(call)
        for each in (*running, (claim, inputs)):
            finish(slab, *each)
        for seed in range(2):
            served.call(seed)
            call_wide = draw(seed, wide, 2)
            out = np.empty_like(call_wide[0])
            served.backend.ffn(1, *call_wide, out)
            assert_close(out, reference_ffn(wide, *call_wide), TOLERANCE[BF16])


def test_experts_come_and_go_while_it_is_there() -> None:
    """Others take the memory of those that went."""
    with serving({0: part(LAYER, [0, 1, 2])}) as served:
        held = {0: 0, 1: 1, 2: 2}

        def assert_right(seed: int) -> None:
            for n_tokens in (1, 3):
                hidden, ids, weights = draw(seed, LAYER, n_tokens)
                there, given = np.full_like(ids, -1), np.full_like(ids, -1)
                for slot, expert in held.items():
                    there[ids == expert], given[ids == expert] = expert, slot
                out = np.empty_like(hidden)
                served.backend.ffn(0, hidden, given, weights, out)
                expected = reference_ffn(LAYER, hidden, there, weights)
                assert_close(out, expected, TOLERANCE[BF16])

        assert_right(0)
        for seed, (gone, new) in enumerate(((1, 5), (2, 3), (0, 4)), 1):
            served.backend.remove(0, [gone])
            del held[gone]
            assert_right(seed)
            (slot,) = served.backend.add(0, part(LAYER, [new]))
            held[slot] = new
            assert_right(seed)


def test_calls_while_experts_come_and_go() -> None:
    with serving() as served:
        served.call(0)

        def come_and_go() -> None:
            for _ in range(4):
                slots = served.backend.add(0, LAYER)
                served.backend.remove(0, slots)

        with meanwhile(come_and_go):
            for seed in range(12):
                served.call(seed, 1 + seed % 2)
        assert served.resident.n_calls == 13


# --- other processes --------------------------------------------------------------------------


def test_it_steps_aside_for_others_and_comes_back(
    others: Others, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once each time; who comes with a session is seen then."""
    caplog.set_level(logging.INFO, resident.__name__)
    with serving() as served:
        served.call(0)
        n_jobs = len(served.backend._jobs)
        assert n_jobs
        others.n = 2
        with engine(served.backend):
            assert not served.backend._jobs
            for seed in range(3):
                served.call(seed)
                served.call(seed, 2)
            assert served.counts == (1, 1)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage() == (
            "the resident kernel on simt steps aside, calls are launched: "
            "2 other processes compute on simt"
        )
        others.n = 0
        served.call(4)
        assert served.counts == (1, 1)
        with engine(served.backend):
            served.call(5)
            served.call(6)
        assert served.counts == (3, 2)
        assert [each.levelno for each in caplog.records] == [logging.WARNING, logging.INFO]
        assert caplog.messages[1] == "the resident kernel on simt takes calls again"


@each_kind
def test_others_that_are_seen_by_a_launch(others: Others, kind: str) -> None:
    """What is begun with it is its last call, also of what was prepared before."""
    with serving() as served, engine(served.backend, kind) as slab:
        inputs = draw(1, LAYER, 1)
        for _ in range(2):
            finish(slab, begin(slab, inputs), inputs)
        served.call(1)
        claim = slab.give(*inputs)
        call = call_of(claim, *inputs[:2])
        slab.slab.prepare(call)
        served.call(0, MANY)
        others.n = 1
        n_calls = served.resident.n_calls
        served.call(2)
        assert served.resident.n_calls == n_calls + 1
        slab.slab.enqueue(call)
        finish(slab, claim, inputs)
        served.call(3)
        assert served.resident.n_calls == n_calls + 1


def test_nobody_can_tell_any_more(others: Others, caplog: pytest.LogCaptureFixture) -> None:
    with serving() as served:
        served.call(0)
        others.error = "NVML status 15"
        with engine(served.backend):
            served.call(1)
        assert served.counts == (1, 1)
        assert "steps aside, calls are launched: NVML status 15" in caplog.text


# --- refused at the start ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            FEATURES._replace(has_mma=False, arch="sm_75"),
            "no resident kernel on simt: it needs a CUDA GPU of sm_80 or later, and this is sm_75; "
            "leave out --resident",
        ),
        (
            FEATURES._replace(ends_long_kernels=True),
            "no resident kernel on simt: the driver ends kernels that run for seconds",
        ),
    ],
)
def test_devices_that_cannot_have_it(features: Features, message: str) -> None:
    device = ResidentDevice(features)
    with pytest.raises(DeviceError, match=message):
        GpuBackend({0: LAYER}, device, is_resident=True)
    assert (device.device_bytes, device.pinned_bytes) == (0, 0)


def test_a_device_that_others_use(others: Others) -> None:
    others.n = 3
    message = "no resident kernel: 3 other processes compute on simt; use another GPU"
    with pytest.raises(DeviceError, match=message):
        GpuBackend({0: LAYER}, ResidentDevice(), is_resident=True)
    others.error = "who else uses the GPU cannot be told: no library"
    with pytest.raises(DeviceError, match="no resident kernel: who else uses the GPU cannot be"):
        GpuBackend({0: LAYER}, ResidentDevice(), is_resident=True)


# --- errors -----------------------------------------------------------------------------------


class Refusing(ResidentDevice):
    """Launches of the resident kernel are refused for as long as `refuses` says."""

    refuses = False

    def do(self, command: Callable[..., None], *arguments: Any) -> None:
        """As `ResidentDevice.do`."""
        if self.refuses and getattr(arguments[0], "name", "") == "resident":
            raise DeviceError("the launch is refused")
        super().do(command, *arguments)


@pytest.mark.parametrize("n_calls", [0, 3])
def test_a_launch_that_fails_is_that_calls_error(
    monkeypatch: pytest.MonkeyPatch, n_calls: int
) -> None:
    """The first, and one after the kernel had ended by itself."""
    monkeypatch.setattr(resident, "IDLE_NS", 0)
    device = Refusing()
    with serving(device=device) as served:
        for seed in range(n_calls):
            served.call(seed)
        device.wait()
        device.refuses = True
        for _ in range(20):
            with pytest.raises(DeviceError, match="the launch is refused"):
                served.call(5)
        served.call(5, MANY)
        device.refuses = False
        for seed in range(3):
            served.call(seed)
        assert served.resident.n_calls == n_calls + 3


@each_kind
def test_what_was_not_begun_is_never_computed(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Its slab is its client's again."""
    monkeypatch.setattr(resident, "IDLE_NS", 0)
    device = Refusing()
    with serving(device=device) as served, engine(served.backend, kind) as slab:
        inputs = draw(1, LAYER, 1)
        for _ in range(2):
            finish(slab, begin(slab, inputs), inputs)
        device.wait()
        device.refuses = True
        claim = slab.give(*inputs)
        with pytest.raises(DeviceError, match="the launch is refused"):
            slab.slab.enqueue(call_of(claim, *inputs[:2]))
        device.refuses = False
        for seed in range(3):
            served.call(seed)
            after = draw(seed, LAYER, 1)
            later = begin(slab, after)
            memory = slab.segment.memory
            assert wait_for_word(memory, later.flag(DONE), later.sequence, PATIENCE_NS, 0)
        assert slab.read(claim.places.out, inputs[0].nbytes) == b"\xff" * inputs[0].nbytes
        assert (slab.flag(claim, DONE), slab.flag(claim, REFUSED)) == (0, 0)


class Dead(ResidentDevice):
    """Resident kernels never begin; then the device is lost."""

    is_lost = False

    def do(self, command: Callable[..., None], *arguments: Any) -> None:
        """As `ResidentDevice.do`."""
        if getattr(arguments[0], "name", "") == "resident":
            self.is_lost = True
        else:
            super().do(command, *arguments)

    def check(self) -> None:
        """As `Device.check`."""
        if self.is_lost:
            raise DeviceLost("simt is lost")


def test_a_device_that_is_lost_while_a_call_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call ends, and so does every one that comes."""
    monkeypatch.setattr(resident, "_SLICE_NS", 1000)
    served = Served({0: LAYER}, Dead())
    for n_tokens in (1, 1, 2, 1):
        with pytest.raises(DeviceLost, match="simt is lost"):
            served.call(1, n_tokens)


def test_a_device_that_is_lost_while_the_mailbox_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_SLICE_NS", 1000)
    device = Dead()
    served = Served({0: LAYER}, device)
    made = Engine(served.backend, "device")
    for seed in range(16):
        begin(made, draw(seed, LAYER, 1))
    with pytest.raises(DeviceLost, match="simt is lost"):
        begin(made, draw(16, LAYER, 1))
    with pytest.raises(DeviceLost, match="simt is lost"):
        served.call(1)
    # Else the log has an error, which has this function's variables.
    device.is_lost = False
    made.slab.close()


def test_a_call_that_is_interrupted_leaves_nothing_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by Ctrl-C: what it was to read and write is the caller's again."""
    monkeypatch.setattr(resident, "IDLE_NS", 1_000_000)
    with serving() as served:
        served.call(0)

        def interrupt(*_how: Any) -> bool:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(resident, "wait_for_word", interrupt)
            with pytest.raises(KeyboardInterrupt):
                served.call(1)
        assert served.device.__dict__["_kernel"] is None
        for seed in range(3):
            served.call(seed)


# --- what the host and the kernel say to each other -------------------------------------------


class Played:
    """A resident kernel that the host plays, by what it writes into the mailbox."""

    def __init__(self) -> None:
        self.launches: list[int] = []
        device = IdleDevice()
        device.on_launch = lambda _name, first: self.launches.append(first.launch)
        self.resident = Resident(device, Kernels(device, {}))
        self.shape = Shape.of(LAYER.info, False)
        self.other = Shape.of(OTHER.info, False)
        self._command = Command()

    def begin(self, shape: Shape | None = None) -> int:
        """A call, of the first shape unless another is given."""
        return self.resident.begin(shape or self.shape, ctypes.addressof(self._command))

    def say(self, *, finished: int | None = None, ended: int | None = None) -> None:
        """The kernel does."""
        memory = self.resident._memory.array
        if finished is not None:
            store_word(memory, FINISHED, finished)
        if ended is not None:
            store_word(memory, ENDED, ended)

    @property
    def commands(self) -> list[str]:
        """All that are in the mailbox, the oldest first: calls, and which kernel is to stop."""
        words: npt.NDArray[np.uint32] = self.resident._memory.array[: 16 * 1024].view(np.uint32)
        found = []
        for number in range(1, self.resident._mailbox.n_posted + 1):
            letter = words.reshape(16, 128, 2)[number % 16, :, 0]
            command = Command.from_buffer_copy(letter.tobytes())
            assert command.number == number
            found.append(f"stop {command.launch}" if command.what else "call")
        return found


def test_a_kernel_is_launched_before_its_first_command_and_once() -> None:
    played = Played()
    assert played.begin() == 1
    assert played.launches == [1]
    assert played.begin() == 2
    assert played.launches == [1]
    assert played.commands == ["call", "call"]


def test_one_that_has_ended_is_followed_by_another() -> None:
    played = Played()
    played.begin()
    played.say(finished=1, ended=1)
    played.begin()
    assert played.launches == [1, 2]
    played.begin()
    assert played.launches == [1, 2]
    assert played.commands == ["call"] * 3


def test_a_stop_is_for_all_that_were_launched() -> None:
    """Also where a kernel said that it ends, and went on for a command that it found then."""
    played = Played()
    played.begin()
    played.say(finished=1, ended=1)
    played.begin()
    played.say(ended=0)
    played.resident.yield_device()
    played.resident.yield_device()
    assert played.commands == ["call", "call", "stop 2"]
    played.begin()
    assert played.launches == [1, 2, 3]


def test_a_kernel_that_has_ended_is_not_told_to() -> None:
    played = Played()
    played.begin()
    played.say(finished=1, ended=1)
    played.resident.yield_device()
    assert played.commands == ["call"]
    played.begin()
    assert played.launches == [1, 2]


def test_a_kernel_that_may_find_a_last_command_is_told_to_end() -> None:
    """It says that it ends before its last look. One of another shape that took its place without
    a word would have its commands computed by the wrong kernel."""
    played = Played()
    played.begin()
    played.say(ended=1)
    played.begin(played.other)
    assert played.commands == ["call", "stop 1", "call"]
    assert played.launches == [1, 2]


def test_a_stop_waits_for_room_in_the_mailbox() -> None:
    played = Played()
    for _ in range(16):
        played.begin()
    is_told = threading.Event()

    def stop() -> None:
        played.resident.yield_device()
        is_told.set()

    with meanwhile(stop):
        assert load_word(played.resident._memory.array, FINISHED) == 0
        assert not is_told.is_set()
        played.say(finished=8)
        assert is_told.wait(30)
    assert played.resident._mailbox.n_posted == 17


def test_waiting_for_all_is_for_calls() -> None:
    """Kernels say nothing of what they were told to stop by."""
    played = Played()
    assert not played.resident.wait_for_all()
    played.begin()
    played.resident.yield_device()
    assert not played.resident.wait_for_all()
    with pytest.MonkeyPatch.context() as patch:
        # The call does not get as far as the mailbox.
        patch.setattr(played.resident, "_mailbox", Interrupted(played.resident._mailbox))
        with pytest.raises(KeyboardInterrupt):
            played.begin()
    played.say(finished=1)
    assert played.resident.wait_for_all()


class Interrupted:
    """A mailbox whose caller presses Ctrl-C."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mailbox, name)

    def post(self, _address: int) -> int | None:
        """Not at all."""
        raise KeyboardInterrupt


def test_starting_over_forgets_what_is_in_the_mailbox() -> None:
    played = Played()
    played.begin()
    played.begin()
    played.resident.start_over()
    assert played.commands == []
    assert played.begin() == 1
    # Numbers of kernels go on: those that end late must not be taken for this one.
    assert played.launches == [1, 2]
