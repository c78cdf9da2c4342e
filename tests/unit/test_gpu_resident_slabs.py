"""Calls from slabs to the kernel that stays on a GPU, which the shim runs beside the host."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from moeshm._claims import Claim
from moeshm.backends.gpu import workspace
from moeshm.backends.reference import reference_ffn
from moeshm.dtypes import DType
from moeshm.transport.slab import REFUSED
from tests.checkpoints import random_layer
from tests.conformance.test_backends import TOLERANCE, assert_close
from tests.steps import AlwaysDue, NeverDue
from tests.unit.test_gpu_experts import part

from .gpu_residents import (
    LAYER,
    MANY,
    OTHER,
    Inputs,
    Others,
    alone,
    begin,
    draw,
    finish,
    serving,
)
from .gpu_slabs import Engine, call_of, each_kind, engine, table

BF16 = DType.BF16


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> Others:
    """None at first; and kernels stay until they are told to end."""
    return alone(monkeypatch)


@each_kind
@pytest.mark.parametrize("dtype", DType)
def test_calls_from_slabs(kind: str, dtype: DType) -> None:
    with serving() as served, engine(served.backend, kind) as slab:
        for n_tokens in (1, 4, 16, 4, 1, 1):
            inputs = draw(n_tokens, LAYER, n_tokens, dtype)
            claim = begin(slab, inputs)
            finish(slab, claim, inputs)
            assert slab.flag(claim, REFUSED) == 0
        # New kinds end it, of which there were three.
        assert served.counts == (6, 3)


@each_kind
def test_calls_are_begun_before_others_are_done(kind: str) -> None:
    """More than the mailbox has room for, of two shapes, with one in between that is waited for."""
    with serving({0: LAYER, 1: OTHER}) as served, engine(served.backend, kind) as slab:
        for seed in range(2):
            calls = []
            for index in range(24):
                layer = OTHER if index % 5 == 4 else LAYER
                inputs = draw(seed + index, layer, 1 + index % 2)
                calls.append((begin(slab, inputs, number=int(layer is OTHER)), inputs, layer))
            served.call(99)
            served.call(98, MANY)
            for each in calls:
                finish(slab, *each)
        assert served.resident.n_calls == 50


@each_kind
@pytest.mark.parametrize("n_tokens", [1, 4])
@pytest.mark.parametrize("wrong", [6, -2])
def test_ids_that_are_wrong(kind: str, n_tokens: int, wrong: int) -> None:
    with serving() as served, engine(served.backend, kind) as slab:
        hidden, ids, weights = draw(5, LAYER, n_tokens)
        ids[-1, 1] = wrong
        claim = begin(slab, (hidden, ids, weights))
        ids[-1, 1] = -1
        finish(slab, claim, (hidden, ids, weights))
        assert slab.flag(claim, REFUSED) == 2 * n_tokens
        inputs = draw(6, LAYER, n_tokens)
        claim = begin(slab, inputs)
        finish(slab, claim, inputs)
        assert served.resident.n_calls == 2


@each_kind
def test_ids_that_stand_for_slots(kind: str) -> None:
    with serving({0: part(LAYER, [2, 4, 5])}) as served, engine(served.backend, kind) as slab:
        hidden, ids, weights = draw(5, LAYER, 6)
        there = np.where(np.isin(ids, (2, 4, 5)), ids, -1)
        inputs = hidden, there, weights
        for slots in (table(-1, -1, 0, -1, 1, 2), table(-1, -1, 0, -1, 1, 2, -1)):
            claim = begin(slab, inputs, slots=slots)
            finish(slab, claim, inputs)
        assert served.resident.n_calls == 2


@each_kind
def test_its_calls_come_between_the_steps_of_a_long_one(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """For which it yields, each time."""
    monkeypatch.setattr(workspace, "_STEP_MULTIPLY_ADDS", 1)
    monkeypatch.setattr(workspace, "_STEP_ROWS", 1)
    with (
        serving() as served,
        engine(served.backend, kind) as slab,
        engine(served.backend, kind) as other,
    ):
        long, short = draw(1, LAYER, 600), draw(2, LAYER, 1)
        finish(other, begin(other, short), short)
        due = AlwaysDue(lambda: finish(other, begin(other, short), short))
        claim = begin(slab, long, between_steps=due)
        finish(slab, claim, long)
        assert due.n == 2
        assert served.counts == (3, 3)


@each_kind
def test_a_slab_is_closed_while_calls_are_on_their_way(kind: str) -> None:
    """After they are done."""
    with serving() as served:
        made = Engine(served.backend, kind)
        calls = []
        for seed in range(5):
            inputs = draw(seed, LAYER, 1)
            calls.append((begin(made, inputs), inputs))
        # Read once they are waited for, before the memory is gone.
        close = functools.partial(assert_all_done, made, calls)
        made.slab._closers.insert(0, close)
        made.slab.close()
        assert not made.claims


def assert_all_done(slab: Engine, calls: list[tuple[Claim, Inputs]]) -> None:
    for claim, inputs in calls:
        found = slab.take(claim, inputs[0])
        assert_close(found, reference_ffn(LAYER, *inputs), TOLERANCE[BF16])


@each_kind
def test_the_workspace_grows_while_it_is_there(kind: str) -> None:
    """And a call was prepared for the one before."""
    with serving() as served, engine(served.backend, kind) as slab:
        served.call(0)
        before = served.backend._workspace.address
        inputs = draw(1, LAYER, 2)
        claim = slab.give(*inputs)
        call = call_of(claim, *inputs[:2])
        slab.slab.prepare(call)
        running = [(begin(slab, each), each) for each in (draw(2, LAYER, 1), draw(3, LAYER, 1))]
        slab.slab.prepare(call)
        wide = random_layer(7, hidden_size=200, intermediate_size=136, top_k=6, weight_dtype=BF16)
        served.backend.add(1, wide)
        assert served.backend._workspace.address != before
        slab.slab.enqueue(call, NeverDue())
        for each in (*running, (claim, inputs)):
            finish(slab, *each)
        for seed in range(2):
            served.call(seed)
            call_wide = draw(seed, wide, 2)
            out = np.empty_like(call_wide[0])
            served.backend.ffn(1, *call_wide, out)
            assert_close(out, reference_ffn(wide, *call_wide), TOLERANCE[BF16])
