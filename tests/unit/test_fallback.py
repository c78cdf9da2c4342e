"""A fallback may hold more than the worker, in another order; what it looks up, it keeps."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from moeshm import arrays, fallback
from moeshm.errors import WorkerDied
from moeshm.fallback import Fallback
from moeshm.held import HeldView
from moeshm.stats import StatsCounter
from tests.growing import GrowingArithmetic, draw, expected, globally, layer_of


def test_local_ids_of_each_view_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    table = fallback._table

    def counted(experts: tuple[int, ...], held: tuple[int, ...]) -> object:
        made.append(experts)
        return table(experts, held)

    monkeypatch.setattr(fallback, "_table", counted)
    order = (4, 2, 0, 1)
    first, second = HeldView({0: layer_of((4, 2))}), HeldView({0: layer_of((1, 4, 0))})
    counter = StatsCounter()
    stands_in = Fallback(GrowingArithmetic({0: order}), first.layers, counter)
    rng = np.random.default_rng(3)
    for _ in range(3):
        for view in (first, second):
            info = view.layers[0]
            hidden, ids, weights = draw(rng, len(info.experts))
            inputs = arrays.check(0, info, hidden, ids, weights, False)
            out = np.full_like(hidden, np.nan)
            stands_in.compute(view, 0, inputs, out, WorkerDied("gone"))
            wanted = expected(0, hidden, globally(ids, info.experts), weights)
            np.testing.assert_array_equal(out, wanted)
    # What is the same as far as it goes needs none.
    assert made == [(1, 4, 0)]
    assert counter.snapshot().fallback_calls == 6
    # And is forgotten with the view.
    del view, second
    gc.collect()
    assert len(stands_in._tables) == 1
