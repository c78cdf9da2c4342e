"""Target: the handshake's messages, and the packets that they come in."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any

import msgspec

from moeshm import handshake, protocol
from moeshm.errors import ProtocolError, SessionError
from moeshm.foreign_fds import close_fds
from moeshm.handshake import Hello, SlabOffer, Welcome
from moeshm.layers import MAX_EXPERTS, fingerprint_of
from moeshm.session import ControlSocket
from tests.fuzz.choices import Choices
from tests.fuzz.records import LAYERS
from tests.wire import n_fds

#: Strings that a field may hold instead.
_TEXTS = ("", "auto", "shared", "stream", "pinned", "device", "cuda", "x" * 5000, "\n", "\ud800é\0")
_HELD = fingerprint_of({number: info.experts for number, info in LAYERS.items()})


def close() -> None:
    """Nothing is kept between executions."""


def seeds() -> list[bytes]:
    """One of each kind, right and slightly wrong."""
    more: tuple[list[int], ...] = ([], [0] * 16, [1, 2, 3, 4, 5, 6], [2, 7, 200, 1, 9, 150])
    packed = [handshake.encode_control(each) for each in (_hello(), _welcome())]
    return [
        *(bytes([kind, *each]) for kind in range(len(_KINDS)) for each in more),
        *(bytes([3]) + each for each in packed),
    ]


def test_one(data: bytes) -> str:
    """What became of one message; AssertionError for what must not."""
    choices = Choices(data)
    return _KINDS[choices.below(len(_KINDS))](choices)


def _hello() -> Hello:
    return Hello(
        protocol=1, version="0.1", transport="auto", batch_capacity=64, placement=_HELD,
        slab="auto", vendor="cuda",
    )  # fmt: skip


def _welcome() -> Welcome:
    return Welcome(
        protocol=1, version="0.1", backend="x", transport="shared", stepped_down="", epoch=5,
        max_tokens=64, layers=LAYERS, takes_orders=True, slab=SlabOffer("device", 1 << 21, b"here"),
    )  # fmt: skip


def changed_hello(choices: Choices) -> bytes:
    """A hello that is right but for what is chosen."""
    return _changed(_hello(), choices)


def changed_welcome(welcome: Welcome, choices: Choices) -> bytes:
    """A welcome, but for what is chosen."""
    return _changed(welcome, choices)


def _changed(message: msgspec.Struct, choices: Choices) -> bytes:
    fields: dict[str, Any] = msgspec.to_builtins(message, builtin_types=(bytes,), str_keys=False)
    if "layers" in fields and choices.below(2):
        fields["layers"][0]["num_experts"] = MAX_EXPERTS
    for _ in range(choices.below(4)):
        _change_one(fields, choices)
    return choices.edit(msgspec.msgpack.encode(fields))


def _change_one(fields: dict[Any, Any], choices: Choices) -> None:
    """One field, or one of a field's own."""
    name = tuple(fields)[choices.below(len(fields))]
    old, how = fields[name], choices.byte()
    if how == 255:
        del fields[name]
    elif isinstance(old, dict) and old:
        _change_one(old, choices)
    elif isinstance(old, bool) or old is None or isinstance(old, float):
        fields[name] = (True, None, 0, float("nan"), "", float("inf"), {})[how % 7]
    elif isinstance(old, int):
        number = choices.near(old & ((1 << 64) - 1), 64)
        fields[name] = number - (1 << 64) if how % 8 == 7 and number >> 63 else number
    elif isinstance(old, bytes):
        fields[name] = choices.take(choices.below(80))
    elif isinstance(old, str):
        fields[name] = _TEXTS[how % (len(_TEXTS) - 1)]
    elif old:
        fields[name] = [choices.near(each, 64) for each in old]


# --- messages ---------------------------------------------------------------------------------


def judge_hello(choices: Choices) -> str:
    """What a worker takes for a hello."""
    return _judge_hello(changed_hello(choices))


def _judge_hello(data: bytes) -> str:
    try:
        hello = handshake.check_hello(handshake.decode_control(data))
        handshake.check_placement(hello, LAYERS)
    except ProtocolError as error:
        return f"hello: {_gist(error)}"
    assert hello.protocol == 1
    assert 1 <= hello.batch_capacity <= protocol.MAX_TOKENS
    assert hello.transport in ("auto", "shared", "stream")
    assert hello.slab in ("", "auto", "pinned", "device")
    assert hello.placement in ("", _HELD)
    assert handshake.decode_control(handshake.encode_control(hello)) == hello
    return "hello"


def judge_welcome(choices: Choices) -> str:
    """What a client takes for a welcome."""
    n_fds_of_it = choices.near(3, 8)
    return _judge_welcome(_changed(_welcome(), choices), n_fds_of_it)


def _judge_welcome(data: bytes, n_fds_of_it: int) -> str:
    try:
        message = handshake.decode_control(data)
        if not isinstance(message, Welcome):
            return f"welcome: {type(message).__name__}"
        welcome = handshake.check_welcome(message, n_fds_of_it)
    except ProtocolError as error:
        return f"welcome: {_gist(error)}"
    assert 1 <= welcome.max_tokens <= protocol.MAX_TOKENS
    assert 0 <= welcome.epoch < 1 << 64
    assert n_fds_of_it == {"shared": 2, "stream": 1}[welcome.transport] + (welcome.slab is not None)
    if welcome.slab is not None:
        assert 0 < welcome.slab.data_bytes <= handshake.MAX_SLAB_BYTES
        assert (welcome.slab.kind == "device") == bool(welcome.slab.handle)
    for number, info in welcome.layers.items():
        assert 0 <= number < 1 << 32
        assert all(0 <= expert < info.num_experts <= 1 << 20 for expert in info.experts)
        # What a client makes of it.
        assert info.holds_all_experts in (True, False)
        protocol.plain_shapes({number: info})
        info.summary()
    # NaN equals nothing.
    again = handshake.encode_control(welcome)
    assert handshake.encode_control(handshake.decode_control(again)) == again
    return "welcome"


def judge_bytes(choices: Choices) -> str:
    """Any bytes, taken for either."""
    data = choices.rest()
    return f"{_judge_hello(data)}; {_judge_welcome(data, 2)}"


# --- packets ----------------------------------------------------------------------------------

_MAX_BYTES = 4096


def judge_packets(choices: Choices) -> str:
    """Packets of any marks, lengths and numbers of fds."""
    before = n_fds()
    outcome = _receive(choices)
    assert n_fds() == before, "fds were left open"
    return outcome


def _receive(choices: Choices) -> str:
    is_worker = bool(choices.below(2))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, contextlib.closing(ControlSocket(ours, is_worker)) as control:
        whole = changed_hello(choices)
        n_packets = 1 + choices.below(4)
        n_each = -(-len(whole) // n_packets)
        #: Of the packets up to the first that is marked as the last.
        n_of_message, is_whole = 0, False
        for number in range(n_packets):
            part = whole[number * n_each : (number + 1) * n_each]
            mark = choices.near(number + 1 < n_packets, 8)
            packet = choices.edit(bytes([mark]) + part)
            packet += bytes(choices.number(16)) if choices.byte() > 250 else b""
            n_passed = choices.below(6) if choices.byte() > 128 else 0
            # With one fd of a kind that nobody expects.
            socket.send_fds(theirs, [packet], [theirs.fileno()] * n_passed)
            n_of_message += 0 if is_whole else n_passed
            is_whole = is_whole or packet[:1] == b"\0"
        if choices.byte() < 64:
            theirs.shutdown(socket.SHUT_WR)
        try:
            message, fds = control.receive(0.0, _MAX_BYTES)
        except (ProtocolError, SessionError) as error:
            return f"packets: {_gist(error)}"
        assert len(fds) == n_of_message <= (0 if is_worker else 4)
        assert all(os.get_inheritable(fd) is False for fd in fds)
        close_fds(fds)
        assert len(handshake.encode_control(message)) <= 2 * _MAX_BYTES
        return f"packets: {type(message).__name__}"


def _gist(error: Exception) -> str:
    words = str(error).split()[:6]
    return f"{type(error).__name__}: {' '.join(word for word in words if word.isalpha())}"


_KINDS: tuple[Callable[[Choices], str], ...] = (
    judge_hello,
    judge_welcome,
    judge_packets,
    judge_bytes,
)
