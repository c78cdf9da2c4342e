"""Answers a call twice.

The second answer would be taken for the next call's; without end, such answers would keep who
receives beyond its deadline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeshm.errors import WorkerDied
from moeshm.session import Session
from tests.hostile.attack import Refusal, Variant
from tests.hostile.lying import INPUTS, lied_to, replying

SIDE = "worker"
REFUSAL = Refusal(WorkerDied, "a reply to call 1, which is not open")
VARIANTS = {"compute": Variant(False), "submit": Variant(True)}


def _twice(opened: Session, call_id: int) -> None:
    for _ in range(2):
        replying()(opened, call_id)


def scene(folder: Path, transport: str, is_submitted: bool, refusal: Refusal) -> None:
    """The first is the result, the second ends the session."""
    with lied_to(folder, transport, _twice) as client:
        result: Any = client.submit(*INPUTS).result() if is_submitted else client.compute(*INPUTS)
        np.testing.assert_array_equal(result, INPUTS.hidden_states)
        with pytest.raises(WorkerDied, match=refusal.says):
            client.compute(*INPUTS)
