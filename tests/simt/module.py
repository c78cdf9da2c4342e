"""Compiles kernels for the host and launches them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from moeshm.backends.gpu.abi import Route
from moeshm.kernels import source

from . import memory

#: Which thread and block runs first; a number is the seed of a random order.
Order = Literal["forward", "reverse"] | int

_FOLDER = Path(__file__).parent
# What undefined behaviour traps: a GPU does not forgive alignment either.
_FLAGS = (
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-fno-exceptions", "-fno-strict-aliasing", "-ffp-contract=off", "-U_FORTIFY_SOURCE"),
)
# Locals start as huge numbers, not as the zeros that they happen to find; who needs too much stack
# meets the inaccessible page below it, however big the step.
_KERNEL_FLAGS = (
    *("-ftrivial-auto-var-init=pattern", "-fstack-clash-protection"),
    *("-DMOESHM_SIMT", "-DSIMT_MODULE", "-include", "simt.h", "-include", "launch.h"),
    *("-fsanitize=alignment,bounds-strict", "-fsanitize-undefined-trap-on-error"),
)
#: Its name and the types of its arguments; KERNEL is what probes.cu writes for the words before.
_KERNEL = re.compile(
    r'^(?:extern "C" __global__ void|KERNEL)\b(?:\s+__launch_bounds__\([^;{]*?\))?'
    r"\s+(\w+)\((\w+)[^,)]*,\s*(\w+)[^,)]*\)",
    re.MULTILINE,
)
#: Of a layer's shape, what changes nothing in a file, with what is compiled instead: so that it is
#: compiled once for all shapes. tests/unit/test_simt_compiling.py compares what comes of it.
UNUSED: Mapping[str, Mapping[str, object]] = {
    "combine.cu": {"INNER": 64, "ACTIVATION": 0, "HAS_BIAS": 0},
    "route.cu": {"WEIGHT": "float", "HIDDEN": 8, "INNER": 64, "ACTIVATION": 0, "HAS_BIAS": 0},
}
_ERROR_BYTES = 4096
_ORDERS = {"forward": 0, "reverse": 1}
_RANDOM = 2
#: The scheduler's state is the process's.
_lock = threading.Lock()


class KernelError(Exception):
    """A launch did what a GPU forbids, or would wait forever."""


class _Request(ctypes.Structure):
    """`simt_request` of launch.h."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("first_bytes", ctypes.c_uint32),
        ("second_bytes", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("order", ctypes.c_int32),
        ("error_bytes", ctypes.c_uint32),
        ("error", ctypes.c_void_p),
        ("fault_address", ctypes.c_uint64),
        ("fault_code", ctypes.c_uint64),
    )


class Module:
    """Kernels that were compiled together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))

    def launch(
        self,
        kernel: str,
        grid: int | tuple[int, int, int],
        block: int,
        shared: int,
        first: ctypes.Structure,
        second: ctypes.Structure | None = None,
        *,
        order: Order = "forward",
    ) -> None:
        """Run every block of `kernel`, of `block` threads and `shared` bytes of dynamic memory.

        `first` and `second`, an empty `Route` if it is None, are its arguments.
        KernelError where the kernel reaches for memory that is not there or not aligned, or where
        threads wait for others that do not come.
        """
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        second = second or Route()
        request = _Request(
            first=ctypes.addressof(first),
            second=ctypes.addressof(second),
            first_bytes=ctypes.sizeof(first),
            second_bytes=ctypes.sizeof(second),
            grid=(grid, 1, 1) if isinstance(grid, int) else grid,
            block=block,
            shared_bytes=shared,
            seed=order if isinstance(order, int) else 0,
            order=_RANDOM if isinstance(order, int) else _ORDERS[order],
            error_bytes=_ERROR_BYTES,
            error=ctypes.addressof(error),
        )
        with _lock:
            is_done = self._library[f"simt_run_{kernel}"](ctypes.byref(request))
        if not is_done:
            raise KernelError(f"{kernel}, {self._explain(error.value.decode(), request)}")

    def _explain(self, error: str, request: _Request) -> str:
        """The error with lines of the source, and with what is known of an address."""
        source_file = self.path.with_suffix(".cu")
        lines = source_file.read_text().splitlines()
        if request.fault_address:
            address = request.fault_address
            error += f": {address:#x}, {memory.describe(address)}"
        for line in _lines_of(self.path, request.fault_code) if request.fault_code else ():
            error += f", in line {line}"

        def quote(found: re.Match[str]) -> str:
            return f"{found[0]} `{lines[int(found[1]) - 1].strip()}`"

        return re.sub(r"in line (\d+)", quote, error) + f" ({source_file})"


def _lines_of(path: Path, code: int) -> list[int]:
    """The lines of an instruction, from the innermost function that was inlined outwards."""
    if (tool := shutil.which("addr2line")) is None:
        return []
    command = [tool, "-i", "-e", str(path), hex(code)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(line) for line in re.findall(rf"{path.stem}\.cu:(\d+)", text)]


def compile(name: str, macros: Mapping[str, object], warp: int = 32) -> Module:
    """The kernels of `name`, as `decode_mma.cu`, with these macros and `warp` lanes."""
    return compile_text(source(name), {**macros, **UNUSED.get(name, {})}, warp, name=name)


def compile_text(
    text: str, macros: Mapping[str, object], warp: int = 32, *, name: str = "text.cu"
) -> Module:
    """The kernels of a source that includes nothing; each has two structs for arguments."""
    flags = _kernel_flags(macros, warp)
    text = _KERNEL.sub(r"SIMT_KERNEL(\1, \2, \3) \g<0>", text)
    return Module(_build(text, flags, [str(_scheduler(warp))], Path(name).stem))


def assembly(name: str, macros: Mapping[str, object], warp: int = 32) -> str:
    """What becomes of the kernels of `name` with these macros and no other."""
    command = [_find_compiler(), *_kernel_flags(macros, warp), "-x", "c++", "-S", "-", "-o", "-"]
    text = source(name)
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def _kernel_flags(macros: Mapping[str, object], warp: int) -> list[str]:
    flags = [*_FLAGS, *_KERNEL_FLAGS, f"-I{_FOLDER}", f"-DWARP={warp}"]
    return [*flags, *(f"-D{macro}={value}" for macro, value in macros.items())]


@functools.cache
def _scheduler(warp: int) -> Path:
    names = sorted(path.name for path in _FOLDER.glob("*.cpp"))
    text = "".join(f'#include "{name}"\n' for name in names)
    flags = [*_FLAGS, "-O3", "-fvisibility=default", f"-I{_FOLDER}", f"-DWARP={warp}"]
    return _build(text, flags, [], "scheduler")


def _build(text: str, flags: list[str], libraries: list[str], stem: str) -> Path:
    compiler = _find_compiler()
    digest = hashlib.sha256("\0".join((compiler, text, *flags, *libraries, _shim())).encode())
    target = _cache() / f"{stem}-{digest.hexdigest()[:20]}.so"
    if not target.exists():
        # Renamed into place: another process must never load a half-written module.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            written = Path(folder) / target.name
            written.with_suffix(".cu").write_text(text)
            command = [compiler, *flags, "-x", "c++", str(written.with_suffix(".cu")), "-x", "none"]
            command += [*libraries, "-o", str(written)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise KernelError(f"{stem} does not compile: {done.stderr}")
            written.with_suffix(".cu").replace(target.with_suffix(".cu"))
            written.replace(target)
    return target


@functools.cache
def _shim() -> str:
    """The shim's own sources, which every module depends on."""
    names = (path for path in sorted(_FOLDER.iterdir()) if path.suffix in {".h", ".cpp"})
    return "\0".join(path.read_text() for path in names)


@functools.cache
def _find_compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        raise KernelError("no C++ compiler: g++ is not on PATH; apt install g++")
    return compiler


@functools.cache
def _cache() -> Path:
    """Where modules are kept from run to run, with the sources that errors quote; `make clean`
    removes it."""
    folder = _FOLDER.parents[1] / "build" / "simt"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
