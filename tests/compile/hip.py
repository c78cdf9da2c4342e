"""HIP without a card: Debian's hipcc, and clang by itself for cards that are newer than that."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from .compilers import CompileError, CompilerMissing, Macros, wheel_file
from .usage import Usage, of_amdgpu_notes

_CLANG = "clang-19"
_TOOLS = (_CLANG, "ld.lld-19", "llvm-as-19", "llvm-dis-19", "llvm-readelf-19")
#: What CuPy adds by itself (cupy.cuda.compiler).
_CUPY_OPTIONS = ("-fcuda-flush-denormals-to-zero",)
#: The device libraries of Debian are older than these cards, whose instructions they need not know:
#: the libraries ask for the number where they choose between ways to compute.
_NEWER_CARDS = {"942": 9402, "1100": 11000}
_NEAREST, _NEAREST_NUMBER = "90a", 9010


@functools.cache
def find_hipcc() -> Hipcc:
    """Debian's HIP, or another on PATH. Raises CompilerMissing."""
    return Hipcc()


@functools.cache
def find_clang() -> Clang:
    """Clang with the header of a wheel. Raises CompilerMissing."""
    package = "rocm-llvm-python"
    header = wheel_file(package, "hiprtc_runtime.h")
    return Clang(header, f"the device header of {package} {metadata.version(package)}")


class Hipcc:
    """As CuPy's backend "nvcc" on ROCm compiles, with the headers of the HIP that is installed."""

    def __init__(self) -> None:
        """Raises CompilerMissing."""
        _check_tools("hipcc", "llvm-readelf-19")
        text = _run(["hipcc", "--version"])
        hip, clang = (
            match[1] if (match := re.search(pattern, text)) else "?"
            for pattern in (r"HIP version: (\S+)", r"clang version (\S+)")
        )
        self.version = f"hipcc of HIP {hip} (clang {clang})"

    def compile(self, source: str, macros: Macros, arch: str) -> list[Usage]:
        """As Compiler.compile."""
        return _compile(["hipcc", "--genco"], source, macros, arch)


class Clang:
    """As hiprtc compiles, which is CuPy's way on ROCm: a header for devices, and no other."""

    def __init__(self, header: Path, header_name: str) -> None:
        """`header`: hiprtc's own, of which `version` gives the name. Raises CompilerMissing."""
        _check_tools(*_TOOLS)
        self._libraries = _device_libraries()
        self._header = header
        found = re.search(r"clang version (\S+)", _run([_CLANG, "--version"]))
        self.version = f"clang {found[1] if found else '?'} with {header_name}"

    def compile(self, source: str, macros: Macros, arch: str) -> list[Usage]:
        """As Compiler.compile."""
        command = [_CLANG, "-x", "hip", "--offload-device-only", "-nogpuinc", "-O3"]
        command += [f"--rocm-device-lib-path={self._libraries.name}"]
        command += ["-D__HIPCC_RTC__", "-D__HIP_PLATFORM_AMD__", "-include", str(self._header)]
        return _compile(command, source, macros, arch)


def _compile(command: Sequence[str], source: str, macros: Macros, arch: str) -> list[Usage]:
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder, "kern.cpp"), Path(folder, "kern.hsaco")
        path.write_text(source)
        defines = [f"-D{name}={value}" for name, value in macros.items()]
        options = ["-std=c++17", "-Werror", f"--offload-arch={arch}", "--no-gpu-bundle-output"]
        _run([*command, *options, *_CUPY_OPTIONS, *defines, str(path), "-o", str(output)])
        return of_amdgpu_notes(_run(["llvm-readelf-19", "--notes", str(output)]))


def _device_libraries() -> tempfile.TemporaryDirectory[str]:
    """A folder with Debian's device libraries, and what they lack of the newer cards."""
    found = sorted(Path("/usr/lib").glob("*/amdgcn/bitcode"))
    if not found:
        raise CompilerMissing("no AMD device libraries; tools/install_compilers.sh brings them")
    folder = tempfile.TemporaryDirectory()
    for library in found[0].iterdir():
        Path(folder.name, library.name).symlink_to(library)
    text = _run(["llvm-dis-19", str(found[0] / f"oclc_isa_version_{_NEAREST}.bc"), "-o", "-"])
    for name, number in _NEWER_CARDS.items():
        target = Path(folder.name, f"oclc_isa_version_{name}.bc")
        if not target.exists():
            changed = text.replace(f"i32 {_NEAREST_NUMBER}", f"i32 {number}")
            _run(["llvm-as-19", "-o", str(target)], changed)
    return folder


def _check_tools(*names: str) -> None:
    missing = [name for name in names if not shutil.which(name)]
    if missing:
        raise CompilerMissing(f"no {', '.join(missing)}; tools/install_compilers.sh brings it")


def _run(command: Sequence[str], text: str = "") -> str:
    """What it prints. Raises CompileError."""
    # hipcc would take a CUDA toolkit's nvcc for the compiler that is meant.
    environment = {**os.environ, "HIP_PLATFORM": "amd"}
    result = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, env=environment
    )
    if result.returncode:
        raise CompileError(f"{command[0]} failed:\n{result.stdout}{result.stderr}")
    return result.stdout
