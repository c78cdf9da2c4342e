"""What fails around the kernel that stays on a GPU; and what the host and it say to each other."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moeshm._words import load_word, store_word, wait_for_word
from moeshm.backends.gpu import resident
from moeshm.backends.gpu._mailbox import ENDED, FINISHED, Mailbox
from moeshm.backends.gpu.abi import Command
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.gpu.choice import Shape
from moeshm.backends.gpu.compiled import Kernels
from moeshm.backends.gpu.resident import Resident
from moeshm.backends.reference import reference_ffn
from moeshm.dtypes import DType
from moeshm.errors import DeviceError, DeviceLost
from moeshm.transport.slab import DONE, REFUSED
from tests.checkpoints import random_layer
from tests.conformance.test_backends import assert_close, compute, draw_call
from tests.simt.device import IdleDevice
from tests.simt.resident_device import ResidentDevice
from tests.steps import NeverDue
from tests.wire import meanwhile

from .gpu_residents import (
    LAYER,
    MANY,
    OTHER,
    PATIENCE_NS,
    Others,
    Served,
    alone,
    begin,
    draw,
    finish,
    serving,
)
from .gpu_slabs import Engine, call_of, each_kind, engine


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> Others:
    """None at first; and kernels stay until they are told to end."""
    return alone(monkeypatch)


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
            slab.slab.enqueue(call_of(claim, *inputs[:2]), NeverDue())
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


def test_a_kernel_that_has_ended_is_told_to_all_the_same() -> None:
    """It looks once more after it has said so."""
    played = Played()
    played.begin()
    played.say(finished=1, ended=1)
    played.resident.yield_device()
    assert played.commands == ["call", "stop 1"]
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


# --- what is not for it -----------------------------------------------------------------------


def test_a_call_that_finds_others_is_the_last_of_its_kind(others: Others) -> None:
    """Also where it is the first of its kind, which is noted for those that follow."""
    with serving({0: LAYER}) as served:
        others.n = 1
        served.call(1)
        assert served.resident.why_not
        counts = served.counts
        for seed in range(2, 7):
            served.call(seed)
        assert served.counts == counts
        assert served.backend.resident_stats == (*counts, "1 other processes use simt")


@pytest.mark.parametrize("cause", ["float32 weights", "MOESHM_KERNELS"])
def test_layers_that_it_cannot_take(caplog: pytest.LogCaptureFixture, cause: str) -> None:
    """Nothing is compiled for them, and their calls are launched."""
    is_f32 = cause == "float32 weights"
    weight_dtype = DType.F32 if is_f32 else DType.BF16
    layer = random_layer(1, hidden_size=64, weight_dtype=weight_dtype)
    device = ResidentDevice()
    kernels = {} if is_f32 else {"decode": "fma"}
    backend = GpuBackend({0: layer}, device, kernels, is_resident=True)
    with caplog.at_level(logging.WARNING):
        backend.warm_up()
    assert "takes no calls of layers of 64 x" in caplog.text
    assert "decode_fma.cu" in caplog.text
    assert "resident.cu" not in device.compiled
    call = draw_call(1, layer, 1, 2)
    assert_close(compute(backend, *call, DType.F32), reference_ffn(layer, *call), 1e-5)
    assert backend._resident is not None
    assert backend._resident.n_calls == 0
