"""Arrays in a GPU's memory: located as they are, or refused with the reason, and no GPU asked."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moeshm import device_arrays
from moeshm.device_arrays import DeviceInputs
from moeshm.dtypes import DType
from moeshm.errors import InvalidCall
from tests.wire import dense_info

HIDDEN_SIZE = 64
N_TOKENS, TOP_K = 5, 3
INFO = dense_info(HIDDEN_SIZE, 8, 4)
DEVICE = 1
#: Where arrays claim to be. Nothing is read there.
ADDRESSES = {
    "hidden_states": 0x7F00_0000_0000,
    "topk_ids": 0x7F00_0010_0008,
    "out": 0x7F00_0020_0000,
}
ADDRESSES["topk_weights"] = 0x7F00_0011_0004
SHAPES = {
    "hidden_states": (N_TOKENS, HIDDEN_SIZE),
    "topk_ids": (N_TOKENS, TOP_K),
    "topk_weights": (N_TOKENS, TOP_K),
    "out": (N_TOKENS, HIDDEN_SIZE),
}
TYPES = {"hidden_states": "f4", "topk_ids": "i4", "topk_weights": "f4", "out": "f4"}
#: torch's name for each of the interface's.
TORCH_TYPES = {
    "f4": "torch.float32",
    "f2": "torch.float16",
    "u2": "torch.bfloat16",
    "f8": "torch.float64",
    "i4": "torch.int32",
    "i8": "torch.int64",
    "i2": "torch.int16",
}


#: That arrays were made on, other than the current ones.
USED_STREAMS: list[tuple[int, int]] = []


class CupyArray:
    """As CuPy's, as far as it is looked at."""

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        kind: str,
        device: int = DEVICE,
        strides: tuple[int, ...] | None = None,
        is_read_only: bool = False,
    ) -> None:
        self.device = CupyDevice(device)
        self.shape = shape
        self.data = SimpleNamespace(ptr=address, device_id=device)
        self.dtype = np.dtype(f"<{kind}")
        self.strides = strides or np.empty(shape, self.dtype).strides
        self.flags = SimpleNamespace(c_contiguous=strides is None)
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": shape,
            "typestr": f"<{kind}",
            "data": (address, is_read_only),
            "strides": strides,
            "version": 3,
        }


class CupyDevice:
    """As CuPy's: it can be made the current one."""

    current = 0

    def __init__(self, number: int) -> None:
        self.id = number

    def __enter__(self) -> None:
        self._before, CupyDevice.current = CupyDevice.current, self.id

    def __exit__(self, *error: object) -> None:
        CupyDevice.current = self._before


class Tensor:
    """As torch's, as far as it is looked at."""

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        kind: str,
        device: int | None = DEVICE,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = TORCH_TYPES[kind]
        self.is_cuda = device is not None
        self.device = _TorchDevice(device)
        self._address = address
        self._is_contiguous = strides is None

    def data_ptr(self) -> int:
        return self._address

    def is_contiguous(self) -> bool:
        return self._is_contiguous


class _TorchDevice:
    def __init__(self, index: int | None) -> None:
        self.index = index

    def __str__(self) -> str:
        return "cpu" if self.index is None else f"cuda:{self.index}"


def _cupy() -> Any:
    module: Any = ModuleType("cupy")
    module.ndarray = CupyArray

    def empty_like(array: CupyArray) -> CupyArray:
        interface: dict[str, Any] = array.__cuda_array_interface__
        kind = interface["typestr"][1:]
        return CupyArray(ADDRESSES["out"], interface["shape"], kind, CupyDevice.current)

    def get_current_stream(device: int) -> Any:
        return SimpleNamespace(ptr=100 + device)

    @contextlib.contextmanager
    def from_external(stream: Any) -> Iterator[None]:
        USED_STREAMS.append(stream.__cuda_stream__())
        yield

    module.empty_like = empty_like
    module.cuda = SimpleNamespace(
        get_current_stream=get_current_stream, Stream=SimpleNamespace(from_external=from_external)
    )
    return module


def _torch() -> Any:
    module: Any = ModuleType("torch")
    module.Tensor = Tensor
    kinds = {name: kind for kind, name in TORCH_TYPES.items()}

    def empty_like(tensor: Tensor) -> Tensor:
        kind = kinds[tensor.dtype]
        return Tensor(ADDRESSES["out"], tensor.shape, kind, tensor.device.index)

    def current_stream(device: _TorchDevice) -> Any:
        return SimpleNamespace(cuda_stream=200 + (device.index or 0))

    @contextlib.contextmanager
    def use_stream(handle: int) -> Iterator[None]:
        USED_STREAMS.append((0, handle))
        yield

    def external(handle: int, device: _TorchDevice) -> int:
        assert device.index == DEVICE
        # As torch's: what has no handle is a new stream.
        return handle or 99

    module.empty_like = empty_like
    module.cuda = SimpleNamespace(
        current_stream=current_stream,
        stream=use_stream,
        ExternalStream=external,
        default_stream=lambda _device: 0,
    )
    return module


@pytest.fixture(params=[CupyArray, Tensor], ids=["cupy", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The type of arrays of a library that the caller has imported."""
    monkeypatch.setitem(sys.modules, "cupy", _cupy())
    monkeypatch.setitem(sys.modules, "torch", _torch())
    return request.param


def make(library: Any, name: str, **changes: Any) -> Any:
    """The array of that name in a call that is right, but for the changes."""
    of_it = {"address": ADDRESSES[name], "shape": SHAPES[name], "kind": TYPES[name]}
    return library(**{**of_it, **changes})


def check(library: Any, info: Any = INFO, **given: Any) -> DeviceInputs:
    """A call, of these arrays or of right ones."""
    names = ("hidden_states", "topk_ids", "topk_weights")
    hidden, ids, weights = (given[name] if name in given else make(library, name) for name in names)
    return device_arrays.check_device(6, info, hidden, ids, weights, DEVICE)


def refused(message: str) -> Any:
    """The reason why a call is."""
    return pytest.raises(InvalidCall, match=message)


# --- accepted -----------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["f4", "f2", "u2"])
@pytest.mark.parametrize("ids", ["i4", "i8"])
@pytest.mark.parametrize("hidden", ["f4", "f2", "u2"])
def test_what_kernels_are_told(library: Any, hidden: str, ids: str, weights: str) -> None:
    given = [
        make(library, name, kind=kind)
        for name, kind in zip(SHAPES, (hidden, ids, weights), strict=False)
    ]
    inputs = check(library, hidden_states=given[0], topk_ids=given[1], topk_weights=given[2])
    formats = {"f4": DType.F32, "f2": DType.F16, "u2": DType.BF16}
    assert inputs == DeviceInputs(
        hidden_states=ADDRESSES["hidden_states"],
        topk_ids=ADDRESSES["topk_ids"],
        topk_weights=ADDRESSES["topk_weights"],
        n_tokens=N_TOKENS,
        hidden_size=HIDDEN_SIZE,
        top_k=TOP_K,
        dtype=formats[hidden],
        ids_itemsize=int(ids[1]),
        weights_dtype=formats[weights],
        owners=(given[0], given[1], given[2]),
        device_index=DEVICE,
    )
    assert inputs.n_bytes == N_TOKENS * HIDDEN_SIZE * int(hidden[1])


def test_no_tokens_are_accepted(library: Any) -> None:
    """Empty arrays are nowhere."""
    given = {
        name: make(library, name, address=0, shape=(0, SHAPES[name][1]))
        for name in ("hidden_states", "topk_ids", "topk_weights")
    }
    inputs = check(library, **given)
    assert (inputs.n_tokens, inputs.n_bytes, inputs.top_k) == (0, 0, TOP_K)


def test_a_part_of_the_tokens(library: Any) -> None:
    inputs = check(
        library,
        topk_ids=make(library, "topk_ids", kind="i8", address=0x1000),
        topk_weights=make(library, "topk_weights", kind="f2", address=0x2000),
    )
    part = inputs.rows(2, 5)
    assert part.hidden_states == inputs.hidden_states + 2 * HIDDEN_SIZE * 4
    assert part.topk_ids == 0x1000 + 2 * TOP_K * 8
    assert part.topk_weights == 0x2000 + 2 * TOP_K * 2
    assert (part.n_tokens, part.n_bytes) == (3, 3 * HIDDEN_SIZE * 4)
    assert part.owners is inputs.owners


def test_strides_that_say_the_same_are_accepted() -> None:
    """Along a length of 1 any do, and in an array of nothing."""
    row = (1, HIDDEN_SIZE)
    for shape, strides in (
        (SHAPES["hidden_states"], (HIDDEN_SIZE * 4, 4)),
        (row, (12345, 4)),
        ((0, HIDDEN_SIZE), (0, 0)),
    ):
        n_tokens = shape[0]
        hidden = make(CupyArray, "hidden_states", shape=shape, strides=strides)
        pairs = {
            name: make(CupyArray, name, shape=(n_tokens, TOP_K))
            for name in ("topk_ids", "topk_weights")
        }
        assert check(CupyArray, hidden_states=hidden, **pairs).n_tokens == n_tokens


def test_arrays_that_do_not_say_where_they_are() -> None:
    """The interface itself knows no devices."""
    hidden = make(CupyArray, "hidden_states")
    del hidden.device
    assert check(CupyArray, hidden_states=hidden).hidden_states == ADDRESSES["hidden_states"]


# --- what is on a GPU -----------------------------------------------------------------------


def test_what_is_on_a_gpu(library: Any) -> None:
    assert device_arrays.is_device_array(make(library, "hidden_states"))
    assert not device_arrays.is_device_array(np.zeros(3))
    assert not device_arrays.is_device_array(Tensor(0, (3,), "f4", None))
    assert not device_arrays.is_device_array([1, 2])
    assert not device_arrays.is_device_array(None)


def test_torchs_own_tensors_in_the_hosts_memory_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    for tensor in (torch.zeros(3), torch.zeros(3, device="meta")):
        assert not device_arrays.is_device_array(tensor)
    for name in ("float32", "float16", "bfloat16", "int32", "int64"):
        assert str(getattr(torch, name)) in TORCH_TYPES.values()
    monkeypatch.setitem(sys.modules, "cupy", _cupy())
    with refused("topk_ids is a tensor on cpu.*all of them on that GPU, or all in the host's"):
        check(CupyArray, topk_ids=torch.zeros(N_TOKENS, TOP_K, dtype=torch.int32))


# --- refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hidden_states", "topk_ids", "topk_weights"])
def test_arrays_at_two_places_are_refused(library: Any, name: str) -> None:
    host = np.zeros(SHAPES[name], np.int32 if name == "topk_ids" else np.float32)
    with refused(f"{name} is an array in the host's memory.*all of them on that GPU, or all in"):
        check(library, **{name: host})
    with refused(f"{name} is list"):
        check(library, **{name: host.tolist()})
    with refused(f"{name} is on GPU 0; pass an array on GPU 1"):
        check(library, **{name: make(library, name, device=0)})


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("hidden_states", "f8", "hidden_states has dtype .*f.*; pass float32, float16, or bfloat"),
        ("hidden_states", "i4", "hidden_states has dtype .*; pass float32"),
        ("topk_weights", "f8", "topk_weights has dtype .*; pass float32"),
        ("topk_ids", "i2", "topk_ids has dtype .*; pass int32 or int64"),
        ("topk_ids", "f4", "topk_ids has dtype .*; pass int32 or int64"),
    ],
)
def test_dtypes_are_refused(library: Any, name: str, kind: str, message: str) -> None:
    with refused(message):
        check(library, **{name: make(library, name, kind=kind)})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("hidden_states", (N_TOKENS, 63), r"\[5, 63\]; layer 6 takes \[n_tokens, 64\]"),
        ("hidden_states", (N_TOKENS * HIDDEN_SIZE,), r"\[320\]; layer 6 takes \[n_tokens, 64\]"),
        ("topk_ids", (4, TOP_K), r"\[4, 3\]; layer 6 takes \[5, 1..4\]: a row for each of hidden"),
        ("topk_ids", (N_TOKENS, 5), r"\[5, 5\]; layer 6 takes \[5, 1..4\]"),
        ("topk_ids", (N_TOKENS, 0), r"\[5, 0\]; layer 6 takes \[5, 1..4\]"),
        ("topk_ids", (N_TOKENS,), r"\[5\]; layer 6 takes \[5, 1..4\]"),
        ("topk_weights", (N_TOKENS, 2), r"\[5, 2\], topk_ids \[5, 3\]; pass one weight for each"),
    ],
)
def test_shapes_are_refused(library: Any, name: str, shape: tuple[int, ...], message: str) -> None:
    with refused(f"{name} has shape {message}"):
        check(library, **{name: make(library, name, shape=shape)})


@pytest.mark.parametrize("name", ["hidden_states", "topk_ids", "topk_weights"])
def test_gaps_are_refused(library: Any, name: str) -> None:
    strides = (2 * SHAPES[name][1] * 4, 4)
    with refused(rf"{name} \[.*\] is not contiguous; pass {name}.contiguous\(\) or a copy"):
        check(library, **{name: make(library, name, strides=strides)})


@pytest.mark.parametrize(
    ("name", "kind", "address", "alignment"),
    [
        ("hidden_states", "f4", 0x1008, 16),
        ("topk_ids", "i8", 0x1004, 8),
        ("topk_ids", "i4", 0x1002, 4),
        ("topk_weights", "f4", 0x1002, 4),
        ("topk_weights", "f2", 0x1001, 2),
    ],
)
def test_odd_addresses_are_refused(
    library: Any, name: str, kind: str, address: int, alignment: int
) -> None:
    """A kernel that loads from there would be the device's last."""
    with refused(f"{name} starts at {address:#x}; pass .* a multiple of {alignment} bytes"):
        check(library, **{name: make(library, name, kind=kind, address=address)})


@pytest.mark.parametrize(("hidden_size", "kind"), [(6, "f4"), (4, "f4"), (12, "f2")])
def test_rows_of_odd_sizes_are_refused(library: Any, hidden_size: int, kind: str) -> None:
    hidden = make(library, "hidden_states", shape=(N_TOKENS, hidden_size), kind=kind)
    with refused(f"hidden_size={hidden_size};.* multiple of 8: pass arrays in the host's"):
        check(library, dense_info(hidden_size, 8, 4), hidden_states=hidden)


# --- outputs ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f4", "f2", "u2"])
def test_an_output_is_made_like_hidden_states(library: Any, kind: str) -> None:
    """On their GPU, whichever is current."""
    hidden = make(library, "hidden_states", kind=kind)
    made, address = device_arrays.make_device_output(
        check(library, hidden_states=hidden), hidden, None
    )
    assert type(made) is library
    assert address == ADDRESSES["out"]
    again = check(library, hidden_states=made)
    assert (again.n_bytes, again.dtype) == (N_TOKENS * HIDDEN_SIZE * int(kind[1]), again.dtype)
    assert CupyDevice.current == 0


def test_an_output_is_taken(library: Any) -> None:
    hidden, out = make(library, "hidden_states"), make(library, "out")
    found, address = device_arrays.make_device_output(check(library), hidden, out)
    assert found is out
    assert address == ADDRESSES["out"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "f2"}, r"out is .* \[5, 64\]; pass a writable, contiguous .* \[5, 64\]"),
        ({"shape": (4, 64)}, r"out is .* \[4, 64\]; pass a writable, contiguous .* \[5, 64\]"),
        ({"strides": (512, 4)}, "out .* is not contiguous; pass a contiguous array"),
        ({"address": 0x1008}, "out starts at 0x1008; pass .* a multiple of 16 bytes"),
        ({"device": 0}, "out is on GPU 0; pass an array on GPU 1"),
    ],
)
def test_outputs_are_refused(library: Any, changes: dict[str, Any], message: str) -> None:
    hidden, out = make(library, "hidden_states"), make(library, "out", **changes)
    with refused(message):
        device_arrays.make_device_output(check(library), hidden, out)


def test_an_output_that_cannot_be_written_is_refused(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = make(library, "hidden_states")
    with refused("out is an array in the host's memory"):
        on_host = np.zeros(SHAPES["out"], np.float32)
        device_arrays.make_device_output(check(library), hidden, on_host)
    # CuPy has none, and says nothing of it.
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with refused("out is read-only "):
        read_only = make(CupyArray, "out", is_read_only=True)
        device_arrays.make_device_output(check(library), hidden, read_only)


def test_what_no_library_makes_must_be_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that are neither CuPy's nor torch's."""
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    hidden, out = make(CupyArray, "hidden_states"), make(CupyArray, "out")
    inputs = check(CupyArray)
    with refused("hidden_states is CupyArray, .*pass `out`"):
        device_arrays.make_device_output(inputs, hidden, None)
    assert device_arrays.make_device_output(inputs, hidden, out) == (out, ADDRESSES["out"])
    with refused("hidden_states is CupyArray, .*pass `stream`"):
        device_arrays.stream_of(None, hidden)


def test_an_output_is_made_on_the_calls_stream(library: Any) -> None:
    """What was freed on another stream may still be in use there."""
    hidden, inputs = make(library, "hidden_states"), check(library)
    USED_STREAMS.clear()
    current = device_arrays.stream_of(None, hidden)
    for stream in (None, current):
        device_arrays.make_device_output(inputs, hidden, None, stream)
    assert USED_STREAMS == []
    _, address = device_arrays.make_device_output(inputs, hidden, None, 77)
    assert address == ADDRESSES["out"]
    # The default stream need not be the current one.
    device_arrays.make_device_output(inputs, hidden, None, 0)
    assert USED_STREAMS == [(0, 77), (0, 0)]


# --- streams ------------------------------------------------------------------------------


def test_streams_are_the_drivers(library: Any) -> None:
    hidden = make(library, "hidden_states")
    current = {CupyArray: 100, Tensor: 200}[library] + DEVICE
    for stream, handle in (
        (None, current),
        (SimpleNamespace(ptr=7), 7),
        (SimpleNamespace(cuda_stream=8), 8),
        (0, 0),
        (9, 9),
    ):
        assert device_arrays.stream_of(stream, hidden) == handle


@pytest.mark.parametrize("stream", ["0", -1, 1.5, object()])
def test_what_is_no_stream_is_refused(library: Any, stream: Any) -> None:
    with refused("stream is .*; pass a cupy.cuda.Stream, a torch.cuda.Stream, its handle, or None"):
        device_arrays.stream_of(stream, make(library, "hidden_states"))
