"""What is looked at by a library's functions in C: what Python finds, or left to Python."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moeshm import device_arrays
from moeshm._device_arrays import look
from moeshm.device_arrays import DeviceInputs
from moeshm.device_future import Given
from moeshm.dtypes import DType
from moeshm.engine_device import Engine, EngineDevice
from moeshm.errors import InvalidCall
from moeshm.stats import StatsCounter
from tests.unit import test_device_arrays as plain
from tests.unit.fake_dlpack import COPIED, CUDA, Library
from tests.unit.test_device_arrays import (
    ADDRESSES,
    DEVICE,
    HIDDEN_SIZE,
    INFO,
    N_TOKENS,
    SHAPES,
    TOP_K,
    CupyArray,
)
from tests.wire import dense_info

NAMES = ("hidden_states", "topk_ids", "topk_weights")
#: Where memory is, by DLPack's numbers.
CPU, ROCM = 1, 10
STREAM = 77


@pytest.fixture
def library() -> Library:
    """One with all functions."""
    return Library()


@pytest.fixture(params=["functions", "cupy"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A type of arrays that are looked at fast: by functions in C, or by CuPy's attributes."""
    monkeypatch.setitem(sys.modules, "cupy", plain._cupy())
    return Library().type if request.param == "functions" else CupyArray


def make(kind: Any, name: str, /, **changes: Any) -> Any:
    """The array of that name in a call that is right, but for the changes."""
    return plain.make(kind, name, **({"device": DEVICE} | changes))


def call(kind: Any, /, **given: Any) -> list[Any]:
    """hidden_states, topk_ids, topk_weights, out; None for no `out`."""
    return [given[name] if name in given else make(kind, name) for name in (*NAMES, "out")]


def looked_at(
    arrays: list[Any],
    stream: Any = STREAM,
    info: Any = INFO,
    device_type: int = CUDA,
    device: int = DEVICE,
) -> Any:
    """What `look` says of them."""
    hidden, ids, weights, out = arrays
    hidden_size, top_k = info.hidden_size, info.top_k
    return look(hidden, ids, weights, out, stream, hidden_size, top_k, device_type, device)


def check(
    arrays: list[Any], stream: Any = STREAM, info: Any = INFO, vendor: str = "cuda"
) -> tuple[Any, ...]:
    """As a client does."""
    hidden, ids, weights, out = arrays
    return device_arrays.check_call(6, info, hidden, ids, weights, out, stream, vendor, DEVICE)


def check_by_python(arrays: list[Any], info: Any = INFO) -> DeviceInputs:
    """As `check` does where nothing else goes."""
    hidden, ids, weights, _ = arrays
    return device_arrays.check_device(6, info, hidden, ids, weights, DEVICE)


def assert_left_to_python(arrays: list[Any], message: str, info: Any = INFO) -> None:
    """Which says what is wrong."""
    assert looked_at(arrays, info=info) is None
    with pytest.raises(InvalidCall, match=message):
        check(arrays, info=info)


# --- found --------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["f4", "f2", "u2"])
@pytest.mark.parametrize("ids", ["i4", "i8"])
@pytest.mark.parametrize("hidden", ["f4", "f2", "u2"])
def test_what_is_found_is_what_python_finds(
    kind: Any, hidden: str, ids: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is not CupyArray:
        hidden, weights = ("bf" if name == "u2" else name for name in (hidden, weights))
    arrays = call(
        kind,
        hidden_states=make(kind, "hidden_states", kind=hidden),
        topk_ids=make(kind, "topk_ids", kind=ids),
        topk_weights=make(kind, "topk_weights", kind=weights),
        out=make(kind, "out", kind=hidden),
    )
    expected = check_by_python(arrays)
    # So is the fast way known to be taken.
    monkeypatch.delattr(device_arrays, "check_device")
    found = check(arrays)
    assert found == (6, expected, arrays[3], ADDRESSES["out"], STREAM)
    assert found[2] is arrays[3]
    assert all(owner is given for owner, given in zip(found[1].owners, arrays, strict=False))
    assert type(found[1].dtype) is type(expected.dtype)


def test_an_engine_is_given_what_was_found(kind: Any) -> None:
    engine = Engine(EngineDevice("cuda:1", "cuda", DEVICE, "auto"), StatsCounter(), False)
    arrays = hidden, ids, weights, out = call(kind)
    given = engine.check(6, INFO, hidden, ids, weights, out, STREAM)
    assert type(given) is Given
    assert given == Given(
        layer=6,
        inputs=check_by_python(arrays),
        output=out,
        out_address=ADDRESSES["out"],
        stream=STREAM,
    )


def test_no_tokens(kind: Any) -> None:
    """Empty arrays are nowhere."""
    arrays = [make(kind, name, address=0, shape=(0, SHAPES[name][1])) for name in (*NAMES, "out")]
    found, out, _, _ = looked_at(arrays)
    assert DeviceInputs(*found) == check_by_python(arrays)
    assert out == 0


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        (SHAPES["hidden_states"], (HIDDEN_SIZE * 4, 4)),
        ((1, HIDDEN_SIZE), (4 * 12345, 4)),
        ((0, HIDDEN_SIZE), (0, 0)),
    ],
)
def test_strides_that_say_the_same(
    kind: Any, shape: tuple[int, int], strides: tuple[int, int]
) -> None:
    pairs = {name: make(kind, name, shape=(shape[0], TOP_K)) for name in NAMES[1:]}
    arrays = call(
        kind,
        hidden_states=make(kind, "hidden_states", shape=shape, strides=strides),
        out=make(kind, "out", shape=shape, strides=strides),
        **pairs,
    )
    assert looked_at(arrays)[0][3] == shape[0]


def test_one_expert_a_token(kind: Any) -> None:
    """Strides along a length of 1 say nothing, those along the other do."""
    shape = (N_TOKENS, 1)
    for strides, is_right in (((4, 4), True), ((4, 400), True), ((8, 4), False)):
        pairs = {name: make(kind, name, shape=shape, strides=strides) for name in NAMES[1:]}
        assert (looked_at(call(kind, **pairs)) is not None) is is_right


def test_contiguous_arrays_may_have_no_strides(library: Library) -> None:
    hidden = make(library.type, "hidden_states", has_strides=False)
    assert looked_at(call(library.type, hidden_states=hidden)) is not None


def test_offsets_count(library: Library) -> None:
    given = {name: make(library.type, name, byte_offset=16) for name in (*NAMES, "out")}
    arrays = call(library.type, **given)
    assert arrays[0].tensor.data == ADDRESSES["hidden_states"] - 16
    assert check(arrays)[1] == check_by_python(arrays)
    assert check(arrays)[3] == ADDRESSES["out"]


def test_arrays_of_amds_gpus(library: Library) -> None:
    arrays = [make(library.type, name, device_type=ROCM) for name in (*NAMES, "out")]
    assert looked_at(arrays) is None
    assert looked_at(arrays, device_type=ROCM) is not None
    found = check(arrays, vendor="hip")
    assert found[1] == check_by_python(arrays)
    assert library.n_exported == 2


def test_arrays_of_two_libraries(kind: Any) -> None:
    other = Library().type
    arrays = call(kind, topk_ids=make(other, "topk_ids"), out=make(other, "out"))
    assert check(arrays)[1] == check_by_python(arrays)
    assert looked_at(arrays) is not None


# --- left to Python -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hidden_states", {"kind": "f8"}, "hidden_states has dtype .*; pass float32"),
        ("hidden_states", {"kind": "i4"}, "hidden_states has dtype .*; pass float32"),
        ("hidden_states", {"kind": "i2"}, "hidden_states has dtype .*; pass float32"),
        ("hidden_states", {"kind": "u4"}, "hidden_states has dtype .*; pass float32"),
        (
            "topk_weights",
            {"kind": "f8", "address": 0x1000},
            "topk_weights has dtype .*; pass float32",
        ),
        ("topk_ids", {"kind": "i2"}, "topk_ids has dtype .*; pass int32 or int64"),
        ("topk_ids", {"kind": "u4"}, "topk_ids has dtype .*; pass int32 or int64"),
        ("topk_ids", {"kind": "f4"}, "topk_ids has dtype .*; pass int32 or int64"),
        ("hidden_states", {"shape": (N_TOKENS, 63)}, "hidden_states has shape"),
        ("hidden_states", {"shape": (N_TOKENS * HIDDEN_SIZE,)}, "hidden_states has shape"),
        ("hidden_states", {"shape": (N_TOKENS, HIDDEN_SIZE, 1)}, "hidden_states has shape"),
        ("topk_ids", {"shape": (4, TOP_K)}, "topk_ids has shape"),
        ("topk_ids", {"shape": (N_TOKENS, 5)}, "topk_ids has shape"),
        ("topk_ids", {"shape": (N_TOKENS, 0)}, "topk_ids has shape"),
        ("topk_ids", {"shape": (N_TOKENS,)}, "topk_ids has shape"),
        ("topk_weights", {"shape": (N_TOKENS, 2)}, "topk_weights has shape"),
        ("topk_weights", {"shape": (4, TOP_K)}, "topk_weights has shape"),
        ("hidden_states", {"strides": (512, 4)}, "hidden_states .* is not contiguous"),
        ("hidden_states", {"strides": (4, 20)}, "hidden_states .* is not contiguous"),
        ("hidden_states", {"strides": (256, 8)}, "hidden_states .* is not contiguous"),
        ("topk_ids", {"strides": (24, 4)}, "topk_ids .* is not contiguous"),
        ("topk_weights", {"strides": (24, 4)}, "topk_weights .* is not contiguous"),
        ("hidden_states", {"address": 0x1008}, "hidden_states starts at 0x1008"),
        ("topk_ids", {"kind": "i8", "address": 0x1004}, "topk_ids starts at 0x1004"),
        ("topk_ids", {"address": 0x1002}, "topk_ids starts at 0x1002"),
        ("topk_weights", {"address": 0x1002}, "topk_weights starts at 0x1002"),
        ("topk_weights", {"kind": "f2", "address": 0x1001}, "topk_weights starts at 0x1001"),
        *((name, {"device": 0}, f"{name} is on GPU 0") for name in (*NAMES, "out")),
        ("out", {"kind": "f2"}, "out is .*; pass a writable"),
        ("out", {"kind": "i4"}, "out is .*; pass a writable"),
        ("out", {"shape": (4, HIDDEN_SIZE)}, "out is .*; pass a writable"),
        ("out", {"shape": (N_TOKENS, 32)}, "out is .*; pass a writable"),
        ("out", {"strides": (512, 4)}, "out .* is not contiguous"),
        ("out", {"address": 0x1008}, "out starts at 0x1008"),
    ],
)
def test_what_is_wrong_is_left_to_python(
    kind: Any, name: str, changes: dict[str, Any], message: str
) -> None:
    assert looked_at(call(kind)) is not None
    arrays = call(kind, **{name: make(kind, name, **changes)})
    assert_left_to_python(arrays, message)
    if name != "out":
        assert looked_at([*arrays[:3], None]) is None


@pytest.mark.parametrize("shape", [(N_TOKENS, 0), (N_TOKENS, 5), (4, TOP_K)])
def test_as_many_weights_as_ids_but_no_right_number(kind: Any, shape: tuple[int, int]) -> None:
    pairs = {name: make(kind, name, shape=shape) for name in NAMES[1:]}
    assert_left_to_python(call(kind, **pairs), "topk_ids has shape")


def test_an_output_that_cannot_be_written_is_left_to_python(library: Library) -> None:
    out = make(library.type, "out", is_read_only=True)
    assert_left_to_python(call(library.type, out=out), "out is read-only ")
    assert looked_at(call(library.type, out=make(library.type, "out", flags=COPIED))) is None
    assert library.n_freed == library.n_exported == 3


def test_rows_of_odd_sizes_are_left_to_python(kind: Any) -> None:
    shape = (N_TOKENS, 12)
    arrays = [make(kind, name, shape=shape) for name in ("hidden_states", "out")]
    pairs = [make(kind, name) for name in NAMES[1:]]
    assert_left_to_python(
        [arrays[0], *pairs, arrays[1]], "hidden_size=12;.* multiple of 8", dense_info(12, 8, 4)
    )


@pytest.mark.parametrize("name", [*NAMES, "out"])
def test_arrays_at_two_places_are_left_to_python(kind: Any, name: str) -> None:
    host = np.zeros(SHAPES[name], np.int32 if name == "topk_ids" else np.float32)
    assert_left_to_python(call(kind, **{name: host}), f"{name} is an array in the host's memory")
    assert_left_to_python(call(kind, **{name: host.tolist()}), f"{name} is list")


@pytest.mark.parametrize("name", [*NAMES, "out"])
@pytest.mark.parametrize("changes", [{"device_type": CPU}, {"device_type": ROCM}, {"lanes": 2}])
def test_what_only_the_functions_tell(library: Library, name: str, changes: dict[str, int]) -> None:
    wrong = make(library.type, name, **changes)
    assert looked_at(call(library.type, **{name: wrong})) is None


@pytest.mark.parametrize("name", ["hidden_states", "topk_weights"])
def test_numbers_of_16_bits_are_no_bfloat16(library: Library, name: str) -> None:
    """Only CuPy's are, which has no other bfloat16."""
    wrong = make(library.type, name, kind="u2")
    assert looked_at(call(library.type, **{name: wrong}, out=None)) is None


def test_cupys_may_have_functions_too(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(ndarray=library.type))
    of_bits = {name: make(library.type, name, kind="u2") for name in ("hidden_states", "out")}
    found = looked_at(call(library.type, **of_bits))
    assert found[0][6] is DType.BF16
    assert library.n_looked == 3


def test_cupys_other_formats_are_left_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", plain._cupy())
    for dtype in (">f4", "c8", "?", "V4", "S4", "f16"):
        hidden = make(CupyArray, "hidden_states")
        hidden.dtype = np.dtype(dtype)
        assert looked_at(call(CupyArray, hidden_states=hidden)) is None


# --- streams and outputs ------------------------------------------------------------------


def test_the_librarys_current_stream(library: Library) -> None:
    """Python does not know it, of a library that is neither CuPy nor torch."""
    assert check(call(library.type), stream=None)[4] == library.stream + DEVICE
    library.stream = -DEVICE
    assert check(call(library.type), stream=None)[4] == 0


@pytest.mark.parametrize("how", ["fails", "is not there"])
def test_a_current_stream_that_is_not_known(library: Library, how: str) -> None:
    if how == "fails":
        library.stream_status = -1
    else:
        library.exchange.current_stream = None
    arrays = call(library.type)
    assert looked_at(arrays, stream=None)[2:] == (None, True)
    with pytest.raises(InvalidCall, match=r"whose stream moeshm does not know; pass `stream`"):
        check(arrays, stream=None)


def test_cupys_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", plain._cupy())
    assert looked_at(call(CupyArray), stream=None)[2:] == (None, True)
    assert check(call(CupyArray), stream=None)[4] == 100 + DEVICE


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (0, 0),
        (9, 9),
        (SimpleNamespace(cuda_stream=8, device_index=DEVICE), 8),
        (SimpleNamespace(ptr=7, device_id=DEVICE), 7),
        (SimpleNamespace(ptr=7, device_id=-1), 7),
    ],
)
def test_streams_are_found(kind: Any, stream: Any, handle: int) -> None:
    assert looked_at(call(kind), stream)[2] == handle
    assert check(call(kind), stream)[4] == handle


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ("0", "pass a cupy.cuda.Stream"),
        (-1, "pass a cupy.cuda.Stream"),
        (True, "pass a cupy.cuda.Stream"),
        (1.5, "pass a cupy.cuda.Stream"),
        (SimpleNamespace(cuda_stream=-8, device_index=DEVICE), "pass a cupy.cuda.Stream"),
        (
            SimpleNamespace(cuda_stream=8, device_index=0, device=SimpleNamespace(index=0)),
            "stream is of GPU 0; pass one of GPU 1",
        ),
        (SimpleNamespace(ptr=7, device_id=0), "stream is of GPU 0; pass one of GPU 1"),
    ],
)
def test_other_streams_are_left_to_python(kind: Any, stream: Any, message: str) -> None:
    assert looked_at(call(kind), stream)[2] is None
    with pytest.raises(InvalidCall, match=message):
        check(call(kind), stream)


def test_streams_that_python_knows(kind: Any) -> None:
    for stream, handle in (
        (SimpleNamespace(ptr=7), 7),
        (SimpleNamespace(cuda_stream=8, device=SimpleNamespace(index=DEVICE)), 8),
    ):
        assert looked_at(call(kind), stream)[2] is None
        assert check(call(kind), stream)[4] == handle


def test_an_output_is_made(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the call's stream, of which only another than the current one is told."""
    made_on = []

    def empty_like(_values: Any, stream: int | None) -> Any:
        made_on.append(stream)
        return SimpleNamespace(data=SimpleNamespace(ptr=0x1000))

    monkeypatch.setattr(device_arrays, "_empty_like", empty_like)
    current = 100 + DEVICE if kind is CupyArray else 4711 + DEVICE
    for stream in (None, 9):
        arrays = call(kind, out=None)
        found = check(arrays, stream)
        assert found[1] == check_by_python(arrays)
        assert found[3:] == (0x1000, stream or current)
    assert made_on == [None, 9]
    if kind is not CupyArray:
        # It is compared without asking Python's side of the library.
        check(call(kind, out=None), current)
        assert made_on[2:] == [None]
