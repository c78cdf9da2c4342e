"""Descriptors: records that say where in a slab a call's arrays are, instead of holding them.

They travel among the calls. Worker's replies to them say only what is wrong; that the output is
there is said by the slab's flags (transport/slab.py). docs/protocol.md draws both; `_claims.pyx`
makes them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from . import protocol
from ._claims import sizes
from .dtypes import DType
from .errors import InvalidCall, ProtocolError
from .layers import LayerInfo
from .protocol import Message
from .transport.slab import ALIGNMENT, SLOTS, Places

#: The type of the records that carry them.
DESCRIPTOR = 4
VERSION = 1
BYTES = 128
# version, length, layer, call id, deadline, tokens, hidden size, top k, id space, dtype, view,
# slot, sequence, and the offsets of hidden states, ids, weights and output
_DESCRIPTOR = struct.Struct("<HHIQqIIHBBIII4Q48x")
_GLOBAL = 1
_DTYPES = {int(dtype): dtype for dtype in DType}


class Descriptor(NamedTuple):
    """One call, as it came; `check` says whether it can be."""

    call_id: int
    layer: int
    #: Of CLOCK_MONOTONIC in ns; 0 for none.
    deadline_ns: int
    n_tokens: int
    hidden_size: int
    top_k: int
    #: Ids are the model's, not local ones.
    are_global: int
    dtype: int
    #: Of the slot's flags.
    sequence: int
    places: Places
    #: That local ids, and the layer, are of.
    view: int


def read(record: Message) -> Descriptor:
    """ProtocolError when it is none, or its slot is none."""
    if record.type != DESCRIPTOR or len(record) != BYTES:
        raise ProtocolError(f"record type {record.type} of {len(record)} bytes is no descriptor")
    version, length, layer, call_id, deadline_ns, n_tokens, hidden_size, top_k, *rest = (
        _DESCRIPTOR.unpack_from(record)
    )
    are_global, dtype, view, slot, sequence, *offsets = rest
    if version != VERSION or length != BYTES:
        raise ProtocolError(
            f"a descriptor of version {version} and {length} bytes; this worker reads version "
            f"{VERSION}: update it"
        )
    if slot >= SLOTS:
        raise ProtocolError(f"slot {slot} of a slab; 0..{SLOTS - 1} are there")
    return Descriptor(
        call_id, layer, deadline_ns, n_tokens, hidden_size, top_k, are_global, dtype, sequence,
        Places(slot, *offsets), view,
    )  # fmt: skip


def check(
    descriptor: Descriptor, layers: Mapping[int, LayerInfo], most: int, data_bytes: int
) -> DType:
    """The format of its rows. `layers`: of its view; `most`: tokens that the worker takes;
    `data_bytes`: the slab's.

    InvalidCall: it contradicts the layer. ProtocolError: its arrays are not in the slab.
    """
    each = descriptor
    info = protocol.find_layer(layers, each.layer)
    dtype = _DTYPES.get(each.dtype)
    if dtype is None or each.are_global > _GLOBAL:
        raise InvalidCall(f"dtype {each.dtype}, id space {each.are_global}: unknown")
    protocol.check_sizes(each.layer, info, each.n_tokens, each.hidden_size, each.top_k, most)
    needed = sizes(each.n_tokens, each.hidden_size, each.top_k, dtype)
    for offset, size in zip(each.places[1:], needed, strict=True):
        if offset % ALIGNMENT or offset + size > data_bytes:
            raise ProtocolError(
                f"an array of {size} bytes at {offset} of a slab of {data_bytes}; it must start "
                f"at a multiple of {ALIGNMENT} and end in the slab"
            )
    return dtype
