"""Experts as Triton kernels: gate and up with the activation, down, and the sum over slots.

Written for `moeshm bench kernels`, as a peer. Pairs come sorted by expert, in blocks of one expert;
pair = token * top_k + slot. An expert's values are gate_proj, up_proj [intermediate_size,
hidden_size] and down_proj [hidden_size, intermediate_size], one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _task(n_tiles: tl.tensor, GROUP_M: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The block of pairs and the tile of weight rows of this program: GROUP_M blocks take the same
    tile one after the other, so that an expert's blocks find its weights in L2."""
    n_blocks = tl.num_programs(0) // n_tiles
    group = tl.program_id(0) // (GROUP_M * n_tiles)
    within = tl.program_id(0) % (GROUP_M * n_tiles)
    size = min(n_blocks - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % size, within // size


@triton.jit(do_not_specialize=["n_pairs", "top_k"])
def gate_up(
    x: tl.tensor,  # [n_tokens, hidden_size]
    experts: tl.tensor,
    inner: tl.tensor,  # [n_pairs, intermediate_size], written
    pairs: tl.tensor,  # [n_blocks, BLOCK_M]; n_pairs and above: none
    block_experts: tl.tensor,  # [n_blocks]
    n_pairs: tl.tensor,
    top_k: tl.tensor,
    expert_values: tl.tensor,
    hidden_size: tl.tensor,  # a multiple of BLOCK_K
    intermediate_size: tl.tensor,  # a multiple of BLOCK_N
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """inner = silu(x @ gate_proj.T) * (x @ up_proj.T), summed in float32."""
    block, tile = _task(intermediate_size // BLOCK_N, GROUP_M)
    pair = tl.load(pairs + block * BLOCK_M + tl.arange(0, BLOCK_M))
    is_valid = pair < n_pairs
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    expert = experts + tl.load(block_experts + block).to(tl.int64) * expert_values
    x_at = x + (pair // top_k)[:, None] * hidden_size + k[None, :]
    gate_at = expert + row[None, :] * hidden_size + k[:, None]
    up_at = gate_at + intermediate_size * hidden_size
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, hidden_size, BLOCK_K):
        rows = tl.load(x_at, mask=is_valid[:, None], other=0.0)
        gate = tl.dot(rows, tl.load(gate_at), gate)
        up = tl.dot(rows, tl.load(up_at), up)
        x_at += BLOCK_K
        gate_at += BLOCK_K
        up_at += BLOCK_K
    result = (gate * tl.sigmoid(gate) * up).to(inner.dtype.element_ty)
    inner_at = inner + pair.to(tl.int64)[:, None] * intermediate_size + row[None, :]
    tl.store(inner_at, result, mask=is_valid[:, None])


@triton.jit(do_not_specialize=["n_pairs"])
def down(
    inner: tl.tensor,  # [n_pairs, intermediate_size]
    experts: tl.tensor,
    topk_weights: tl.tensor,  # float32 [n_pairs]
    partial: tl.tensor,  # [n_pairs, hidden_size], written
    pairs: tl.tensor,  # as for `gate_up`
    block_experts: tl.tensor,
    n_pairs: tl.tensor,
    expert_values: tl.tensor,
    hidden_size: tl.tensor,  # a multiple of BLOCK_N
    intermediate_size: tl.tensor,  # a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """partial = topk_weights * (inner @ down_proj.T), summed in float32."""
    block, tile = _task(hidden_size // BLOCK_N, GROUP_M)
    pair = tl.load(pairs + block * BLOCK_M + tl.arange(0, BLOCK_M))
    is_valid = pair < n_pairs
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    expert = experts + tl.load(block_experts + block).to(tl.int64) * expert_values
    inner_at = inner + pair.to(tl.int64)[:, None] * intermediate_size + k[None, :]
    first = 2 * intermediate_size * hidden_size
    down_at = expert + first + row[None, :] * intermediate_size + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, intermediate_size, BLOCK_K):
        rows = tl.load(inner_at, mask=is_valid[:, None], other=0.0)
        sums = tl.dot(rows, tl.load(down_at), sums)
        inner_at += BLOCK_K
        down_at += BLOCK_K
    sums *= tl.load(topk_weights + pair, mask=is_valid, other=0.0)[:, None]
    partial_at = partial + pair.to(tl.int64)[:, None] * hidden_size + row[None, :]
    tl.store(partial_at, sums.to(partial.dtype.element_ty), mask=is_valid[:, None])


@triton.jit(do_not_specialize=["top_k"])
def combine(
    partial: tl.tensor,  # [n_tokens, top_k, hidden_size]
    out: tl.tensor,  # [n_tokens, hidden_size], written
    top_k: tl.tensor,
    hidden_size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """out = the sum over the slots, in their order, in float32; a program per token and BLOCK."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = column < hidden_size
    sums = tl.zeros((BLOCK,), tl.float32)
    for slot in range(top_k):
        row = (token * top_k + slot) * hidden_size
        sums += tl.load(partial + row + column, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + token * hidden_size + column, sums.to(out.dtype.element_ty), mask=is_there)
