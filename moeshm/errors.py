"""Every exception that moeshm raises, one tree under MoeshmError."""

from __future__ import annotations


class MoeshmError(Exception):
    """The root: `except MoeshmError` catches whatever moeshm raises on purpose."""


class SettingError(MoeshmError, ValueError):
    """A MOESHM_* variable or an option holds a value that is not allowed."""


class UnsupportedPlatform(MoeshmError, OSError):
    """This kernel or build lacks something that moeshm cannot do without."""


class SegmentError(MoeshmError, OSError):
    """Shared memory could not be created, attached or checked; says sizes and limits."""


# --- ring -------------------------------------------------------------------------------


class RingError(MoeshmError):
    """Anything a ring refuses."""


class RingFull(RingError, TimeoutError):
    """The consumer did not free enough room before the timeout."""


class RingEmpty(RingError, TimeoutError):
    """No record arrived before the timeout."""


class RingClosed(RingError):
    """This end was closed, or the other end closed and everything it sent was read."""


class Corrupt(RingError):
    """The other end wrote something impossible; the segment is never touched again."""


class ForkedProcess(MoeshmError, RuntimeError):
    """A ring or client opened before fork() was used in the child; open a new one there."""


# --- session ----------------------------------------------------------------------------


class SessionError(MoeshmError):
    """Anything that ends or prevents a session."""


class ConnectError(SessionError, ConnectionError):
    """No worker answered at the address."""


class HandshakeRefused(SessionError, ConnectionError):
    """The worker answered and said no; the message carries its reason."""


class ProtocolError(SessionError):
    """The peer's bytes do not follow the protocol; the session is closed."""


class PeerDied(SessionError, ConnectionError):
    """The process at the other end is gone."""


class AddressInUse(SessionError, OSError):
    """A live worker already listens at the socket path."""


# --- calls ------------------------------------------------------------------------------


class CallError(MoeshmError):
    """One call failed; the class says whether the session lives on."""


class InvalidCall(CallError, ValueError):
    """Shapes, ids, dtype or layer of this call are not allowed; the session lives."""


class DeadlineExceeded(CallError, TimeoutError):
    """The worker did not answer in time; the session is abandoned, unless the worker said so."""


class NotReady(CallError, TimeoutError):
    """`result(timeout_s)` waited that long; the call is still on its way."""


class WorkerDied(CallError, ConnectionError):
    """The worker went away with this call in flight."""


class WorkerFailed(CallError, RuntimeError):
    """The worker's backend raised while it computed this call; the session lives."""


class ClientClosed(CallError, RuntimeError):
    """The client was closed, with this call in flight or before it was made."""


# --- weights ----------------------------------------------------------------------------


class CheckpointError(MoeshmError, ValueError):
    """A checkpoint lacks a tensor, misshapes one, or has a layout moeshm does not know."""


# --- GPUs -------------------------------------------------------------------------------


class DeviceError(MoeshmError, RuntimeError):
    """A GPU is not there, or refused what was asked of it."""


class OutOfDeviceMemory(DeviceError, MemoryError):
    """What was to be kept on a GPU does not fit; says what was needed and what was free."""


class DeviceLost(DeviceError):
    """Every further call on the GPU fails in this process, which has to be started anew."""
