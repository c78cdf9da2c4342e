"""Writes NaN, infinity, noise and other ids over a call that is being computed.

What was checked once would be another thing when it is used.
"""

from __future__ import annotations

import os
import random
import struct
import time

import numpy as np

from tests.hostile.attack import Refusal
from tests.hostile.attacker import CACHE_LINE, PAGE, PATIENCE_S, Attacker, attacking
from tests.hostile.calls import CALL_FORM
from tests.hostile.conftest import Victim

TRANSPORTS, VICTIM = ("shared",), "model_victim"
REFUSAL = Refusal(
    None, "ids are copied before they are checked; the rest spoils its own result", "session ended"
)
N_TOKENS, HIDDEN_SIZE, TOP_K, NUM_EXPERTS = 8, 128, 4, 16
#: Where a call's arrays begin, after a record's header of a cache line.
IDS = PAGE + CACHE_LINE + 64
WEIGHTS = IDS + N_TOKENS * TOP_K * 4
ROWS = WEIGHTS + N_TOKENS * TOP_K * 4
STRANGE = [np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 1e-45, 1.0]


def a_call(rng: np.random.Generator) -> bytes:
    """With strange values here and there, every id in range."""
    header = struct.pack(CALL_FORM, 1, 64, 0, 1, 0, N_TOKENS, HIDDEN_SIZE, TOP_K, 0, 0, 0, 0)
    ids = rng.integers(-1, NUM_EXPERTS, (N_TOKENS, TOP_K), np.int32)
    weights, rows = (
        np.where(rng.random(shape) < 0.2, rng.choice(STRANGE, shape), rng.standard_normal(shape))
        for shape in ((N_TOKENS, TOP_K), (N_TOKENS, HIDDEN_SIZE))
    )
    floats = [array.astype(np.float32).tobytes() for array in (weights, rows)]
    return b"".join((header, ids.tobytes(), *floats))


def scene(victim: Victim, transport: str, _: None, refusal: Refusal) -> None:
    """Forty calls, each with a session of its own."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    rng, choices = np.random.default_rng(seed), random.Random(seed)
    for attempt in range(40):
        # Mostly ids that exist: others end the call at once.
        largest_id = NUM_EXPERTS - 1 if attempt % 4 else 1 << 30
        with attacking(victim.address, transport) as attacker:
            # Read first: a quick worker has answered before the first change.
            before = attacker.bytes_of_replies()
            attacker.send(a_call(rng))
            _scribble(attacker, before, choices, largest_id)
            version, status = struct.unpack_from("<HH", attacker.receive())
            assert (version, status) in ((1, 0), (1, 1))
            assert status == 0 or largest_id >= NUM_EXPERTS
        victim.expect_log(refusal.log)


def _scribble(attacker: Attacker, before: int, choices: random.Random, largest_id: int) -> None:
    """Write over ids, weights and rows until the worker has answered: has sent more than before."""
    limit = time.monotonic() + PATIENCE_S
    while attacker.bytes_of_replies() == before:
        if time.monotonic() > limit:
            attacker.control.setblocking(False)
            raise AssertionError(f"no answer; the worker says {attacker.farewell()}")
        start = choices.choice((IDS, WEIGHTS, ROWS))
        at = start + 4 * choices.randrange(N_TOKENS * TOP_K)
        as_id = struct.pack("<i", choices.randint(-1, largest_id))
        as_float = struct.pack("<f", choices.choice(STRANGE))
        attacker.calls[at : at + 4] = as_id if start == IDS else as_float
