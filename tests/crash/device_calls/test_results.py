"""Calls whose arrays are on the engine's GPU: results, and their order."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import moeshm
from moeshm import device_watch
from moeshm.demo import tiny_moe_path
from moeshm.errors import InvalidCall, NotReady
from moeshm.transport.slab import SLOTS
from tests.crash.arithmetic import FREE, HIDDEN_SIZE, MANY_TOKENS, WIDE, assert_exact, make_inputs
from tests.crash.device_calls.calls import MORE_TOKENS, GpuCall, Kind, wait_until
from tests.engine_gpu import PATIENCE_S, GpuArray, Movers, Stream


def test_results(client: moeshm.ExpertClient, stream: Stream) -> None:
    calls = [GpuCall.of(make_inputs(FREE, tag, n_tokens=tag + 1)) for tag in range(8)]
    futures = [call.submit(client, stream) for call in calls]
    for call, future in zip(calls, futures, strict=True):
        assert future.wait(PATIENCE_S) is call.out
        assert future.done()
        call.check()
    stats = client.stats()
    assert (stats.calls, stats.rows) == (8, 36)
    assert stats.bytes_in == 36 * HIDDEN_SIZE * 4


def test_small_calls_are_one_launch(
    client: moeshm.ExpertClient, stream: Stream, movers: Movers, kind: Kind
) -> None:
    """Where the mover has one for them; larger ones between them go the other way."""
    sizes = (1, MORE_TOKENS, 16, MORE_TOKENS, 2)
    calls = [GpuCall.of(make_inputs(FREE, tag, n_tokens)) for tag, n_tokens in enumerate(sizes)]
    for call in calls:
        call.submit(client, stream)
    stream.synchronize()
    for call in calls:
        call.check()
    mover = movers.opened[0]
    assert (mover.n_given, mover.n_taken) == (5, 5)
    assert mover.n_exchanged == (3 if kind.most_exchanged > 0 else 0)


def test_the_host_waits_for_nothing(client: moeshm.ExpertClient, stream: Stream) -> None:
    """Neither for the call's own stream, nor for the worker; what comes later on the stream finds
    the result."""
    call, seen = GpuCall.of(make_inputs(FREE, 1)), []
    held = stream.hold()
    # What fills the arrays comes late, too.
    stream.do(lambda: call.arrays[0].host.__imul__(2))
    future = call.submit(client, stream)
    assert future.result() is call.out
    stream.do(lambda: seen.append(call.out.host.copy()))
    assert not future.done()
    with pytest.raises(NotReady, match="still on its way"):
        future.wait(0.05)
    held.set()
    stream.synchronize()
    doubled = call.inputs._replace(hidden_states=call.inputs.hidden_states * 2)
    assert_exact(seen[0], doubled)


def test_compute_waits(client: moeshm.ExpertClient, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Stream()
    monkeypatch.setattr("moeshm.device_arrays._current_stream", lambda _array: made.ptr)
    call = GpuCall.of(make_inputs(FREE, 3))
    assert client.compute(FREE, *call.arrays, out=call.out) is call.out
    call.check()
    made.close()


def test_formats_and_wide_ids(client: moeshm.ExpertClient, stream: Stream) -> None:
    inputs = make_inputs(FREE, 5, n_tokens=9)
    ids = inputs.topk_ids.astype(np.int64)
    ids[2, 1] = -1
    call = GpuCall.of(inputs)._replace(
        inputs=inputs._replace(topk_ids=ids.astype(np.int32)),
        arrays=(
            GpuArray(inputs.hidden_states),
            GpuArray(ids),
            GpuArray(inputs.topk_weights.astype(np.float16)),
        ),
    )
    call.submit(client, stream).wait(PATIENCE_S)
    call.check()
    half = GpuArray(inputs.hidden_states.astype(np.float16))
    out = GpuArray(np.zeros_like(half.host))
    client.submit(FREE, half, *call.arrays[1:], out=out, stream=stream).wait(PATIENCE_S)
    assert out.host.dtype == np.float16
    assert_exact(out.host.astype(np.float32), call.inputs)


def test_no_tokens(client: moeshm.ExpertClient, stream: Stream) -> None:
    call = GpuCall.of(make_inputs(FREE, 0, n_tokens=1))
    empty = GpuArray(call.inputs.hidden_states[:0])
    ids, weights = (GpuArray(each.host[:0]) for each in call.arrays[1:])
    future = client.submit(FREE, empty, ids, weights, out=GpuArray(empty.host), stream=stream)
    assert future.done()
    future.wait(0.0)


def test_slices_and_long_calls(client: moeshm.ExpertClient, stream: Stream) -> None:
    """In more parts than there are slots."""
    call = GpuCall.of(make_inputs(FREE, 7, n_tokens=3 * SLOTS + 1))
    call.submit(client, stream, slice_tokens=2).wait(PATIENCE_S)
    call.check()
    long = GpuCall.of(make_inputs(FREE, 7, n_tokens=3000))
    long.submit(client, stream).wait(PATIENCE_S)
    long.check()


def test_a_full_slab_waits_for_room(client: moeshm.ExpertClient, stream: Stream) -> None:
    calls = [GpuCall.of(make_inputs(WIDE, tag, MANY_TOKENS)) for tag in range(8)]
    for call in calls:
        call.submit(client, stream)
    stream.synchronize()
    for call in calls:
        call.check()


def test_a_new_session_is_part_of_the_time_that_a_call_has(
    client: moeshm.ExpertClient, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadlines, live_link = [], client._sessions.live

    def note(deadline: float, can_fall_back: bool = True) -> Any:
        deadlines.append(deadline)
        return live_link(deadline, can_fall_back)

    monkeypatch.setattr(client._sessions, "live", note)
    future = GpuCall.of(make_inputs(FREE, 1)).submit(client, stream)
    assert deadlines == [future.deadline]
    future.wait(PATIENCE_S)


def test_several_streams(client: moeshm.ExpertClient, stream: Stream) -> None:
    """Calls begin in the order of their submits: one that is held holds the next."""
    other = Stream()
    held = stream.hold()
    first, second = (GpuCall.of(make_inputs(FREE, tag)) for tag in (1, 2))
    pending = first.submit(client, stream)
    later = second.submit(client, other)
    with pytest.raises(NotReady):
        later.wait(0.1)
    held.set()
    pending.wait(PATIENCE_S)
    later.wait(PATIENCE_S)
    first.check()
    second.check()
    other.close()


def test_calls_of_host_and_device_arrays_mix(client: moeshm.ExpertClient, stream: Stream) -> None:
    call, inputs = GpuCall.of(make_inputs(FREE, 1)), make_inputs(FREE, 2)
    future = call.submit(client, stream)
    assert_exact(client.compute(*inputs), inputs)
    future.wait(PATIENCE_S)
    call.check()


def test_threads_on_one_stream(client: moeshm.ExpertClient, stream: Stream) -> None:
    failures: list[BaseException] = []

    def call(thread: int) -> None:
        try:
            for tag in range(30):
                each = GpuCall.of(make_inputs(FREE, 100 * thread + tag))
                each.submit(client, stream, timeout_s=PATIENCE_S).wait(PATIENCE_S)
                each.check()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * PATIENCE_S)
    assert failures == []


def test_a_long_pause_between_calls(
    client: moeshm.ExpertClient, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After which nobody looks after anything until something is on its way."""
    monkeypatch.setattr(device_watch, "_IDLE_LOOKS", 1)
    for tag in range(3):
        call = GpuCall.of(make_inputs(FREE, tag))
        future = call.submit(client, stream)
        watch = client._link.device_calls._watch  # type: ignore[union-attr]
        # By nobody but the thread that looks after it.
        stream.synchronize()
        wait_until(lambda: not watch.parts)  # noqa: B023
        wait_until(lambda: watch._is_asleep)  # noqa: B023
        assert future.done()
        call.check()


def test_experts_that_are_held_later(movers: Movers, stream: Stream) -> None:
    """Of a layer that the worker was not started with, served by its host."""
    assert not movers.opened
    rng = np.random.default_rng(1)
    hidden = rng.standard_normal((5, 128), np.float32)
    ids, weights = np.tile(np.arange(4, dtype=np.int32), (5, 1)), np.ones((5, 4), np.float32)
    with moeshm.spawn_worker(tiny_moe_path(), layers=[3], engine_device="cuda:0") as client:
        view = client.hold({1: [7, 5, 3, 1]})
        expected = client.compute(1, hidden, ids, weights, view=view)
        arrays, out = [GpuArray(each) for each in (hidden, ids, weights)], GpuArray(hidden.copy())
        client.submit(1, *arrays, out=out, view=view, stream=stream).wait(PATIENCE_S)
        np.testing.assert_array_equal(out.host, expected)
        # The same experts by the model's numbers.
        named = GpuArray(np.array([7, 5, 3, 1], np.int64)[ids])
        again = GpuArray(np.zeros_like(hidden))
        client.submit(
            1, arrays[0], named, arrays[2], out=again, view=view, global_ids=True, stream=stream
        ).wait(PATIENCE_S)
        np.testing.assert_array_equal(again.host, expected)
        named.host[2, 3] = 6
        with pytest.raises(InvalidCall, match="expert 6 of layer 1 is not on this worker"):
            client.submit(
                1, arrays[0], named, arrays[2], out=again, view=view, global_ids=True, stream=stream
            ).wait(PATIENCE_S)
