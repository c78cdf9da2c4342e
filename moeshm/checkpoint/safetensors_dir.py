"""Tensors of a directory of safetensors files, memory-mapped and never copied."""

from __future__ import annotations

import difflib
import heapq
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from ..dtypes import Array, DType
from ..errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_FORMATS = {"F32": DType.F32, "F16": DType.F16, "BF16": DType.BF16}
_REMEDY = (
    "moeshm reads F32, F16 and BF16: load the model with transformers (dequantize=True in its "
    "quantization config) and save_pretrained() it as bfloat16"
)


class TensorDirectory:
    """The tensors of one model directory: `model.safetensors`, shards with an index, or any
    `*.safetensors`.

    Files are opened when a tensor of theirs is asked for; arrays stay valid for as long as
    anything refers to them. CheckpointError: nothing there to read, or a file or index is
    damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a directory; pass a model directory")
        self._files: dict[str, _File] = {}
        #: Of the index and the files that it names, or of the files there were; None for missing.
        self._seen: dict[str, _Identity | None] = {}
        self._file_of = self._find_tensors()

    def names(self) -> tuple[str, ...]:
        """Every tensor's name, sorted."""
        return tuple(sorted(self._file_of))

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it; CheckpointError as for `tensor`."""
        return self._entry(name)[1].shape

    def tensor(self, name: str) -> Array:
        """The tensor as a read-only view of the mapped file: float32, float16, or bfloat16 as
        uint16.

        CheckpointError: no such tensor (with the names that come close), or a dtype that
        moeshm does not compute with.
        """
        file, entry = self._entry(name)
        try:
            dtype = _FORMATS[entry.dtype]
        except KeyError:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} is {entry.dtype}; {_REMEDY}"
            ) from None
        flat = np.frombuffer(
            file.mapping, dtype.numpy, count=math.prod(entry.shape), offset=entry.begin
        )
        return flat.reshape(entry.shape)

    def _entry(self, name: str) -> tuple[_File, _Entry]:
        file_name = self._file_of.get(name)
        if file_name is None:
            raise CheckpointError(f"{self.path}: no tensor {name!r}{self._hint(name)}")
        file = self._open(file_name)
        if name not in file.entries:
            raise CheckpointError(
                f"{file.path}: no tensor {name!r}, although {INDEX_FILE} places it there"
            )
        return file, file.entries[name]

    def _hint(self, name: str) -> str:
        if f"{name}_blocks" in self._file_of:
            return f"; {name}_blocks is there, so this is MXFP4; {_REMEDY}"
        # difflib takes seconds for the tens of thousands of names that a model may have.
        related = heapq.nlargest(100, self._file_of, key=lambda other: _common(name, other))
        close = difflib.get_close_matches(name, related, n=3, cutoff=0.8)
        return f"; there are {', '.join(map(repr, close))}" if close else ""

    def check_unchanged(self) -> None:
        """CheckpointError: a file is another than when the directory was opened."""
        for file_name, seen in self._seen.items():
            path = self.path / file_name
            if _identity(path) != seen:
                raise _changed(path)

    def _open(self, file_name: str) -> _File:
        file = self._files.get(file_name)
        if file is None:
            file = self._files[file_name] = _File(self.path / file_name, self._seen[file_name])
        return file

    def _find_tensors(self) -> dict[str, str]:
        """Tensor name to file name."""
        if not (self.path / SINGLE_FILE).exists() and (self.path / INDEX_FILE).exists():
            self._see(INDEX_FILE)
            by_index = _read_index(self.path / INDEX_FILE)
            self._see(*by_index.values())
            return by_index
        if (self.path / SINGLE_FILE).exists():
            files = [SINGLE_FILE]
        else:
            files = sorted(found.name for found in self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{self.path} has no {SINGLE_FILE}, no {INDEX_FILE} and no other *.safetensors"
            )
        self._see(*files)
        file_of: dict[str, str] = {}
        for file_name in files:
            for name in self._open(file_name).entries:
                if name in file_of:
                    raise CheckpointError(
                        f"{self.path}: tensor {name!r} is in {file_of[name]} and in "
                        f"{file_name}; add a {INDEX_FILE} or remove one of them"
                    )
                file_of[name] = file_name
        return file_of

    def _see(self, *file_names: str) -> None:
        self._seen |= {name: _identity(self.path / name) for name in {*file_names}}


class _Identity(NamedTuple):
    """What tells a file from one that took its place, or that was written over it."""

    device: int
    inode: int
    size: int
    modified_ns: int


def _identity(path: Path) -> _Identity | None:
    """None where there is no file."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be looked at: {error}") from error
    return _Identity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} has changed since the worker started; start it anew")


def _common(first: str, second: str) -> int:
    """How many characters two names begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    #: Offset of the first byte in the file.
    begin: int


class _File:
    """One safetensors file, which was like this when the directory was opened: what its header
    says, and the mapping."""

    def __init__(self, path: Path, seen: _Identity | None) -> None:
        self.path = path
        # Mapped at once, so that the header and the tensors are of one file whatever follows.
        self.entries, self.mapping = _map(path)
        if _identity(path) != seen:
            raise _changed(path)


class _HeaderEntry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _map(path: Path) -> tuple[Mapping[str, _Entry], mmap.mmap]:
    """Where each tensor lies, and the mapped file; the safetensors library has checked sizes and
    offsets before."""
    try:
        with safe_open(path, framework="numpy"):
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = msgspec.json.decode(file.read(length))
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header.pop("__metadata__", None)
        entries = msgspec.convert(header, dict[str, _HeaderEntry])
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; download the model again") from None
    except (SafetensorError, msgspec.MsgspecError, OSError) as error:
        raise CheckpointError(f"{path} is not a sound safetensors file: {error}") from error
    return {
        name: _Entry(entry.dtype, entry.shape, 8 + length + entry.data_offsets[0])
        for name, entry in entries.items()
    }, mapping


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = msgspec.json.decode(path.read_bytes(), type=_Index)
    except (msgspec.MsgspecError, OSError) as error:
        raise CheckpointError(f"{path} is not a safetensors index: {error}") from error
    for file_name in set(index.weight_map.values()):
        if Path(file_name).name != file_name or not file_name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} names the file {file_name!r}; "
                "only *.safetensors files of the same directory are read"
            )
    return index.weight_map
