"""The engine's own GPU, as far as a client needs it: which one, and how its arrays travel."""

from __future__ import annotations

import logging
import re
import time
from typing import Any, NamedTuple

import numpy as np

from . import arrays, device_arrays, settings
from .device_calls import DeviceCalls
from .device_future import DeviceCall, DeviceFuture, Given, HostFallback
from .device_watch import Mover
from .dtypes import Array
from .errors import (
    ClientClosed,
    DeadlineExceeded,
    DeviceError,
    InvalidCall,
    SettingError,
    WorkerDied,
)
from .fallback import Fallback
from .handshake import SlabWish
from .held import HeldView
from .layers import LayerInfo
from .link import Link
from .stats import StatsCounter

_log = logging.getLogger(__name__)

_NAME = re.compile(r"(?P<vendor>cuda|hip)(:(?P<index>\d+))?")
#: By transport, the kind of slab that is asked for.
_KINDS = {"auto": "auto", "shared": "pinned", "device": "device"}


class EngineDevice(NamedTuple):
    """The GPU whose arrays calls may hold."""

    #: With its number, whoever left that out.
    name: str
    vendor: str
    number: int
    #: "auto", "pinned" or "device".
    kind: str

    @property
    def wish(self) -> SlabWish:
        """What a worker is asked for."""
        return SlabWish(self.kind, self.vendor)


def parse(name: str | None, transport: str | None) -> tuple[EngineDevice | None, str | None]:
    """The GPU of `cuda:N` or `hip:N`, None for None; and the transport for arrays of the host's.

    `transport`: as of `connect`; "device" is for arrays of the GPU's alone. SettingError: it, or
    the name.
    """
    wanted = transport or settings.current().transport
    gpu = parse_name(name, wanted, "MOESHM_TRANSPORT" if transport is None else "transport")
    if gpu is None:
        return None, transport
    if wanted not in _KINDS:
        raise SettingError(
            f"transport={wanted!r} carries no arrays of engine_device={name!r}; choose "
            f"{', '.join(_KINDS)}"
        )
    return gpu._replace(kind=_KINDS[wanted]), "shared" if wanted == "device" else transport


def parse_name(
    name: str | None, transport: str, transport_name: str = "transport"
) -> EngineDevice | None:
    """The GPU of `cuda:N` or `hip:N`, with any kind of slab; None for None.

    SettingError: it is no such name, or there is none and the transport is "device".
    """
    if name is None:
        if transport == "device":
            raise SettingError(
                f"{transport_name}='device' is for arrays on the engine's GPU; say which: "
                "engine_device='cuda:0'"
            )
        return None
    found = _NAME.fullmatch(name)
    if found is None:
        raise SettingError(f"engine_device={name!r}; write cuda:N or hip:N")
    vendor, number = found["vendor"], int(found["index"] or 0)
    return EngineDevice(f"{vendor}:{number}", vendor, number, "auto")


class Engine:
    """The calls of one client whose arrays are on the engine's GPU, if it named one."""

    def __init__(
        self, device: EngineDevice | None, counter: StatsCounter, has_fallback: bool
    ) -> None:
        self._device = device
        self._counter = counter
        #: What workers are asked for: what they, or this process, could not is not tried again.
        self.wish = SlabWish() if device is None else device.wish
        if has_fallback and self.wish.kind == "auto":
            # A fallback must reach the slab while streams wait for it, and drivers may wait for
            # these streams before they copy from another GPU's memory.
            self.wish = self.wish._replace(kind="pinned")
        self._why_none = ""

    @property
    def name(self) -> str | None:
        """Like "cuda:0"; None for none."""
        return None if self._device is None else self._device.name

    def open_slab(self, link: Link) -> bool:
        """Use the session's slab; False if another session, which is asked for less, is to be
        opened. DeviceError: there is none of the kind that the caller insists on."""
        device = self._device
        if device is None:
            return True
        welcome = link.session.welcome
        if welcome.slab_refused:
            self._tell(welcome.slab_refused)
        try:
            link.device_calls = open_calls(device, link)
        except DeviceError as error:
            is_device = welcome.slab is not None and welcome.slab.kind == "device"
            if device.kind != "auto" or (welcome.slab is not None and not is_device):
                # The GPU is not there, or the caller insists.
                link.close(ClientClosed(f"the session is of no use: {error}"))
                raise
            # Its words alone: the error's frames hold on to the slab.
            self._why_none = str(error)
            self._tell(self._why_none)
            if is_device:
                self.wish = self.wish._replace(kind="pinned")
                return False
        return True

    def _tell(self, why: str) -> None:
        """Arrays go another way than they might."""
        if self._counter.stepped_down(why):
            assert self._device is not None
            _log.warning("arrays on %s: %s", self._device.name, why)

    def check(
        self,
        layer: int,
        info: LayerInfo,
        hidden_states: Any,
        topk_ids: Any,
        topk_weights: Any,
        out: Any,
        stream: Any,
    ) -> Given:
        """The arrays of a call; InvalidCall. `stream`: None for their library's current one."""
        device = self._device
        if device is None:
            raise InvalidCall(
                "arrays on a GPU; connect with engine_device='cuda:0', or pass them in the host's "
                "memory"
            )
        checked = device_arrays.check_call(
            layer, info, hidden_states, topk_ids, topk_weights, out, stream, device.vendor,
            device.number,
        )  # fmt: skip
        # What Given(*checked) would do, but by a function of Python's.
        return tuple.__new__(Given, checked)

    def submit(
        self,
        given: Given,
        link: Link,
        view: HeldView,
        deadline: float,
        timeout_s: float,
        are_global: bool,
        slice_tokens: int,
        fallback: Fallback | None,
    ) -> DeviceFuture:
        """Enqueue it. InvalidCall: the session has no slab; else as `DeviceCalls.submit`."""
        start_ns = time.perf_counter_ns()
        calls = link.device_calls
        if calls is None:
            raise InvalidCall(
                f"arrays on a GPU, but {self._why_none}; pass them in the host's memory"
            )
        call = DeviceCall(
            link,
            given,
            deadline,
            timeout_s,
            link.views.of(view),
            are_global,
            slice_tokens,
            None if fallback is None else host_fallback(fallback, view, are_global),
            self._counter.taken,
        )
        future = calls.submit(call)
        elapsed_ns = time.perf_counter_ns() - start_ns
        self._counter.sent(future.n_parts, given.inputs.n_tokens, future.bytes_out, elapsed_ns)
        return future


def host_fallback(fallback: Fallback, view: HeldView, are_global: bool) -> HostFallback:
    """It, for arrays that were fetched from a slab, whose ids nobody has looked at."""

    def compute(
        layer: int,
        hidden_states: Array,
        topk_ids: Array,
        topk_weights: Array,
        cause: WorkerDied | DeadlineExceeded,
    ) -> Array:
        info = view.layers[layer]
        inputs = arrays.check(layer, info, hidden_states, topk_ids, topk_weights, are_global)
        output = np.empty_like(hidden_states)
        fallback.compute(view, layer, inputs, output, cause)
        return output

    return compute


def open_mover(
    engine: EngineDevice, memory: memoryview, handle: bytes, worker_bus_id: str
) -> Mover:
    """What moves arrays between that GPU and a slab; DeviceError."""
    from .backends.gpu.mover import Mover as GpuMover

    return GpuMover(engine.name, memory, handle, worker_bus_id)


def open_calls(engine: EngineDevice, link: Link) -> DeviceCalls:
    """The way for calls of arrays on the GPU. DeviceError: why there is none."""
    welcome, segment = link.session.welcome, link.session.slab
    if welcome.slab is None or segment is None:
        raise DeviceError(
            "the worker gives no slab"
            + (f": {welcome.slab_refused}" if welcome.slab_refused else "; update it")
        )
    mover = open_mover(engine, segment.memory, welcome.slab.handle, welcome.slab.bus_id)
    return DeviceCalls(link, segment, welcome.slab.data_bytes, mover)
