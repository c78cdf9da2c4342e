"""Long calls from slabs are computed in steps, on a GPU made of the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from moeshm.backends.gpu import slab_calls, tables, workspace
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.gpu.choice import MOST_FEW_TOKENS, Shape
from moeshm.backends.gpu.workspace import Workspace, step_tokens
from moeshm.backends.reference import reference_ffn
from moeshm.dtypes import DType, narrow
from moeshm.errors import DeviceError
from moeshm.transport.slab import DONE, REFUSED
from tests.checkpoints import random_layer
from tests.conformance.test_backends import assert_close, compute, draw_call
from tests.simt.device import IdleDevice, LazyDevice, SimtDevice
from tests.steps import AlwaysDue, NeverDue

from .gpu_slabs import LAYER, Engine, Noted, call_of, each_kind, engine, table

WIDE = random_layer(7, hidden_size=200, intermediate_size=136, top_k=6)
#: The least that a step can be.
LEAST_STEP = 2 * MOST_FEW_TOKENS + 1
N_TOKENS = 2 * LEAST_STEP + 1


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is as short as it can be, and a call of N_TOKENS three of them."""
    monkeypatch.setattr(workspace, "_STEP_MULTIPLY_ADDS", 1)
    monkeypatch.setattr(workspace, "_STEP_ROWS", 1)


def n_jobs(backend: GpuBackend) -> int:
    """That nobody uses."""
    return sum(len(free) for free in backend._slab_calls._jobs.values())


def run(slab: Engine, inputs: Any, pause: Callable[[], None], n_pauses: int, **how: Any) -> Any:
    """The result of a call, with so many pauses."""
    due = AlwaysDue(pause)
    claim = slab.begin(*inputs, between_steps=due, **how)
    assert due.n == n_pauses
    slab.slab.wait()
    assert slab.flag(claim, REFUSED) == 0
    return slab.take(claim, inputs[0])


# --- the order of things --------------------------------------------------------------------


@pytest.mark.usefixtures("small_steps")
@each_kind
def test_the_device_is_waited_for_between_two_parts_and_not_after_the_last(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Nor in a call of one step. Nobody else wants the device."""
    device = IdleDevice()
    backend = GpuBackend({0: LAYER}, device)
    with engine(backend, kind) as slab:
        noted = Noted(device, monkeypatch)
        slab.begin(*draw_call(1, LAYER, LEAST_STEP, 2), between_steps=NeverDue())
        assert noted.seen[0] == "admit"
        assert noted.seen[-1] == "write_value"
        assert "wait" not in noted.seen
        part = noted.seen[:-1]
        noted.seen.clear()
        slab.begin(*draw_call(1, LAYER, N_TOKENS, 2), between_steps=NeverDue())
        assert noted.seen == [*part, "wait", *part, "wait", *part, "write_value"]


@pytest.mark.usefixtures("small_steps")
@each_kind
def test_anothers_short_call_has_its_turn_between_two_parts(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of another session, which has the device's turn: what it begins comes before the rest."""
    device = IdleDevice()
    backend = GpuBackend({0: LAYER}, device)
    short = draw_call(2, LAYER, 1, 2)
    with engine(backend, kind) as slab, engine(backend, kind) as other:
        noted = Noted(device, monkeypatch)
        other.begin(*short)
        of_short = [*noted.seen]
        noted.seen.clear()

        def pause() -> None:
            assert not backend._turn.kept.locked()
            assert noted.seen[-1] == "wait"
            noted.seen.append("pause")
            other.begin(*short)
            noted.seen.append("end")

        slab.begin(*draw_call(1, LAYER, N_TOKENS, 2), between_steps=AlwaysDue(pause))
    parts = " ".join(noted.seen).split(f"pause {' '.join(of_short)} end ")
    assert len(parts) == 3
    assert all(part.startswith("admit") for part in parts)
    assert [part.count("wait") for part in parts[:2]] == [1, 1]


def test_parts_are_equal_and_none_is_for_other_kernels_than_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels for few tokens give other bits."""
    monkeypatch.setattr(workspace, "_STEP_MULTIPLY_ADDS", 1)
    backend = GpuBackend({0: LAYER}, IdleDevice())
    shape, space = Shape.of(LAYER.info, has_bias=False), backend._workspace
    for rows in (1, 1000):
        monkeypatch.setattr(workspace, "_STEP_ROWS", rows)
        step = step_tokens(shape, 2, 6)
        assert step == max(LEAST_STEP, 3 * rows)
        for n_tokens in (*range(9 * LEAST_STEP), 5 * step, 5 * step + 1):
            parts = parts_of(space, n_tokens, shape)
            assert len(parts) == max(1, -(-n_tokens // step))
            assert sum(parts) == n_tokens
            assert max(parts) - min(parts) <= 1
            assert max(parts) <= step
            assert len(parts) == 1 or min(parts) > MOST_FEW_TOKENS


def parts_of(space: Workspace, n_tokens: int, shape: Shape) -> list[int]:
    """Tokens of each."""
    parts = [space.part_tokens(n_tokens, shape, 2, 6)]
    while sum(parts) < n_tokens:
        parts.append(space.part_tokens(n_tokens - sum(parts), shape, 2, 6))
    return parts


# --- results --------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("dtype", DType)
def test_bits_are_those_of_the_call_at_once(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: DType
) -> None:
    """With others in between, or nobody, and through rings."""
    layer = random_layer(1, hidden_size=64, weight_dtype=dtype)
    hidden, ids, weights = draw_call(3, layer, N_TOKENS, 2)
    inputs = narrow(hidden, dtype), ids, weights
    short = draw_call(4, layer, 2, 2)
    with engine(GpuBackend({0: layer}, SimtDevice()), kind) as slab:
        expected = run(slab, inputs, lambda: None, 0)
        expected_short = slab.compute(*short)
    for name in ("_STEP_MULTIPLY_ADDS", "_STEP_ROWS"):
        monkeypatch.setattr(workspace, name, 1)
    backend = GpuBackend({0: layer}, SimtDevice())
    with engine(backend, kind) as slab, engine(backend, kind) as other:

        def pause() -> None:
            np.testing.assert_array_equal(other.compute(*short), expected_short)
            compute(backend, *short)

        np.testing.assert_array_equal(run(slab, inputs, pause, 2), expected)
        np.testing.assert_array_equal(slab.compute(*inputs), expected)
        np.testing.assert_array_equal(compute(backend, *inputs, dtype), expected)


@pytest.mark.usefixtures("small_steps")
@each_kind
def test_the_workspace_and_experts_change_in_a_pause(kind: str) -> None:
    """What was made ready before that is not begun."""
    device = LazyDevice()
    backend = GpuBackend({0: LAYER}, device)
    inputs, wide_call = draw_call(6, LAYER, N_TOKENS, 2), draw_call(9, WIDE, 5, 6)
    with engine(backend, kind) as slab:
        expected = run(slab, inputs, lambda: None, 2)
        assert_close(expected, reference_ffn(LAYER, *inputs), 1e-5)
        before = backend._workspace.address
        held = backend._experts.layers[0]

        def pause() -> None:
            table = held.table
            backend.add(0, LAYER)
            assert held.table is not table
            if 1 not in backend._experts.layers:
                backend.add(1, WIDE)
                assert backend._workspace.address != before
            out = np.full_like(wide_call[0], np.nan)
            backend.ffn(1, *wide_call, out)
            assert_close(out, reference_ffn(WIDE, *wide_call), 1e-5)

        np.testing.assert_array_equal(run(slab, inputs, pause, 2), expected)
    assert device.n_freed_early == 0


@pytest.mark.usefixtures("small_steps")
@each_kind
def test_a_table_of_slots_is_replaced_in_a_pause(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tables, "MAX_TABLES", 1)
    device = LazyDevice()
    backend = GpuBackend({0: LAYER}, device)
    slots, others = table(5, 4, 3, 2, 1, 0), table(1, 2, 3, 4, 5, 0)
    hidden, ids, weights = draw_call(6, LAYER, N_TOKENS, 2)
    short = draw_call(7, LAYER, 1, 2)
    with engine(backend, kind) as slab, engine(backend, kind) as other:
        found = run(
            slab, (hidden, ids, weights), lambda: void(other.begin(*short, slots=others)), 2,
            slots=slots,
        )  # fmt: skip
        assert_close(found, reference_ffn(LAYER, hidden, slots[ids], weights), 1e-5)
    assert device.n_freed_early == 0


def void(_: object) -> None:
    """A statement's value."""


@pytest.mark.usefixtures("small_steps")
@each_kind
def test_steps_change_before_the_call_is_begun(kind: str) -> None:
    """It was made ready as one of more steps, or of fewer."""
    device = LazyDevice()
    backend = GpuBackend({0: LAYER}, device)
    inputs = draw_call(6, LAYER, N_TOKENS, 2)
    with pytest.MonkeyPatch.context() as patch, engine(backend, kind) as slab:
        expected = slab.begin(*inputs)
        slab.slab.wait()
        found = [slab.take(expected, inputs[0])]
        for rows, n_pauses in ((1000, 2), (1, 0)):
            patch.setattr(workspace, "_STEP_ROWS", rows)
            claim = slab.give(*inputs)
            call = call_of(claim, *inputs[:2])
            slab.slab.prepare(call)
            patch.setattr(workspace, "_STEP_ROWS", 1001 - rows)
            backend.add(0, LAYER)
            due = AlwaysDue()
            slab.slab.enqueue(call, due)
            assert due.n == n_pauses
            slab.slab.wait()
            found.append(slab.take(claim, inputs[0]))
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])


# --- what ends a call in its middle -----------------------------------------------------------


@pytest.mark.usefixtures("small_steps")
@each_kind
def test_what_a_pause_raises_ends_the_call(kind: str) -> None:
    """Nothing of it is on its way, and others have what it had; the worker tells the client."""
    device = LazyDevice()
    backend = GpuBackend({0: LAYER}, device)
    inputs = draw_call(6, LAYER, N_TOKENS, 2)

    def stop() -> None:
        assert not backend._turn.kept.locked()
        assert not device._enqueued
        if due.n == 2:
            raise TimeoutError("enough")

    with engine(backend, kind) as slab:
        expected = run(slab, inputs, lambda: None, 2)
        before = n_jobs(backend)
        due = AlwaysDue(stop)
        claim = slab.give(*inputs)
        with pytest.raises(TimeoutError, match="enough"):
            slab.slab.enqueue(call_of(claim, *inputs[:2]), due)
        assert not device._enqueued
        assert n_jobs(backend) == before
        assert slab.flag(claim, DONE) != claim.sequence
        np.testing.assert_array_equal(run(slab, inputs, lambda: None, 2), expected)


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("command", ["launch", "wait"])
def test_a_device_that_fails_in_the_middle(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    device = SimtDevice()
    backend = GpuBackend({0: LAYER}, device)
    inputs = draw_call(6, LAYER, N_TOKENS, 2)

    def fail(*_how: Any) -> None:
        raise DeviceError("refused")

    with engine(backend) as slab:
        slab.compute(*inputs)
        before = n_jobs(backend)
        claim = slab.give(*inputs)
        with monkeypatch.context() as patch:
            due = AlwaysDue(lambda: patch.setattr(device, command, fail))
            with pytest.raises(DeviceError, match="refused"):
                slab.slab.enqueue(call_of(claim, *inputs[:2]), due)
        assert due.n == 1
        assert n_jobs(backend) == before
        assert not backend._turn.kept.locked()
        assert slab.flag(claim, DONE) != claim.sequence
        assert_close(slab.compute(*inputs), reference_ffn(LAYER, *inputs), 1e-5)


# --- how much of a step a call is ---------------------------------------------------------------


def test_a_calls_share_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the layer, top_k and what is held of it at the time; what is kept of that is bounded."""
    monkeypatch.setattr(workspace, "_STEP_MULTIPLY_ADDS", 1)
    monkeypatch.setattr(slab_calls, "_MAX_KNOWN", 2)
    backend = GpuBackend({0: LAYER, 1: WIDE}, IdleDevice())
    held = backend._experts.layers[0]
    with engine(backend) as slab:
        inputs = draw_call(6, LAYER, 300, 2)
        call = call_of(slab.give(*inputs), *inputs[:2])
        for _ in range(2):
            for layer, top_k, slots in ((0, 2, 6), (0, 1, 6), (1, 2, 6)):
                changed = msgspec.structs.replace(call, layer=layer, top_k=top_k)
                expected = 300 / (256 * slots // top_k)
                assert slab.slab.share_of_step(changed) == expected
                assert len(backend._slab_calls._step_tokens) <= 2
        backend.add(0, LAYER)
        assert held.n_slots == 12
        assert slab.slab.share_of_step(call) == 300 / (256 * 12 // 2)
        # No step is longer than what the workspace is made for.
        for _ in range(10):
            backend.add(0, LAYER)
        assert slab.slab.share_of_step(call) == 300 / workspace.MAX_TOKENS
