"""Numbers in the shim: conversions, and instructions that multiply matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moeshm.backends.gpu.abi import Call
from tests.simt import KernelError, Module, Order, guarded

from .probing import ORDERS, Floats, call_of, floats, needs_compiler

pytestmark = needs_compiler


def test_every_float16_is_widened(probes: Module) -> None:
    out = floats(1 << 16)
    probes.launch("widens", 256, 256, 0, call_of(out))
    expected = np.arange(1 << 16).astype(np.uint16).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(np.signbit(out), np.signbit(expected))


def _float32_to_narrow(seed: int) -> Floats:
    """Every float16, what lies around it and halfway to the next, and random bits."""
    halves = np.arange(1 << 16).astype(np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    between = (finite[1:] + finite[:-1]) / 2
    around = [np.nextafter(between, np.float32(side)) for side in (-np.inf, np.inf)]
    edges = np.array([65519, 65520, 65521, 1e30, 1e-30, 1e-45, -0.0], np.float32)
    bits = np.random.default_rng(seed).integers(0, 1 << 32, 1 << 16, np.uint32).view(np.float32)
    return np.concatenate([halves, between, *around, edges, -edges, bits])


@pytest.mark.parametrize("seed", [3])
def test_float32_are_rounded_to_the_nearest_float16(probes: Module, seed: int) -> None:
    x = guarded(_float32_to_narrow(seed))
    out = guarded(np.zeros(x.size, np.uint16))
    probes.launch("narrows", -(-x.size // 256), 256, 0, call_of(out, x, n_tokens=x.size))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(out.view(np.float16), expected)
    np.testing.assert_array_equal(np.signbit(out.view(np.float16)), np.signbit(expected))


@pytest.mark.parametrize("seed", [4, 5])
@pytest.mark.parametrize("order", ORDERS)
def test_mma_multiplies_its_fragments(probes_32: Module, order: Order, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = guarded(random.standard_normal((24, 16)).astype(np.float16))
    c = random.standard_normal((16, 8)).astype(np.float32)
    out = guarded(c)
    probes_32.launch("multiplies", 1, 32, 0, call_of(out, x), order=order)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(out, c + wide[:16] @ wide[16:].T, rtol=1e-6, atol=1e-6)


def test_ldmatrix_hands_out_four_tiles(probes_32: Module) -> None:
    x = guarded(np.arange(32 * 8, dtype=np.uint16).reshape(4, 8, 8))
    out = guarded(np.zeros((32, 4), np.uint32))
    probes_32.launch("loads_tiles", 1, 32, 0, call_of(out, x))
    for lane in range(32):
        for tile in range(4):
            first = int(x[tile, lane // 4, lane % 4 * 2])
            assert out[lane, tile] == first | (first + 1) << 16


def test_stmatrix_puts_tiles_back_transposed(probes_32: Module) -> None:
    x = np.arange(32 * 8, dtype=np.uint16).reshape(4, 8, 8)
    words = guarded(np.zeros((32, 8), np.uint16))
    for lane in range(32):
        words[lane] = x[:, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].ravel()
    out = guarded(np.zeros((4, 8, 8), np.uint16))
    probes_32.launch("stores_tiles", 1, 32, 0, call_of(out, words, n_tokens=1))
    np.testing.assert_array_equal(out, x.swapaxes(1, 2))
    probes_32.launch("stores_tiles", 1, 32, 0, call_of(out, words, n_tokens=0))
    np.testing.assert_array_equal(out, 0xFFFF)


def _wgmma(probes: Module, columns: int, waits: int, order: Order) -> tuple[Floats, Any]:
    """D and what it should be."""
    x = guarded(np.random.default_rng(6).standard_normal((64 + columns, 64)).astype(np.float16))
    out = floats(64, columns)
    shared = (64 + columns) * 128 + 1024
    kernel = f"multiplies_by_group_{columns}"
    probes.launch(kernel, 1, 128, shared, call_of(out, x, n_tokens=waits), order=order)
    wide = x.astype(np.float64)
    return out, wide[:64] @ wide[64:].T


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", [8, 64, 256])
def test_wgmma_multiplies_swizzled_tiles(probes_32: Module, columns: int, order: Order) -> None:
    out, expected = _wgmma(probes_32, columns, 3, order)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_wgmma_happens_until_its_wait(probes_32: Module) -> None:
    early, expected = _wgmma(probes_32, 8, 0, "forward")
    np.testing.assert_array_equal(early, 0)
    overwritten, _ = _wgmma(probes_32, 8, 1, "forward")
    assert not np.allclose(overwritten, expected, atol=1e-3)
    at_once, _ = _wgmma(probes_32, 8, 0, "reverse")
    np.testing.assert_allclose(at_once, expected, rtol=1e-5, atol=1e-5)


def test_wgmma_is_for_four_warps_and_aligned_tiles(probes_32: Module) -> None:
    with pytest.raises(KernelError, match=r"threads 0 and 96 of a group ran 1 and 0 wgmma"):
        probes_32.launch("multiplies_by_some", 1, 128, 9216, Call())
    with pytest.raises(KernelError, match="does not start at a multiple of 1024"):
        probes_32.launch("multiplies_by_some", 1, 128, 9216, Call(n_tokens=128))
