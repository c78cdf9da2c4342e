"""The GPU checks, with a runtime like CuPy's and with a driver's files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from moeshm.backends.gpu import driver
from moeshm.diagnosis import gpu_paths, gpus
from moeshm.diagnosis.finding import Finding

GIB = 1 << 30


class CudaError(RuntimeError):
    """Stands for CuPy's CUDARuntimeError."""


class FakeRuntime:
    """The calls of cupy.cuda.runtime that the checks make; `refused` ones raise, as stubs do."""

    CUDARuntimeError = CudaError
    eventInterprocess = 4
    eventDisableTiming = 2

    def __init__(self, *, count: int = 1, is_hip: bool = False, refused: tuple[str, ...] = ()):
        self.count = count
        self.is_hip = is_hip
        self.refused = refused
        self.device = 0
        self.held: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Every call that takes or gives something back: balanced ones leave `held` empty."""
        pairs = {"free": "malloc", "eventDestroy": "eventCreateWithFlags"}

        def call(*_: int) -> int:
            if name in self.refused:
                raise CudaError(f"hipErrorUnknown: {name}")
            if name in pairs:
                self.held.remove(pairs[name])
            elif name in pairs.values():
                self.held.append(name)
            return 1

        return call

    def getDeviceCount(self) -> int:
        if self.count < 0:
            raise CudaError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return self.count

    def getDevice(self) -> int:
        return self.device

    def setDevice(self, index: int) -> None:
        self.device = index

    def getDeviceProperties(self, index: int) -> dict[str, Any]:
        if self.is_hip:
            name, arch = b"AMD Instinct MI300X", b"gfx942:sramecc+:xnack-"
            return {"name": name, "gcnArchName": arch, "totalGlobalMem": 192 * GIB}
        name = f"NVIDIA H100 {index}".encode()
        return {"name": name, "major": 9, "minor": 0, "totalGlobalMem": 80 * GIB}

    def runtimeGetVersion(self) -> int:
        return 70_051_831 if self.is_hip else 13_020

    def driverGetVersion(self) -> int:
        return 4 if self.is_hip else 13_000


class FakeDriver:
    """Registers memory of up to `most_bytes`, and none that is read-only unless it is told to."""

    most_bytes = 1 << 30
    takes_read_only = True
    held: ClassVar[list[int]] = []

    def register(self, address: int, nbytes: int, *, read_only: bool) -> int:
        if nbytes > self.most_bytes:
            raise CudaError("cudaErrorInvalidValue: invalid argument")
        if read_only and not self.takes_read_only:
            raise CudaError("cudaErrorNotSupported: operation not supported")
        self.held.append(address)
        return address

    def unregister(self, address: int) -> None:
        self.held.remove(address)


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeDriver]]:
    """The driver that there is; at the end it holds nothing."""

    class Fresh(FakeDriver):
        held: ClassVar[list[int]] = []

    monkeypatch.setattr(driver, "Driver", Fresh)
    yield Fresh
    assert Fresh.held == []


@pytest.fixture(autouse=True)
def paths(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """What is found of the ways between GPUs: nothing, until a test adds something."""
    found: list[Finding] = []

    def check(_runtime: Any, names: list[str]) -> list[Finding]:
        return [each for each in found if each.name.partition("-")[0] in names]

    monkeypatch.setattr(gpu_paths, "check_paths", check)
    return found


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeRuntime], FakeRuntime]:
    def install(runtime: FakeRuntime) -> FakeRuntime:
        cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
        cuda.runtime = runtime  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
        return runtime

    return install


Pretend = Callable[[FakeRuntime], FakeRuntime]


def test_each_cuda_device_has_a_line(pretend: Pretend) -> None:
    runtime = pretend(FakeRuntime(count=2))
    first, second = gpus.check_gpus()
    assert (first.name, second.name) == ("cuda:0", "cuda:1")
    assert first == Finding(
        "cuda:0",
        "ok",
        "NVIDIA H100 0, sm_90, 80.0 GiB, CUDA 13.2 (the driver's: 13.0); "
        "IPC memory, IPC events, rings it reads, rings it writes work",
    )
    assert runtime.held == []
    assert runtime.device == 0


def test_ways_between_gpus_follow_the_gpus(pretend: Pretend, paths: list[Finding]) -> None:
    pretend(FakeRuntime(count=2))
    paths += [Finding("cuda:0-cuda:1", "ok", "fast"), Finding("cuda:2-host", "ok", "slow")]
    assert [found.name for found in gpus.check_gpus()] == ["cuda:0", "cuda:1", "cuda:0-cuda:1"]


def test_a_ring_that_is_taken_by_halves(pretend: Pretend, card: type[FakeDriver]) -> None:
    """The data area for 2 MiB, and a page, once."""
    pretend(FakeRuntime())
    card.most_bytes = (2 << 20) + 4096
    assert gpus.check_gpus()[0].status == "ok"


def test_rings_that_cannot_be_registered(pretend: Pretend, card: type[FakeDriver]) -> None:
    pretend(FakeRuntime())
    card.takes_read_only = False
    (finding,) = gpus.check_gpus()
    assert finding.status == "degraded"
    assert finding.value.endswith(
        "IPC memory, IPC events, rings it writes work; do not work: rings it reads "
        "(CudaError: cudaErrorNotSupported: operation not supported)"
    )
    card.most_bytes = 0
    assert "rings it writes (CudaError: cudaErrorInvalid" in gpus.check_gpus()[0].value


def test_a_driver_that_is_not_there(pretend: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    pretend(FakeRuntime())
    monkeypatch.setattr(driver, "Driver", fail)
    assert "rings it reads (OSError: libcuda.so.1: cannot open" in gpus.check_gpus()[0].value


def test_rocm_names_what_its_cupy_lacks(pretend: Pretend) -> None:
    runtime = pretend(FakeRuntime(is_hip=True, refused=("ipcGetEventHandle",)))
    (finding,) = gpus.check_gpus()
    assert (finding.name, finding.status) == ("hip:0", "degraded")
    assert finding.value.startswith("AMD Instinct MI300X, gfx942, 192.0 GiB, HIP 7.0; IPC memory")
    assert "IPC events (CudaError: hipErrorUnknown: ipcGetEventHandle)" in finding.value
    assert "mallocAsync" in finding.value
    assert finding.remedy
    assert runtime.held == []  # what was made before the refusal was given back


@pytest.mark.parametrize("count", [0, -1])
def test_cupy_without_a_gpu(pretend: Pretend, count: int) -> None:
    pretend(FakeRuntime(count=count))
    (finding,) = gpus.check_gpus()
    assert (finding.name, finding.status) == ("gpu", "missing")


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A root folder in which the driver's files are looked for; no CuPy, no nvidia-smi."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    monkeypatch.setattr(gpus, "Path", lambda path: tmp_path / path.lstrip("/"))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_no_cupy_and_no_gpu(hardware: Path) -> None:
    assert list(hardware.iterdir()) == []
    (finding,) = gpus.check_gpus()
    assert (finding.status, finding.value) == ("missing", "none found")


def test_an_nvidia_gpu_without_cupy(hardware: Path) -> None:
    folder = hardware / "proc/driver/nvidia/gpus/0000:00:06.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 11\n")
    (finding,) = gpus.check_gpus()
    assert (finding.name, finding.status) == ("gpu", "degraded")
    assert finding.value.startswith("NVIDIA H100 80GB HBM3 is here but CuPy is not")
    assert "pip install 'moeshm[cuda13]'" in finding.remedy


def test_nvidia_smi_without_cupy(hardware: Path) -> None:
    (hardware / "nvidia-smi").touch(mode=0o755)
    assert "moeshm[cuda13]" in gpus.check_gpus()[0].remedy


def test_an_amd_gpu_without_cupy(hardware: Path) -> None:
    (hardware / "dev").mkdir()
    (hardware / "dev" / "kfd").touch()
    (finding,) = gpus.check_gpus()
    assert (finding.name, finding.status) == ("gpu", "degraded")
    assert "pip install 'moeshm[rocm]'" in finding.remedy
