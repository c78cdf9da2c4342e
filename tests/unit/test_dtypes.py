"""Conversions between the number formats, against exact arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from moeshm.dtypes import DType, FloatArray, dtype_of, narrow, widen

ALL_16_BITS = np.arange(1 << 16, dtype=np.uint16)
#: Both sides of the size from which conversions are vectorised.
SIZES = (1, 100, 4095, 4096, 70_000)


def bits_of(values: FloatArray) -> np.ndarray[tuple[int, ...], np.dtype[np.uint32]]:
    return np.ascontiguousarray(values).view(np.uint32)


def test_parse_and_str() -> None:
    assert [DType.parse(name) for name in ("f32", "F16", "bf16")] == list(DType)
    assert [str(dtype) for dtype in DType] == ["f32", "f16", "bf16"]
    with pytest.raises(ValueError, match="dtype 'fp8'; choose f32, f16 or bf16"):
        DType.parse("fp8")


def test_storage() -> None:
    for dtype in DType:
        assert dtype_of(np.zeros(1, dtype.numpy)) is dtype
        assert dtype.itemsize == dtype.numpy.itemsize
    for other in (np.float64, np.int16, np.int32):
        with pytest.raises(TypeError, match="pass float32, float16, or bfloat16 as uint16"):
            dtype_of(np.zeros(1, other))
        with pytest.raises(TypeError, match="pass float32, float16, or bfloat16 as uint16"):
            widen(np.zeros(1, other))


# --- widen ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", SIZES)
def test_widen_f16_is_exact_for_every_value(chunk: int) -> None:
    for start in range(0, 1 << 16, chunk if chunk > 100 else 1 << 16):
        stored = ALL_16_BITS[start : start + chunk].view(np.float16)
        expected = stored.astype(np.float32)
        found = widen(stored)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def test_widen_finite_f16_is_exact() -> None:
    """Without infinities and NaN, which keep whole arrays from the vectorised way."""
    stored = ALL_16_BITS.view(np.float16)
    stored = stored[np.isfinite(stored)]
    np.testing.assert_array_equal(bits_of(widen(stored)), bits_of(stored.astype(np.float32)))


def test_widen_bf16_is_exact_for_every_value() -> None:
    np.testing.assert_array_equal(bits_of(widen(ALL_16_BITS)), ALL_16_BITS.astype("u4") << 16)


@pytest.mark.parametrize("dtype", DType)
def test_widen_into_an_array(dtype: DType) -> None:
    stored = narrow(np.linspace(-3, 3, 60, dtype=np.float32).reshape(6, 10), dtype)[::2, ::3]
    out = np.full(stored.shape, np.nan, np.float32)
    assert widen(stored, out) is out
    np.testing.assert_array_equal(out, widen(stored.copy()))


def test_widen_f32_is_the_same_array() -> None:
    values = np.ones(3, np.float32)
    assert widen(values) is values


# --- narrow -----------------------------------------------------------------------------


def random_values(seed: int, size: int) -> FloatArray:
    """Any bit patterns, and as many in the range of float16."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, size, np.uint32)
    in_range = np.arange(size) % 2 == 0
    bits[in_range] = (bits[in_range] & 0x8FFFFFFF) | 0x30000000
    return bits.view(np.float32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", SIZES)
def test_narrow_to_f16_rounds_as_numpy(seed: int, size: int) -> None:
    values = random_values(seed, size)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(narrow(values, DType.F16), expected)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_narrow_to_f16_at_every_tie(offset: int) -> None:
    """Float32 values half way between two float16 ones, and their neighbours."""
    ties = np.arange(0x33000000, 0x47900000, 0x1000, dtype=np.int64) + offset
    values = ties.astype(np.uint32).view(np.float32)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    np.testing.assert_array_equal(narrow(values, DType.F16), expected)


@pytest.mark.parametrize("seed", range(3))
def test_narrow_to_bf16_rounds_to_nearest_even(seed: int) -> None:
    values = random_values(seed, 20_000)
    values = values[np.isfinite(values)]
    below = bits_of(values) >> 16
    candidates = np.stack([below, below + 1])
    distance = np.abs(
        (candidates << 16).view(np.float32).astype(np.float64) - values.astype(np.float64)
    )
    # Beyond the largest finite value, infinity is as far as the next power of two.
    distance[np.isinf(distance)] = np.ldexp(1.0, 128) - np.abs(
        np.broadcast_to(values.astype(np.float64), distance.shape)[np.isinf(distance)]
    )
    is_up = (distance[1] < distance[0]) | ((distance[1] == distance[0]) & (below % 2 == 1))
    np.testing.assert_array_equal(narrow(values, DType.BF16), np.where(is_up, below + 1, below))


def test_narrow_to_bf16_at_ties() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F7FFFFF], np.uint32)
    found = narrow(bits.view(np.float32), DType.BF16)
    np.testing.assert_array_equal(found, [0x3F80, 0x3F82, 0x3F80, 0x3F81, 0x7F80])


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
@pytest.mark.parametrize("size", [16, 5000])
def test_narrow_keeps_nan_infinity_and_signed_zero(dtype: DType, size: int) -> None:
    patterns = [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFF800001]
    values = np.resize(np.array(patterns, np.uint32), size).view(np.float32)
    assert np.isnan(widen(narrow(values, dtype))).all()
    special = np.resize(np.array([np.inf, -np.inf, 0.0, -0.0, 1.0], np.float32), size)
    found = widen(narrow(special, dtype))
    np.testing.assert_array_equal(bits_of(found), bits_of(special))


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("shape", [(), (0, 4), (3, 5), (80, 90)])
def test_narrow_into_an_array(dtype: DType, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal((*shape, 2), np.float32)[..., 0]
    out = np.zeros((*shape, 3), dtype.numpy)[..., 1]
    assert narrow(values, dtype, out=out) is out
    np.testing.assert_array_equal(out, narrow(values, dtype))
    assert narrow(values, dtype).shape == shape


def test_narrow_to_f32_is_the_same_array() -> None:
    values = np.ones(3, np.float32)
    assert narrow(values, DType.F32) is values
