"""Directories of safetensors files: views of the file without a copy, and attacks refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeshm.checkpoint import ModelDirectory, TensorDirectory
from moeshm.demo import tiny_moe_path
from moeshm.dtypes import Array
from moeshm.errors import CheckpointError
from tests.checkpoints import save_safetensors, write_shards

F32 = np.arange(12, dtype=np.float32).reshape(3, 4)
F16 = np.arange(6, dtype=np.float16).reshape(2, 3)
BF16 = np.arange(8, dtype=np.uint16).reshape(2, 2, 2)
TENSORS: dict[str, Array] = {"a.weight": F32, "b.weight": F16, "c.weight": BF16}


def write_raw(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int = 0) -> None:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((length or len(encoded)).to_bytes(8, "little") + encoded + data)


def test_names_shapes_and_values(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "model.safetensors", TENSORS)
    directory = TensorDirectory(tmp_path)
    assert directory.names() == ("a.weight", "b.weight", "c.weight")
    assert "a.weight" in directory
    assert "a" not in directory
    for name, expected in TENSORS.items():
        assert directory.shape(name) == expected.shape
        assert directory.tensor(name).dtype == expected.dtype
        np.testing.assert_array_equal(directory.tensor(name), expected)


def test_tensors_are_read_only_views_of_the_mapped_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_safetensors(file, TENSORS)
    directory = TensorDirectory(tmp_path)
    first, second = directory.tensor("c.weight"), directory.tensor("c.weight")
    assert np.shares_memory(first, second)
    assert not first.flags.writeable
    # The mapping shows what is written to the file later, so nothing was copied.
    with file.open("r+b") as handle:
        handle.seek(-2, 2)
        handle.write(b"\x34\x12")
    assert first[1, 1, 1] == 0x1234


def test_arrays_outlive_the_directory(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "model.safetensors", TENSORS)
    array = TensorDirectory(tmp_path).tensor("a.weight")
    (tmp_path / "model.safetensors").unlink()
    np.testing.assert_array_equal(array, F32)


def test_tensors_at_odd_offsets(tmp_path: Path) -> None:
    header = {
        "pad": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [3, 4], "data_offsets": [1, 49]},
    }
    write_raw(tmp_path / "model.safetensors", header, b"\0" + F32.tobytes())
    np.testing.assert_array_equal(TensorDirectory(tmp_path).tensor("x"), F32)


def test_an_empty_tensor(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}}
    write_raw(tmp_path / "model.safetensors", header, b"")
    assert TensorDirectory(tmp_path).tensor("x").shape == (0, 4)


# --- which files ------------------------------------------------------------------------


def test_shards_with_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS, 2)
    directory = TensorDirectory(tmp_path)
    assert directory.names() == tuple(TENSORS)
    for name, expected in TENSORS.items():
        np.testing.assert_array_equal(directory.tensor(name), expected)


def test_any_safetensors_files(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "x.safetensors", {"a.weight": F32})
    save_safetensors(tmp_path / "y.safetensors", {"b.weight": F16})
    directory = TensorDirectory(tmp_path)
    assert directory.names() == ("a.weight", "b.weight")
    np.testing.assert_array_equal(directory.tensor("b.weight"), F16)


def test_a_name_in_two_files(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_safetensors(tmp_path / f"{name}.safetensors", {"a.weight": F32})
    with pytest.raises(CheckpointError, match=r"'a.weight' is in x\.safetensors and in y\.safet"):
        TensorDirectory(tmp_path)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors.*no other \*\.safetensors"):
        TensorDirectory(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere is not a directory"):
        TensorDirectory(tmp_path / "nowhere")


# --- what is wrong with a tensor --------------------------------------------------------


def test_a_missing_tensor_names_those_that_come_close(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "model.safetensors", TENSORS)
    with pytest.raises(CheckpointError, match=r"no tensor 'a\.wieght'; there are .*'a\.weight'"):
        TensorDirectory(tmp_path).tensor("a.wieght")
    with pytest.raises(CheckpointError, match=rf"{tmp_path.name}: no tensor 'lm_head'$"):
        TensorDirectory(tmp_path).shape("lm_head")


def test_other_dtypes_are_refused_only_when_they_are_read(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "model.safetensors", TENSORS, {"a.weight": "I32"})
    directory = TensorDirectory(tmp_path)
    np.testing.assert_array_equal(directory.tensor("b.weight"), F16)
    assert directory.shape("a.weight") == (3, 4)
    with pytest.raises(CheckpointError, match=r"'a\.weight' is I32; moeshm reads F32, F16 and BF"):
        directory.tensor("a.weight")


# --- broken files -----------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}


@pytest.mark.parametrize(
    "header",
    [
        {"x": ENTRY | {"data_offsets": [0, 64]}},
        {"x": ENTRY | {"data_offsets": [48, 0]}},
        {"x": ENTRY | {"shape": [1 << 40, 1 << 40]}},
        {"x": ENTRY | {"shape": [3, -4]}},
        {"x": ENTRY | {"dtype": "F99"}},
        {"x": ENTRY, "y": ENTRY},
        {"x": {"dtype": "F32"}},
        [],
        b"{",
        b"",
    ],
    ids=str,
)
def test_headers_that_lie(tmp_path: Path, header: dict[str, Any] | bytes) -> None:
    write_raw(tmp_path / "model.safetensors", header, F32.tobytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a sound safetensors"):
        TensorDirectory(tmp_path)


@pytest.mark.parametrize("length", [1 << 20, 1 << 63])
def test_a_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    write_raw(tmp_path / "model.safetensors", {"x": ENTRY}, F32.tobytes(), length)
    with pytest.raises(CheckpointError, match="is not a sound safetensors file"):
        TensorDirectory(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 20, -1])
def test_truncated_files(tmp_path: Path, size: int) -> None:
    file = tmp_path / "model.safetensors"
    save_safetensors(file, TENSORS)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="is not a sound safetensors file"):
        TensorDirectory(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"x": 3}}'])
def test_indexes_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        TensorDirectory(tmp_path)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "..", ""])
def test_an_index_does_not_lead_out_of_the_directory(tmp_path: Path, file: str) -> None:
    index = {"weight_map": {"x": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"only \*\.safetensors files of the same"):
        TensorDirectory(tmp_path)


def test_an_index_that_points_to_the_wrong_file(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS, 3)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "model-00002"))
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors: no tensor 'a\.weigh"):
        TensorDirectory(tmp_path).tensor("a.weight")


# --- files that change ------------------------------------------------------------------


def replace(path: Path) -> None:
    """By another file of the same content."""
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def write_over(path: Path) -> None:
    """The last byte, in place, a moment later."""
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    seen = path.stat()
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [replace, write_over, Path.unlink])
@pytest.mark.parametrize("which", ["index", "first shard", "second shard"])
def test_a_file_that_changed_is_noticed(
    tmp_path: Path, change: Callable[[Path], None], which: str
) -> None:
    write_shards(tmp_path, TENSORS, 2)
    shards = sorted(tmp_path.glob("*.safetensors"))
    paths = [tmp_path / "model.safetensors.index.json", *shards]
    path = paths[["index", "first shard", "second shard"].index(which)]
    directory = TensorDirectory(tmp_path)
    first = directory.tensor("a.weight")
    directory.check_unchanged()
    change(path)
    with pytest.raises(CheckpointError, match=f"{path.name} has changed since the worker started"):
        directory.check_unchanged()
    # What was read is of the file that there was.
    if change is not write_over:
        np.testing.assert_array_equal(first, F32)


@pytest.mark.parametrize("was_there", [True, False])
def test_a_shard_that_is_opened_later_is_the_one_of_the_beginning(
    tmp_path: Path, was_there: bool
) -> None:
    write_shards(tmp_path, TENSORS, 3)
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    aside = shard.read_bytes()
    if not was_there:
        shard.unlink()
    directory = TensorDirectory(tmp_path)
    shard.with_suffix(".new").write_bytes(aside)
    shard.with_suffix(".new").replace(shard)
    with pytest.raises(CheckpointError, match="has changed since the worker started; start it"):
        directory.tensor("c.weight")


def test_experts_are_not_loaded_from_a_checkpoint_that_changed(tmp_path: Path) -> None:
    for source in tiny_moe_path().iterdir():
        shutil.copy(source, tmp_path)
    model = ModelDirectory(tmp_path)
    first = model.load(experts={0: (1,)}).layers[0].expert(0)
    replace(next(tmp_path.glob("*.safetensors")))
    with pytest.raises(CheckpointError, match="has changed since the worker started"):
        model.load(experts={0: (2,)})
    assert first.gate_proj.any()
