"""NVRTC without CuPy, which needs a driver: as CuPy calls it, with no header of CUDA's."""

from __future__ import annotations

import ctypes
import functools
from importlib import metadata
from pathlib import Path

from .compilers import CompileError, Macros, wheel_file
from .usage import Usage, of_ptxas_log

#: What CuPy adds by itself (cupy.cuda.compiler), but for the architecture.
_CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
_REPORT_OPTIONS = (
    "--ptxas-options=-v",
    # A header's functions are not all used.
    "-diag-suppress=177",
)
#: The second is ptxas's, of wgmma that does not run ahead.
_COMPLAINTS = ("warning", "Performance Loss")
#: Said of sm_61, for which this compiler is still the one to use.
_OLD_CARD = "warning: Architectures prior to '<compute/sm>_75' are deprecated"


@functools.cache
def find_nvrtc(package: str, major: int) -> Nvrtc:
    """The library of a wheel. Raises CompilerMissing."""
    return Nvrtc(wheel_file(package, f"libnvrtc.so.{major}"), f"NVRTC {metadata.version(package)}")


class Nvrtc:
    """One library; several of different versions can be loaded."""

    def __init__(self, library: Path, version: str) -> None:
        """Load `library`. `version`: of the wheel that it is from."""
        self._library = ctypes.CDLL(str(library))
        self.version = version

    def compile(self, source: str, macros: Macros, arch: str) -> list[Usage]:
        """As Compiler.compile; threads compile side by side, ctypes lets go of the GIL."""
        program = ctypes.c_void_p()
        self._call(
            "CreateProgram", ctypes.byref(program), source.encode(), b"kern.cu", 0, None, None
        )
        try:
            defines = [f"-D{name}={value}" for name, value in macros.items()]
            arch_option = f"--gpu-architecture={arch}"
            options = ["-std=c++17", arch_option, *defines, *_CUPY_OPTIONS, *_REPORT_OPTIONS]
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            result = self._library.nvrtcCompileProgram(program, len(options), array)
            log = self._log(program)
        finally:
            self._call("DestroyProgram", ctypes.byref(program))
        said = log.replace(_OLD_CARD, "")
        if result or any(complaint in said for complaint in _COMPLAINTS):
            raise CompileError(log)
        return of_ptxas_log(log)

    def _log(self, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self._call("GetProgramLogSize", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call("GetProgramLog", program, text)
        return text.value.decode()

    def _call(self, function: str, *arguments: object) -> None:
        result = getattr(self._library, f"nvrtc{function}")(*arguments)
        if result:
            raise CompileError(f"nvrtc{function} returned {result}")
