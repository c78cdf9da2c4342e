"""A client of `overload`: it calls as fast as it is answered, or with a pause, and notes the times.

python -m moeshm.bench.overload_client SETUP

SETUP is a `ClientSetup` as JSON. Says "ready" after its first call, reads when to begin and when to
end (seconds of CLOCK_MONOTONIC) from a line, and prints a `Found` as JSON.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import msgspec
import numpy as np

import moeshm
from moeshm.errors import CallError, DeadlineExceeded

from .overload_worker import LAYER
from .replay_model import Shape

#: Until the deadlines of a prefill's calls, which are to be computed.
_PATIENCE_S = 600.0


class ClientSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What one client does."""

    address: str
    shape: Shape
    n_tokens: int
    #: Until a call's deadline; 0 for minutes.
    timeout_s: float
    #: Between a call's end and the next one's beginning.
    pause_s: float
    seed: int


class Found(msgspec.Struct):
    """What the program prints: of each call, in ns, how long it took and how late it ended."""

    durations_ns: list[int] = []
    late_ns: list[int] = []
    #: How late a plain sleep between calls ended.
    sleep_late_ns: list[int] = []
    #: Ended in a result, in DeadlineExceeded, and with another error: the worker was lost.
    done: int = 0
    missed: int = 0
    lost: int = 0
    reconnects: int = 0


def main(words: Sequence[str]) -> None:
    """Call until the end."""
    (text,) = words
    setup = msgspec.json.decode(text, type=ClientSetup)
    shape, n_tokens = setup.shape, setup.n_tokens
    random = np.random.default_rng(setup.seed)
    x = random.standard_normal((n_tokens, shape.hidden_size), np.float32).astype(np.float16)
    # No expert twice for a token.
    ids = random.random((n_tokens, shape.num_experts)).argsort(axis=1)[:, : shape.top_k]
    weights = np.full(ids.shape, 1 / shape.top_k, np.float32)
    call = LAYER, x, np.ascontiguousarray(ids, np.int32), weights
    found = Found()
    with moeshm.connect(setup.address) as client:
        client.compute(*call, timeout_s=_PATIENCE_S)
        print("ready", flush=True)
        begin_s, end_s = map(float, sys.stdin.readline().split())
        time.sleep(max(0.0, begin_s - time.monotonic()))
        while time.monotonic() < end_s:
            _call(client, call, setup.timeout_s or _PATIENCE_S, found)
            if setup.pause_s:
                slept_ns = time.monotonic_ns()
                time.sleep(setup.pause_s)
                slept_ns = time.monotonic_ns() - slept_ns
                found.sleep_late_ns.append(slept_ns - int(setup.pause_s * 1e9))
        found.reconnects = client.stats().reconnects
    print(msgspec.json.encode(found).decode(), flush=True)


def _call(
    client: moeshm.ExpertClient, call: tuple[object, ...], timeout_s: float, found: Found
) -> None:
    start_ns = time.monotonic_ns()
    try:
        client.compute(*call, timeout_s=timeout_s)  # type: ignore[arg-type]
        found.done += 1
    except DeadlineExceeded:
        found.missed += 1
    except CallError:
        found.lost += 1
    end_ns = time.monotonic_ns()
    found.durations_ns.append(end_ns - start_ns)
    late_ns = end_ns - start_ns - int(timeout_s * 1e9)
    if late_ns > 0:
        found.late_ns.append(late_ns)


if __name__ == "__main__":
    main(sys.argv[1:])
