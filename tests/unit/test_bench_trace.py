"""What a replay is made of: routing traces, random experts, and a backend that takes its time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeshm.backends.gpu import cupy_device
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.bench import replay_trace
from moeshm.bench.replay_model import SHAPES, Computed, PacedBackend, make_backend
from moeshm.bench.replay_trace import Trace
from moeshm.demo import tiny_moe_path
from moeshm.demo.decoder import DecoderConfig
from moeshm.dtypes import DType
from moeshm.errors import SettingError
from tests.simt.device import SimtDevice

from ..replays import messages

# --- traces -------------------------------------------------------------------------------


def test_a_synthetic_trace_chooses_distinct_experts_with_weights_that_sum_to_one() -> None:
    shape = SHAPES["qwen3-30b-a3b"].with_layers(2)
    trace = replay_trace.synthetic(shape, 600, 5, seed=1)
    assert trace.topk_ids.shape == trace.topk_weights.shape == (2, 605, 8)
    assert (trace.n_prompt, trace.n_completion, trace.num_experts) == (600, 5, 128)
    assert 0 <= trace.topk_ids.min() <= trace.topk_ids.max() < 128
    assert (np.diff(np.sort(trace.topk_ids, axis=2), axis=2) > 0).all()
    np.testing.assert_allclose(trace.topk_weights.sum(axis=2), 1, rtol=1e-5)


def test_the_seed_decides_the_trace() -> None:
    shape = SHAPES["tiny"]
    first, again, other = (replay_trace.synthetic(shape, 50, 2, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.topk_ids, again.topk_ids)
    assert not np.array_equal(first.topk_ids, other.topk_ids)


def test_a_synthetic_trace_is_skewed_bursty_and_as_cold_as_the_original_by_default() -> None:
    # Six of the forty layers: layers are drawn alike.
    shape = SHAPES["qwen3.5-35b-a3b"].with_layers(6)
    trace = replay_trace.synthetic(shape, 4248, 128, seed=0)
    counts = np.sort(trace.stats().counts(0))[::-1]
    assert counts[:26].sum() > 3 * counts[-26:].sum()
    placement = replay_trace.place(trace, replay_trace.DEFAULT_HOT, "worker")
    cold = trace.has_cold(placement)[:, : trace.n_prompt]
    assert 0.38 < cold.mean() < 0.46
    # Were tokens independent of their neighbours, nine in ten windows would have a cold expert.
    windows = cold.reshape(6, -1, 4).any(axis=2)
    assert windows.mean() < 1 - (1 - cold.mean()) ** 4 - 0.1


def test_at_the_originals_workload_batched_makes_a_tenth_of_the_calls_of_stream() -> None:
    trace = replay_trace.synthetic(SHAPES["qwen3.5-35b-a3b"], 4248, 128, seed=0)
    placement = replay_trace.place(trace, replay_trace.DEFAULT_HOT, "worker")
    stream, batched = (
        replay_trace.rows_of_messages(trace, placement, 512, tokens) for tokens in (4, 1024)
    )
    assert sum(stream) == sum(batched)
    assert len(batched) <= 0.09 * len(stream)


def test_the_bundled_model_is_recorded_as_it_routes(tmp_path: Path) -> None:
    trace = replay_trace.record(n_prompt=1030, n_completion=3)  # the context holds 1,024
    config = msgspec.json.decode((tiny_moe_path() / "config.json").read_bytes(), type=DecoderConfig)
    assert trace.topk_ids.shape == (4, 1033, config.num_experts_per_tok)
    assert (trace.n_prompt, trace.num_experts) == (1030, config.num_experts)
    np.testing.assert_allclose(trace.topk_weights.sum(axis=2), 1, rtol=1e-5)
    trace.save(tmp_path / "t.npz")
    loaded = Trace.load(tmp_path / "t.npz")
    assert np.array_equal(loaded.topk_ids, trace.topk_ids)
    assert np.array_equal(loaded.topk_weights, trace.topk_weights)
    assert loaded[2:] == trace[2:] == (1030, 16, "recorded")


def test_a_part_of_a_trace_keeps_prompt_and_completion_apart() -> None:
    trace = replay_trace.synthetic(SHAPES["tiny"], 20, 10, seed=0)
    part = trace.fitted(SHAPES["tiny"].with_layers(2), n_prompt=5, n_completion=3)
    assert np.array_equal(part.topk_ids[:, :5], trace.topk_ids[:2, :5])
    assert np.array_equal(part.topk_ids[:, 5:], trace.topk_ids[:2, 20:23])
    assert (part.n_prompt, part.n_completion) == (5, 3)


@pytest.mark.parametrize(
    ("shape", "asked", "complaint"),
    [
        ("tiny", {"n_prompt": 21}, "prompt=21, but the trace has 20"),
        ("tiny", {"n_completion": 11}, "completion=11, but the trace has 10"),
        ("qwen3-30b-a3b", {}, "layers=48, but the trace has 4"),
    ],
)
def test_a_trace_refuses_what_it_does_not_have(
    shape: str, asked: dict[str, int], complaint: str
) -> None:
    trace = replay_trace.synthetic(SHAPES["tiny"], 20, 10, seed=0)
    with pytest.raises(SettingError, match=complaint):
        trace.fitted(SHAPES[shape], **asked)


def test_a_trace_of_another_shape_is_refused() -> None:
    trace = replay_trace.synthetic(SHAPES["tiny"], 20, 10, seed=0)
    with pytest.raises(SettingError, match=r"16 experts, top-4; qwen3-30b-a3b has 128, top-8"):
        trace.fitted(SHAPES["qwen3-30b-a3b"].with_layers(2))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"topk_ids": np.zeros((2, 3), np.int32)}, r"topk_ids is int32 \[2, 3\]"),
        ({"topk_ids": np.zeros((1, 2, 2), np.int64)}, "topk_ids is int64"),
        ({"topk_weights": np.zeros((1, 2, 1), np.float32)}, r"topk_weights is float32 \[1, 2, 1\]"),
        ({"n_prompt": 3}, "n_prompt=3 of 2 tokens"),
        ({"n_prompt": 0}, "n_prompt=0 of 2 tokens"),
        ({"num_experts": 4}, r"an expert id outside 0\.\.3"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    ids = np.array([[[0, 1], [2, 4]]], np.int32)
    good = Trace(ids, np.ones(ids.shape, np.float32), 1, 5, "recorded")
    good.save(tmp_path / "good.npz")
    Trace.load(tmp_path / "good.npz")
    good._replace(**changes).save(tmp_path / "bad.npz")
    with pytest.raises(SettingError, match=complaint):
        Trace.load(tmp_path / "bad.npz")


def test_a_damaged_file_is_refused_or_read_whole(tmp_path: Path) -> None:
    """Cut off anywhere, or with any one byte changed; the file has some 1,500."""
    path = tmp_path / "trace.npz"
    trace = replay_trace.synthetic(SHAPES["tiny"].with_layers(1), 3, 0, seed=0)
    trace.save(path)
    good = path.read_bytes()
    damaged = [good[:length] for length in range(0, len(good), 7)]
    damaged += [b"no archive", b"\x80\x04N.", good + good]
    for at in range(len(good)):
        changed = bytearray(good)
        changed[at] ^= 0xFF
        damaged.append(bytes(changed))
    complaints = []
    for content in damaged:
        path.write_bytes(content)
        try:
            loaded = Trace.load(path)
        except SettingError as error:
            complaints.append(str(error))
        else:
            assert np.array_equal(loaded.topk_ids, trace.topk_ids)
    assert len(complaints) > len(damaged) // 2
    assert all(f"trace {path}: " in each for each in complaints)


def test_an_array_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.zeros(3))
    with pytest.raises(SettingError, match=r"ids\.npy"):
        Trace.load(tmp_path / "ids.npy")


def test_without_hot_only_the_cold_experts_are_left() -> None:
    trace = replay_trace.synthetic(SHAPES["tiny"], 20, 5, seed=0)
    placement = replay_trace.place(trace, 0.6, "worker")
    cold = trace.without_hot(placement)
    for layer, (ids, left) in enumerate(zip(trace.topk_ids, cold.topk_ids, strict=True)):
        expected = [-1 if placement.is_hot(layer)[expert] else expert for expert in ids.flat]
        assert left.ravel().tolist() == expected
    assert np.array_equal(cold.topk_weights, trace.topk_weights)
    assert cold[2:] == trace[2:]
    # Each pair is in one of the two parts.
    hot = trace.without_cold(placement)
    assert np.array_equal(np.maximum(hot.topk_ids, cold.topk_ids), trace.topk_ids)
    assert np.array_equal(np.minimum(hot.topk_ids, cold.topk_ids), np.full_like(hot.topk_ids, -1))


@given(
    seed=st.integers(0, 1000),
    chunk=st.integers(1, 40),
    window=st.integers(1, 20),
    hot=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
)
def test_the_messages_are_those_that_a_walk_token_by_token_finds(
    seed: int, chunk: int, window: int, hot: float
) -> None:
    trace = replay_trace.synthetic(SHAPES["tiny"].with_layers(2), 33, 3, seed)
    placement = replay_trace.place(trace, hot, "worker")
    found = replay_trace.rows_of_messages(trace, placement, chunk, window)
    assert found == messages(trace, hot, chunk, window)


# --- experts ------------------------------------------------------------------------------


def test_sizes_are_divided_to_multiples_of_eight() -> None:
    shape = SHAPES["qwen3-30b-a3b"].scaled(7)
    assert (shape.hidden_size, shape.intermediate_size) == (288, 104)
    assert SHAPES["tiny"].scaled(100).hidden_size == 8
    assert SHAPES["tiny"].scaled(1) == SHAPES["tiny"]
    with pytest.raises(SettingError, match=r"layers=5; tiny has 1\.\.4"):
        SHAPES["tiny"].with_layers(5)


def test_the_bundled_models_shape_is_its_configs() -> None:
    config = msgspec.json.decode((tiny_moe_path() / "config.json").read_bytes())
    assert msgspec.structs.astuple(SHAPES["tiny"])[1:] == (
        config["hidden_size"],
        config["moe_intermediate_size"],
        config["num_experts"],
        config["num_experts_per_tok"],
        config["num_hidden_layers"],
    )


def test_an_expert_has_the_same_weights_wherever_it_is() -> None:
    shape = SHAPES["tiny"].scaled(4)
    x = np.random.default_rng(0).standard_normal((3, shape.hidden_size), np.float32)
    weights = np.ones((3, 1), np.float32)
    outputs = []
    for held, local in (((0, 5, 9), 1), ((5,), 0)):
        backend = make_backend(shape, {0: (), 1: held}, Computed(is_null=False, seed=4))
        out = np.empty_like(x)
        backend.ffn(1, x, np.full((3, 1), local, np.int32), weights, out)
        outputs.append(out)
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-6)
    assert 0.01 < np.abs(outputs[0]).mean() < 10


def test_a_gpu_computes_the_same_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_device, "open_device", lambda _name: SimtDevice())
    shape, held = SHAPES["tiny"].scaled(4), {0: (), 1: (0, 5, 9)}
    x = np.random.default_rng(0).standard_normal((3, shape.hidden_size), np.float32)
    ids, weights = np.array([[0, 2], [1, -1], [2, 1]], np.int32), np.ones((3, 2), np.float32)
    outputs = []
    for device in ("cpu", "cuda:0"):
        computed = Computed(is_null=False, seed=4, device=device, weight_dtype=DType.BF16)
        backend = make_backend(shape, held, computed)
        assert isinstance(backend, GpuBackend) == (device != "cpu")
        assert backend.layers[1].weight_dtype is DType.BF16
        out = np.empty_like(x)
        backend.ffn(1, x, ids, weights, out)
        outputs.append(out)
    assert np.abs(outputs[1] - outputs[0]).max() < 3e-2 * np.abs(outputs[0]).max()


def test_a_slow_backend_answers_as_the_fast_one_and_never_too_early() -> None:
    shape = SHAPES["tiny"]
    x = np.random.default_rng(0).standard_normal((64, shape.hidden_size), np.float32)
    ids = np.tile(np.arange(4, dtype=np.int32), (64, 1))
    weights = np.ones((64, 4), np.float32)
    fast = make_backend(shape, {0: range(4)}, Computed(is_null=False, seed=0))
    slow = make_backend(shape, {0: range(4)}, Computed(is_null=False, seed=0, slowdown=20))
    assert isinstance(slow, PacedBackend)
    expected, found = np.empty_like(x), np.empty_like(x)
    fast.ffn(0, x, ids, weights, expected)
    start_ns, used_ns = time.monotonic_ns(), time.thread_time_ns()
    slow.ffn(0, x, ids, weights, found)
    used_ns, elapsed_ns = time.thread_time_ns() - used_ns, time.monotonic_ns() - start_ns
    assert np.array_equal(found, expected)
    # What it used itself includes the end of the wait, which is spun for at most 0.1 ms.
    assert elapsed_ns >= 20 * max(0, used_ns - 150_000)
