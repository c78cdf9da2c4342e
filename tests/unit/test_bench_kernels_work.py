"""What `moeshm bench kernels` computes, and against which limits and values it is held."""

from __future__ import annotations

import numpy as np
import pytest

from moeshm.backends.reference import reference_ffn
from moeshm.bench import kernels_shapes
from moeshm.bench.kernels_shapes import KERNEL_SHAPES, KernelShape, limit_of, peaks_of
from moeshm.bench.kernels_work import CALLS, PROBES, Work, judge
from moeshm.dtypes import DType

from .bench_gpus import BIASED, GPU, H100, TINY

# --- limits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "n_tokens", "n_distinct", "us", "reason"),
    [
        ("qwen3-30b-a3b", 1, 8, 22.5, "memory"),
        ("qwen3.5-35b-a3b", 16, 102, 192, "memory"),
        ("qwen3-30b-a3b", 4096, 128, 371, "memory"),
        ("mixtral-8x7b", 4096, 8, 2918, "arithmetic"),
    ],
)
def test_a_limit_is_the_longer_of_reading_and_computing(
    shape: str, n_tokens: int, n_distinct: float, us: float, reason: str
) -> None:
    peaks, source = peaks_of(H100, 3000.0)
    assert source == "datasheet"
    limit = limit_of(KERNEL_SHAPES[shape].info(DType.BF16), n_tokens, n_distinct, peaks)
    assert limit.us == pytest.approx(us, rel=0.01)
    assert limit.reason == reason


def test_a_device_without_a_datasheet_is_held_against_a_copy() -> None:
    peaks, source = peaks_of("GeForce", 300.0)
    assert source == "measured copy"
    limit = limit_of(KERNEL_SHAPES["mixtral-8x7b"].info(DType.F32), 4096, 8, peaks)
    assert limit.reason == "memory"
    assert limit.us == pytest.approx((8 * 3 * 4096 * 14336 + 2 * 4096 * 4096) * 4 / 300e3)


def test_goals_are_those_of_one_card_and_format() -> None:
    assert kernels_shapes.goal_us(H100, "qwen3-30b-a3b", "bf16", 1) == 27
    assert kernels_shapes.goal_us(H100, "qwen3-30b-a3b", "f32", 1) is None
    assert kernels_shapes.goal_us("NVIDIA H200", "qwen3-30b-a3b", "bf16", 1) is None


@pytest.mark.parametrize("shape", KERNEL_SHAPES.values(), ids=list(KERNEL_SHAPES))
def test_a_layer_is_much_larger_than_a_cache(shape: KernelShape) -> None:
    info = shape.info(DType.BF16)
    experts = CALLS * min(info.top_k, info.num_experts)
    read_between = kernels_shapes.call_bytes(info, CALLS, min(experts, info.num_experts))
    assert read_between > 10 * GPU.l2_bytes


# --- work and verdicts --------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", [1, 5, 33])
@pytest.mark.parametrize("shape", [TINY, BIASED], ids=["tiny", "biased"])
def test_probes_are_rows_of_the_last_call_whose_outputs_are_known(
    shape: KernelShape, n_tokens: int
) -> None:
    work = Work(shape, DType.F32, seed=3)
    cell = work.cell(n_tokens)
    assert len(cell.rows) == len(set(cell.rows)) == min(n_tokens, PROBES)
    expected = reference_ffn(work.layer, cell.hidden_states, *cell.routings[-1])[cell.rows]
    np.testing.assert_array_equal(cell.expected, expected)
    assert np.abs(expected).max() > 0.01


def test_every_call_has_a_routing_of_its_own_and_every_expert_its_weights() -> None:
    work = Work(TINY, DType.BF16, seed=3)
    cell = work.cell(40)
    assert len({routing.ids.tobytes() for routing in cell.routings}) == CALLS >= 8
    for ids, weights in cell.routings:
        assert (np.sort(ids, axis=1)[:, 1:] != np.sort(ids, axis=1)[:, :-1]).all()
        assert set(ids.ravel()) == set(range(8))
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    assert cell.n_distinct == 8
    assert len({work.matrices(expert).tobytes() for expert in range(8)}) == 8
    again = Work(TINY, DType.BF16, seed=3).cell(40)
    assert again.hidden_states.tobytes() == cell.hidden_states.tobytes()


def test_matrices_are_what_the_layer_has() -> None:
    work = Work(TINY, DType.BF16, seed=3)
    weights = work.layer.expert(5)
    parts = (weights.gate_proj, weights.up_proj, weights.down_proj)
    assert work.matrices(5).tobytes() == b"".join(part.tobytes() for part in parts)


def test_a_verdict_names_error_and_repeatability() -> None:
    cell = Work(TINY, DType.F32, seed=3).cell(20)
    output = np.zeros_like(cell.hidden_states)
    output[cell.rows] = cell.expected.astype(np.float32)
    right = judge(output, output.copy(), cell)
    assert right.relative_error < 1e-6
    assert right.is_repeatable
    wrong = judge(output * np.float32(1.5), output, cell)
    assert wrong.relative_error == pytest.approx(0.5)
    assert not wrong.is_repeatable


def test_an_output_that_was_not_written_is_no_output() -> None:
    cell = Work(TINY, DType.BF16, seed=3).cell(20)
    output = np.zeros_like(cell.hidden_states)
    output[7, 3] = 0xFFFF
    with pytest.raises(ValueError, match="1 of 1280 outputs are not finite"):
        judge(output, output, cell)
