"""Opening a client of a worker that runs already."""

from __future__ import annotations

from . import engine_device as engines
from . import session
from .backends import Backend
from .choice import choose
from .client import ExpertClient
from .handshake import SlabWish
from .sessions import Opened


def connect(
    address: str,
    *,
    transport: str | None = None,
    wire_dtype: str | None = None,
    timeout_s: float | None = None,
    fallback: Backend | None = None,
    placement: str = "",
    batch_capacity: int | None = None,
    engine_device: str | None = None,
) -> ExpertClient:
    """A client of the worker that listens at `unix:PATH`.

    `transport` ("auto", "shared", "stream", "device") and `wire_dtype` ("auto", "f32", "f16",
    "bf16"): by default MOESHM_TRANSPORT and MOESHM_WIRE_DTYPE. `timeout_s`: for connecting and the
    handshake, by default MOESHM_CONNECT_TIMEOUT_S. `fallback`: a backend that holds the same
    experts and computes, in this process, the calls that a lost worker leaves. `placement`: what
    `Placement.fingerprint` says of this worker; one that holds other experts refuses.
    `batch_capacity`: most tokens in one message, by default MOESHM_BATCH_CAPACITY. `engine_device`
    ("cuda:0", "hip:1"): the GPU whose arrays calls may hold; then `transport` "shared" has them go
    through the host's memory, and "device" through that of the worker's GPU.

    ConnectError: nobody answers there. HandshakeRefused: the worker said no. SettingError: an
    argument is not allowed. DeviceError: the GPU is not there, or arrays on it cannot go the way
    that `transport` names.
    """
    engine, transport = engines.parse(engine_device, transport)
    chosen = choose(transport, wire_dtype, timeout_s, batch_capacity)
    # Of the first session only: by the next, the worker may begin with a newer view.
    expected = [placement]

    def open_session(wish: SlabWish) -> Opened:
        opened = session.connect(
            address,
            chosen.transport,
            chosen.batch_capacity,
            chosen.timeout_s,
            expected.pop() if expected else "",
            wish,
        )
        return Opened(opened, False)

    return ExpertClient(
        open_session, lambda: None, chosen.wire_dtype, fallback, chosen.batch_capacity, engine
    )
