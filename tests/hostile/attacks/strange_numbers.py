"""Sends NaN, infinities and denormals as activations and as weights.

They must stay in that call: what is computed beside it, or after it in the same memory, is others'.
"""

from __future__ import annotations

import numpy as np

import moeshm
from tests.hostile.attack import Refusal, Variant
from tests.hostile.conftest import Victim

VICTIM = "model_victim"
REFUSAL = Refusal(None, "computed as they are; nobody else's result changes", "session ended after")
VARIANTS = {
    "NaN": Variant(np.nan),
    "infinity": Variant(np.inf),
    "minus infinity": Variant(-np.inf),
    "the largest": Variant(np.finfo(np.float32).max),
    "denormal": Variant(1e-45),
}


def scene(victim: Victim, transport: str, value: float, refusal: Refusal) -> None:
    """In each array, of one token among good ones; those, and others' calls, are as they were."""
    rng = np.random.default_rng(3)
    with (
        moeshm.connect(victim.address, transport=transport) as attacker,
        moeshm.connect(victim.address, transport=transport) as other,
    ):
        layer, info = next(iter(attacker.layers.items()))
        hidden = rng.standard_normal((9, info.hidden_size), np.float32)
        ids = rng.integers(0, info.num_experts, (9, info.top_k), np.int32)
        weights = rng.random((9, info.top_k), np.float32)
        expected = other.compute(layer, hidden, ids, weights)
        for place in ("hidden", "weights", "both"):
            bad_hidden, bad_weights = hidden.copy(), weights.copy()
            if place != "weights":
                bad_hidden[4, ::3] = value
            if place != "hidden":
                bad_weights[4, 0] = value
            # On their way at the same time, of the same layer.
            futures = [
                attacker.submit(layer, bad_hidden, ids, bad_weights),
                other.submit(layer, hidden, ids, weights),
                attacker.submit(layer, bad_hidden, ids, bad_weights),
            ]
            spoilt, good, again = (future.result() for future in futures)
            np.testing.assert_array_equal(good, expected)
            np.testing.assert_array_equal(np.delete(spoilt, 4, 0), np.delete(expected, 4, 0))
            np.testing.assert_array_equal(spoilt, again)
    for _ in range(2):
        victim.expect_log(refusal.log)
