"""Every MOESHM_* variable: its name, default, meaning and allowed values, parsed once."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import msgspec

from .errors import SettingError

MODES = ("auto", "batched", "stream")
#: `device` is for arrays on the engine's GPU alone.
TRANSPORTS = ("auto", "stream", "shared", "device")
WIRE_DTYPES = ("auto", "f32", "f16", "bf16")
MAX_BATCH_CAPACITY = 4096
LOG_LEVELS = ("debug", "info", "warning", "error")
#: GPU kernels for calls of few and of many tokens (docs/gpu.md).
KERNELS = {"decode": ("fma", "mma"), "prefill": ("fma", "mma", "wgmma")}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One field per variable: `spin_us` is MOESHM_SPIN_US, and so on."""

    #: How a layer's tokens are cut into messages: as few as fit, slices of 4, or as measured.
    mode: str = "auto"
    #: How activations travel: over the socket, through the host's shared memory, from GPU to GPU
    #: through that of the worker's, or what fits best.
    transport: str = "auto"
    #: Number format of activations on the way; `auto` sends them as the caller holds them.
    wire_dtype: str = "auto"
    #: Relative rounding error of activations that `auto` may add on the way.
    tolerance: float = 0.0
    #: Most tokens in one call; longer calls are cut. The worker may advertise less.
    batch_capacity: int = 1024
    #: Longest busy wait before sleeping, in microseconds. It adapts below this; 0 never spins.
    spin_us: float = 200.0
    #: Deadline of a call that names none, in seconds.
    timeout_s: float = 120.0
    #: How long connecting and the handshake may take, in seconds.
    connect_timeout_s: float = 10.0
    #: Of a worker on a GPU, for experiments: which kernels, like `decode=fma,prefill=mma`.
    kernels: str = "auto"
    log_level: str = "info"
    #: Who else than this process's user and root may be the worker that a client talks to: a user's
    #: name or number, or none.
    worker_user: str = ""
    # Of a worker, what clients may take (docs/security.md). A connection counts as a session from
    # when it is accepted until all of it is freed.
    #: Sessions, of all clients.
    max_sessions: int = 256
    #: Of them, those of one user.
    max_sessions_per_user: int = 128
    #: Of them, those of one process.
    max_sessions_per_process: int = 64
    #: Connections whose handshake is not over.
    max_handshakes: int = 64
    #: Bytes of the rings, stream buffers and slabs of all sessions; 0 for half of the memory that
    #: is free when the worker starts. One user may have 3/4 of it, and one process 1/2.
    max_bytes: int = 0
    #: The same, of one session: it is offered calls of fewer tokens, so that they fit.
    max_bytes_per_session: int = 256 << 20
    #: Calls of one session that a GPU has begun before more are taken; others are taken one at a
    #: time, and wait in the session's own memory.
    max_calls_per_session: int = 16
    #: Experts that the views of one session may list, each time it is listed.
    max_experts_per_session: int = 1 << 16

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Settings:
        """Read the variables; SettingError names an unknown one or a bad value and the choices."""
        values: dict[str, Any] = {}
        for variable, text in environment.items():
            if not variable.startswith("MOESHM_") or variable in _NOT_OURS:
                continue
            name = variable.removeprefix("MOESHM_").lower()
            if name not in cls.__struct_fields__:
                known = ", ".join(f"MOESHM_{field.upper()}" for field in cls.__struct_fields__)
                raise SettingError(f"{variable} is no setting; known are {known}")
            default = getattr(_DEFAULTS, name)
            values[name] = text.strip() if name in _AS_WRITTEN else _parse(variable, text, default)
        return cls(**values)

    def __post_init__(self) -> None:
        check_choice("MOESHM_MODE", self.mode, MODES)
        check_choice("MOESHM_TRANSPORT", self.transport, TRANSPORTS)
        check_choice("MOESHM_WIRE_DTYPE", self.wire_dtype, WIRE_DTYPES)
        check_choice("MOESHM_LOG_LEVEL", self.log_level, LOG_LEVELS)
        parse_kernels(self.kernels)
        check_range("MOESHM_TOLERANCE", self.tolerance, 0, 1)
        check_range("MOESHM_BATCH_CAPACITY", self.batch_capacity, 1, MAX_BATCH_CAPACITY)
        check_range("MOESHM_SPIN_US", self.spin_us, 0, 1e6)
        check_range("MOESHM_TIMEOUT_S", self.timeout_s, 1e-3, 1e6)
        check_range("MOESHM_CONNECT_TIMEOUT_S", self.connect_timeout_s, 1e-3, 3600)
        for name, (low, high) in _LIMITS.items():
            check_range(f"MOESHM_{name.upper()}", getattr(self, name), low, high)


#: Of what clients may take of a worker, the least and the most that can be set.
_LIMITS = {
    "max_sessions": (1, 65536),
    "max_sessions_per_user": (1, 65536),
    "max_sessions_per_process": (1, 65536),
    "max_handshakes": (1, 65536),
    "max_bytes": (0, 1 << 50),
    "max_bytes_per_session": (1, 1 << 40),
    "max_calls_per_session": (1, 32),
    "max_experts_per_session": (1, 1 << 24),
}
#: Not made lower case: names of users.
_AS_WRITTEN = ("worker_user",)

#: Read by the build and by the tests, not at run time.
_NOT_OURS = frozenset({"MOESHM_CRASHPOINTS", "MOESHM_SANITIZE", "MOESHM_TEST_RUN"})


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """SettingError unless it is one of the choices."""
    if value not in choices:
        raise SettingError(f"{name}={value!r}; choose {', '.join(choices)}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """SettingError unless it lies between the two, both allowed."""
    if not low <= value <= high:
        shown = [f"{each:g}" if isinstance(each, float) else str(each) for each in (low, high)]
        raise SettingError(f"{name}={value!r}; it must lie in {'..'.join(shown)}")


def parse_kernels(text: str) -> dict[str, str]:
    """`"decode=fma,prefill=mma"` as a dict, `"auto"` as an empty one; SettingError."""
    wanted: dict[str, str] = {}
    for part in () if text == "auto" else text.split(","):
        kind, _, kernels = part.strip().partition("=")
        if kernels not in KERNELS.get(kind, ()):
            known = ", ".join(f"{each}={'|'.join(names)}" for each, names in KERNELS.items())
            raise SettingError(f"MOESHM_KERNELS={text!r}: {part!r}; choose auto, or of {known}")
        wanted[kind] = kernels
    return wanted


def _parse(name: str, text: str, default: Any) -> Any:
    if isinstance(default, str):
        return text.strip().lower()
    kind = type(default)
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise SettingError(f"{name}={text!r} is not {wanted}") from None


_DEFAULTS = Settings()


@functools.cache
def current() -> Settings:
    """The settings of this process, read from its environment at the first use."""
    return Settings.from_environment(os.environ)
