"""The handshake: who the two sides are, what they wish and offer, and how a session may end.

Messages are msgpack, tagged by type, cut into packets of a SOCK_SEQPACKET socket; what is in them
is checked here. docs/protocol.md lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from .errors import ProtocolError
from .layers import LayerInfo, fingerprint_of
from .printable import printable
from .protocol import MAX_TOKENS, check_layers, decode
from .transport.slab import ALIGNMENT

#: Both sides must speak the same.
PROTOCOL_VERSION = 1
MAX_CONTROL_BYTES = 16 << 20
#: Of a client's first message: nobody knows yet who it is.
MAX_HELLO_BYTES = 4096


#: Kinds of slabs: shared memory of the host, and memory of the worker's GPU.
SLAB_KINDS = ("pinned", "device")
#: Of a slab of either kind.
MAX_SLAB_BYTES = 1 << 32
#: What a driver describes memory by, to other processes.
_MAX_HANDLE_BYTES = 64


class SlabWish(NamedTuple):
    """What slab a client asks for: a kind, "auto" for any, or "" for none; and by which driver its
    GPU could open device memory, "cuda" or "hip"."""

    kind: str = ""
    vendor: str = ""


class SlabOffer(msgspec.Struct, frozen=True):
    """The slab of a session; its segment is the last of the welcome's fds."""

    kind: str
    #: Of its data.
    data_bytes: int
    #: What device memory is opened by.
    handle: bytes = b""
    #: Where the worker's GPU is on the host's PCI bus; empty for none, or if it is not known.
    bus_id: str = ""


class Hello(msgspec.Struct, tag="hello", frozen=True, kw_only=True):
    """The client's first message: who it is and what it wishes."""

    protocol: int
    version: str
    #: "auto", "shared" or "stream".
    transport: str
    #: Most tokens that it wants to send in one call; the rings are sized for it.
    batch_capacity: int
    #: `layers.fingerprint_of` the experts that it takes the worker to hold; empty for any.
    placement: str = ""
    #: `SlabWish`.
    slab: str = ""
    vendor: str = ""


class Welcome(msgspec.Struct, tag="welcome", frozen=True, kw_only=True):
    """The worker's answer; the fds come with it: two rings' segments, or one stream socket."""

    protocol: int
    version: str
    backend: str
    #: "shared" or "stream".
    transport: str
    #: Why not the transport that was wished for; empty when it is.
    stepped_down: str
    epoch: int
    #: Most tokens in one call: by the worker's memory, and by the rings' size.
    max_tokens: int
    layers: dict[int, LayerInfo]
    #: It knows `orders`, and calls of other views than 0; one that does not say so does not.
    takes_orders: bool = False
    slab: SlabOffer | None = None
    #: Why there is no slab, or not the kind that was wished for; empty when there is.
    slab_refused: str = ""


class Refusal(msgspec.Struct, tag="refusal", frozen=True):
    """The worker's answer when there will be no session."""

    reason: str
    #: The same may be asked again soon.
    is_busy: bool = False


class Goodbye(msgspec.Struct, tag="goodbye", frozen=True):
    """The last word of a worker that ends a session on purpose."""

    reason: str


ControlMessage = Hello | Welcome | Refusal | Goodbye
_decoder: msgspec.msgpack.Decoder[ControlMessage] = msgspec.msgpack.Decoder(ControlMessage)
encode_control = msgspec.msgpack.Encoder().encode


def decode_control(data: bytes) -> ControlMessage:
    """A handshake message; ProtocolError when it is none."""
    return decode(_decoder, data, "handshake message")


def check_hello(hello: ControlMessage) -> Hello:
    """ProtocolError unless it is a Hello that this version can answer."""
    if not isinstance(hello, Hello):
        raise ProtocolError(f"expected hello, got {type(hello).__name__.lower()}")
    if hello.protocol != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the client speaks protocol {hello.protocol} (moeshm {hello.version!r:.80}), this "
            f"worker {PROTOCOL_VERSION}; install the same moeshm on both sides"
        )
    if hello.transport not in ("auto", "shared", "stream"):
        raise ProtocolError(f"transport {hello.transport!r:.80}; choose auto, shared or stream")
    if not 1 <= hello.batch_capacity <= MAX_TOKENS:
        raise ProtocolError(f"batch_capacity={hello.batch_capacity}; it must be 1..{MAX_TOKENS}")
    if hello.slab not in ("", "auto", *SLAB_KINDS):
        raise ProtocolError(
            f"slab {hello.slab!r:.80}; choose auto, {', '.join(SLAB_KINDS)}, or none"
        )
    return hello


def check_placement(hello: Hello, layers: Mapping[int, LayerInfo]) -> None:
    """ProtocolError unless the worker holds the experts that the client takes it to hold."""
    held = fingerprint_of({number: info.experts for number, info in layers.items()})
    if hello.placement not in ("", held):
        raise ProtocolError(
            f"the client's placement gives this worker {hello.placement!r:.80}, and it holds "
            f"{held}: start it with --placement and the client's file, or, if its experts were "
            "moved meanwhile, use the placement that was applied last"
        )


def check_welcome(welcome: Welcome, n_fds: int) -> Welcome:
    """The same, its texts fit to be shown. ProtocolError unless a client of this version can work
    with it."""
    wanted = {"shared": 2, "stream": 1}.get(welcome.transport)
    if wanted is not None and welcome.slab is not None:
        _check_slab(welcome.slab)
        wanted += 1
    if welcome.protocol != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the worker speaks protocol {welcome.protocol} (moeshm {welcome.version!r:.80}), this "
            f"client {PROTOCOL_VERSION}; install the same moeshm on both sides"
        )
    if wanted is None or n_fds != wanted:
        raise ProtocolError(f"transport {welcome.transport!r:.80} came with {n_fds} fds")
    if not 1 <= welcome.max_tokens <= MAX_TOKENS or not 0 <= welcome.epoch < 1 << 64:
        raise ProtocolError(f"max_tokens={welcome.max_tokens}, epoch={welcome.epoch}")
    check_layers(welcome.layers)
    # They are shown, and logged.
    return msgspec.structs.replace(
        welcome,
        backend=printable(welcome.backend),
        stepped_down=printable(welcome.stepped_down),
        slab_refused=printable(welcome.slab_refused),
    )


def _check_slab(offer: SlabOffer) -> None:
    is_sized = 0 < offer.data_bytes <= MAX_SLAB_BYTES and offer.data_bytes % ALIGNMENT == 0
    has_handle = 0 < len(offer.handle) <= _MAX_HANDLE_BYTES
    if offer.kind not in SLAB_KINDS or not is_sized or has_handle != (offer.kind == "device"):
        raise ProtocolError(
            f"a slab of kind {offer.kind!r:.80}, {offer.data_bytes} bytes, and a handle of "
            f"{len(offer.handle)}"
        )
