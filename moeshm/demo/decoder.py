"""Runs the dense part of a small Qwen3-MoE model in NumPy; the routed experts are called out to.

The engine side of the demo: embeddings, attention with a key/value cache, norms, router and the
tied output head, all in float32. The layout is that of Qwen3MoeForCausalLM in transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from ..backends import Ids, Weights
from ..checkpoint import TensorDirectory
from ..dtypes import FloatArray, widen
from ..errors import CheckpointError

#: `(layer, hidden_states [T, hidden_size], topk_ids [T, top_k], topk_weights [T, top_k])` to the
#: weighted sum of the selected experts' outputs, [T, hidden_size] float32.
ExpertsFn = Callable[[int, FloatArray, Ids, Weights], FloatArray]

#: What the model's text starts with and what stands between its files.
SEPARATOR = 0


class RopeParameters(msgspec.Struct, frozen=True, kw_only=True):
    """The rotary position embedding of config.json."""

    rope_theta: float
    rope_type: str = "default"


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the decoder needs of config.json, under the names that stand there."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    rms_norm_eps: float
    norm_topk_prob: bool
    tie_word_embeddings: bool
    rope_parameters: RopeParameters
    attention_bias: bool = False
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1
    use_sliding_window: bool = False


@dataclass(frozen=True, slots=True)
class _Layer:
    """The dense tensors of one layer, float32, matrices as [out, in]."""

    input_layernorm: FloatArray
    post_attention_layernorm: FloatArray
    q_proj: FloatArray
    k_proj: FloatArray
    v_proj: FloatArray
    o_proj: FloatArray
    q_norm: FloatArray
    k_norm: FloatArray
    router: FloatArray


class Decoder:
    """A Qwen3-MoE language model whose routed experts are computed by `experts`.

    Reads only the dense tensors of `model_dir`. CheckpointError: config.json is missing or
    asks for something that the decoder does not do, or a tensor is missing or misshapen.
    """

    def __init__(self, model_dir: Path, experts: ExpertsFn) -> None:
        self.config = config = _read_config(model_dir / "config.json")
        self._experts = experts
        tensors = TensorDirectory(model_dir)
        hidden = config.hidden_size
        self._embed = _dense(tensors, "model.embed_tokens", config.vocab_size, hidden)
        self._norm = _dense(tensors, "model.norm", hidden)
        self._layers = [_layer(tensors, config, n) for n in range(config.num_hidden_layers)]
        self._cos, self._sin = _rotary_tables(config)
        # Axes: layer, key or value, head, position, element.
        heads, limit = config.num_key_value_heads, config.max_position_embeddings
        shape = (config.num_hidden_layers, 2, heads, limit, config.head_dim)
        self._cache = np.zeros(shape, np.float32)
        self._length = 0

    @property
    def length(self) -> int:
        """Tokens in the key/value cache."""
        return self._length

    def reset(self) -> None:
        """Forget every token."""
        self._length = 0

    def prefill(self, tokens: list[int]) -> FloatArray:
        """Append `tokens` in one pass and return the logits [vocab_size] after the last one.

        ValueError: no tokens, a token outside the vocabulary, or more than the context holds.
        When the experts raise, the decoder stays as it was, and the call can be repeated.
        """
        return self._forward(tokens)

    def step(self, token: int) -> FloatArray:
        """Append one token and return the logits [vocab_size] after it; errors as `prefill`."""
        return self._forward([token])

    def _forward(self, tokens: list[int]) -> FloatArray:
        self._check(tokens)
        eps = self.config.rms_norm_eps
        x = self._embed[tokens]
        for number, layer in enumerate(self._layers):
            x = x + self._attention(number, layer, _rms_norm(x, layer.input_layernorm, eps))
            y = _rms_norm(x, layer.post_attention_layernorm, eps)
            ids, weights = route(y @ layer.router.T, self.config.num_experts_per_tok)
            x = x + self._experts(number, y, ids, weights)
        # Counted only now, so that a pass that raised leaves nothing behind.
        self._length += len(tokens)
        logits: FloatArray = self._embed @ _rms_norm(x[-1], self._norm, eps)
        return logits

    def _check(self, tokens: list[int]) -> None:
        limit, vocab_size = self.config.max_position_embeddings, self.config.vocab_size
        if not tokens:
            raise ValueError(f"no tokens; pass at least one, such as the separator {SEPARATOR}")
        if self._length + len(tokens) > limit:
            raise ValueError(
                f"{self._length} + {len(tokens)} tokens, but the context holds {limit}; "
                "reset() and prefill with fewer"
            )
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < vocab_size)
            raise ValueError(f"token {wrong}; tokens lie in 0..{vocab_size - 1}")

    def _attention(self, number: int, layer: _Layer, x: FloatArray) -> FloatArray:
        """Causal grouped-query attention of the new rows x [T, hidden_size] to all rows so far."""
        config = self.config
        rows, first = len(x), self._length
        last, groups = first + rows, config.num_key_value_heads
        q = self._heads(x, layer.q_proj, layer.q_norm)
        keys, values = self._cache[number, :, :, :last]
        keys[:, first:] = self._heads(x, layer.k_proj, layer.k_norm)
        values[:, first:] = (x @ layer.v_proj.T).reshape(rows, groups, -1).swapaxes(0, 1)

        # Query head h reads key/value head h // (query heads per group).
        scores = q.reshape(groups, -1, config.head_dim) @ keys.swapaxes(1, 2)
        scores = scores.reshape(groups, -1, rows, last) * np.float32(config.head_dim**-0.5)
        if rows > 1:
            scores += np.triu(np.full((rows, last), -np.inf, np.float32), first + 1)
        mixed = _softmax(scores).reshape(groups, -1, last) @ values
        joined = mixed.reshape(config.num_attention_heads, rows, -1).swapaxes(0, 1)
        out: FloatArray = joined.reshape(rows, -1) @ layer.o_proj.T
        return out

    def _heads(self, x: FloatArray, projection: FloatArray, norm: FloatArray) -> FloatArray:
        """Normed and rotated queries or keys [heads, T, head_dim] of the rows x."""
        heads = (x @ projection.T).reshape(len(x), -1, self.config.head_dim).swapaxes(0, 1)
        heads = _rms_norm(heads, norm, self.config.rms_norm_eps)
        new = slice(self._length, self._length + len(x))
        first, second = np.split(heads, 2, axis=-1)
        turned = np.concatenate((-second, first), axis=-1)
        rotated: FloatArray = heads * self._cos[new] + turned * self._sin[new]
        return rotated


def generate(
    decoder: Decoder, prompt: bytes, n_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[tuple[int, FloatArray]]:
    """Yield `n_tokens` pairs of a token and the logits [vocab_size] it was drawn from.

    The decoder starts afresh. `temperature` 0 takes the likeliest token; above 0, the same
    `seed` and logits give the same tokens. When the context is full, the last half of it is
    read again and the rest forgotten, so the text may grow without end; of a prompt longer than
    the context, the end is read. An empty prompt is the start of a file. ValueError:
    `temperature` is negative, or as `Decoder.prefill`.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature}; pass 0 for the likeliest token, or more")
    random = np.random.default_rng(seed)
    limit = decoder.config.max_position_embeddings
    history = list(prompt) or [SEPARATOR]
    decoder.reset()
    logits: FloatArray | None = None
    for _ in range(n_tokens):
        if logits is None:
            logits = decoder.prefill(history[-limit:])
        elif decoder.length == limit:
            decoder.reset()
            logits = decoder.prefill(history[-(limit // 2) :])
        else:
            logits = decoder.step(history[-1])
        token = _draw(logits, temperature, random)
        history.append(token)
        yield token, logits


def route(router_logits: FloatArray, top_k: int) -> tuple[Ids, Weights]:
    """The `top_k` likeliest experts of each row, likeliest first, and their renormed weights.

    `router_logits`: [T, num_experts]. Returns ids [T, top_k] int32 and weights [T, top_k]
    float32 that sum to 1.
    """
    probabilities = _softmax(router_logits)
    order = np.argsort(-probabilities, axis=-1, kind="stable")[:, :top_k]
    top = np.take_along_axis(probabilities, order, axis=-1)
    return order.astype(np.int32), top / top.sum(axis=-1, keepdims=True)


def _draw(logits: FloatArray, temperature: float, random: np.random.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    cumulative = np.exp((logits - logits.max()).astype(np.float64) / temperature).cumsum()
    return int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))


def _rms_norm(x: FloatArray, weight: FloatArray, eps: float) -> FloatArray:
    scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    normed: FloatArray = x / scale * weight
    return normed


def _softmax(x: FloatArray) -> FloatArray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    shares: FloatArray = powers / powers.sum(axis=-1, keepdims=True)
    return shares


def _rotary_tables(config: DecoderConfig) -> tuple[FloatArray, FloatArray]:
    """Cosines and sines [max_position_embeddings, head_dim]; both halves of a row are equal."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = config.rope_parameters.rope_theta**-exponents
    angles = np.outer(np.arange(config.max_position_embeddings), np.tile(frequencies, 2))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


# --- reading ----------------------------------------------------------------------------


def _read_config(path: Path) -> DecoderConfig:
    try:
        config = msgspec.json.decode(path.read_bytes(), type=DecoderConfig)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{path} is no config of a Qwen3-MoE model: {error}") from error
    for name, value, supported in (
        ("model_type", config.model_type, "qwen3_moe"),
        ("norm_topk_prob", config.norm_topk_prob, True),
        ("tie_word_embeddings", config.tie_word_embeddings, True),
        ("rope_type", config.rope_parameters.rope_type, "default"),
        ("attention_bias", config.attention_bias, False),
        ("mlp_only_layers", config.mlp_only_layers, ()),
        ("decoder_sparse_step", config.decoder_sparse_step, 1),
        ("use_sliding_window", config.use_sliding_window, False),
    ):
        if value != supported:
            raise CheckpointError(
                f"{path}: {name} is {value!r}; the demo's decoder runs {supported!r} only, "
                "use moeshm.integrations.transformers for other models"
            )
    return config


def _layer(tensors: TensorDirectory, config: DecoderConfig, number: int) -> _Layer:
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head

    def dense(name: str, *shape: int) -> FloatArray:
        return _dense(tensors, f"model.layers.{number}.{name}", *shape)

    return _Layer(
        input_layernorm=dense("input_layernorm", hidden),
        post_attention_layernorm=dense("post_attention_layernorm", hidden),
        q_proj=dense("self_attn.q_proj", queries, hidden),
        k_proj=dense("self_attn.k_proj", keys, hidden),
        v_proj=dense("self_attn.v_proj", keys, hidden),
        o_proj=dense("self_attn.o_proj", hidden, queries),
        q_norm=dense("self_attn.q_norm", head),
        k_norm=dense("self_attn.k_norm", head),
        router=dense("mlp.gate", config.num_experts, hidden),
    )


def _dense(tensors: TensorDirectory, module: str, *shape: int) -> FloatArray:
    """The module's weight as float32, checked against `shape`."""
    tensor = tensors.tensor(f"{module}.weight")
    if tensor.shape != shape:
        raise CheckpointError(
            f"{module}.weight has shape {list(tensor.shape)}; config.json asks for {list(shape)}"
        )
    return widen(tensor)
