"""The checks of ways between GPUs and the host, with GPUs that are made up."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from moeshm.backends.gpu import cupy_device
from moeshm.backends.gpu.device import Registration
from moeshm.diagnosis import gpu_paths
from moeshm.diagnosis.finding import Finding
from moeshm.errors import DeviceError
from tests.engine_gpu import PATIENCE_S, Stream
from tests.simt.device import SimtDevice

#: As much as the shim's allocations are to be of, for others to open them.
LARGE_BYTES = 2 << 20
RATE = r"\d+\.\d GB/s"
SMALL = r"\d+\.\d µs for 4 KiB"
COPIES = f"pinned slabs: {RATE} in, {RATE} out, {SMALL}"
WORKS = f"{COPIES}; stream waits work"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_paths, "_LARGE_BYTES", LARGE_BYTES)


# --- a GPU and the host ----------------------------------------------------------------------


class Card(SimtDevice):
    """A GPU whose stream runs by itself; what is in `refused` is not enqueued."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = Stream()
        self.refused: set[str] = set()

    def do(self, command: Callable[..., None], *arguments: Any) -> None:
        """On its stream, or at once on the default one, which nothing is waited for on."""
        if command.__name__ in self.refused:
            raise DeviceError(f"no {command.__name__} here")
        if self.used_streams[-1] is not None:
            command(*arguments)
        else:
            self.stream.do(lambda: command(*arguments))

    def wait(self) -> None:
        """As `Device.wait`."""
        self.stream.synchronize()

    def wait_value(self, address: int, value: int) -> None:
        """Until it is there."""
        word, stop = ctypes.c_uint32.from_address(address), threading.Event()
        for _ in range(int(PATIENCE_S * 1e4)):
            if not self.registered:
                raise DeviceError("waits for memory that is gone")
            if word.value >= value:
                return
            stop.wait(1e-4)
        raise DeviceError("waits for ever")


class Deaf(Card):
    """Its stream sees no flag that the host sets, but those of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._has_written: dict[int, threading.Event] = {}

    def wait_value(self, address: int, value: int) -> None:  # noqa: ARG002
        """Until the GPU itself wrote there."""
        assert self._event(address).wait(PATIENCE_S)

    def write_value(self, address: int, value: int) -> None:
        """Enqueued by a command list."""
        super().write_value(address, value)
        self._event(address).set()

    def _event(self, address: int) -> threading.Event:
        return self._has_written.setdefault(address, threading.Event())


Check = Callable[[Card], Finding]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[Check]:
    """Checks a card, which then holds nothing and has nothing to do."""
    cards: list[Card] = []

    def check(card: Card) -> Finding:
        cards.append(card)
        monkeypatch.setattr(cupy_device, "open_device", lambda _name: card)
        return gpu_paths.check_host_path("cuda:3")

    yield check
    for card in cards:
        card.stream.close()
        assert not card.registered
        assert card.device_bytes == 0


def assert_degraded(finding: Finding, value: str) -> None:
    assert finding.status == "degraded"
    assert re.fullmatch(value, finding.value), finding.value
    assert "pass arrays in the host's memory" in finding.remedy


def test_a_gpu_that_can_use_slabs(check: Check) -> None:
    finding = check(Card())
    assert (finding.name, finding.status) == ("cuda:3-host", "ok")
    assert re.fullmatch(WORKS, finding.value)


def test_no_gpu_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise DeviceError(f"{name} is gone")

    monkeypatch.setattr(cupy_device, "open_device", fail)
    assert_degraded(
        gpu_paths.check_host_path("cuda:3"), r"no slabs \(DeviceError: cuda:3 is gone\)"
    )


def test_memory_that_is_not_registered(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Registration:
        raise DeviceError("not supported")

    card = Card()
    monkeypatch.setattr(card, "register", refuse)
    assert_degraded(check(card), r"no slabs \(DeviceError: not supported\)")


def test_a_full_gpu_still_shows_that_its_streams_wait(check: Check) -> None:
    card = Card()
    card.features = card.features._replace(total_bytes=LARGE_BYTES - 1)
    assert_degraded(
        check(card),
        r"stream waits work; pinned slabs do not work \(OutOfDeviceMemory: .*\)",
    )


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_copy_that_is_refused(check: Check, direction: str) -> None:
    card = Card()
    card.refused = {f"copy_{direction}"}
    assert_degraded(
        check(card),
        rf"stream waits work; pinned slabs do not work \(DeviceError: no copy_{direction} here\)",
    )


@pytest.mark.parametrize("direction", ["in", "out"])
def test_bytes_that_do_not_arrive(
    check: Check, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    card = Card()

    def skip(*_: int) -> None:
        pass

    monkeypatch.setattr(card, f"copy_{direction}", skip)
    assert "1048576 bytes did not arrive as they were sent" in check(card).value


@pytest.mark.parametrize("command", ["write_value", "wait_value"])
def test_flags_that_are_refused(check: Check, command: str) -> None:
    """Nothing waits behind what was refused."""
    card = Card()
    card.refused = {command}
    assert_degraded(
        check(card), rf"{COPIES}; stream waits do not work \(DeviceError: no {command} here\)"
    )


def test_a_flag_that_is_not_set(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def skip(*_: int) -> None:
        pass

    card = Card()
    monkeypatch.setattr(card, "write_value", skip)
    assert "(DeviceError: a stream did not set a flag)" in check(card).value


def test_a_stream_that_does_not_wait(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def skip(*_: int) -> None:
        pass

    card = Card()
    monkeypatch.setattr(card, "wait_value", skip)
    # However slow this machine is.
    monkeypatch.setattr(gpu_paths, "_HELD_NS", int(PATIENCE_S * 1e9))
    assert "(DeviceError: a stream did not wait for a flag)" in check(card).value


def test_a_stream_that_does_not_see_the_host_is_let_go(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_paths, "_RELEASED_NS", 1)
    assert_degraded(
        check(Deaf()),
        rf"{COPIES}; stream waits do not work "
        r"\(DeviceError: a stream did not see a flag that the host had set\)",
    )


# --- two GPUs --------------------------------------------------------------------------------


class CudaError(RuntimeError):
    """Stands for CuPy's CUDARuntimeError."""


class Gpus:
    """The calls of cupy.cuda.runtime that are made for pairs; their memory is the host's.

    `refused`: calls that raise. `apart`: pairs of which the first has no access to the second.
    """

    memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = 1, 2, 3

    def __init__(self, *, is_hip: bool = False) -> None:
        self.is_hip = is_hip
        self.device = 0
        self.apart: set[tuple[int, int]] = set()
        self.refused: dict[str, str] = {}
        #: By address: whose memory it is.
        self.owners: dict[int, int] = {}
        self.peers: set[tuple[int, int]] = set()
        #: Whether copies between devices do anything.
        self.copies = True
        self._memory: dict[int, Any] = {}

    def getDevice(self) -> int:
        return self.device

    def setDevice(self, index: int) -> None:
        self.device = index

    def deviceSynchronize(self) -> None:
        pass

    def deviceCanAccessPeer(self, mine: int, theirs: int) -> int:
        return int((mine, theirs) not in self.apart)

    def deviceEnablePeerAccess(self, other: int) -> None:
        self._refuse("deviceEnablePeerAccess")
        if (self.device, other) in self.peers:
            raise CudaError("cudaErrorPeerAccessAlreadyEnabled: peer access is already enabled")
        self.peers.add((self.device, other))

    def deviceDisablePeerAccess(self, other: int) -> None:
        self.peers.remove((self.device, other))

    def malloc(self, n_bytes: int) -> int:
        self._refuse("malloc")
        memory = ctypes.create_string_buffer(n_bytes)
        address = ctypes.addressof(memory)
        self._memory[address] = memory
        self.owners[address] = self.device
        return address

    def free(self, address: int) -> None:
        del self._memory[address], self.owners[address]

    def ipcGetMemHandle(self, address: int) -> bytes:
        self._refuse("ipcGetMemHandle")
        assert self.owners[address] == self.device
        return b""

    def memcpy(self, to: int, source: int, n_bytes: int, kind: int) -> None:
        assert (to in self.owners, source in self.owners) == (kind == 1, kind == 2)
        ctypes.memmove(to, source, n_bytes)

    def memcpyAsync(self, to: int, source: int, n_bytes: int, kind: int, stream: int) -> None:
        assert (kind, stream) == (self.memcpyDeviceToDevice, 0)
        for owner in (self.owners[to], self.owners[source]):
            assert owner == self.device or (self.device, owner) in self.peers
        if self.copies:
            ctypes.memmove(to, source, n_bytes)

    def streamSynchronize(self, stream: int) -> None:
        assert stream == 0

    def _refuse(self, call: str) -> None:
        if call in self.refused:
            raise CudaError(self.refused[call])


def check_pair(gpus: Gpus, first: int = 0, second: int = 1) -> Finding:
    """Nothing is left behind."""
    peers = set(gpus.peers)
    vendor = "hip" if gpus.is_hip else "cuda"
    finding = gpu_paths.check_pair(gpus, [f"{vendor}:0", f"{vendor}:1"], first, second)
    assert gpus.owners == {}
    assert gpus.peers == peers
    return finding


def test_two_gpus_that_reach_each_other() -> None:
    finding = check_pair(Gpus())
    assert (finding.name, finding.status) == ("cuda:0-cuda:1", "ok")
    pattern = f"device slabs: {RATE} to cuda:1, {RATE} from there, {SMALL}"
    assert re.fullmatch(pattern, finding.value), finding.value


def test_one_gpu_by_itself() -> None:
    gpus = Gpus()
    gpus.apart = {(0, 0), (1, 1)}  # there is no peer to ask for
    finding = check_pair(gpus, 1, 1)
    assert (finding.name, finding.status) == ("cuda:1-cuda:1", "ok")
    pattern = f"device slabs: {RATE}, {SMALL}; an engine and a worker on one GPU take turns"
    assert re.fullmatch(pattern, finding.value), finding.value


@pytest.mark.parametrize("is_hip", [False, True])
@pytest.mark.parametrize(("mine", "theirs"), [(0, 1), (1, 0)])
def test_no_peer_access(mine: int, theirs: int, is_hip: bool) -> None:
    gpus = Gpus(is_hip=is_hip)
    gpus.apart = {(mine, theirs)}
    finding = check_pair(gpus)
    vendor, tool = ("hip", "rocm-smi") if is_hip else ("cuda", "nvidia-smi")
    assert finding.status == "degraded"
    assert finding.value == (
        f"no device slabs: {vendor}:{mine} has no peer access to {vendor}:{theirs}; "
        "arrays go through the host's memory"
    )
    assert "transport auto takes pinned slabs" in finding.remedy
    assert tool in finding.remedy


@pytest.mark.parametrize("call", ["malloc", "ipcGetMemHandle", "deviceEnablePeerAccess"])
def test_a_call_that_is_refused(call: str) -> None:
    gpus = Gpus()
    gpus.refused[call] = f"cudaErrorUnknown: {call}"
    finding = check_pair(gpus)
    assert finding.status == "degraded"
    assert finding.value.startswith(f"no device slabs (CudaError: cudaErrorUnknown: {call})")
    assert finding.remedy


def test_peer_access_that_others_enabled_stays() -> None:
    gpus = Gpus()
    gpus.peers = {(0, 1)}
    assert check_pair(gpus).status == "ok"


def test_bytes_that_do_not_arrive_at_the_other_gpu() -> None:
    gpus = Gpus()
    gpus.copies = False
    finding = check_pair(gpus)
    assert finding.status == "degraded"
    assert "1048576 bytes did not arrive as they were sent" in finding.value


# --- all of them -----------------------------------------------------------------------------


def test_every_way_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(name: str) -> Finding:
        gpus.setDevice(int(name[-1]))
        return Finding(f"{name}-host", "ok", "works")

    gpus = Gpus()
    gpus.setDevice(1)
    monkeypatch.setattr(gpu_paths, "check_host_path", check)
    found = gpu_paths.check_paths(gpus, ["cuda:0", "cuda:1", "cuda:2"])
    assert [finding.name for finding in found] == [
        "cuda:0-host",
        "cuda:1-host",
        "cuda:2-host",
        "cuda:0-cuda:0",
        "cuda:0-cuda:1",
        "cuda:0-cuda:2",
        "cuda:1-cuda:1",
        "cuda:1-cuda:2",
        "cuda:2-cuda:2",
    ]
    assert {finding.status for finding in found} == {"ok"}
    assert gpus.getDevice() == 1
