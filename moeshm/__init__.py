"""Mixture-of-Experts layers computed in another process, over lock-free shared memory.

with moeshm.connect("unix:/run/moeshm/w0.sock") as client:
    y = client.compute(3, hidden_states, topk_ids, topk_weights)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import VERSION as __version__

if TYPE_CHECKING:
    from . import errors
    from ._ring import RingConsumer, RingProducer
    from .call import CallFuture
    from .client import ExpertClient
    from .connecting import connect
    from .device_future import DeviceFuture
    from .layers import Activation, LayerInfo
    from .offload import ExpertOffload, OffloadStats
    from .placement import Placement
    from .policy import Policy
    from .routing_stats import RoutingStats
    from .stats import ClientStats
    from .supervisor import spawn_worker

__all__ = [
    "Activation",
    "CallFuture",
    "ClientStats",
    "DeviceFuture",
    "ExpertClient",
    "ExpertOffload",
    "LayerInfo",
    "OffloadStats",
    "Placement",
    "Policy",
    "RingConsumer",
    "RingProducer",
    "RoutingStats",
    "__version__",
    "connect",
    "errors",
    "spawn_worker",
]

_HOMES = {
    "Activation": "layers",
    "CallFuture": "call",
    "ClientStats": "stats",
    "DeviceFuture": "device_future",
    "ExpertClient": "client",
    "ExpertOffload": "offload",
    "LayerInfo": "layers",
    "OffloadStats": "offload",
    "Placement": "placement",
    "Policy": "policy",
    "RingConsumer": "_ring",
    "RingProducer": "_ring",
    "RoutingStats": "routing_stats",
    "connect": "connecting",
    "spawn_worker": "supervisor",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: a worker chooses NumPy's threads before NumPy is imported, and
    # `moeshm doctor` must be able to say that the extension was not built.
    if name == "errors":
        return importlib.import_module(".errors", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'moeshm' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
