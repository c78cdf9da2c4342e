"""kernels/move.cu: everything is copied as it is, and the flag is set after all of it."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from moeshm._words import store_word, wait_for_word
from moeshm.backends import Ids, Weights
from moeshm.backends.gpu.mover import Answer, Given, Signal, Taken
from moeshm.dtypes import Array, DType, narrow, widen
from tests.simt import KernelError, Module, Order, compile, guarded

from .harness import ORDERS, same_bits

BLOCK = 256
SEQUENCE = 0xFFFFFFFE
UNWRITTEN = 0xEE
NO_EXPERT = 0x7FFFFFFF
#: Far longer than a kernel takes that waits for nothing.
WAITS_S = 0.3
#: Far longer than anything takes.
PATIENCE_NS = 30 * 10**9
#: Vectors of 16 bytes and pairs: none, fewer than a block's threads, about as many as what those
#: load together, and more than several blocks do.
SIZES = [(0, 0), (1, 1), (3, 8), (255, 33), (256, 256), (257, 511), (2049, 7), (6001, 1300)]


@pytest.fixture(scope="module", params=[32, 64])
def module(request: pytest.FixtureRequest) -> Module:
    return compile("move.cu", {}, request.param)


def draw_bytes(n_vectors: int) -> Array:
    """Random ones, which end where memory ends."""
    return guarded(np.random.default_rng(n_vectors).integers(0, 256, n_vectors * 16, np.uint8))


def unwritten(n_bytes: int) -> Array:
    """For so many bytes."""
    return guarded(np.full(n_bytes, UNWRITTEN, np.uint8))


class Flag:
    """A flag, by default in a word of its own, and the count of blocks."""

    def __init__(self, address: int = 0) -> None:
        self.word = guarded(np.array([SEQUENCE - 1], np.uint32), 4)
        self.count = guarded(np.zeros(1, np.uint32), 4)
        self.signal = Signal(address or self.word.ctypes.data, self.count.ctypes.data, SEQUENCE)

    def assert_set(self) -> None:
        """And the next launch can count."""
        word = ctypes.c_uint32.from_address(self.signal.flag)
        assert word.value == SEQUENCE
        assert self.count.tolist() == [0]


class Slab(NamedTuple):
    """Where a call's arrays go."""

    hidden_states: Array
    topk_ids: Array
    topk_weights: Array

    @classmethod
    def of(cls, n_vectors: int, n_pairs: int) -> Slab:
        """With nothing in it."""
        return cls(unwritten(n_vectors * 16), unwritten(n_pairs * 4), unwritten(n_pairs * 4))

    @property
    def ids(self) -> Ids:
        """As numbers."""
        return self.topk_ids.view(np.int32)

    @property
    def weights(self) -> Weights:
        """As numbers."""
        return self.topk_weights.view(np.float32)


def given_of(hidden: Array, ids: Array, weights: Array, slab: Slab, dtype: DType) -> Given:
    """Weights in that format."""
    return Given(
        *(each.ctypes.data for each in (hidden, ids, weights, *slab)),
        n_bytes=hidden.nbytes,
        n_pairs=ids.size,
        ids_bytes=ids.itemsize,
        weights_dtype=dtype,
    )


def give(
    module: Module,
    hidden: Array,
    ids: Array,
    weights: Array,
    slab: Slab,
    flag: Flag,
    *,
    dtype: DType = DType.F32,
    grid: int = 2,
    order: Order = "forward",
) -> None:
    """Launch it. What is read ends where memory ends."""
    ids, weights = guarded(ids, ids.itemsize), guarded(weights, weights.itemsize)
    given = given_of(hidden, ids, weights, slab, dtype)
    module.launch("give", grid, BLOCK, 0, given, flag.signal, order=order)


class Exchange:
    """A call for `exchange`, its slab and flags; `done` is not set."""

    def __init__(
        self, n_vectors: int, n_pairs: int, ids_dtype: Any = np.int32, dtype: DType = DType.F32
    ) -> None:
        self.hidden, self.slab = draw_bytes(n_vectors), Slab.of(n_vectors, n_pairs)
        ids, weights = draw_pairs(n_pairs, ids_dtype, dtype)
        self.ids, self.weights = guarded(ids, ids.itemsize), guarded(weights, weights.itemsize)
        self.output = guarded(self.hidden[::-1].copy())
        self.slab_out, self.out = (unwritten(n_vectors * 16) for _ in range(2))
        self.given, self.done, self.taken = Flag(), Flag(), Flag()
        self.dtype = dtype

    def launch(self, module: Module, order: Order = "forward") -> None:
        """Returns when the output is taken."""
        given = given_of(self.hidden, self.ids, self.weights, self.slab, self.dtype)
        flags = (each.signal.flag for each in (self.given, self.done, self.taken))
        answer = Answer(self.slab_out.ctypes.data, self.out.ctypes.data, *flags, SEQUENCE)
        module.launch("exchange", 1, BLOCK, 0, given, answer, order=order)

    def answer(self) -> None:
        """As the worker."""
        self.slab_out[:] = self.output
        store_word(self.done.word, 0, SEQUENCE)

    def assert_given(self) -> None:
        """The worker can begin."""
        assert same_bits(self.slab.hidden_states, self.hidden)
        np.testing.assert_array_equal(self.slab.ids, self.ids)
        np.testing.assert_array_equal(self.slab.weights, widen(self.weights))
        self.given.assert_set()


def take(
    module: Module, slab_out: Array, out: Array, flag: Flag, grid: int = 2, order: Order = "forward"
) -> None:
    """Launch it."""
    taken = Taken(slab_out.ctypes.data, out.ctypes.data, n_bytes=out.nbytes)
    module.launch("take", grid, BLOCK, 0, taken, flag.signal, order=order)


@contextlib.contextmanager
def launched(module: Module, kernel: str, grid: int, taken: Taken, flag: Flag) -> Iterator[None]:
    """It runs meanwhile; and it waits, as one that does not has ended long before."""
    thread = threading.Thread(
        target=module.launch, args=(kernel, grid, BLOCK, 0, taken, flag.signal)
    )
    thread.start()
    thread.join(WAITS_S)
    assert thread.is_alive()
    assert flag.word[0] == SEQUENCE - 1
    yield
    thread.join()


def draw_pairs(n_pairs: int, ids_dtype: Any, dtype: DType) -> tuple[Array, Array]:
    """Ids from -1 on, and weights in that format."""
    rng = np.random.default_rng(n_pairs)
    weights = narrow(rng.standard_normal(n_pairs, np.float32), dtype)
    return rng.integers(-1, 300, n_pairs).astype(ids_dtype), weights


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("grid", [1, 2, 7])
@pytest.mark.parametrize(("n_vectors", "n_pairs"), SIZES)
def test_a_calls_arrays_reach_the_slab(
    module: Module, n_vectors: int, n_pairs: int, grid: int, ids_dtype: Any, dtype: DType
) -> None:
    hidden = draw_bytes(n_vectors)
    ids, weights = draw_pairs(n_pairs, ids_dtype, dtype)
    slab, flag = Slab.of(n_vectors, n_pairs), Flag()
    give(module, hidden, ids, weights, slab, flag, dtype=dtype, grid=grid)
    assert same_bits(slab.hidden_states, hidden)
    np.testing.assert_array_equal(slab.ids, ids)
    np.testing.assert_array_equal(slab.weights, widen(weights))
    flag.assert_set()


@pytest.mark.parametrize("grid", [1, 2, 7])
@pytest.mark.parametrize("n_vectors", [size for size, _ in SIZES])
def test_an_output_reaches_the_caller(module: Module, n_vectors: int, grid: int) -> None:
    slab_out, out, flag = draw_bytes(n_vectors), unwritten(n_vectors * 16), Flag()
    take(module, slab_out, out, flag, grid)
    assert same_bits(out, slab_out)
    flag.assert_set()


@pytest.mark.parametrize("grid", [1, 2, 7])
def test_an_output_is_awaited(module: Module, grid: int) -> None:
    """By all blocks; the flag is set, and the output written, while they look."""
    n_vectors = 3000
    source, slab_out = draw_bytes(n_vectors), unwritten(n_vectors * 16)
    out, done, flag = unwritten(n_vectors * 16), Flag(), Flag()
    taken = Taken(slab_out.ctypes.data, out.ctypes.data, done.signal.flag, out.nbytes)
    with launched(module, "await_and_take", grid, taken, flag):
        slab_out[:] = source
        store_word(done.word, 0, SEQUENCE)
    assert same_bits(out, source)
    flag.assert_set()


def test_a_kernel_ahead_awaits_and_does_nothing_else(module: Module) -> None:
    out, done, flag = unwritten(48), Flag(), Flag()
    taken = Taken(draw_bytes(3).ctypes.data, out.ctypes.data, done.signal.flag, out.nbytes)
    with launched(module, "await_done", 1, taken, flag):
        store_word(done.word, 0, SEQUENCE)
    assert same_bits(out, unwritten(48))
    assert flag.word[0] == SEQUENCE - 1


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
@pytest.mark.parametrize(("n_vectors", "n_pairs"), SIZES)
def test_a_call_is_exchanged(
    module: Module, n_vectors: int, n_pairs: int, ids_dtype: Any, dtype: DType
) -> None:
    call = Exchange(n_vectors, n_pairs, ids_dtype, dtype)
    call.answer()
    call.launch(module)
    call.assert_given()
    assert same_bits(call.out, call.output)
    call.taken.assert_set()


def test_an_exchange_waits_for_the_output(module: Module) -> None:
    """With its arrays given, and nothing taken."""
    call = Exchange(2048, 64)
    thread = threading.Thread(target=call.launch, args=(module,))
    thread.start()
    assert wait_for_word(call.given.word, 0, SEQUENCE, PATIENCE_NS, 0)
    call.assert_given()
    thread.join(WAITS_S)
    assert thread.is_alive()
    assert call.taken.word[0] == SEQUENCE - 1
    assert same_bits(call.out, unwritten(call.out.nbytes))
    call.answer()
    thread.join()
    assert same_bits(call.out, call.output)
    call.taken.assert_set()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("part", Slab._fields)
def test_an_exchange_gives_after_every_store(module: Module, part: str, order: Order) -> None:
    """The flag is in one of the arrays: what is stored there later would be found in its place."""
    call = Exchange(3000, 1100, np.int64, DType.F16)
    target = getattr(call.slab, part)
    call.answer()
    for word in (0, 700, target.nbytes // 4 - 1):
        call.given = Flag(target.ctypes.data + word * 4)
        call.launch(module, order)
        call.given.assert_set()


@pytest.mark.parametrize("order", ORDERS)
def test_an_exchange_takes_after_every_store(module: Module, order: Order) -> None:
    call = Exchange(3000, 8)
    call.answer()
    for word in (0, 4 * BLOCK, call.out.nbytes // 4 - 1):
        call.taken = Flag(call.out.ctypes.data + word * 4)
        call.launch(module, order)
        call.taken.assert_set()


@pytest.mark.parametrize("order", ORDERS)
def test_an_exchange_sets_no_flag_before_the_last_load(module: Module, order: Order) -> None:
    """The flags are in what is read."""
    for word in (0, 4 * BLOCK, 3000 * 4 - 1):
        call = Exchange(3000, 8)
        call.answer()
        before = call.hidden.copy()
        call.given = Flag(call.hidden.ctypes.data + word * 4)
        call.taken = Flag(call.slab_out.ctypes.data + word * 4)
        call.launch(module, order)
        assert same_bits(call.slab.hidden_states, before)
        assert same_bits(call.out, call.output)
        call.given.assert_set()
        call.taken.assert_set()


def test_a_flag_of_later_calls_is_not_awaited(module: Module) -> None:
    """As words are compared on a circle."""
    source, out, flag = draw_bytes(3), unwritten(48), Flag()
    done = guarded(np.array([5], np.uint32), 4)
    taken = Taken(source.ctypes.data, out.ctypes.data, done.ctypes.data, out.nbytes)
    module.launch("await_and_take", 1, BLOCK, 0, taken, flag.signal)
    assert same_bits(out, source)


def test_wide_ids_stay_what_they_are_or_become_refused_ones(module: Module) -> None:
    """An id must not become another one that there is an expert for."""
    held = [0, -1, -7, 0x7FFFFFFF, -0x80000000]
    wide = [1 << 31, 1 << 32, (1 << 32) + 5, -(1 << 31) - 1, -(1 << 32), (1 << 63) - 1, -(1 << 63)]
    ids = np.array([*held, *wide], np.int64)
    slab = Slab.of(0, ids.size)
    give(module, draw_bytes(0), ids, np.zeros(ids.size, np.float32), slab, Flag())
    assert slab.ids.tolist() == [*held, *(NO_EXPERT for _ in wide)]


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_weights_are_widened_exactly(module: Module, dtype: DType) -> None:
    """All of that format, subnormals and infinities included."""
    weights = np.arange(1 << 16, dtype=np.uint16).view(dtype.numpy)
    slab = Slab.of(0, weights.size)
    ids = np.zeros(weights.size, np.int32)
    give(module, draw_bytes(0), ids, weights, slab, Flag(), dtype=dtype, grid=3)
    expected = widen(weights)
    is_nan = np.isnan(expected)
    assert np.array_equal(np.isnan(slab.weights), is_nan)
    assert same_bits(slab.weights[~is_nan], expected[~is_nan])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", [1, 3])
@pytest.mark.parametrize("part", Slab._fields)
def test_given_is_set_after_every_store(module: Module, part: str, grid: int, order: Order) -> None:
    """The flag is in one of the arrays: what is stored there later would be found in its place."""
    n_vectors, n_pairs = 3000, 1100
    hidden = draw_bytes(n_vectors)
    ids, weights = draw_pairs(n_pairs, np.int64, DType.F16)
    slab = Slab.of(n_vectors, n_pairs)
    target = getattr(slab, part)
    for word in (0, 700, target.nbytes // 4 - 1):
        flag = Flag(target.ctypes.data + word * 4)
        give(module, hidden, ids, weights, slab, flag, dtype=DType.F16, grid=grid, order=order)
        flag.assert_set()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", [1, 3])
def test_taken_is_set_after_every_store(module: Module, grid: int, order: Order) -> None:
    n_vectors = 7000
    slab_out, out = draw_bytes(n_vectors), unwritten(n_vectors * 16)
    for word in (0, 4 * BLOCK, out.nbytes // 4 - 1):
        flag = Flag(out.ctypes.data + word * 4)
        take(module, slab_out, out, flag, grid, order)
        flag.assert_set()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grid", [2, 3, 20])
def test_no_flag_is_set_before_the_last_load(module: Module, grid: int, order: Order) -> None:
    """The flag is in what is read: blocks that come later would find it there."""
    source = draw_bytes(7000)
    words = source.view(np.uint32)
    for word in (0, 4 * BLOCK, words.size // 2, words.size - 1):
        before, out = source.copy(), unwritten(source.nbytes)
        take(module, source, out, Flag(words[word:].ctypes.data), grid, order)
        assert same_bits(out, before)
        assert words[word] == SEQUENCE
        words[word] = before.view(np.uint32)[word]


def test_arrays_that_are_not_aligned_are_a_fault(module: Module) -> None:
    """What `device_arrays` refuses would be one on a GPU, too."""
    with pytest.raises(KernelError):
        take(module, draw_bytes(4)[8:], unwritten(56)[:48], Flag())
