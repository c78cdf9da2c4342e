"""A worker that lies: the client gets an error that says so, and never a wrong result."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import moeshm
from moeshm import orders, protocol, session
from moeshm.dtypes import DType
from moeshm.errors import InvalidCall, WorkerDied, WorkerFailed
from moeshm.session import ControlSocket, Session
from tests.crash.arithmetic import FREE, HIDDEN_SIZE, ArithmeticBackend, make_inputs
from tests.wire import PATIENCE_S, meanwhile

INPUTS = make_inputs(FREE, 1, n_tokens=2)
ROWS = INPUTS.hidden_states.tobytes()


@pytest.fixture(params=["shared", "stream"])
def transport(request: pytest.FixtureRequest) -> str:
    """How activations travel."""
    return str(request.param)


@contextlib.contextmanager
def lied_to(
    folder: Path, transport: str, lie: Callable[[Session, int], None]
) -> Iterator[moeshm.ExpertClient]:
    """A client whose worker answers its first call or order, of this id, with a lie, and then
    waits."""

    def serve() -> None:
        control = ControlSocket(listener.accept()[0])
        with session.accept(control, ArithmeticBackend().layers, "x", 64, PATIENCE_S) as opened:
            record = opened.transport.acquire(PATIENCE_S)
            if record.type == protocol.ORDER:
                order = orders.parse_order(record)
                assert isinstance(order, orders.Hold)
                call_id = order.call_id
            else:
                call_id, _ = protocol.read_call_header(record)
            record.release()
            lie(opened, call_id)
            # The client hangs up.
            control._socket.settimeout(PATIENCE_S)
            assert control._socket.recv(1) == b""

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(folder / "s"))
        listener.listen()
        with (
            meanwhile(serve),
            moeshm.connect(f"unix:{folder / 's'}", transport=transport) as client,
        ):
            yield client


def replying(data: bytes = ROWS, **changed: int) -> Callable[[Session, int], None]:
    """With a reply, right but for what is changed."""

    def lie(opened: Session, call_id: int) -> None:
        header = {"version": 1, "status": 0, "n_tokens": 2, "call_id": call_id, "compute_ns": 0}
        header.update({"hidden_size": HIDDEN_SIZE, "dtype": 0, **changed})
        packed = struct.pack("<HHIQQIB35x", *header.values())
        opened.transport.write((packed, data), protocol.REPLY)

    return lie


def other_type(opened: Session, _: int) -> None:
    """A call, to the client."""
    parts = protocol.pack_call(1, *INPUTS, DType.F32)
    opened.transport.write(parts, protocol.CALL)


def nothing(opened: Session, _: int) -> None:
    """An empty record."""
    opened.transport.write((), protocol.REPLY)


def holding(opened: Session, call_id: int) -> None:
    """What would answer an order; its header is that of rows that fit."""
    layers = msgspec.msgpack.encode(dict(ArithmeticBackend().layers))
    replying(layers, status=4)(opened, call_id)


LIES: dict[str, tuple[Callable[[Session, int], None], str]] = {
    "another call's id": (replying(call_id=999), "a reply to call 999, which is not open"),
    "fewer rows": (
        replying(ROWS[: len(ROWS) // 2], n_tokens=1),
        r"answered by f32 \[1, 16\] instead of f32 \[2, 16\]",
    ),
    "wider rows": (replying(ROWS * 2, hidden_size=2 * HIDDEN_SIZE), r"f32 \[2, 32\] instead"),
    "another dtype": (replying(ROWS[: len(ROWS) // 2], dtype=1), r"f16 \[2, 16\] instead"),
    "an unknown dtype": (replying(dtype=77), "dtype 77"),
    "an unknown status": (replying(status=9), "status 9"),
    "another version": (replying(version=2), "reply version 2"),
    "more rows than came": (replying(n_tokens=2**32 - 1), "4294967295 tokens"),
    "a byte too many": (replying(ROWS + b"x"), "holds 193 bytes"),
    "what a view holds": (holding, "answered by what a view holds, not rows"),
    "an age of computing": (replying(compute_ns=2**63 - 1), "9223372036854775807 ns to compute"),
    "just too long": (replying(compute_ns=10**15 + 1), "no call lasts so long"),
    "another type": (other_type, "record type 1"),
    "nothing": (nothing, "record type 2 of 0 bytes"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_reply_that_cannot_be_ends_the_session(tmp_path: Path, transport: str, name: str) -> None:
    lie, says = LIES[name]
    out = np.full_like(INPUTS.hidden_states, 7)
    with lied_to(tmp_path, transport, lie) as client:
        with pytest.raises(WorkerDied, match=says):
            client.compute(*INPUTS, out=out)
        assert (out == 7).all()


@pytest.mark.parametrize(("status", "kind"), [(1, InvalidCall), (2, WorkerFailed)])
def test_any_text_may_be_an_error(
    tmp_path: Path, transport: str, status: int, kind: type[Exception]
) -> None:
    text = b"\xff\0 %s {}" + "é".encode()[:1]
    lie = replying(text, status=status, n_tokens=2**32 - 1)
    with lied_to(tmp_path, transport, lie) as client:
        with pytest.raises(kind) as caught:
            client.compute(*INPUTS)
        assert "%s {}" in str(caught.value)


def test_a_reply_that_comes_twice_ends_the_session(tmp_path: Path, transport: str) -> None:
    def twice(opened: Session, call_id: int) -> None:
        for _ in range(2):
            replying()(opened, call_id)

    with lied_to(tmp_path, transport, twice) as client:
        result: Any = client.compute(*INPUTS)
        np.testing.assert_array_equal(result, INPUTS.hidden_states)
        with pytest.raises(WorkerDied, match="a reply to call 1, which is not open"):
            client.compute(*INPUTS)


def held_as(**fields: Any) -> Callable[[Session, int], None]:
    """An answer to an order, of layers that are right but for this."""

    def lie(opened: Session, call_id: int) -> None:
        layers = {FREE: msgspec.structs.replace(ArithmeticBackend().layers[FREE], **fields)}
        parts = protocol.pack_held(call_id, layers)
        opened.transport.write(parts, protocol.REPLY)

    return lie


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        (replying(), "rows of 192 bytes answer an order"),
        (held_as(num_experts=1, top_k=1, experts=()), "says it holds cannot be: experts must lie"),
        (other_type, "record type 1"),
    ],
)
def test_an_answer_to_an_order_that_cannot_be_ends_the_session(
    tmp_path: Path, transport: str, lie: Callable[[Session, int], None], says: str
) -> None:
    with lied_to(tmp_path, transport, lie) as client:
        with pytest.raises(WorkerDied, match=says):
            client.hold({FREE: (1,)})
        with pytest.raises(WorkerDied):
            client._link.views.hold({FREE: (1,)}, 1.0)
