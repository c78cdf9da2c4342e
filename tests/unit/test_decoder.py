"""The demo's decoder and the bundled model: right logits, and a model that knows some Python."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from moeshm import checkpoint
from moeshm.backends import Ids, Weights
from moeshm.backends.reference import ReferenceBackend
from moeshm.checkpoint import TensorDirectory
from moeshm.demo import tiny_moe_path
from moeshm.demo.decoder import Decoder, ExpertsFn, generate, route
from moeshm.dtypes import FloatArray
from moeshm.errors import CheckpointError

#: Written for this test, so no file of the training text holds it.
SNIPPET = b'''\
class Ledger:
    """Keep a running balance for each account.

    Amounts are whole cents.
    """

    def __init__(self, accounts=None):
        self.balances = dict(accounts or {})

    def deposit(self, name, cents):
        if cents < 0:
            raise ValueError("cents must not be negative")
        self.balances[name] = self.balances.get(name, 0) + cents
        return self.balances[name]
'''
#: float32 sums in another order: a matrix product of T rows against T products of one.
TOLERANCE = 2e-4
LIMIT = 1024


@pytest.fixture(scope="module")
def experts() -> ExpertsFn:
    backend = ReferenceBackend(checkpoint.load(tiny_moe_path()).layers)

    def compute(layer: int, hidden_states: FloatArray, ids: Ids, weights: Weights) -> FloatArray:
        out = np.empty_like(hidden_states)
        backend.ffn(layer, hidden_states, ids, weights, out)
        return out

    return compute


@pytest.fixture
def decoder(experts: ExpertsFn) -> Decoder:
    return Decoder(tiny_moe_path(), experts)


@pytest.fixture
def idle_decoder() -> Decoder:
    """A decoder whose experts contribute nothing, for what does not depend on them."""
    return Decoder(tiny_moe_path(), lambda _layer, x, _ids, _weights: np.zeros_like(x))


def every_logits(decoder: Decoder, text: bytes) -> Iterator[FloatArray]:
    """The logits after each byte, one step at a time."""
    decoder.reset()
    return (decoder.step(byte) for byte in text)


def test_prefill_equals_steps(decoder: Decoder) -> None:
    *_, stepped = every_logits(decoder, SNIPPET[:96])
    decoder.reset()
    np.testing.assert_allclose(decoder.prefill(list(SNIPPET[:96])), stepped, atol=TOLERANCE)


def test_prefill_onto_a_filled_cache_equals_one_prefill(decoder: Decoder) -> None:
    decoder.prefill(list(SNIPPET[:40]))
    in_parts = decoder.prefill(list(SNIPPET[40:96]))
    decoder.reset()
    np.testing.assert_allclose(decoder.prefill(list(SNIPPET[:96])), in_parts, atol=TOLERANCE)


def test_reset_leaves_nothing_of_the_earlier_text(experts: ExpertsFn, decoder: Decoder) -> None:
    fresh = Decoder(tiny_moe_path(), experts).prefill(list(SNIPPET[:64]))
    decoder.prefill(list(reversed(SNIPPET)))
    decoder.reset()
    np.testing.assert_array_equal(decoder.prefill(list(SNIPPET[:64])), fresh)


def test_the_model_predicts_python_it_has_not_seen(decoder: Decoder) -> None:
    bits = 0.0
    for logits, following in zip(every_logits(decoder, SNIPPET), SNIPPET[1:], strict=False):
        wide = logits.astype(np.float64)
        bits += (np.logaddexp.reduce(wide) - wide[following]) / math.log(2)
    assert bits / (len(SNIPPET) - 1) < 3


def test_logits_equal_transformers(decoder: Decoder) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(
        tiny_moe_path(), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        theirs = model(torch.tensor([list(SNIPPET)])).logits[0].numpy()
    ours = np.stack(list(every_logits(decoder, SNIPPET)))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_a_pass_that_raised_can_be_repeated(experts: ExpertsFn) -> None:
    failing_layers = {2}

    def flaky(layer: int, x: FloatArray, ids: Ids, weights: Weights) -> FloatArray:
        if layer in failing_layers:
            raise ConnectionError("gone")
        return experts(layer, x, ids, weights)

    decoder = Decoder(tiny_moe_path(), flaky)
    with pytest.raises(ConnectionError):
        decoder.prefill(list(SNIPPET[:32]))
    assert decoder.length == 0
    failing_layers.clear()
    expected = Decoder(tiny_moe_path(), experts).prefill(list(SNIPPET[:32]))
    np.testing.assert_array_equal(decoder.prefill(list(SNIPPET[:32])), expected)


def test_experts_get_every_layer_with_normed_weights() -> None:
    calls: list[tuple[int, tuple[int, ...]]] = []

    def record(layer: int, x: FloatArray, ids: Ids, weights: Weights) -> FloatArray:
        assert [str(a.dtype) for a in (x, ids, weights)] == ["float32", "int32", "float32"]
        assert ids.shape == weights.shape == (len(x), 4)
        assert all(len(set(row)) == 4 for row in ids.tolist())
        assert ids.min() >= 0
        assert ids.max() < 16
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
        calls.append((layer, x.shape))
        return np.zeros_like(x)

    Decoder(tiny_moe_path(), record).prefill(list(b"import"))
    assert calls == [(layer, (6, 128)) for layer in range(4)]


def test_route_takes_the_likeliest_and_renorms() -> None:
    ids, weights = route(np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32)), 2)
    np.testing.assert_array_equal(ids, [[1, 3]])
    np.testing.assert_allclose(weights, [[4 / 7, 3 / 7]], rtol=1e-6)


def test_greedy_generation_takes_the_argmax_and_repeats(decoder: Decoder) -> None:
    first = list(generate(decoder, b"def main(", 24))
    again = list(generate(decoder, b"def main(", 24))
    assert [token for token, _ in first] == [token for token, _ in again]
    assert all(token == int(logits.argmax()) for token, logits in first)
    assert len(first) == 24


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_fixes_the_sampled_text(decoder: Decoder, seed: int) -> None:
    def text(seed: int) -> list[int]:
        return [token for token, _ in generate(decoder, b"import ", 24, 0.8, seed)]

    assert text(seed) == text(seed)
    assert text(seed) != text(seed + 2)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_sampling_follows_the_probabilities(idle_decoder: Decoder, temperature: float) -> None:
    logits = idle_decoder.prefill([0]).astype(np.float64) / temperature
    expected = np.exp(logits - np.logaddexp.reduce(logits))
    drawn = [next(generate(idle_decoder, b"", 1, temperature, seed))[0] for seed in range(400)]
    counts = np.bincount(drawn, minlength=256)
    # Five standard deviations of a binomial count, and one for rounding.
    allowed = 5 * np.sqrt(400 * expected * (1 - expected)) + 1
    assert (np.abs(counts - 400 * expected) <= allowed).all()


def test_generation_goes_on_past_the_context(idle_decoder: Decoder) -> None:
    prompt = bytes(range(32, 96)) * 17
    assert len(prompt) > LIMIT
    lengths = [idle_decoder.length for _ in islice(generate(idle_decoder, prompt, 3), 3)]
    assert lengths == [LIMIT, LIMIT // 2, LIMIT // 2 + 1]


def test_wrong_tokens_are_refused_and_change_nothing(idle_decoder: Decoder) -> None:
    idle_decoder.prefill([1, 2, 3])
    with pytest.raises(ValueError, match=r"token 256; tokens lie in 0\.\.255"):
        idle_decoder.step(256)
    with pytest.raises(ValueError, match=r"token -1; tokens lie in 0\.\.255"):
        idle_decoder.step(-1)
    with pytest.raises(ValueError, match="no tokens"):
        idle_decoder.prefill([])
    with pytest.raises(ValueError, match=r"3 \+ 1022 tokens, but the context holds 1024"):
        idle_decoder.prefill([0] * (LIMIT - 2))
    with pytest.raises(ValueError, match="temperature=-1"):
        next(generate(idle_decoder, b"x", 1, -1))
    assert idle_decoder.length == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False"),
        ({"hidden_size": 64}, r"embed_tokens.weight has shape \[256, 128\]"),
        ({"head_dim": "x"}, "no config of a Qwen3-MoE model"),
    ],
)
def test_a_model_it_cannot_run_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    config = json.loads((tiny_moe_path() / "config.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "model.safetensors").symlink_to(tiny_moe_path() / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Decoder(tmp_path, lambda _layer, x, _ids, _weights: x)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        Decoder(tmp_path, lambda _layer, x, _ids, _weights: x)


def test_the_bundled_files_are_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in tiny_moe_path().iterdir()}
    assert set(files) == {"README.md", "config.json", "model.safetensors", "training.json"}
    assert sum(files.values()) <= 4_000_000
    figures = json.loads((tiny_moe_path() / "training.json").read_bytes())
    card = (tiny_moe_path() / "README.md").read_text()
    assert f"**{figures['held_out_bits_per_byte']:.3f}**" in card
    tensors = TensorDirectory(tiny_moe_path())
    elements = sum(math.prod(tensors.shape(name)) for name in tensors.names())
    assert elements == figures["parameters"]
