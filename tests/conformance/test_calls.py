"""A call's result does not depend on how it travels: every transport, format and kind of array."""

from __future__ import annotations

import importlib
import importlib.util
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import moeshm
from moeshm import session
from moeshm._formats import add_rows
from moeshm.backends import Ids, Weights
from moeshm.dtypes import DType, dtype_of, narrow, widen
from moeshm.holdings import Holdings
from moeshm.layers import LayerInfo
from moeshm.session import ControlSocket
from moeshm.turns import Turns
from moeshm.views import SessionViews
from moeshm.worker import SessionServer
from tests.wire import PATIENCE_S, dense_info, meanwhile, partial_info

HIDDEN_SIZE = 32
DENSE, PARTIAL = 0, 1
HELD = (5, 0, 3)
MAX_TOKENS = 8


class SumOfIds:
    """An expert multiplies a row by its local id and 1."""

    name = "sum of ids"

    def __init__(self) -> None:
        self.layers: Mapping[int, LayerInfo] = {
            DENSE: dense_info(HIDDEN_SIZE, 6, 2),
            PARTIAL: partial_info(HIDDEN_SIZE, 6, HELD, 2),
        }

    def ffn(
        self,
        layer: int,  # noqa: ARG002
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
    ) -> None:
        """As `Backend.ffn`."""
        factors = ((topk_ids + 1) * topk_weights).sum(axis=1, keepdims=True, dtype=np.float32)
        # One zero, as bit patterns are compared: no negative one.
        narrow(widen(hidden_states) * factors + np.float32(0), dtype_of(out), out=out)


@pytest.fixture(params=["shared", "stream"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of a worker in a thread, for one session."""
    backend = SumOfIds()
    holdings = Holdings(backend)

    def serve() -> None:
        control = ControlSocket(listener.accept()[0])
        with SessionViews(holdings) as views:
            layers = views.layers
            with session.accept(control, layers, backend.name, MAX_TOKENS, PATIENCE_S) as opened:
                SessionServer(opened, views, Turns(), threading.Event()).serve()

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with meanwhile(serve):
            yield f"{request.param} unix:{tmp_path / 's'}"


def connect(address: str, **named: Any) -> moeshm.ExpertClient:
    """By the transport that the fixture says."""
    transport, _, at = address.partition(" ")
    client = moeshm.connect(at, transport=transport, **named)
    assert client.transport == transport
    return client


def inputs(
    n_tokens: int, dtype: DType = DType.F32, top_k: int = 2
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Small whole numbers, exact in every format; every third row has no expert."""
    rng = np.random.default_rng(n_tokens)
    hidden = narrow(rng.integers(-4, 5, (n_tokens, HIDDEN_SIZE)).astype(np.float32), dtype)
    ids = rng.integers(-1, 6, (n_tokens, top_k)).astype(np.int32)
    ids[::3] = -1
    return hidden, ids, rng.integers(1, 3, (n_tokens, top_k)).astype(np.float32)


def expected(
    hidden: npt.NDArray[Any], ids: npt.NDArray[Any], weights: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """What the worker computes of local ids."""
    out = np.empty_like(hidden)
    SumOfIds().ffn(DENSE, hidden, ids, weights, out)
    return out


@pytest.mark.parametrize("wire_dtype", ["auto", "f32", "f16", "bf16"])
@pytest.mark.parametrize("dtype", DType)
def test_every_format_over_every_wire(address: str, dtype: DType, wire_dtype: str) -> None:
    with connect(address, wire_dtype=wire_dtype) as client:
        # One message, and several.
        for n_tokens in (1, 2, MAX_TOKENS, 5 * MAX_TOKENS + 3):
            given = inputs(n_tokens, dtype)
            result = client.compute(DENSE, *given)
            assert result.dtype == dtype.numpy
            np.testing.assert_array_equal(result, expected(*given))


def test_rows_without_an_expert_are_zeros_and_stay_here(address: str) -> None:
    hidden, ids, weights = inputs(6)
    ids[:] = [[-1, -1], [0, 1], [-1, -1], [2, -1], [-1, 3], [-1, -1]]
    with connect(address) as client:
        out = np.full_like(hidden, 7)
        result = client.compute(DENSE, hidden, ids, weights, out=out)
        assert result is out
        np.testing.assert_array_equal(result, expected(hidden, ids, weights))
        assert client.stats().rows == 3


@pytest.mark.parametrize("wire_dtype", ["auto", "f16"])
@pytest.mark.parametrize("n_tokens", [1, 4, 3 * MAX_TOKENS])
def test_no_expert_at_all_is_zeros(address: str, n_tokens: int, wire_dtype: str) -> None:
    hidden, ids, weights = inputs(n_tokens)
    ids[:] = -1
    with connect(address, wire_dtype=wire_dtype) as client:
        out = np.full_like(hidden, 7)
        client.compute(DENSE, hidden, ids, weights, out=out)
        assert not out.any()
        assert client.stats().messages == 0


@pytest.mark.parametrize("dtype", DType)
def test_no_tokens_is_no_message(address: str, dtype: DType) -> None:
    with connect(address) as client:
        result = client.compute(DENSE, *inputs(0, dtype))
        assert (result.shape, result.dtype) == ((0, HIDDEN_SIZE), dtype.numpy)
        assert client.stats().messages == 0
        given = inputs(2, dtype)
        np.testing.assert_array_equal(client.compute(DENSE, *given), expected(*given))


def test_global_ids_are_the_models(address: str) -> None:
    hidden, _, weights = inputs(4)
    ids = np.array([[5, 3], [0, -1], [-1, -1], [3, 3]])
    local = np.array([[0, 2], [1, -1], [-1, -1], [2, 2]], np.int32)
    with connect(address) as client:
        result = client.compute(PARTIAL, hidden, ids, weights, global_ids=True)
        np.testing.assert_array_equal(result, expected(hidden, local, weights))
        with pytest.raises(moeshm.errors.InvalidCall, match="expert 1 of layer 1 is not on this"):
            client.compute(PARTIAL, hidden, abs(ids - 4), weights, global_ids=True)


def test_a_result_may_replace_its_input(address: str) -> None:
    with connect(address) as client:
        for n_tokens in (2, 3 * MAX_TOKENS):
            hidden, ids, weights = inputs(n_tokens)
            wanted = expected(hidden, ids, weights)
            client.compute(DENSE, hidden, ids, weights, out=hidden)
            np.testing.assert_array_equal(hidden, wanted)


# A mark: the worker of `address` waits for a client, who would not come if the test skipped itself.
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("dtype", DType)
def test_tensors_in_a_tensor_out(address: str, dtype: DType) -> None:
    torch = importlib.import_module("torch")
    kind = {DType.F32: torch.float32, DType.F16: torch.float16, DType.BF16: torch.bfloat16}[dtype]
    with connect(address) as client:
        for n_tokens in (0, 1, 2 * MAX_TOKENS + 1):
            hidden, ids, weights = inputs(n_tokens)
            tensors = [torch.from_numpy(array) for array in (hidden, ids.astype(np.int64), weights)]
            tensors[0] = tensors[0].to(kind)
            wanted = torch.from_numpy(expected(hidden, ids, weights)).to(kind)
            result = client.compute(DENSE, *tensors)
            assert torch.equal(result, wanted)
            out = torch.full_like(wanted, 7)
            assert client.compute(DENSE, *tensors, out=out) is out
            assert torch.equal(out, wanted)
            # Mixed: what the hidden states are decides.
            assert torch.equal(client.compute(DENSE, tensors[0], ids, weights), wanted)


@pytest.mark.parametrize("slice_tokens", [1, 3, 4, 100])
@pytest.mark.parametrize("wire_dtype", DType)
def test_slices_and_formats_of_one_call(address: str, slice_tokens: int, wire_dtype: DType) -> None:
    n_tokens = 2 * MAX_TOKENS + 3
    hidden, ids, weights = inputs(n_tokens)
    ids[4:8] = -1  # a whole window of 4 that need not be sent
    is_sent = np.asarray((ids >= 0).any(axis=1))
    cut = min(slice_tokens, n_tokens)
    windows = [int(is_sent[start : start + cut].sum()) for start in range(0, n_tokens, cut)]
    with connect(address) as client:
        how: dict[str, Any] = {"wire_dtype": wire_dtype, "slice_tokens": slice_tokens}
        future = client.submit(DENSE, hidden, ids, weights, **how)
        np.testing.assert_array_equal(future.result(), expected(hidden, ids, weights))
        times = future.times
        assert times is not None
        assert times.messages == sum(-(-rows // MAX_TOKENS) for rows in windows)
        row_bytes = HIDDEN_SIZE * wire_dtype.itemsize
        assert times.bytes_in == times.messages * 64 + is_sent.sum() * row_bytes
        assert times.elapsed_ns >= times.pack_ns > 0
        stats = client.stats()
        assert (stats.messages, stats.rows) == (times.messages, is_sent.sum())
        assert (stats.bytes_in, stats.bytes_out) == (times.bytes_in, times.bytes_out)


@pytest.mark.parametrize("dtype", DType)
def test_a_result_may_be_added_to_a_sum(address: str, dtype: DType) -> None:
    with connect(address) as client:
        for n_tokens in (1, 3, 4 * MAX_TOKENS):
            given = inputs(n_tokens, dtype)
            total = np.full((n_tokens, HIDDEN_SIZE), 2, np.float32)
            future = client.submit(DENSE, *given, slice_tokens=4)
            future.add_to(total)
            np.testing.assert_array_equal(total, widen(expected(*given)) + 2)
            assert (future.times is None) == (n_tokens == 1)  # whose only row has no expert


def test_a_sum_stays_as_it_was_when_a_part_fails(address: str) -> None:
    """A worker that refuses one of several messages has computed the others."""
    hidden, ids, weights = inputs(2 * MAX_TOKENS)
    ids[:] = 0
    with connect(address) as client:
        future = client.submit(DENSE, hidden, ids, weights, slice_tokens=MAX_TOKENS)
        # As if the second had been answered by an error.
        future._error = moeshm.errors.WorkerFailed("no")
        total = np.zeros_like(hidden)
        with pytest.raises(moeshm.errors.WorkerFailed, match="no"):
            future.add_to(total)
        assert not total.any()


def test_an_interrupt_after_the_rows_were_added_leaves_them_added_once(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal's handler runs as soon as the compiled loop returns."""
    add = add_rows

    def interrupted(*arguments: Any) -> None:
        add(*arguments)
        del arguments  # a compiled function has no frame that would keep them
        raise KeyboardInterrupt

    hidden, ids, weights = inputs(MAX_TOKENS)
    ids[:] = 0
    total = np.zeros_like(hidden)
    with connect(address) as client:
        future = client.submit(DENSE, hidden, ids, weights)
        monkeypatch.setattr("moeshm.call.add_rows", interrupted)
        # No BufferError: nothing keeps a view of the record.
        with pytest.raises(KeyboardInterrupt):
            future.add_to(total)
        monkeypatch.undo()
        np.testing.assert_array_equal(total, expected(hidden, ids, weights))
        # What is told to it later changes nothing: the rows are not computed elsewhere, too.
        future.fail(moeshm.errors.WorkerDied("gone"))
        future.add_to(total)
        np.testing.assert_array_equal(total, expected(hidden, ids, weights))
        np.testing.assert_array_equal(
            client.compute(DENSE, hidden, ids, weights), expected(hidden, ids, weights)
        )


@pytest.mark.parametrize(
    "total",
    [
        np.zeros((2, HIDDEN_SIZE), np.float64),
        np.zeros((3, HIDDEN_SIZE), np.float32),
        np.zeros((2, HIDDEN_SIZE + 1), np.float32),
        np.zeros((HIDDEN_SIZE, 2), np.float32).T,
    ],
)
def test_a_sum_of_another_shape_is_refused_before_anything_is_taken(
    address: str, total: npt.NDArray[Any]
) -> None:
    hidden, ids, weights = inputs(2)
    with connect(address) as client:
        future = client.submit(DENSE, hidden, ids, weights)
        with pytest.raises(moeshm.errors.InvalidCall, match="pass a writable, contiguous float32"):
            future.add_to(total)
        np.testing.assert_array_equal(future.result(), expected(hidden, ids, weights))


def test_a_slice_of_nothing_is_refused(address: str) -> None:
    with (
        connect(address) as client,
        pytest.raises(moeshm.errors.InvalidCall, match="slice_tokens=0; it must be at least 1"),
    ):
        client.submit(DENSE, *inputs(2), slice_tokens=0)
