"""How large a session's memory is: rings, stream buffers and slab, by the calls that are to fit."""

from __future__ import annotations

from collections.abc import Mapping

from . import protocol, segment
from .dtypes import DType
from .layers import LayerInfo
from .orders import MAX_ORDER_BYTES
from .transport import slab

#: Rings are made no larger than this; longer calls are cut.
MAX_RING_BYTES = 64 << 20
#: Of the largest call's arrays, how many a slab has room for: while one is computed, the next is
#: put there.
_SLAB_CALLS = 2
#: Of the kernel, for both ways of a stream: what the transport asks for, which the kernel doubles.
_STREAM_BUFFERS_BYTES = 4 << 20


def ring_sizes(layers: Mapping[int, LayerInfo], max_tokens: int) -> tuple[int, int]:
    """Capacities for calls and for replies: what the largest call of any layer takes, or an
    order."""
    sizes = [_call_sizes(info, max_tokens) for info in layers.values()]
    calls, replies = (max(each) for each in zip(*sizes, strict=True))
    calls, replies = max(calls, MAX_ORDER_BYTES), max(replies, protocol.MAX_ANSWER_BYTES)
    return min(calls, MAX_RING_BYTES), min(replies, MAX_RING_BYTES)


def fitting_tokens(layers: Mapping[int, LayerInfo], calls: int, replies: int) -> int:
    """Most tokens whose call and reply fit for every layer."""
    fitting = protocol.MAX_TOKENS
    for info in layers.values():
        row = 4 * info.hidden_size
        by_call = (calls - 2 * protocol.HEADER_BYTES) // (row + 8 * info.top_k)
        by_reply = (replies - protocol.HEADER_BYTES) // row
        fitting = min(fitting, by_call, by_reply)
    return max(1, fitting)


def slab_bytes(call_bytes: int) -> int:
    """Of a slab's data, when a call and its reply take so many."""
    n_bytes = min(_SLAB_CALLS * call_bytes, MAX_RING_BYTES)
    return -(-n_bytes // slab.PAGE_BYTES) * slab.PAGE_BYTES


def session_bytes(
    layers: Mapping[int, LayerInfo], transport: str, has_slab: bool, max_tokens: int
) -> int:
    """What a session takes at most: its slab, if it has one, and two rings, or what a stream holds
    instead of them: a record each way, and the kernel's buffers."""
    sizes = ring_sizes(layers, max_tokens)
    of_slab = slab.FLAGS_BYTES + slab_bytes(sum(sizes)) if has_slab else 0
    stream = sum(sizes) + _STREAM_BUFFERS_BYTES
    if transport == "stream":
        return of_slab + stream
    # Capacities are powers of two; a page more, and one for control.
    rings = sum((1 << (each - 1).bit_length()) + 2 * segment.PAGE_BYTES for each in sizes)
    return of_slab + (rings if transport == "shared" else max(rings, stream))


def _call_sizes(info: LayerInfo, max_tokens: int) -> tuple[int, int]:
    """Bytes of a call and of its reply in the widest format."""
    rows = protocol.reply_bytes(max_tokens, info.hidden_size, DType.F32)
    return rows + max_tokens * info.top_k * 8 + protocol.HEADER_BYTES, rows
