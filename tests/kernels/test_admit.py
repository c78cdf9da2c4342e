"""kernels/admit.cu: what a client wrote is checked and copied, and each id is looked at once;
activations are brought along, in the format that is asked for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from moeshm.backends.gpu.abi import Admitted, Asked
from moeshm.dtypes import Array, DType, narrow, widen
from tests.simt import KernelError, Module, Order, compile, guarded

from .harness import ORDERS

Ints = npt.NDArray[np.int32]
_UNWRITTEN = -77
#: Ids that are no expert's, of 6.
HOSTILE = (6, 7, 1 << 20, (1 << 31) - 1, -2, -(1 << 31))


@pytest.fixture(params=[32, 64], ids="WARP={}".format)
def module(request: pytest.FixtureRequest) -> Module:
    return compile("admit.cu", {}, request.param)


class Call:
    """Ids to admit, with weights; arrays end where memory ends."""

    def __init__(
        self, ids: list[int] | Ints, slots: list[int] | None = None, n_ids: int = 6
    ) -> None:
        self.ids = guarded(np.array(ids, np.int32), 4)
        self.weights = guarded(np.arange(self.ids.size, dtype=np.float32), 4)
        self.weights[self.ids < 0] = np.nan
        self.slots = None if slots is None else guarded(np.array(slots, np.int32), 4)
        self.found_ids = guarded(np.full(self.ids.size, _UNWRITTEN, np.int32), 4)
        self.found_weights = guarded(np.full(self.ids.size, -1, np.float32), 4)
        #: None for none.
        self.refused: npt.NDArray[np.uint32] | None = guarded(np.zeros(1, np.uint32), 4)
        self.n_ids = n_ids
        #: Activations, and where they are brought to; None where they stay where they are.
        self.x: tuple[Array, Array] | None = None
        self.dtypes = DType.F32, DType.F32

    def launch(
        self, module: Module, grid: int = 2, *, order: Order = "forward", first_pair: int = 0
    ) -> Ints:
        """The ids that kernels get."""
        x, n_values = (0, 0), 0
        if self.x is not None:
            x, n_values = (self.x[0].ctypes.data, self.x[1].ctypes.data), self.x[1].size
        asked = Asked(
            ids=self.ids.ctypes.data,
            weights=self.weights.ctypes.data,
            slots=0 if self.slots is None else self.slots.ctypes.data,
            x=x[0],
            n_pairs=self.ids.size,
            n_ids=self.n_ids,
            first_pair=first_pair,
            x_dtype=self.dtypes[0],
        )
        admitted = Admitted(
            ids=self.found_ids.ctypes.data,
            weights=self.found_weights.ctypes.data,
            refused=0 if self.refused is None else self.refused.ctypes.data,
            x=x[1],
            n_values=n_values,
            x_dtype=self.dtypes[1],
        )
        module.launch("admit", grid, 256, 0, asked, admitted, order=order)
        np.testing.assert_array_equal(self.found_weights, self.weights)
        return self.found_ids

    @property
    def told(self) -> int:
        """What the flag says."""
        assert self.refused is not None
        return int(self.refused[0])


@pytest.mark.parametrize("n_pairs", [1, 31, 256, 257, 1500])
@pytest.mark.parametrize("grid", [1, 3])
@pytest.mark.parametrize("has_table", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_ids_that_are_right(
    module: Module, n_pairs: int, grid: int, has_table: bool, order: Order
) -> None:
    ids = np.random.default_rng(n_pairs).integers(-1, 6, n_pairs, np.int32)
    slots = [3, 9, 0, 2, 1, 7] if has_table else None
    call = Call(ids, slots)
    expected = ids if slots is None else np.where(ids < 0, -1, np.array([*slots])[ids])
    np.testing.assert_array_equal(call.launch(module, grid, order=order), expected)
    assert call.told == 0


@pytest.mark.parametrize("wrong", HOSTILE)
@pytest.mark.parametrize("has_table", [False, True])
def test_one_that_is_wrong_is_told_of_and_becomes_empty(
    module: Module, wrong: int, has_table: bool
) -> None:
    """What lies around a table is not looked at: it ends where memory ends."""
    ids = [0, -1, 5, wrong, 2]
    call = Call(ids, [0, 1, 2, 3, 4, 5] if has_table else None)
    assert call.launch(module).tolist() == [0, -1, 5, -1, 2]
    assert call.told == 4


def test_an_expert_that_is_not_here(module: Module) -> None:
    call = Call([0, 1, -1, 2], [4, -1, 8], n_ids=3)
    assert call.launch(module).tolist() == [4, -1, -1, 8]
    assert call.told == 2


@pytest.mark.parametrize("order", ORDERS)
def test_of_several_one_is_told_of(module: Module, order: Order) -> None:
    ids = np.zeros(1000, np.int32)
    wrong = [3, 400, 999]
    ids[wrong] = HOSTILE[:3]
    call = Call(ids)
    found = call.launch(module, order=order)
    assert (found[wrong] == -1).all()
    assert np.count_nonzero(found) == 3
    assert call.told - 1 in wrong


def test_pairs_are_counted_over_all_parts_of_a_call(module: Module) -> None:
    call = Call([0, 1, 99])
    call.launch(module, first_pair=70_000)
    assert call.told == 70_003


def test_no_experts_at_all(module: Module) -> None:
    call = Call([-1, 0, -1], n_ids=0)
    assert call.launch(module).tolist() == [-1, -1, -1]
    assert call.told == 2


def test_the_flag_is_only_touched_where_something_is_wrong(module: Module) -> None:
    call = Call([0, 1, -1])
    call.refused = None
    call.launch(module)
    call = Call([0, 6])
    call.refused = None
    with pytest.raises(KernelError, match="admit"):
        call.launch(module)


@pytest.mark.parametrize("source", DType)
@pytest.mark.parametrize("to", DType)
@pytest.mark.parametrize("n_values", [8, 1024, 4104])
@pytest.mark.parametrize("grid", [1, 2, 6])
def test_activations_are_brought_along(
    module: Module, source: DType, to: DType, n_values: int, grid: int
) -> None:
    """As the package converts them; a grid has threads for all values, or not."""
    call = Call(np.arange(-1, 700, dtype=np.int32) % 6)
    values = np.random.default_rng(n_values).standard_normal(n_values, np.float32)
    found = guarded(np.full(n_values, 77, to.numpy), 16)
    call.x, call.dtypes = (guarded(narrow(values, source), 16), found), (source, to)
    np.testing.assert_array_equal(call.launch(module, grid), call.ids)
    np.testing.assert_array_equal(found, narrow(widen(call.x[0]), to))
    assert call.told == 0
