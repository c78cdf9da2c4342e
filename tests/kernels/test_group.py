"""kernels/group.cuh: a small call's pairs by expert, as each block makes them for itself."""

from __future__ import annotations

import re

import numpy as np
import pytest

from moeshm.backends import Ids
from moeshm.backends.gpu.abi import Call
from moeshm.kernels import source
from tests.simt import Module, Order, compile_text, guarded

from .harness import ORDERS

MACROS = {"WEIGHT": "float", "HIDDEN": 8, "INNER": 64, "ACTIVATION": 0, "HAS_BIAS": 0}
MAX_PAIRS, MAX_SLOTS, VISIT_PAIRS = (
    int(re.findall(rf"#define {name} (\d+)", source("group.cuh"))[0])
    for name in ("MAX_PAIRS", "MAX_SLOTS", "VISIT_PAIRS")
)
#: Writes n_active, begin, pairs and each visit's expert, as 64-bit integers.
KERNEL = """
extern "C" __global__ void group(Call call, Route) {
    __shared__ Groups groups;
    group_pairs(call, groups);
    long long* out = (long long*)call.out;
    if (threadIdx.x) return;
    out[0] = groups.n_active;
    const int n_pairs = call.n_tokens * call.top_k, n = groups.n_active;
    for (int i = 0; i <= n; ++i) out[1 + i] = groups.begin[i];
    for (int i = 0; i < groups.begin[n]; ++i) out[2 + n_pairs + i] = groups.pairs[i];
    for (int i = 0; i < n; ++i) out[2 + 2 * n_pairs + i] = (long long)groups.expert[i];
}
"""


@pytest.fixture(scope="module", params=[32, 64])
def module(request: pytest.FixtureRequest) -> Module:
    return compile_text(source("group.cuh") + KERNEL, MACROS, request.param)


def visits(
    module: Module, ids: Ids, n_slots: int, block: int, order: Order
) -> list[tuple[int, list[int]]]:
    """Slots and their pairs, as the block has them."""
    n_tokens, top_k = ids.shape
    addresses = guarded(np.arange(n_slots, dtype=np.uint64) * 16 + 16)
    ids, out = guarded(ids, 4), np.full(2 + 3 * ids.size, -9, np.int64)
    call = Call(
        ids=ids.ctypes.data,
        out=out.ctypes.data,
        experts=addresses.ctypes.data,
        n_tokens=n_tokens,
        top_k=top_k,
        n_slots=n_slots,
    )
    module.launch("group", 1, block, 0, call, order=order)
    n_visits, begin, pairs = int(out[0]), out[1:], out[2 + ids.size :]
    slots = out[2 + 2 * ids.size :] // 16 - 1
    assert begin[0] == 0
    return [(int(slots[i]), pairs[begin[i] : begin[i + 1]].tolist()) for i in range(n_visits)]


def check(module: Module, ids: Ids, n_slots: int, block: int, order: Order) -> None:
    found = visits(module, ids, n_slots, block, order)
    flat = ids.ravel().tolist()
    assert all(0 < len(pairs) <= VISIT_PAIRS for _, pairs in found)
    for slot, pairs in found:
        assert {flat[pair] for pair in pairs} == {slot}
    placed = sorted(pair for _, pairs in found for pair in pairs)
    assert placed == [pair for pair, slot in enumerate(flat) if slot >= 0]
    # As they first appear, and no more visits than an expert needs, but for a single token's.
    used = list(dict.fromkeys(slot for slot in flat if slot >= 0))
    assert list(dict.fromkeys(slot for slot, _ in found)) == used
    if len(ids) > 1:
        assert len(found) == sum(-(-flat.count(slot) // VISIT_PAIRS) for slot in used)


@pytest.mark.parametrize("block", [128, 256, 512])
@pytest.mark.parametrize("n_slots", [1, 3, 40, 256, MAX_SLOTS])
def test_every_pair_is_in_one_visit_of_its_expert(module: Module, n_slots: int, block: int) -> None:
    rng = np.random.default_rng(n_slots)
    calls = [(1, 1), (1, 16), (1, 32), (1, 300), (2, 8), (7, 5), (32, 16), (MAX_PAIRS // 8, 8)]
    for i, (n_tokens, top_k) in enumerate(calls):
        ids = rng.integers(-1, n_slots, (n_tokens, top_k), np.int32)
        check(module, ids, n_slots, block, ORDERS[i % len(ORDERS)])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_tokens", [31, 32, 33, 64, 100])
def test_an_expert_with_many_pairs_is_visited_again(
    module: Module, n_tokens: int, order: Order
) -> None:
    ids = np.array([[5, 2, -1]] * n_tokens, np.int32)
    ids[7:40, 1] = 9
    check(module, ids, 10, 256, order)


@pytest.mark.parametrize("n_tokens", [1, 5])
def test_no_expert_at_all(module: Module, n_tokens: int) -> None:
    assert visits(module, np.full((n_tokens, 4), -1, np.int32), 8, 128, 1) == []


@pytest.mark.parametrize("n_tokens", [33, 64, 100])
@pytest.mark.parametrize("block", [128, 256])
def test_all_blocks_have_the_same_pairs_in_a_visit(
    module: Module, n_tokens: int, block: int
) -> None:
    """One block takes an expert's first visit, another its second, whoever came first in each."""
    ids = np.array([[5, 2, -1]] * n_tokens, np.int32)
    ids[7:40, 1] = 9
    ids[: n_tokens // 3, 2] = 5
    found = [
        [(slot, sorted(pairs)) for slot, pairs in visits(module, ids, 10, block, order)]
        for order in (*ORDERS, *range(3, 8))
    ]
    assert all(each == found[0] for each in found)
