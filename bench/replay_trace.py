"""Which experts the router chooses for every token of a prompt and a completion."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moeshm.backends import Ids, Weights
from moeshm.errors import SettingError
from moeshm.placement import Placement
from moeshm.routing_stats import RoutingStats

from .replay_model import Shape

#: The synthetic router. A token's logit for an expert is the sum of three parts: the expert's
#: popularity in the layer, -log(rank) (Zipf's law); the stretch's topic, normal with this standard
#: deviation, drawn anew for each stretch; and the token's own, Gumbel noise of this scale, as in
#: sampling without replacement by Gumbel-top-k (Kool et al. 2019, arXiv:1903.06059).
TOPIC_DEVIATION = 2.0
TOKEN_SCALE = 0.4
#: Tokens of a stretch, on average; their number is geometric.
STRETCH_TOKENS = 16
#: With these and DEFAULT_HOT, about two in five prompt tokens have a cold expert in a layer of the
#: original's shape, and about seven in ten windows of four tokens, as its published counts of
#: calls and bytes imply.
DEFAULT_HOT = 0.58

_GENERATED_AT_ONCE = 512
#: What NumPy and zipfile raise for a file that is empty, cut off or something else.
_DAMAGED = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)


class Trace(NamedTuple):
    """A routing trace; prompt tokens come first, completion tokens after them."""

    #: int32 [n_layers, n_tokens, top_k], the model's ids.
    topk_ids: Ids
    #: float32 of the same shape.
    topk_weights: Weights
    n_prompt: int
    num_experts: int
    #: "synthetic" or "recorded".
    source: str

    @property
    def n_layers(self) -> int:
        """How many layers it has."""
        return len(self.topk_ids)

    @property
    def n_completion(self) -> int:
        """How many tokens follow the prompt."""
        return int(self.topk_ids.shape[1]) - self.n_prompt

    def fitted(
        self, shape: Shape, n_prompt: int | None = None, n_completion: int | None = None
    ) -> Trace:
        """The shape's layers, and that many prompt and completion tokens; all of them for None.

        SettingError: it has fewer, or is of another shape.
        """
        n_prompt = self.n_prompt if n_prompt is None else n_prompt
        n_completion = self.n_completion if n_completion is None else n_completion
        for name, asked, held in (
            ("layers", shape.n_layers, self.n_layers),
            ("prompt", n_prompt, self.n_prompt),
            ("completion", n_completion, self.n_completion),
        ):
            if asked > held:
                raise SettingError(f"{name}={asked}, but the trace has {held}; ask for less")
        found = self.num_experts, self.topk_ids.shape[2]
        if found != (shape.num_experts, shape.top_k):
            raise SettingError(
                f"the trace has {found[0]} experts, top-{found[1]}; {shape.name} has "
                f"{shape.num_experts}, top-{shape.top_k}: pass the --shape that was recorded"
            )
        tokens = np.r_[:n_prompt, self.n_prompt : self.n_prompt + n_completion]
        return self._replace(
            topk_ids=np.ascontiguousarray(self.topk_ids[: shape.n_layers, tokens]),
            topk_weights=np.ascontiguousarray(self.topk_weights[: shape.n_layers, tokens]),
            n_prompt=n_prompt,
        )

    def passes(self, chunk: int) -> Iterator[slice]:
        """The tokens of each forward pass: the prompt by chunks, then one at a time."""
        for start in range(0, self.n_prompt, chunk):
            yield slice(start, min(start + chunk, self.n_prompt))
        for token in range(self.n_prompt, self.n_prompt + self.n_completion):
            yield slice(token, token + 1)

    def stats(self) -> RoutingStats:
        """How often each expert was chosen."""
        stats = RoutingStats(dict.fromkeys(range(self.n_layers), self.num_experts))
        for layer, ids in enumerate(self.topk_ids):
            stats.observe(layer, ids)
        return stats

    def has_cold(self, placement: Placement) -> npt.NDArray[np.bool_]:
        """Whether a token has a cold expert in a layer; bool [n_layers, n_tokens]."""
        return np.stack(
            [(~placement.is_hot(n)[ids]).any(axis=1) for n, ids in enumerate(self.topk_ids)]
        )

    def without_hot(self, placement: Placement) -> Trace:
        """The same with -1 in place of every hot expert."""
        return self._without(placement, hot=True)

    def without_cold(self, placement: Placement) -> Trace:
        """The same with -1 in place of every cold expert."""
        return self._without(placement, hot=False)

    def _without(self, placement: Placement, hot: bool) -> Trace:
        ids = self.topk_ids.copy()
        for layer, chosen in enumerate(ids):
            chosen[placement.is_hot(layer)[chosen] == hot] = -1
        return self._replace(topk_ids=ids)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an npz that `load` reads."""
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **self._asdict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read what `save` wrote; SettingError: it cannot be read, or is no such file."""
        try:
            # Opened here, as NumPy leaves what it opened and cannot read.
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                trace = cls(
                    topk_ids=file["topk_ids"],
                    topk_weights=file["topk_weights"],
                    n_prompt=int(file["n_prompt"]),
                    num_experts=int(file["num_experts"]),
                    source=str(file["source"]),
                )
            trace._check()
        except _DAMAGED as error:
            raise SettingError(f"trace {path}: {error}; write one with --record") from error
        return trace

    def _check(self) -> None:
        ids, weights = self.topk_ids, self.topk_weights
        if ids.ndim != 3 or not ids.size or ids.dtype != np.int32:
            raise ValueError(f"topk_ids is {ids.dtype} {list(ids.shape)}")
        if weights.shape != ids.shape or weights.dtype != np.float32:
            raise ValueError(f"topk_weights is {weights.dtype} {list(weights.shape)}")
        if not 1 <= self.n_prompt <= ids.shape[1]:
            raise ValueError(f"n_prompt={self.n_prompt} of {ids.shape[1]} tokens")
        if ids.min() < -1 or ids.max() >= self.num_experts:
            raise ValueError(f"an expert id outside 0..{self.num_experts - 1}")


def synthetic(shape: Shape, n_prompt: int, n_completion: int, seed: int) -> Trace:
    """A trace like real routing: skewed, and neighbouring tokens share experts."""
    random = np.random.default_rng(seed)
    n_tokens = n_prompt + n_completion
    ends = np.cumsum(random.geometric(1 / STRETCH_TOKENS, n_tokens))
    stretch = np.searchsorted(ends, np.arange(n_tokens), side="right")
    ids = np.empty((shape.n_layers, n_tokens, shape.top_k), np.int32)
    weights = np.empty(ids.shape, np.float32)
    for layer in range(shape.n_layers):
        rank = random.permutation(shape.num_experts) + 1
        topics = random.standard_normal((stretch[-1] + 1, shape.num_experts), np.float32)
        topics = TOPIC_DEVIATION * topics - np.log(rank.astype(np.float32))
        for start in range(0, n_tokens, _GENERATED_AT_ONCE):
            part = slice(start, start + _GENERATED_AT_ONCE)
            logits = topics[stretch[part]]
            logits += TOKEN_SCALE * random.gumbel(size=logits.shape).astype(np.float32)
            ids[layer, part], weights[layer, part] = _choose(logits, shape.top_k)
    return Trace(ids, weights, n_prompt, shape.num_experts, "synthetic")


def _choose(logits: npt.NDArray[np.float32], top_k: int) -> tuple[Ids, Weights]:
    """The largest of each row, in no order, and the softmax over them."""
    chosen = np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]
    kept = np.take_along_axis(logits, chosen, axis=1)
    powers = np.exp(kept - kept.max(axis=1, keepdims=True))
    return chosen.astype(np.int32), powers / powers.sum(axis=1, keepdims=True)


def record(n_prompt: int, n_completion: int) -> Trace:
    """The routing of the bundled model: it reads its decoder's source, and writes on.

    A prompt longer than the model's context is read in pieces, each of which starts afresh.
    """
    from moeshm import checkpoint
    from moeshm.backends.cpu import CpuBackend
    from moeshm.demo import decoder, tiny_moe_path
    from moeshm.dtypes import FloatArray

    backend = CpuBackend(checkpoint.load(tiny_moe_path()).layers, threads=1)
    seen: list[list[tuple[Ids, Weights]]] = [[] for _ in backend.layers]

    def experts(layer: int, x: FloatArray, ids: Ids, weights: Weights) -> FloatArray:
        seen[layer].append((ids, weights))
        out = np.empty_like(x)
        backend.ffn(layer, x, ids, weights, out)
        return out

    model = decoder.Decoder(tiny_moe_path(), experts)
    limit = model.config.max_position_embeddings
    text = Path(decoder.__file__).read_bytes()
    prompt = list((text * (n_prompt // len(text) + 1))[:n_prompt])
    logits = None
    for start in range(0, n_prompt, limit):
        model.reset()
        logits = model.prefill(prompt[start : start + limit])
    for _ in range(n_completion):
        if model.length == limit:
            model.reset()
        token = decoder.SEPARATOR if logits is None else int(logits.argmax())
        logits = model.step(token)
    ids = np.stack([np.concatenate([each[0] for each in calls]) for calls in seen])
    weights = np.stack([np.concatenate([each[1] for each in calls]) for calls in seen])
    return Trace(ids, weights, n_prompt, model.config.num_experts, "recorded")


def place(trace: Trace, hot: float, worker: str) -> Placement:
    """The most used share of each layer's experts is hot; the others are the worker's."""
    n_hot = round(hot * trace.num_experts)
    return Placement.from_counts([worker], trace.stats(), n_hot)


def rows_of_messages(
    trace: Trace, placement: Placement, chunk: int, slice_tokens: int
) -> Sequence[int]:
    """Rows of each message, in the order in which an engine sends them: a window of so many
    tokens is a message, without its rows that have no cold expert, unless none is left."""
    has_cold = trace.has_cold(placement)
    rows: list[int] = []
    for tokens in trace.passes(chunk):
        starts = np.arange(0, tokens.stop - tokens.start, slice_tokens)
        for layer in has_cold:
            counts = np.add.reduceat(layer[tokens].astype(np.int64), starts)
            rows += counts[counts > 0].tolist()
    return rows
