"""What every contender of `moeshm bench kernels` computes: random experts, tokens and routing."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moeshm.backends import Ids, Weights
from moeshm.backends.reference import Float64Array, reference_ffn
from moeshm.checkpoint import ExpertLayer
from moeshm.checkpoint.layer import ExpertWeights
from moeshm.dtypes import Array, DType, narrow, widen

from .kernels_shapes import KernelShape

#: Calls of one graph, each with a routing of its own, so that no call finds the last one's
#: weights in the cache.
CALLS = 16
#: Tokens that are in every number of tokens alike, and whose outputs are checked.
PROBES = 8
#: Values between the first of an expert and that of the next in what all are cut from.
_STEP = 8192


class Routing(NamedTuple):
    """`topk_ids` and `topk_weights` of one call."""

    ids: Ids
    weights: Weights


class Cell(NamedTuple):
    """`CALLS` calls of one number of tokens."""

    #: [n_tokens, hidden_size] in the format of the weights, of every call.
    hidden_states: Array
    routings: list[Routing]
    #: Rows of `hidden_states` whose output of the last call is known, and that output.
    rows: npt.NDArray[np.intp]
    expected: Float64Array

    @property
    def n_tokens(self) -> int:
        """Of each call."""
        return len(self.hidden_states)

    @property
    def n_distinct(self) -> float:
        """Experts that a call uses, mean over the calls."""
        return float(np.mean([len(np.unique(routing.ids)) for routing in self.routings]))


class Work:
    """A layer of random experts in one format, and calls on it.

    The experts are windows of one long random array, each beginning elsewhere: that many random
    numbers would take minutes to draw.
    """

    def __init__(self, shape: KernelShape, dtype: DType, seed: int) -> None:
        self.info = info = shape.info(dtype)
        self.has_bias = shape.has_bias
        self._seed = seed
        random = np.random.default_rng(seed)
        self._n_values = 3 * info.hidden_size * info.intermediate_size
        n_random = self._n_values + info.num_experts * _STEP
        values = random.standard_normal(n_random, np.float32)
        # Of a variance with which gate and up are about 1.
        values *= np.float32(info.hidden_size**-0.5)
        self._values = narrow(values, dtype)
        self.layer = ExpertLayer(info, [self._expert(random, i) for i in info.experts])
        self._probes = _tokens(random, PROBES, info.hidden_size, dtype)
        self._probe_routing = _routing(random, PROBES, info.num_experts, info.top_k)

    def matrices(self, expert: int) -> Array:
        """Its three projections as one array: `gate_proj`, `up_proj`, `down_proj`, row by row."""
        return self._values[expert * _STEP :][: self._n_values]

    def cell(self, n_tokens: int) -> Cell:
        """The calls with that many tokens; the same ones every time."""
        info = self.info
        random = np.random.default_rng([self._seed, n_tokens])
        hidden_states = _tokens(random, n_tokens, info.hidden_size, info.weight_dtype)
        routings = [_routing(random, n_tokens, info.num_experts, info.top_k) for _ in range(CALLS)]
        n_probes = min(n_tokens, PROBES)
        rows = random.permutation(n_tokens)[:n_probes]
        hidden_states[rows] = self._probes[:n_probes]
        routings[-1].ids[rows] = self._probe_routing.ids[:n_probes]
        routings[-1].weights[rows] = self._probe_routing.weights[:n_probes]
        return Cell(hidden_states, routings, rows, self._expected[:n_probes])

    @functools.cached_property
    def _expected(self) -> Float64Array:
        """A probe at a time on each CPU: the reference keeps a probe's experts in float64."""
        ids, weights = self._probe_routing

        def compute(probe: int) -> Float64Array:
            row = slice(probe, probe + 1)
            return reference_ffn(self.layer, self._probes[row], ids[row], weights[row])

        with ThreadPoolExecutor(min(PROBES, os.cpu_count() or 1)) as threads:
            return np.concatenate(list(threads.map(compute, range(PROBES))))

    def _expert(self, random: np.random.Generator, expert: int) -> ExpertWeights:
        hidden, inner = self.info.hidden_size, self.info.intermediate_size
        gate, up, down = np.split(self.matrices(expert), 3)
        biases: dict[str, Any] = {}
        if self.has_bias:
            for name, size in (("gate", inner), ("up", inner), ("down", hidden)):
                biases[f"{name}_bias"] = random.standard_normal(size, np.float32)
        return ExpertWeights(
            gate_proj=gate.reshape(inner, hidden),
            up_proj=up.reshape(inner, hidden),
            down_proj=down.reshape(hidden, inner),
            **biases,
        )


def _tokens(random: np.random.Generator, n_tokens: int, hidden_size: int, dtype: DType) -> Array:
    return narrow(random.standard_normal((n_tokens, hidden_size), np.float32), dtype)


def _routing(random: np.random.Generator, n_tokens: int, n_experts: int, top_k: int) -> Routing:
    """Uniform: each token has `top_k` different experts, each as likely as any other."""
    scores = random.random((n_tokens, n_experts), np.float32)
    ids = np.argsort(scores, axis=1)[:, :top_k].astype(np.int32)
    weights = random.random((n_tokens, top_k), np.float32) + np.float32(0.1)
    return Routing(ids, weights / weights.sum(axis=1, keepdims=True))


class Verdict(NamedTuple):
    """How right a contender's output is."""

    relative_error: float
    is_repeatable: bool


def judge(first: Array, second: Array, cell: Cell) -> Verdict:
    """Of two outputs of the last call, each [n_tokens, hidden_size].

    `relative_error`: Frobenius norm, of the rows that are known. ValueError: an output is not
    finite, as where nothing was written.
    """
    values = widen(first)
    n_bad = int(np.count_nonzero(~np.isfinite(values)))
    if n_bad:
        raise ValueError(f"{n_bad} of {values.size} outputs are not finite")
    difference = values[cell.rows] - cell.expected
    return Verdict(
        relative_error=float(np.linalg.norm(difference) / np.linalg.norm(cell.expected)),
        is_repeatable=first.tobytes() == second.tobytes(),
    )
