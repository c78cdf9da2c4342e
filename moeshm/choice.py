"""How to reach a worker: what the caller says, and the settings for the rest."""

from __future__ import annotations

from typing import NamedTuple

from . import settings
from .errors import SettingError

#: As of MOESHM_TIMEOUT_S.
MAX_TIMEOUT_S = 1e6


class Choice(NamedTuple):
    """Arguments of `connect`, with the settings where the caller said nothing."""

    transport: str
    wire_dtype: str
    timeout_s: float
    batch_capacity: int


def choose(
    transport: str | None,
    wire_dtype: str | None,
    timeout_s: float | None,
    batch_capacity: int | None = None,
) -> Choice:
    """Fill in the settings; SettingError names an argument that is not allowed."""
    current = settings.current()
    transport = current.transport if transport is None else transport
    wire_dtype = current.wire_dtype if wire_dtype is None else wire_dtype
    for name, value, choices in (
        ("transport", transport, settings.TRANSPORTS),
        ("wire_dtype", wire_dtype, settings.WIRE_DTYPES),
    ):
        if value not in choices:
            raise SettingError(f"{name}={value!r}; choose {', '.join(choices)}")
    timeout_s = current.connect_timeout_s if timeout_s is None else timeout_s
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise SettingError(f"timeout_s={timeout_s}; it must lie in 0..{MAX_TIMEOUT_S:g}")
    capacity = current.batch_capacity if batch_capacity is None else batch_capacity
    settings.check_range("batch_capacity", capacity, 1, settings.MAX_BATCH_CAPACITY)
    return Choice(transport, wire_dtype, timeout_s, capacity)
