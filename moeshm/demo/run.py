"""Generates text with the bundled model, its experts in a worker process, and checks every step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import checkpoint
from ..backends import Backend, Ids, Weights
from ..backends.cpu import CpuBackend
from ..client import ExpertClient
from ..dtypes import FloatArray
from ..offload import ExpertOffload, OffloadStats
from ..placement import Placement
from ..stats import ClientStats
from ..supervisor import spawn_worker
from . import tiny_moe_path
from .decoder import Decoder, ExpertsFn, generate
from .placed import (
    WORKER,
    Choices,
    Shares,
    n_hot_experts,
    place,
    recorded,
    shares_of,
)
from .victim import Kill, Victim

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
    n_layers: int
    #: None where there was no worker: no expert was cold.
    transport: str | None
    #: Of the last worker.
    worker_pid: int | None
    #: None unless it was to be killed and a call was on its way in time.
    kill: Kill | None
    kill_worker: bool
    worker_restarts: int
    #: Why the worker could not give the transport that was wished for.
    stepped_down: tuple[str, ...]
    #: Calls of the worker: bytes, rows and times. Those by which an offload gets to know it first
    #: are not among them.
    stats: ClientStats | OffloadStats
    #: Why calls were computed here in the worker's place.
    fallback_causes: tuple[str, ...]
    #: None when all experts were the worker's.
    shares: Shares | None

    @property
    def agrees(self) -> bool:
        """True when the text is the same and no logit differs by more than MAX_LOGIT_DIFF."""
        difference, first_other_token = self.comparison
        return first_other_token is None and difference <= MAX_LOGIT_DIFF


class _Text(NamedTuple):
    """What is written, whoever computes the experts."""

    prompt: bytes
    n_tokens: int

    def write(
        self, experts: ExpertsFn, on_token: Callable[[int], None] = lambda _token: None
    ) -> tuple[list[Step], float]:
        """Every step, and how long they took, without `on_token`."""
        decoder = Decoder(tiny_moe_path(), experts)
        return _timed(generate(decoder, self.prompt, self.n_tokens, TEMPERATURE, SEED), on_token)


def run(
    prompt: bytes,
    n_tokens: int,
    kill_worker: bool,
    on_token: Callable[[int], None],
    hot_fraction: float | None = None,
) -> Outcome:
    """Generate `n_tokens` bytes after `prompt`, each handed to `on_token` as soon as it is drawn.

    `kill_worker`: SIGKILL to the worker halfway, with a call on its way. `hot_fraction`: the most
    used experts of each layer stay in this process, so many of all; by default the worker has
    every expert. The text is computed once more with all experts in this process; every step's
    logits are kept for that, 1 KiB each. SettingError: `hot_fraction` is not in 0..1.
    """
    text = _Text(prompt, n_tokens)
    backend = CpuBackend(checkpoint.load(tiny_moe_path()).layers, THREADS)
    n_layers = len(backend.layers)
    # Not in the last layers: of a single token, too, calls are left that need another worker.
    kill_at = n_tokens // 2 * n_layers + (n_layers - 1) // 2 if kill_worker else None
    if hot_fraction is None:
        return _run_remote(text, backend, kill_at, on_token)
    return _run_placed(text, backend, kill_at, on_token, hot_fraction)


def _run_remote(
    text: _Text, backend: CpuBackend, kill_at: int | None, on_token: Callable[[int], None]
) -> Outcome:
    """All experts are the worker's."""
    choices: Choices = []
    with spawn_worker(tiny_moe_path(), threads=THREADS, fallback=backend) as client:
        victim = Victim(client, len(client.layers), choices, kill_at)
        steps, elapsed_s = text.write(recorded(_through(victim), choices), on_token)
        stats, transport, worker_pid = client.stats(), client.transport, client.worker_pid
    expected, in_process_s = text.write(_in_process(backend))
    return Outcome(
        generated=bytes(token for token, _ in steps),
        elapsed_s=elapsed_s,
        in_process_s=in_process_s,
        comparison=compare(steps, expected),
        n_layers=len(backend.layers),
        transport=transport,
        worker_pid=worker_pid,
        kill=victim.kill,
        kill_worker=kill_at is not None,
        worker_restarts=stats.worker_restarts,
        stepped_down=tuple(stats.stepped_down),
        stats=stats,
        fallback_causes=tuple(stats.fallbacks),
        shares=None,
    )


def _run_placed(
    text: _Text,
    backend: CpuBackend,
    kill_at: int | None,
    on_token: Callable[[int], None],
    hot_fraction: float,
) -> Outcome:
    """Hot experts stay here: those that a first run, all in this process, used most."""
    first_choices: Choices = []
    choices: Choices = []
    n_hot, _ = n_hot_experts(hot_fraction)
    expected, in_process_s = text.write(recorded(_in_process(backend), first_choices))
    placement = place(backend.layers, first_choices, n_hot)
    with contextlib.ExitStack() as stack:
        client = victim = None
        cold = placement.experts_of(WORKER)
        if cold:
            client = stack.enter_context(
                spawn_worker(tiny_moe_path(), experts=cold, threads=THREADS)
            )
            victim = Victim(client, len(backend.layers), choices, kill_at)
        offload = _make_offload(victim, placement, backend)
        steps, elapsed_s = text.write(recorded(offload.forward, choices), on_token)
        stats = offload.stats()
        service = None if client is None else client.stats()
        return Outcome(
            generated=bytes(token for token, _ in steps),
            elapsed_s=elapsed_s,
            in_process_s=in_process_s,
            comparison=compare(steps, expected),
            n_layers=len(backend.layers),
            transport=None if client is None else client.transport,
            worker_pid=None if client is None else client.worker_pid,
            kill=None if victim is None else victim.kill,
            kill_worker=kill_at is not None,
            worker_restarts=0 if service is None else service.worker_restarts,
            stepped_down=() if service is None else tuple(service.stepped_down),
            stats=stats,
            fallback_causes=tuple(stats.fallback_slots),
            shares=shares_of(hot_fraction, placement, choices, stats),
        )


def _make_offload(client: Any, placement: Placement, fallback: Backend) -> ExpertOffload:
    """`client`: None where no expert is cold; a Victim stands for a client."""
    hot = {number: layer.hot for number, layer in placement.layers.items() if layer.hot}
    local = None
    if hot:
        local = CpuBackend(checkpoint.load(tiny_moe_path(), experts=hot).layers, THREADS)
    workers = {} if client is None else {WORKER: client}
    return ExpertOffload(workers, placement, local=local, fallback=fallback)


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


def _through(client: ExpertClient | Victim) -> ExpertsFn:
    def compute(layer: int, hidden_states: FloatArray, ids: Ids, weights: Weights) -> FloatArray:
        result: FloatArray = client.submit(layer, hidden_states, ids, weights).result()
        return result

    return compute


def _in_process(backend: Backend) -> ExpertsFn:
    def compute(layer: int, hidden_states: FloatArray, ids: Ids, weights: Weights) -> FloatArray:
        out = np.empty_like(hidden_states)
        backend.ffn(layer, hidden_states, ids, weights, out)
        return out

    return compute


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
