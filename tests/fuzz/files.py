"""Target: files that people write or download: placements, and the headers of safetensors."""

from __future__ import annotations

import functools
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moeshm.checkpoint.safetensors_dir import SINGLE_FILE, TensorDirectory
from moeshm.errors import CheckpointError
from moeshm.layers import format_ranges, parse_ranges
from moeshm.placement import Placement, PlacementError
from tests.fuzz.choices import Choices

_RANGES = (
    *("", "0-3", "0-1, 3", "3-0", "1", "-", "0-", "-1", "1,1", "é", "0x1", "2-2"),
    *("1-9999", "99999999999999999999", "0-99999999999999999999", "0-1000000000"),
)


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(suffix="-moeshm-fuzz"))


def close() -> None:
    """Let go of what is kept between executions."""
    if _folder.cache_info().currsize:
        shutil.rmtree(_folder())
        _folder.cache_clear()


def seeds() -> list[bytes]:
    """One of each kind, right and slightly wrong."""
    more: tuple[list[int], ...] = ([], [0] * 16, [1, 2, 3, 4, 5, 6], [2, 7, 200, 1, 9, 150])
    return [bytes([kind, *each]) for kind in range(len(_KINDS)) for each in more]


def test_one(data: bytes) -> str:
    """What became of one file; AssertionError for what must not."""
    choices = Choices(data)
    return _KINDS[choices.below(len(_KINDS))](choices)


def judge_placement(choices: Choices) -> str:
    """A placement that is right but for what is chosen."""
    layer = {"num_experts": 4, "hot": "0-1", "cold": {"a": "2", "b": "3"}}
    file: dict[str, Any] = {"version": 1, "workers": ["a", "b"], "layers": {"0": layer}}
    for _ in range(choices.below(4)):
        what = choices.byte()
        if what < 64:
            number = choices.near(4, 64)
            layer["num_experts"] = number - (1 << 64) if number >> 63 else number
        elif what < 128:
            layer["hot"] = _RANGES[choices.below(len(_RANGES))]
        elif what < 192:
            layer["cold"] = {"ab"[what & 1]: _RANGES[choices.below(len(_RANGES))]}
        elif what < 224:
            file["workers"] = ["a", "b", "c", "a"][: choices.below(5)]
        else:
            file["layers"][str(choices.near(0, 64))] = layer
    return _judge_placement(choices.edit(json.dumps(file).encode()))


def _judge_placement(data: bytes) -> str:
    try:
        placement = Placement.from_json(data)
    except PlacementError as error:
        return f"placement: {_gist(error)}"
    assert Placement.from_json(placement.to_json()) == placement
    for number, layer in placement.layers.items():
        placed = {*layer.hot}.union(*layer.cold.values())
        assert placed == set(range(layer.num_experts))
        assert placement.is_hot(number).sum() == len(layer.hot)
        for worker in placement.workers:
            assert placement.local_ids(number, worker).max(initial=-1) < layer.num_experts
    return "placement"


def judge_ranges(choices: Choices) -> str:
    """Any text, taken for ranges."""
    text = choices.rest().decode("utf-8", "replace")
    try:
        numbers = parse_ranges(text)
    except ValueError as error:
        return f"ranges: {_gist(error)}"
    assert parse_ranges(format_ranges(numbers)) == numbers
    return "ranges"


def judge_tensors(choices: Choices) -> str:
    """A file of tensors that is right but for what is chosen."""
    header: dict[str, Any] = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    for _ in range(choices.below(4)):
        entry = header["ab"[choices.below(2)]]
        what = choices.byte()
        if what < 64:
            entry["dtype"] = ("F16", "F64", "I8", "U4", "", "f32", 3)[what % 7]
        elif what < 128:
            entry["shape"] = [choices.near(each, 64) for each in entry["shape"]]
        elif what < 192:
            entry["data_offsets"] = [choices.near(each, 64) for each in entry["data_offsets"]]
        elif what < 224:
            header["__metadata__"] = ({"x": "y"}, {"x": 1}, [], None)[what % 4]
        else:
            entry["shape"] = [0] * (what - 224)
    packed = choices.edit(json.dumps(header).encode())
    length = choices.near(len(packed), 64)
    return _judge_tensors(length.to_bytes(8, "little") + packed + choices.edit(bytes(32)))


def judge_bytes(choices: Choices) -> str:
    """Any bytes, taken for either."""
    data = choices.rest()
    return f"{_judge_placement(data)}; {_judge_tensors(data)}"


def _judge_tensors(data: bytes) -> str:
    (_folder() / SINGLE_FILE).write_bytes(data)
    try:
        tensors = TensorDirectory(_folder())
        for name in tensors.names():
            array = tensors.tensor(name)
            assert array.shape == tensors.shape(name)
            assert array.nbytes == math.prod(array.shape) * array.itemsize <= len(data)
            array.tobytes()
    except CheckpointError as error:
        return f"tensors: {_gist(error)}"
    return "tensors"


def _gist(error: Exception) -> str:
    words = str(error).split(": ", 1)[-1].split()[:5]
    return f"{type(error).__name__}: {' '.join(word for word in words if word.isalpha())}"


_KINDS: tuple[Callable[[Choices], str], ...] = (
    judge_placement,
    judge_ranges,
    judge_tensors,
    judge_bytes,
)
