"""Libraries' functions in C for their arrays: torch's own, none, others', and what fails."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import pytest

from moeshm.dtypes import DType
from tests.unit.fake_dlpack import Array, Library
from tests.unit.test_device_arrays import ADDRESSES, HIDDEN_SIZE, N_TOKENS, TOP_K
from tests.unit.test_device_arrays_fast import (
    CPU,
    STREAM,
    call,
    check,
    check_by_python,
    looked_at,
    make,
)


@pytest.fixture
def library() -> Library:
    """One with all functions."""
    return Library()


def test_torchs_own_functions() -> None:
    """On tensors in the host's memory, which are taken for a GPU's here."""
    torch = pytest.importorskip("torch")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has no functions for DLPack in C")

    def seen(**changes: Any) -> Any:
        made = {
            "hidden_states": torch.zeros(N_TOKENS, HIDDEN_SIZE, dtype=torch.bfloat16),
            "topk_ids": torch.zeros(N_TOKENS, TOP_K, dtype=torch.int64),
            "topk_weights": torch.zeros(N_TOKENS, TOP_K),
            "out": torch.zeros(N_TOKENS, HIDDEN_SIZE, dtype=torch.bfloat16),
        }
        arrays = [*(made | changes).values()]
        # None of these is on a GPU.
        assert looked_at(arrays, device=0) is None
        found = looked_at(arrays, device_type=CPU, device=0)
        if found is not None:
            hidden, ids, weights, out = arrays
            assert found[:3] == (
                (
                    hidden.data_ptr(), ids.data_ptr(), weights.data_ptr(), N_TOKENS, HIDDEN_SIZE,
                    TOP_K, DType.BF16, ids.element_size(),
                    DType.F32, (hidden, ids, weights), 0,
                ),
                out.data_ptr(),
                STREAM,
            )  # fmt: skip
        return found

    assert seen() is not None
    assert seen(topk_ids=torch.zeros(N_TOKENS, TOP_K, dtype=torch.int32)) is not None
    wide = torch.zeros(N_TOKENS, 2 * HIDDEN_SIZE, dtype=torch.bfloat16)
    for name in ("hidden_states", "out"):
        for wrong in (
            wide[:, :HIDDEN_SIZE],
            torch.zeros(HIDDEN_SIZE, N_TOKENS, dtype=torch.bfloat16).T,
            torch.zeros(N_TOKENS, HIDDEN_SIZE, dtype=torch.uint16),
            torch.zeros(N_TOKENS, HIDDEN_SIZE, dtype=torch.bfloat16, device="meta"),
            torch.zeros(N_TOKENS, HIDDEN_SIZE, dtype=torch.bfloat16).to_sparse(),
            torch.zeros(N_TOKENS, HIDDEN_SIZE, dtype=torch.complex64).conj(),
        ):
            assert seen(**{name: wrong}) is None


def _is_another(library: Library) -> None:
    library.exchange.version.major = 2


def _has_another_name(library: Library) -> None:
    library.type.__dlpack_c_exchange_api__ = library.capsule(b"dltensor")


def _is_a_number(library: Library) -> None:
    library.type.__dlpack_c_exchange_api__ = ctypes.addressof(library.exchange)


def _is_none(library: Library) -> None:
    library.type.__dlpack_c_exchange_api__ = None


def _lacks(function: str) -> Any:
    return lambda library: setattr(library.exchange, function, None)


@pytest.mark.parametrize(
    "change",
    [_is_another, _has_another_name, _is_a_number, _is_none, _lacks("look_at"), _lacks("export")],
)
def test_functions_that_are_not_there(library: Library, change: Any) -> None:
    """Python's way goes on."""
    change(library)
    arrays = call(library.type)
    assert looked_at(arrays) is None
    assert check(arrays) == (6, check_by_python(arrays), arrays[3], ADDRESSES["out"], STREAM)


def test_a_type_that_raises(library: Library) -> None:
    class Meta(type):
        @property
        def __dlpack_c_exchange_api__(cls) -> Any:
            raise library.error

    class Broken(Array, metaclass=Meta):
        pass

    arrays = call(library.type, topk_ids=make(Broken, "topk_ids"))
    assert looked_at(arrays) is None
    assert check(arrays)[1] == check_by_python(arrays)
    library.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        looked_at(arrays)


@pytest.mark.parametrize("function", ["look_at", "export"])
def test_functions_that_fail(library: Library, function: str) -> None:
    """As torch's do for what DLPack has no words for; Python's way goes on."""
    arrays = call(library.type)
    library.fail(function, ValueError("no array of that kind"))
    counts = [sys.getrefcount(array) for array in arrays]
    for _ in range(100):
        assert looked_at(arrays) is None
    assert [sys.getrefcount(array) for array in arrays] == counts
    assert check(arrays)[1] == check_by_python(arrays)
    library.fail(function, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        looked_at(arrays)


def test_nothing_is_kept(library: Library) -> None:
    arrays = call(library.type)
    looked_at(arrays)
    # What was looked at last may be known, so the type's count is of no use.
    counts = [sys.getrefcount(array) for array in arrays]
    wrong = call(library.type, out=make(library.type, "out", kind="f2"))
    for _ in range(100):
        assert looked_at(arrays) is not None
        assert looked_at([*arrays[:3], wrong[3]]) is None
    assert [sys.getrefcount(array) for array in arrays] == counts
    assert library.n_exported == library.n_freed == 201
