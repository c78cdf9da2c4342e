"""The GPU backend while slots come and go between two looks at how many there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeshm.backends.gpu import backend as backend_module
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.reference import reference_ffn
from tests.conformance.test_backends import assert_close, compute, draw_call
from tests.simt.device import SimtDevice
from tests.unit.test_gpu_backend import LAYER
from tests.unit.test_gpu_experts import part


@pytest.mark.parametrize("n_tokens", [1, 40, 100])
def test_slots_that_go_while_a_job_is_looked_for(
    n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job for fewer slots must not be taken for one for all: it leaves the last ones out."""
    backend = GpuBackend({0: part(LAYER, [0, 1])}, SimtDevice())
    signs_of = backend_module._signs
    slots = backend.add(0, part(LAYER, [2, 3, 4, 5]))
    assert slots == [2, 3, 4, 5]

    def signs_and_removal(*arguments: Any) -> Any:
        signs = signs_of(*arguments)
        backend.remove(0, slots)  # as another session's thread
        return signs

    hidden, ids, weights = draw_call(1, LAYER, n_tokens, 2)
    with monkeypatch.context() as patched:
        patched.setattr(backend_module, "_signs", signs_and_removal)
        low = np.minimum(ids, 1)
        found = compute(backend, hidden, low, weights)
        assert_close(found, reference_ffn(LAYER, hidden, low, weights), 1e-5)
    assert backend.add(0, part(LAYER, [2, 3, 4, 5])) == slots
    found = compute(backend, hidden, ids, weights)
    assert_close(found, reference_ffn(LAYER, hidden, ids, weights), 1e-5)
