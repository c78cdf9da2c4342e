"""What is compiled to be checked: for some layers and every family of cards, what is chosen there.

The choice itself, with the macros that are tuned, is moeshm/backends/gpu/choice.py's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from moeshm.backends.gpu.choice import (
    Shape,
    Size,
    Step,
    check_wanted,
    convert,
    plan,
    resident,
)
from moeshm.backends.gpu.device import Features
from moeshm.dtypes import DType
from moeshm.errors import SettingError
from moeshm.kernels import source
from moeshm.layers import Activation
from moeshm.settings import KERNELS

from .compilers import Compiler
from .hip import find_clang, find_hipcc
from .nvrtc import find_nvrtc
from .usage import Usage


class Target(NamedTuple):
    """A family of cards, by one compiler."""

    name: str
    arch: str
    warp: int
    #: Of a block, in bytes.
    shared_bytes: int
    find: Callable[[], Compiler]

    def features(self) -> Features:
        """What kernels are chosen by."""
        number = int(self.arch[3:]) if self.arch.startswith("sm_") else 0
        return Features(
            name=self.name,
            arch=self.arch,
            warp=self.warp,
            multiprocessors=64,
            shared_bytes=self.shared_bytes,
            total_bytes=16 << 30,
            has_mma=number >= 80,
            has_overlap=number >= 90,
            has_wgmma=number == 90,
        )


_cuda12 = functools.partial(find_nvrtc, "nvidia-cuda-nvrtc-cu12", 12)
_cuda13 = functools.partial(find_nvrtc, "nvidia-cuda-nvrtc", 13)

#: Figures of the newer compiler are not on the page, which need not follow every release of CUDA.
PAGE_TARGETS = (
    Target("sm_61", "sm_61", 32, 48 << 10, _cuda12),
    Target("sm_75", "sm_75", 32, 64 << 10, _cuda12),
    Target("sm_80", "sm_80", 32, 163 << 10, _cuda12),
    Target("sm_90", "sm_90", 32, 227 << 10, _cuda12),
    Target("gfx906", "gfx906", 64, 64 << 10, find_hipcc),
    Target("gfx90a", "gfx90a", 64, 64 << 10, find_hipcc),
    Target("gfx942", "gfx942", 64, 64 << 10, find_clang),
    Target("gfx1100", "gfx1100", 32, 64 << 10, find_clang),
)
TARGETS = (
    *PAGE_TARGETS,
    Target("sm_75 by CUDA 13", "sm_75", 32, 64 << 10, _cuda13),
    Target("sm_80 by CUDA 13", "sm_80", 32, 163 << 10, _cuda13),
    Target("sm_90 by CUDA 13", "sm_90", 32, 227 << 10, _cuda13),
)


class Sample(NamedTuple):
    """A layer, and two calls of it."""

    shape: Shape
    top_k: int
    num_experts: int
    #: Tokens of a call for the kernels of few, and for those of many.
    few: int
    many: int


#: Qwen3-30B-A3B, gpt-oss-120b, and two with the other activations and sizes that need padding.
_QWEN = Sample(Shape(2048, 768, DType.BF16, Activation.SWIGLU, False), 8, 128, 1, 1024)
_QWEN_F32 = _QWEN._replace(shape=_QWEN.shape._replace(weight_dtype=DType.F32), few=16, many=4096)
_GPT_OSS = Sample(Shape(2880, 2880, DType.BF16, Activation.SWIGLU_CLAMPED, True), 4, 128, 4, 1000)
_ODD = Sample(Shape(1000, 1408, DType.F16, Activation.GEGLU, False), 6, 60, 32, 200)
_GEMMA = Sample(Shape(2816, 704, DType.BF16, Activation.GEGLU_TANH, False), 8, 128, 8, 8192)
SAMPLES = (_QWEN, _QWEN_F32, _GPT_OSS, _ODD, _GEMMA)
#: Those that differ most, for every card; all of them for the newest card of each maker, and for a
#: second compiler of the same cards only what no other sample has: a bias, and padding.
_UNLIKE_SAMPLES = (_QWEN_F32, _GPT_OSS, _ODD)
_FEWEST_SAMPLES = (_GPT_OSS, _ODD)
_NEWEST_CARDS = ("sm_90", "gfx942")

#: Kernels for which the shape makes little difference, and what they are compiled for.
_PLAIN_FILES = ("route.cu", "convert.cu", "combine.cu")
_PLAIN_SAMPLES = (_QWEN, _GPT_OSS)
#: Kernels that are of no layer.
_SHAPELESS_FILES = ("admit.cu", "move.cu")


class Case(NamedTuple):
    """One compilation."""

    file: str
    #: None for kernels that are of no layer.
    shape: Shape | None
    #: Beyond the shape's.
    macros: tuple[tuple[str, object], ...]
    target: Target

    def __str__(self) -> str:
        return f"{self.file}, {self.variant}, {self.target.name}"

    @property
    def variant(self) -> str:
        """What the file is compiled for, but for the card."""
        shape = self.shape
        if shape is None:
            return "any layer"
        words = [f"{shape.weight_dtype}", f"{shape.hidden_size}x{shape.inner}"]
        words += [f"{shape.activation}", *("bias",) * shape.has_bias]
        return " ".join([*words, *(f"{name}={value}" for name, value in self.macros)])

    def compile(self) -> list[Usage]:
        """What each kernel takes. Raises CompileError, and CompilerMissing."""
        shape = {} if self.shape is None else self.shape.macros()
        macros = {**shape, **dict(self.macros), "WARP": self.target.warp}
        # As CupyDevice.compile has it.
        arch = f"{self.target.arch}a" if self.file.endswith("_wgmma.cu") else self.target.arch
        return self.target.find().compile(source(self.file), macros, arch)


def _steps(sample: Sample, features: Features) -> Iterator[Step]:
    """Every launch that the card has for the sample's calls, with whatever kernels it can."""
    shape = sample.shape
    yield convert(shape, sample.many, features)
    if features.has_mma and shape.weight_dtype is not DType.F32:
        yield resident(shape, features)
    for kind, choices in KERNELS.items():
        n_tokens = sample.few if kind == "decode" else sample.many
        size = Size(n_tokens, sample.top_k, sample.num_experts)
        for kernels in choices:
            wanted = {kind: kernels}
            with contextlib.suppress(SettingError):
                check_wanted(wanted, features)
                yield from plan(shape, size, shape.weight_dtype, features, wanted).steps


def _samples_of(target: Target) -> tuple[Sample, ...]:
    if target not in PAGE_TARGETS:
        return _FEWEST_SAMPLES
    return SAMPLES if target.name in _NEWEST_CARDS else _UNLIKE_SAMPLES


def _all_cases() -> Iterator[Case]:
    for target in TARGETS:
        for file in _SHAPELESS_FILES:
            yield Case(file, None, (), target)
        for sample in _samples_of(target):
            for step in _steps(sample, target.features()):
                if sample in _PLAIN_SAMPLES or step.file not in _PLAIN_FILES:
                    yield Case(step.file, sample.shape, step.macros, target)


#: By file; each once, though most files have several kernels.
CASES = tuple(sorted(dict.fromkeys(_all_cases()), key=lambda case: case.file))
FILES = tuple(dict.fromkeys(case.file for case in CASES))


def cases_of(file: str) -> list[Case]:
    """Every case of one file."""
    return [case for case in CASES if case.file == file]
