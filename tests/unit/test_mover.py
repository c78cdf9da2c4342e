"""The engine's side of a slab, without a GPU: what it enqueues for calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from moeshm.dtypes import DType
from moeshm.errors import DeviceError
from moeshm.transport import slab
from moeshm.transport.slab import GIVEN, TAKEN
from tests.simt.device import FEATURES, LazyDevice, SimtDevice
from tests.unit.mover_slabs import (
    ANOTHERS_BUS_ID,
    AT,
    OTHER,
    OWN_BUS_ID,
    STREAM,
    Call,
    Runtime,
    Slab,
    done_by,
    opened_slab,
)


class Launches:
    """What is launched, and not done: grids, and where blocks are counted."""

    def __init__(self, device: SimtDevice, patch: pytest.MonkeyPatch) -> None:
        self.grids: list[int] = []
        self.counts: list[int] = []
        patch.setattr(device, "do", self._note)

    def _note(self, command: Callable[..., None], *how: Any) -> None:
        if command.__name__ == "launch":
            self.grids.append(how[1])
            self.counts.append(getattr(how[-1], "n_done", 0))


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """In the place of CuPy's."""
    return Runtime(monkeypatch)


@pytest.fixture(params=["pinned", "device"])
def opened(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, runtime: Runtime
) -> Iterator[Slab]:
    """A slab of each kind; what is enqueued is done at once."""
    with opened_slab(SimtDevice(), monkeypatch, runtime, request.param) as made:
        yield made


@pytest.fixture(params=["pinned", "device"])
def of_another(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, runtime: Runtime
) -> Iterator[Slab]:
    """As `opened`, for a worker on another GPU."""
    device = SimtDevice(FEATURES._replace(bus_id=OWN_BUS_ID))
    with opened_slab(device, monkeypatch, runtime, request.param, ANOTHERS_BUS_ID) as made:
        yield made


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> Iterator[Slab]:
    """A pinned slab; what is enqueued is done when the device is waited for."""
    with opened_slab(LazyDevice(), monkeypatch, runtime, "pinned") as made:
        yield made


@pytest.mark.parametrize("weights_dtype", DType)
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [0, 1, 130])
def test_a_call_goes_to_a_slab_and_comes_back(
    opened: Slab, n_tokens: int, dtype: DType, ids_dtype: Any, weights_dtype: DType
) -> None:
    call = Call(n_tokens, dtype, ids_dtype, weights_dtype)
    call.give(opened, AT, 17)
    assert opened.flag(AT, GIVEN) == 17
    call.assert_given(opened, AT)
    opened.answer(AT, 17, call.output)
    call.take(opened, AT, 17)
    assert opened.flag(AT, TAKEN) == 17
    np.testing.assert_array_equal(call.out, call.output)


def test_calls_of_many_slots_and_sizes(opened: Slab) -> None:
    """Sequences wrap; what a larger call left behind changes nothing."""
    for round_, n_tokens in enumerate((700, 1, 0, 33, 2, 300, 1)):
        for at in (AT, OTHER):
            call, sequence = Call(n_tokens), (0xFFFFFFFC + round_) % (1 << 32)
            call.give(opened, at, sequence)
            call.assert_given(opened, at)
            opened.answer(at, sequence, call.output)
            call.take(opened, at, sequence)
            np.testing.assert_array_equal(call.out, call.output)
            assert (opened.flag(at, GIVEN), opened.flag(at, TAKEN)) == (sequence, sequence)


def test_nothing_is_done_before_its_turn(lazy: Slab) -> None:
    """Several calls are on their way at a time, each with its own arguments."""
    calls = {AT: Call(40), OTHER: Call(3, DType.F32, np.int64)}
    for at, call in calls.items():
        call.give(lazy, at, 9)
        assert lazy.flag(at, GIVEN) == 0
    lazy.device.wait()
    for at, call in calls.items():
        assert lazy.flag(at, GIVEN) == 9
        call.assert_given(lazy, at)
        call.take(lazy, at, 9)
    for at, call in calls.items():
        lazy.answer(at, 9, call.output)
        assert lazy.flag(at, TAKEN) == 0
    lazy.device.wait()
    for at, call in calls.items():
        assert lazy.flag(at, TAKEN) == 9
        np.testing.assert_array_equal(call.out, call.output)


def test_an_output_is_waited_for(opened: Slab) -> None:
    """The slot's own flag; the stand-in has nobody who could set it later."""
    call = Call(4)
    opened.answer(AT, 6, call.output)
    opened.answer(OTHER, 7, call.output)
    with pytest.raises(DeviceError, match="waits for ever for 7 where 6 is"):
        call.take(opened, AT, 7)
    assert not call.out.any()
    assert opened.flag(AT, TAKEN) == 0


@pytest.mark.parametrize("kind", ["pinned", "device"])
@pytest.mark.parametrize(
    ("worker_bus_id", "kernels"),
    [
        # A block of 256 threads that load 8 vectors each, or more behind one that waits.
        (ANOTHERS_BUS_ID, ["await_and_take", "await_done", "take"]),
        (OWN_BUS_ID, ["wait", "take", "wait", "take"]),
        ("", ["wait", "take", "wait", "take"]),
    ],
)
@pytest.mark.parametrize("ends_long_kernels", [False, True])
def test_kernels_await_only_what_another_gpu_computes(
    monkeypatch: pytest.MonkeyPatch,
    runtime: Runtime,
    kind: str,
    ends_long_kernels: bool,
    worker_bus_id: str,
    kernels: list[str],
) -> None:
    """On its own GPU the worker would not have its turn; and no kernel may take long for all."""
    if ends_long_kernels:
        kernels = ["wait", "take", "wait", "take"]
    features = FEATURES._replace(
        bus_id=OWN_BUS_ID, multiprocessors=20, ends_long_kernels=ends_long_kernels
    )
    device = SimtDevice(features)
    with opened_slab(device, monkeypatch, runtime, kind, worker_bus_id) as made:
        source, out = (np.arange(2_049 * 4, dtype=np.uint32) for _ in range(2))
        made.answer(AT, 5, source)
        done = done_by(device, monkeypatch)
        for n_vectors in (2_048, 2_049):
            out[:] = 0
            made.mover.take(STREAM, out.ctypes.data, n_vectors * 16, AT, 5)
            assert made.flag(AT, TAKEN) == 5
            np.testing.assert_array_equal(out[: n_vectors * 4], source[: n_vectors * 4])
        assert done == kernels
        call = Call(1)
        made.answer(AT, 6, call.output)
        assert call.exchange(made, AT, 6) == ("await_done" in kernels)
        assert made.flag(AT, GIVEN) == (6 if "await_done" in kernels else 0)


@pytest.mark.parametrize("weights_dtype", DType)
@pytest.mark.parametrize("ids_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [0, 1, 85])
def test_a_small_call_is_one_launch(
    of_another: Slab,
    monkeypatch: pytest.MonkeyPatch,
    n_tokens: int,
    dtype: DType,
    ids_dtype: Any,
    weights_dtype: DType,
) -> None:
    """Given, answered and taken as by two."""
    call, after = Call(n_tokens, dtype, ids_dtype, weights_dtype), Call(2)
    done = done_by(of_another.device, monkeypatch)
    for at, sequence in ((AT, 0xFFFFFFFF), (OTHER, 0), (AT, 31)):
        call.out[:] = 0
        of_another.answer(at, sequence, call.output)
        assert call.exchange(of_another, at, sequence)
        call.assert_given(of_another, at)
        np.testing.assert_array_equal(call.out, call.output)
        assert (of_another.flag(at, GIVEN), of_another.flag(at, TAKEN)) == (sequence, sequence)
    assert done == ["exchange"] * 3
    # The slot is as the other kernels need it.
    after.give(of_another, AT, 63)
    of_another.answer(AT, 63, after.output)
    after.take(of_another, AT, 63)
    np.testing.assert_array_equal(after.out, after.output)


@pytest.mark.parametrize(
    ("n_tokens", "hidden_size", "top_k", "is_one"),
    [
        # 32 KiB of float16, and more.
        (8, 2048, 32, True),
        (8, 2056, 8, False),
        # A pair for each of 256 threads, and more.
        (64, 8, 4, True),
        (257, 8, 1, False),
    ],
)
def test_a_block_has_vectors_and_pairs_enough_for_small_calls_only(
    of_another: Slab,
    monkeypatch: pytest.MonkeyPatch,
    n_tokens: int,
    hidden_size: int,
    top_k: int,
    is_one: bool,
) -> None:
    call = Call(n_tokens, DType.F16, hidden_size=hidden_size, top_k=top_k)
    launched = Launches(of_another.device, monkeypatch)
    assert call.exchange(of_another, AT, 1) == is_one
    assert launched.grids == [1] * is_one


def test_exchanges_have_their_own_arguments(
    monkeypatch: pytest.MonkeyPatch, runtime: Runtime
) -> None:
    """Several are on their way at a time."""
    device = LazyDevice(FEATURES._replace(bus_id=OWN_BUS_ID))
    with opened_slab(device, monkeypatch, runtime, "pinned", ANOTHERS_BUS_ID) as made:
        calls = {AT: Call(40), OTHER: Call(3, DType.F32, np.int64)}
        for at, call in calls.items():
            made.answer(at, 9, call.output)
            assert call.exchange(made, at, 9)
            assert made.flag(at, GIVEN) == 0
        device.wait()
        for at, call in calls.items():
            call.assert_given(made, at)
            assert (made.flag(at, GIVEN), made.flag(at, TAKEN)) == (9, 9)
            np.testing.assert_array_equal(call.out, call.output)


@pytest.mark.parametrize("stream", [0, STREAM])
def test_everything_is_on_the_callers_stream(opened: Slab, stream: int) -> None:
    """And none of it before the one ahead has ended, which is not ours."""
    opened.device.used_streams.clear()
    call = Call(4)
    opened.mover.give(stream, call.inputs, AT, 1)
    opened.answer(AT, 1, call.output)
    opened.mover.take(stream, call.out.ctypes.data, call.out.nbytes, AT, 1)
    assert opened.device.used_streams == [stream, stream]
    assert opened.device.overlapping == {"give": False, "take": False}


@pytest.mark.parametrize("stream", [0, STREAM])
def test_an_exchange_is_on_the_callers_stream(of_another: Slab, stream: int) -> None:
    """Nor does it begin before the one ahead has ended."""
    of_another.device.used_streams.clear()
    call = Call(4)
    of_another.answer(AT, 1, call.output)
    out, n_bytes = call.out.ctypes.data, call.out.nbytes
    of_another.mover.exchange(stream, call.inputs, out, n_bytes, AT, 1)
    assert of_another.device.used_streams == [stream]
    assert not any(of_another.device.overlapping.values())


def test_grids_follow_the_bytes(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> None:
    """A thread for each vector and pair, as far as there are multiprocessors."""
    device = SimtDevice(FEATURES._replace(multiprocessors=6))
    with opened_slab(device, monkeypatch, runtime, "pinned") as made:
        given = Launches(device, monkeypatch)
        # 9 vectors and 3 pairs of a token: 256 threads are enough for 21.
        for n_tokens in (0, 1, 21, 22, 50, 100, 1000):
            Call(n_tokens).give(made, AT, 1)
        taken = Launches(device, monkeypatch)
        for n_vectors in (0, 1, 256, 257, 512, 513, 1024, 1025, 10_000):
            made.mover.take(STREAM, AT.out, n_vectors * 16, AT, 1)
    assert given.grids == [1, 1, 1, 2, 4, 6, 6]
    assert taken.grids == [1, 1, 1, 2, 2, 4, 4, 6, 6]


def test_every_slot_counts_by_itself(opened: Slab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of several streams are on their way at a time."""
    launches = Launches(opened.device, monkeypatch)
    places = [AT._replace(slot=slot) for slot in range(slab.SLOTS)]
    for at in places:
        Call(1).give(opened, at, 1)
    assert len(set(launches.counts)) == slab.SLOTS
