"""The memory that calls use, allocated when layers are loaded, and how a call lies in it."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from ...dtypes import DType
from ...errors import InvalidCall
from .choice import MAX_PAIRS, MOST_FEW_TOKENS, Plan, Shape, Size
from .device import Device, HostMemory, Memory

#: Tokens that are computed together, where memory allows it.
MAX_TOKENS = 4096
#: Longer calls are computed in parts of about so many multiply-adds, between which others have
#: their turn. On an H200 4096 tokens through Mixtral's experts in bfloat16 take 5953 us at once,
#: and in parts of 1536, of 2215 us each, 5988 us.
_STEP_MULTIPLY_ADDS = 1 << 39
#: Not of fewer tokens than this for each expert of the layer: every part reads the weights anew,
#: and with fewer tokens that, not the multiplying, is what takes the time.
_STEP_ROWS = 256
#: Of the device's memory, what the workspace may take at most.
_SHARE = 1 / 16
_ALIGNMENT = 256
_N_REGIONS = 10


class Layout(NamedTuple):
    """Offsets of a call's arrays in device memory, each a multiple of 256.

    Up to `inner`, pinned memory has the same layout. What comes after it is there for `route`.
    """

    ids: int
    weights: int
    x: int
    out: int
    inner: int
    partial: int
    begin: int
    pairs: int
    n_tiles: int
    tiles: int


def lay_out(shape: Shape, plan: Plan, size: Size, out_dtype: DType) -> Layout:
    """Where a call's arrays are."""
    kept = plan.kept_dtype.itemsize
    sizes = [
        4 * size.n_pairs,
        4 * size.n_pairs,
        plan.x_dtype.itemsize * size.n_tokens * shape.hidden,
        out_dtype.itemsize * size.n_tokens * shape.hidden,
        kept * size.n_pairs * shape.inner,
        kept * size.n_pairs * shape.hidden,
        4 * (size.n_slots + 1),
        4 * size.n_pairs,
        4,
    ]
    padded = (-(-n_bytes // _ALIGNMENT) * _ALIGNMENT for n_bytes in sizes)
    return Layout(*itertools.accumulate(padded, initial=0))


def step_tokens(shape: Shape, top_k: int, n_slots: int) -> int:
    """How many tokens of a longer call are computed at once at most, for others not to wait longer.

    Half of them are not few (choice.FEW): parts get the kernels, and so the bits, of the call.
    """
    by_work = _STEP_MULTIPLY_ADDS // (3 * top_k * shape.hidden * shape.inner)
    by_rows = _STEP_ROWS * n_slots // top_k
    return min(MAX_TOKENS, max(2 * MOST_FEW_TOKENS + 1, by_work, by_rows))


def _bytes_per_token(shape: Shape, top_k: int) -> tuple[int, int]:
    """Most bytes of a token that a layout takes, in pinned and in device memory."""
    host = 8 * top_k + 8 * shape.hidden
    # Of a pair: float32 of both kinds, its number, and two tiles at most.
    return host, host + top_k * (4 * shape.inner + 4 * shape.hidden + 20)


def _fixed_bytes(n_slots: int) -> int:
    return _N_REGIONS * _ALIGNMENT + 4 * (n_slots + 1)


class Workspace:
    """Memory of the device and pinned memory, which calls use one after the other.

    Both keep their size, whatever the sizes of calls: long calls are cut into parts that fit.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._limit = int(device.features.total_bytes * _SHARE)
        self._memory: Memory | None = None
        self._host: HostMemory | None = None

    @property
    def address(self) -> int:
        """Of the device memory."""
        assert self._memory is not None
        return self._memory.address

    @property
    def host(self) -> HostMemory:
        """The pinned memory."""
        assert self._host is not None
        return self._host

    def bytes_for(self, shape: Shape, top_k: int, n_slots: int) -> tuple[int, int]:
        """Pinned and device memory that calls to such a layer are to have."""
        host, device = _bytes_per_token(shape, top_k)
        fixed = _fixed_bytes(n_slots)
        n_tokens = min(MAX_TOKENS, (self._limit - fixed) // device)
        n_tokens = max(n_tokens, MOST_FEW_TOKENS)
        return fixed + n_tokens * host, fixed + n_tokens * device

    @property
    def device_bytes(self) -> int:
        """Of the device memory; 0 at first."""
        return 0 if self._memory is None else self._memory.nbytes

    def missing_bytes(self, host_bytes: int, device_bytes: int) -> int:
        """What `resize` to these would allocate of device memory, before anything is freed."""
        if self._host is not None and host_bytes <= len(self._host.array):
            return device_bytes if device_bytes > self.device_bytes else 0
        return max(device_bytes, self.device_bytes)

    def resize(self, host_bytes: int, device_bytes: int) -> None:
        """Have at least these, and never less than before. Jobs made earlier are of no use then.

        For whoever uses the device's stream.
        """
        device_bytes = self.missing_bytes(host_bytes, device_bytes)
        if device_bytes == 0:
            return
        if self._host is not None:
            host_bytes = max(host_bytes, len(self._host.array))
        memory, host = self._device.allocate(device_bytes), self._device.pin(host_bytes)
        for old in (self._memory, self._host):
            if old is not None:
                old.close()
        self._memory, self._host = memory, host

    def most_tokens(self, shape: Shape, top_k: int, n_slots: int) -> int:
        """That can be computed together. InvalidCall: not even one."""
        assert self._memory is not None
        host, device = _bytes_per_token(shape, top_k)
        fixed = _fixed_bytes(n_slots)
        n_tokens = min(
            MAX_TOKENS,
            MAX_PAIRS // top_k,
            (len(self.host.array) - fixed) // host,
            (self._memory.nbytes - fixed) // device,
        )
        if n_tokens < 1:
            raise InvalidCall(f"top_k={top_k} is more than this layer's calls have memory for")
        return n_tokens

    def part_tokens(self, n_tokens: int, shape: Shape, top_k: int, n_slots: int) -> int:
        """How many are computed at once of the `n_tokens` tokens of a call, or of what is left of
        it: all, or the first of parts of equal length, each of at most a step, and of what there
        is memory for. InvalidCall as `most_tokens`."""
        most = min(self.most_tokens(shape, top_k, n_slots), step_tokens(shape, top_k, n_slots))
        n_parts = max(1, -(-n_tokens // most))
        return -(-n_tokens // n_parts)
