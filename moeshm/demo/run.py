"""Generates text with the bundled model, its experts in a worker process, and checks every step."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .. import checkpoint
from ..backends import Backend, Ids, Weights
from ..backends.cpu import CpuBackend
from ..client import ExpertClient
from ..dtypes import FloatArray
from ..stats import ClientStats
from ..supervisor import spawn_worker
from . import tiny_moe_path
from .decoder import Decoder, generate

#: The head of a function, whose docstring the model goes on to write.
DEFAULT_PROMPT = b'import os\n\n\ndef find_files(folder, pattern):\n    """'
#: The likeliest token at every step ends in loops; this does so far less.
TEMPERATURE = 0.5
SEED = 0
#: The model's matrices are too small to be worth another thread.
THREADS = 1
#: Largest difference of a logit for which the two runs agree.
MAX_LOGIT_DIFF = 1e-3

Step = tuple[int, FloatArray]


class Kill(NamedTuple):
    """SIGKILL to the worker: which process, and during which call."""

    pid: int
    #: The token, counted from 0, that was being computed.
    token: int
    layer: int


class Comparison(NamedTuple):
    """Two runs over the same tokens, up to and with the first one on which they do not agree."""

    max_abs_logit_diff: float
    #: Counted from 0; None when the texts are the same.
    first_other_token: int | None


@dataclass(frozen=True)
class Outcome:
    """What was generated, how fast, and whether the experts in this process say the same."""

    generated: bytes
    #: Of the decoder and its experts, without what was done with the tokens.
    elapsed_s: float
    #: The same with the experts in this process.
    in_process_s: float
    comparison: Comparison
    transport: str
    #: Of the last worker.
    worker_pid: int
    kill: Kill | None
    n_layers: int
    stats: ClientStats

    @property
    def agrees(self) -> bool:
        """True when the text is the same and no logit differs by more than MAX_LOGIT_DIFF."""
        difference, first_other_token = self.comparison
        return first_other_token is None and difference <= MAX_LOGIT_DIFF


def run(
    prompt: bytes, n_tokens: int, kill_worker: bool, on_token: Callable[[int], None]
) -> Outcome:
    """Generate `n_tokens` bytes after `prompt`, each handed to `on_token` as soon as it is drawn.

    `kill_worker`: SIGKILL to the worker halfway, with a call on its way. The text is then computed
    once more with the experts in this process; every step's logits are kept for that, 1 KiB each.
    """
    model = tiny_moe_path()
    backend = CpuBackend(checkpoint.load(model).layers, THREADS)
    with spawn_worker(model, threads=THREADS, fallback=backend) as client:
        n_layers = len(client.layers)
        # Not in the last layers: of a single token, too, calls are left that need another worker.
        kill_at = n_tokens // 2 * n_layers + (n_layers - 1) // 2 if kill_worker else None
        experts = _RemoteExperts(client, kill_at)
        steps, elapsed_s = _timed(_steps(Decoder(model, experts), prompt, n_tokens), on_token)
        stats, transport, worker_pid = client.stats(), client.transport, client.worker_pid
    local = Decoder(model, _in_process(backend))
    expected, in_process_s = _timed(_steps(local, prompt, n_tokens), lambda _token: None)
    return Outcome(
        generated=bytes(token for token, _ in steps),
        elapsed_s=elapsed_s,
        in_process_s=in_process_s,
        comparison=compare(steps, expected),
        transport=transport,
        worker_pid=worker_pid,
        kill=experts.kill,
        n_layers=n_layers,
        stats=stats,
    )


def compare(steps: Sequence[Step], expected: Sequence[Step]) -> Comparison:
    """Compare the logits of every step, and end where the tokens part.

    After that the two runs have read different texts, and their logits have nothing to do with
    each other.
    """
    differences = []
    for number, ((token, logits), (other, other_logits)) in enumerate(
        zip(steps, expected, strict=True)
    ):
        differences.append(np.abs(logits - other_logits).max())
        if token != other:
            return Comparison(float(np.max(differences)), number)
    return Comparison(float(np.max(differences)), None)


class _RemoteExperts:
    """Every call goes to the worker, which is killed during the one numbered `kill_at`."""

    def __init__(self, client: ExpertClient, kill_at: int | None) -> None:
        self._client = client
        self._kill_at = kill_at
        self._n_calls = 0
        self.kill: Kill | None = None

    def __call__(
        self, layer: int, hidden_states: FloatArray, topk_ids: Ids, topk_weights: Weights
    ) -> FloatArray:
        is_fatal = self._n_calls == self._kill_at
        self._n_calls += 1
        # It answers one row sooner than a signal arrives. More rows take their time, and might
        # not all fit into a transport that nobody reads.
        if is_fatal and len(hidden_states) == 1:
            _stop(self._client.worker_pid)
        future = self._client.submit(layer, hidden_states, topk_ids, topk_weights)
        if is_fatal:
            token = (self._n_calls - 1) // len(self._client.layers)
            self.kill = Kill(self._client.worker_pid, token, layer)
            os.kill(self.kill.pid, signal.SIGKILL)
        result: FloatArray = future.result()
        return result


def _stop(pid: int) -> None:
    """Stop a child process, and return when it does not run any more."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def _in_process(backend: Backend) -> Callable[[int, FloatArray, Ids, Weights], FloatArray]:
    def compute(layer: int, hidden_states: FloatArray, ids: Ids, weights: Weights) -> FloatArray:
        out = np.empty_like(hidden_states)
        backend.ffn(layer, hidden_states, ids, weights, out)
        return out

    return compute


def _steps(decoder: Decoder, prompt: bytes, n_tokens: int) -> Iterator[Step]:
    return generate(decoder, prompt, n_tokens, TEMPERATURE, SEED)


def _timed(steps: Iterator[Step], on_token: Callable[[int], None]) -> tuple[list[Step], float]:
    """Take every step; how long they took, without `on_token`."""
    taken = []
    elapsed_s = 0.0
    start = time.perf_counter()
    for step in steps:
        elapsed_s += time.perf_counter() - start
        taken.append(step)
        on_token(step[0])
        start = time.perf_counter()
    return taken, elapsed_s
