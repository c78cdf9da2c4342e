"""What callers hand over: accepted as the same numbers, or refused with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from moeshm import arrays
from moeshm.arrays import Inputs
from moeshm.dtypes import DType, narrow, widen
from moeshm.errors import InvalidCall
from moeshm.layers import LayerInfo
from tests.wire import dense_info, partial_info

HIDDEN_SIZE = 8
DENSE = dense_info(HIDDEN_SIZE, 5, 3)
PARTIAL = partial_info(HIDDEN_SIZE, 9, (8, 0, 4), 3)
HIDDEN = np.arange(4 * HIDDEN_SIZE, dtype=np.float32).reshape(4, HIDDEN_SIZE)
IDS = np.array([[0, 1, -1], [2, 0, 1], [-1, -1, -1], [1, 1, 1]], np.int32)
WEIGHTS = np.linspace(0, 1, 12, dtype=np.float32).reshape(4, 3)


def check(
    hidden_states: Any = HIDDEN,
    topk_ids: Any = IDS,
    topk_weights: Any = WEIGHTS,
    *,
    info: LayerInfo = DENSE,
    global_ids: bool = False,
) -> Inputs:
    """As the client does; what comes out can travel."""
    inputs = arrays.check(6, info, hidden_states, topk_ids, topk_weights, global_ids)
    for array in (inputs.hidden_states, inputs.topk_ids, inputs.topk_weights):
        assert type(array) is np.ndarray
        assert array.flags.c_contiguous
        assert array.flags.aligned
    assert inputs.topk_ids.dtype == np.int32
    assert inputs.topk_weights.dtype == np.float32
    assert inputs.hidden_states.dtype == inputs.dtype.numpy
    return inputs


def unaligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same values, at an odd address."""
    memory = np.frombuffer(bytearray(array.nbytes + 1), np.uint8)
    odd = memory[1:].view(array.dtype).reshape(array.shape)
    odd[...] = array
    assert not odd.flags.aligned
    return odd


def spread(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same values, with gaps between them."""
    return np.repeat(np.repeat(array, 2, axis=0), 2, axis=1)[::2, ::2]


def fortran(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same values, columns first."""
    return np.asfortranarray(array)


# --- accepted -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("global_ids", [False, True])
def test_plain_arrays_travel_as_they_are(dtype: DType, global_ids: bool) -> None:
    hidden = narrow(HIDDEN, dtype)
    inputs = check(hidden, global_ids=global_ids)
    assert inputs.hidden_states is hidden
    assert inputs.topk_ids is IDS
    assert inputs.topk_weights is WEIGHTS
    assert (inputs.dtype, inputs.n_empty, inputs.is_torch) == (dtype, 1, False)


@pytest.mark.parametrize("change", [unaligned, spread, fortran, np.flipud])
def test_any_layout_in_memory_is_accepted(change: Any) -> None:
    given = [change(array) for array in (HIDDEN, IDS, WEIGHTS)]
    inputs = check(*given)
    for array, came in zip(
        given, (inputs.hidden_states, inputs.topk_ids, inputs.topk_weights), strict=True
    ):
        np.testing.assert_array_equal(came, array)
    assert inputs.n_empty == 1


@pytest.mark.parametrize(
    "dtype", [np.int64, np.int16, np.int8, np.uint8, np.uint32, np.uint64, ">i4"]
)
@pytest.mark.parametrize("change", [np.array, fortran, spread])
def test_ids_of_any_integer_dtype_are_accepted(dtype: Any, change: Any) -> None:
    ids = np.abs(IDS)
    inputs = check(topk_ids=change(ids.astype(dtype)))
    np.testing.assert_array_equal(inputs.topk_ids, ids)


def test_weights_of_less_precision_are_widened() -> None:
    inputs = check(topk_weights=WEIGHTS.astype(np.float16))
    np.testing.assert_array_equal(inputs.topk_weights, WEIGHTS.astype(np.float16))


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_fewer_columns_than_top_k_are_accepted(columns: int) -> None:
    inputs = check(topk_ids=IDS[:, :columns], topk_weights=WEIGHTS[:, :columns])
    np.testing.assert_array_equal(inputs.topk_ids, IDS[:, :columns])


@pytest.mark.parametrize("ids", [IDS[:0], IDS[2:3], np.full((4, 3), -1, np.int64)])
def test_no_tokens_and_no_experts_are_accepted(ids: npt.NDArray[Any]) -> None:
    n_tokens = len(ids)
    inputs = check(HIDDEN[:n_tokens], ids, WEIGHTS[:n_tokens])
    assert inputs.n_empty == n_tokens


def test_global_ids_become_local_ones() -> None:
    ids = np.array([[8, 4, -1], [0, 0, 8], [-1, -1, -1], [4, 4, 4]])
    for given in (ids, ids.astype(np.int32), fortran(ids)):
        inputs = check(topk_ids=given, info=PARTIAL, global_ids=True)
        np.testing.assert_array_equal(
            inputs.topk_ids, [[0, 2, -1], [1, 1, 0], [-1, -1, -1], [2, 2, 2]]
        )
        assert inputs.n_empty == 1
    assert ids[0, 0] == 8


# --- refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"hidden_states": HIDDEN[0]}, r"shape \[8\]; layer 6 takes \[n_tokens, 8\]"),
        ({"hidden_states": HIDDEN[:, :7]}, r"shape \[4, 7\]; layer 6 takes \[n_tokens, 8\]"),
        ({"hidden_states": HIDDEN[None]}, r"shape \[1, 4, 8\]"),
        ({"hidden_states": np.float32(1)}, "hidden_states is float32; pass a NumPy array"),
        ({"hidden_states": np.array(1, np.float32)}, r"hidden_states has shape \[\]"),
        ({"hidden_states": HIDDEN.astype(np.float64)}, "hidden_states has dtype float64"),
        ({"hidden_states": HIDDEN.astype(">f4")}, "hidden_states has dtype >f4"),
        ({"hidden_states": HIDDEN.tolist()}, "hidden_states is list; pass a NumPy array"),
        ({"hidden_states": None}, "hidden_states is NoneType"),
        ({"topk_ids": IDS[:3]}, r"topk_ids has shape \[3, 3\]; layer 6 takes \[4, 1\.\.3\]"),
        ({"topk_ids": IDS[0]}, r"topk_ids has shape \[3\]"),
        ({"topk_ids": IDS[:, :0]}, r"topk_ids has shape \[4, 0\]"),
        ({"topk_ids": np.zeros((4, 4), np.int32)}, r"topk_ids has shape \[4, 4\].*1\.\.3"),
        ({"topk_ids": IDS.astype(np.float32)}, "topk_ids has dtype float32; pass int32"),
        ({"topk_ids": IDS >= 0}, "topk_ids has dtype bool"),
        ({"topk_ids": IDS.tolist()}, "topk_ids is list"),
        ({"topk_ids": IDS + np.int64(1 << 32)}, "a number that int32 cannot"),
        ({"topk_ids": np.full((4, 3), 2**64 - 1, np.uint64)}, "a number that int32 cannot"),
        ({"topk_ids": IDS + 3}, r"expert id 5; local ids of layer 6 are 0\.\.4, and -1"),
        ({"topk_ids": IDS.astype(np.int64) - 1}, r"expert id -2; local ids"),
        ({"topk_weights": WEIGHTS[:, :2]}, r"topk_weights has shape \[4, 2\].*\[4, 3\]"),
        ({"topk_weights": WEIGHTS[:3]}, r"topk_weights has shape \[3, 3\]"),
        ({"topk_weights": WEIGHTS.astype(np.float64)}, "topk_weights has dtype float64"),
        ({"topk_weights": WEIGHTS.astype(np.uint16)}, "topk_weights has dtype uint16; pass"),
        ({"topk_weights": 1.0}, "topk_weights is float"),
    ],
)
@pytest.mark.parametrize("global_ids", [False, True])
def test_what_cannot_travel_is_refused_by_name(
    changed: dict[str, Any], says: str, global_ids: bool
) -> None:
    says = says.replace("local ids", "(local|global) ids")
    with pytest.raises(InvalidCall, match=says):
        check(**changed, global_ids=global_ids)


@pytest.mark.parametrize(
    ("expert", "says"),
    [
        (1, "expert 1 of layer 6 is not on this worker; it holds 0, 4, 8"),
        (9, r"expert id 9; global ids of layer 6 are 0\.\.8"),
        (-2, "expert id -2"),
    ],
)
def test_a_global_id_that_is_not_held_is_refused(expert: int, says: str) -> None:
    ids = np.full((4, 3), expert, np.int32)
    with pytest.raises(InvalidCall, match=says):
        check(topk_ids=ids, info=PARTIAL, global_ids=True)


# --- the result ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DType)
def test_the_result_is_like_hidden_states(dtype: DType) -> None:
    output, array = arrays.make_output(check(narrow(HIDDEN, dtype)), None)
    assert output is array
    assert (array.shape, array.dtype) == (HIDDEN.shape, dtype.numpy)


def test_the_result_goes_where_the_caller_says() -> None:
    out = np.empty_like(HIDDEN)
    output, array = arrays.make_output(check(), out)
    assert output is out
    assert array is out


def _read_only() -> npt.NDArray[np.float32]:
    array = np.empty_like(HIDDEN)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "out",
    [
        np.empty((4, 7), np.float32),
        np.empty((3, 8), np.float32),
        np.empty(32, np.float32),
        np.empty((4, 8), np.float16),
        np.empty((4, 8), np.float64),
        np.empty((4, 8), ">f4"),
        np.empty((4, 8), np.float32, order="F"),
        spread(HIDDEN),
        unaligned(HIDDEN),
        _read_only(),
        [[0.0] * 8] * 4,
        7,
    ],
    ids=[
        "too narrow",
        "too short",
        "flat",
        "float16",
        "float64",
        "big-endian",
        "column-major",
        "spread",
        "unaligned",
        "read-only",
        "a list",
        "a number",
    ],
)
def test_an_out_that_cannot_be_written_whole_is_refused(out: Any) -> None:
    with pytest.raises(InvalidCall, match=r"pass a writable, contiguous float32 \[4, 8\]"):
        arrays.make_output(check(), out)


# --- torch --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch() -> Any:
    """The module, if it is installed."""
    return pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", DType)
def test_tensors_travel_without_a_copy(torch: Any, dtype: DType) -> None:
    stored = narrow(HIDDEN, dtype)
    hidden = torch.from_numpy(HIDDEN).to(_torch_dtype(torch, dtype))
    inputs = check(hidden, torch.from_numpy(IDS), torch.from_numpy(WEIGHTS))
    assert inputs.dtype is dtype
    assert inputs.is_torch
    assert inputs.hidden_states.ctypes.data == hidden.data_ptr()
    np.testing.assert_array_equal(inputs.hidden_states, stored)
    assert inputs.topk_ids.ctypes.data == IDS.ctypes.data
    output, array = arrays.make_output(inputs, None)
    assert output.dtype == hidden.dtype
    assert output.shape == hidden.shape
    array[...] = stored
    assert torch.equal(output, hidden)


def test_tensors_of_any_layout_are_accepted(torch: Any) -> None:
    hidden = torch.from_numpy(HIDDEN.T.copy()).t().requires_grad_()
    ids = torch.from_numpy(IDS.astype(np.int64).T.copy()).t()
    inputs = check(hidden, ids, torch.from_numpy(WEIGHTS.T.copy()).t().half())
    np.testing.assert_array_equal(inputs.hidden_states, HIDDEN)
    np.testing.assert_array_equal(inputs.topk_ids, IDS)
    np.testing.assert_array_equal(inputs.topk_weights, WEIGHTS.astype(np.float16))


def test_bfloat16_weights_are_widened(torch: Any) -> None:
    inputs = check(topk_weights=torch.from_numpy(WEIGHTS).bfloat16())
    np.testing.assert_array_equal(inputs.topk_weights, widen(narrow(WEIGHTS, DType.BF16)))
    assert not inputs.is_torch


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"hidden_states": "double"}, "hidden_states has dtype float64"),
        ({"hidden_states": "int"}, "hidden_states has dtype int32"),
        ({"hidden_states": "meta"}, r"a tensor on meta; pass it as tensor\.cpu\(\)"),
        ({"topk_ids": "float"}, "topk_ids has dtype float32"),
        ({"topk_weights": "double"}, "topk_weights has dtype float64"),
    ],
)
def test_tensors_that_cannot_travel_are_refused_by_name(
    torch: Any, changed: dict[str, str], says: str
) -> None:
    given = {"hidden_states": HIDDEN, "topk_ids": IDS, "topk_weights": WEIGHTS}
    ((name, how),) = changed.items()
    tensor = torch.from_numpy(given[name])
    bad = tensor.to("meta") if how == "meta" else getattr(tensor, how)()
    with pytest.raises(InvalidCall, match=says):
        check(**{name: bad})


@pytest.mark.parametrize("dtype", DType)
def test_the_result_goes_into_a_tensor(torch: Any, dtype: DType) -> None:
    stored = narrow(HIDDEN, dtype)
    out = torch.zeros(4, 8, dtype=_torch_dtype(torch, dtype))
    output, array = arrays.make_output(check(stored), out)
    assert output is out
    array[...] = stored
    assert torch.equal(out, torch.from_numpy(HIDDEN).to(out.dtype))


def test_a_tensor_that_would_be_copied_is_refused(torch: Any) -> None:
    """The result would go into the copy."""
    for out in (torch.zeros(8, 4).t(), torch.zeros(4, 16)[:, ::2], torch.zeros(4, 8).half()):
        with pytest.raises(InvalidCall, match="pass a writable, contiguous float32"):
            arrays.make_output(check(), out)


def _torch_dtype(torch: Any, dtype: DType) -> Any:
    return {DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16}[dtype]
