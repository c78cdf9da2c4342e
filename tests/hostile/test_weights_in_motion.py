"""A real worker whose client writes NaN, infinity and noise over a call that is being computed."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator

import numpy as np
import pytest

import moeshm
from moeshm.demo import tiny_moe_path
from tests.crash.processes import Process, running
from tests.hostile.attacker import PAGE, Attacker, attacking

N_TOKENS, HIDDEN_SIZE, TOP_K, NUM_EXPERTS = 8, 128, 4, 16
#: Where a call's arrays begin, after a record's header of a cache line.
IDS = PAGE + 64 + 64
WEIGHTS = IDS + N_TOKENS * TOP_K * 4
ROWS = WEIGHTS + N_TOKENS * TOP_K * 4
STRANGE = [np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 1e-45, 1.0]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, str]]:
    """`moeshm worker` with the bundled model, and its address."""
    address = f"unix:{tmp_path_factory.mktemp('hostile') / 's'}"
    arguments = ["--model", str(tiny_moe_path()), "--listen", address, "--threads", "2"]
    with running(["-m", "moeshm", "worker", *arguments]) as process:
        process.log.read_until("listening at")
        yield process, address
        assert process.is_running()


def a_call(rng: np.random.Generator, layer: int) -> bytes:
    """With strange values here and there, every id in range."""
    header = struct.pack(
        "<HHIQqIIHBBB27x", 1, 64, layer, 1, 0, N_TOKENS, HIDDEN_SIZE, TOP_K, 0, 0, 0
    )
    ids = rng.integers(-1, NUM_EXPERTS, (N_TOKENS, TOP_K), np.int32)
    weights, rows = (
        np.where(rng.random(shape) < 0.2, rng.choice(STRANGE, shape), rng.standard_normal(shape))
        for shape in ((N_TOKENS, TOP_K), (N_TOKENS, HIDDEN_SIZE))
    )
    floats = [array.astype(np.float32).tobytes() for array in (weights, rows)]
    return b"".join((header, ids.tobytes(), *floats))


def scribble(attacker: Attacker, choices: random.Random, largest_id: int) -> None:
    """Write over ids, weights and rows until the worker has answered."""
    before = attacker.bytes_of_replies()
    while attacker.bytes_of_replies() == before:
        start = choices.choice((IDS, WEIGHTS, ROWS))
        at = start + 4 * choices.randrange(N_TOKENS * TOP_K)
        as_id = struct.pack("<i", choices.randint(-1, largest_id))
        as_float = struct.pack("<f", choices.choice(STRANGE))
        attacker.calls[at : at + 4] = as_id if start == IDS else as_float


def test_what_changes_under_the_worker_spoils_only_its_own_result(
    worker: tuple[Process, str],
) -> None:
    process, address = worker
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    rng, choices = np.random.default_rng(seed), random.Random(seed)
    hidden = rng.standard_normal((5, HIDDEN_SIZE), np.float32)
    ids = rng.integers(0, NUM_EXPERTS, (5, TOP_K), np.int32)
    weights = rng.random((5, TOP_K), np.float32)
    with moeshm.connect(address) as bystander:
        layer = next(iter(bystander.layers))
        expected = bystander.compute(layer, hidden, ids, weights)
        for attempt in range(40):
            # Mostly ids that exist: others end the call at once.
            largest_id = NUM_EXPERTS - 1 if attempt % 4 else 1 << 30
            with attacking(address, "shared") as attacker:
                attacker.send(a_call(rng, layer))
                scribble(attacker, choices, largest_id)
                version, status = struct.unpack_from("<HH", attacker.receive())
                assert (version, status) in ((1, 0), (1, 1))
                assert status == 0 or largest_id >= NUM_EXPERTS
            result = bystander.compute(layer, hidden, ids, weights)
            np.testing.assert_array_equal(result, expected)
        assert bystander.stats().reconnects == 0
    assert process.is_running()
