"""The slab of one session, on the worker's side: offered, computed in, closed."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from . import descriptors, settings
from ._descriptors import read_plain_descriptor
from ._inputs import inspect_ids
from ._ring import Record
from ._words import load_word, store_word, wait_for_word
from .backends import (
    Backend,
    BetweenSteps,
    SlabCall,
    SlabUser,
    WorkerSlab,
    in_steps,
)
from .descriptors import Descriptor
from .dtypes import Array, DType
from .errors import DeviceError, InvalidCall, ProtocolError, SegmentError
from .handshake import Hello, SlabOffer
from .holdings import View
from .protocol import Message, SlotTable
from .transport.slab import (
    DONE,
    GIVEN,
    REFUSED,
    SLOT_BYTES,
    SLOTS,
    TAKEN,
    TOLD,
    Places,
    Segment,
)

_log = logging.getLogger(__name__)

#: Of views and layers, what stays known.
_MAX_KNOWN = 1024
#: How long a slab is kept for a client whose GPU still copies from it.
_TAKEN_LIMIT_S = 5.0
_TAKEN_SLICE_NS = 10_000_000
_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)
_DTYPES = tuple(DType)


class _Known(NamedTuple):
    """What a call may be, of one view's layer and one id space; in the order in which
    `read_plain_descriptor` takes it."""

    hidden_size: int
    #: At most.
    top_k: int
    n_ids: int
    slots: SlotTable | None


#: By `view << 32 | layer`.
_KnownLayers = dict[int, _Known]


class SlabServer:
    """Makes the slab that a client wishes for, if it does, and computes calls in it.

    Where the backend's device takes calls from slabs by itself, it does; else the host waits for
    their arrays, which then are in its memory. One thread at a time.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._ffn = in_steps(backend)
        self._segment: Segment | None = None
        self._data_bytes = 0
        #: Why the host serves it though the backend has a device.
        self._why_host: list[str] = []
        #: The device's; None for a slab that the host serves.
        self._slab: WorkerSlab | None = None
        #: The call that the device was given last, unless it is known to be done.
        self._last: SlabCall | None = None
        #: How many were prepared for it since it was waited for, and of how many steps' work.
        self._n_begun, self._steps_begun = 0, 0.0
        #: For local ids and for global ones.
        self._known: tuple[_KnownLayers, _KnownLayers] = ({}, {})
        self._spin_ns = int(settings.current().spin_us * 1e3)
        #: Calls of one session that the device is given before it is waited for.
        self._most_begun = settings.current().max_calls_per_session

    def offer(self, hello: Hello, data_bytes: int) -> tuple[SlabOffer, int, str]:
        """As `session.OfferSlab`. DeviceError, SegmentError: why there is none."""
        kinds = ("device", "pinned") if hello.slab == "auto" else (hello.slab,)
        whys: list[str] = []
        for kind in kinds:
            make = self._make_device if kind == "device" else self._make_pinned
            try:
                offer, fd = make(hello, data_bytes)
                return offer, fd, "; ".join(whys + self._why_host)
            except (DeviceError, SegmentError) as error:
                whys.append(f"no {kind} slab: {error}")
        raise DeviceError("; ".join(whys))

    def check_open(self) -> None:
        """ProtocolError: the session has no slab."""
        if self._segment is None:
            raise ProtocolError("a descriptor in a session without a slab")

    @property
    def summary(self) -> str:
        """What there is, for the log; empty for none."""
        if self._segment is None:
            return ""
        kind = "device" if self._slab is not None and self._slab.handle else "pinned"
        how = "" if self._slab is not None else ", served by the host"
        return f"{kind} slab of {self._data_bytes / 2**20:g} MiB{how}"

    def read_plain(self, record: Message, most: int) -> SlabCall | None:
        """The call of a descriptor that came in a ring, is right in everything, and to a layer to
        which there was one before; None for any other, which `descriptors.read` and `call_of` then
        judge. `most`: tokens that the worker takes."""
        if type(record) is not Record:
            return None
        # Nothing is known without a slab.
        found = read_plain_descriptor(record, self._known, most, self._data_bytes)
        if found is None:
            return None
        (
            layer, n_tokens, hidden_size, top_k, dtype, places, sequence, n_ids, slots, call_id,
            deadline_ns,
        ) = found  # fmt: skip
        return SlabCall(
            layer,
            n_tokens,
            hidden_size,
            top_k,
            _DTYPES[dtype],
            Places._make(places),
            sequence,
            n_ids,
            slots,
            call_id,
            deadline_ns,
        )

    def call_of(self, descriptor: Descriptor, view: View, most: int) -> SlabCall:
        """The call that it describes. InvalidCall, ProtocolError: as `descriptors.check`."""
        dtype = descriptors.check(descriptor, view.layers, most, self._data_bytes)
        known = self._known_of(descriptor, view)
        return SlabCall(
            descriptor.layer,
            descriptor.n_tokens,
            descriptor.hidden_size,
            descriptor.top_k,
            dtype,
            descriptor.places,
            descriptor.sequence,
            known.n_ids,
            known.slots,
            descriptor.call_id,
            descriptor.deadline_ns,
        )

    def forget_view(self, number: int) -> None:
        """The client releases it, and may use its number for another."""
        for known in self._known:
            for key in [key for key in known if key >> 32 == number]:
                del known[key]

    def wait_for_arrays(self, call: SlabCall, timeout_s: float) -> bool:
        """Until the engine's GPU has put them there; False at the timeout."""
        assert self._segment is not None
        at, timeout_ns = _flag(call.places.slot, GIVEN), int(timeout_s * 1e9)
        return wait_for_word(self._segment.memory, at, call.sequence, timeout_ns, self._spin_ns)

    def prepare(self, call: SlabCall) -> None:
        """Do what can be done before the call's arrays are there. InvalidCall: it cannot be.
        DeviceLost: the device will do none."""
        if self._slab is not None:
            self._hold_back(self._slab, call)
            self._slab.prepare(call)

    def _hold_back(self, slab: WorkerSlab, call: SlabCall) -> None:
        """Wait for the device if, with this call, it had more than a step of this session, or too
        many calls: what it was given comes before others' calls."""
        share = slab.share_of_step(call)
        if self._n_begun >= self._most_begun or (self._n_begun and self._steps_begun + share > 1):
            slab.wait()
            self._n_begun, self._steps_begun = 0, 0.0
        self._n_begun += 1
        self._steps_begun += share

    def compute(self, call: SlabCall, between_steps: BetweenSteps) -> None:
        """Compute the call in steps, or all but its last one, and begin that; the flag `done` tells
        of the end. InvalidCall: an id. What `between_steps` raises."""
        if self._slab is not None:
            self._slab.enqueue(call, between_steps)
            self._last = call
            return
        self._compute_on_host(call, between_steps)
        self._tell_done(call.places.slot, call.sequence)

    def check(self) -> None:
        """Where the device has taken long for what it was given, wait until it is done.

        DeviceLost: it never will be. A device that fails says so to nobody who does not ask.
        """
        last, self._last = self._last, None
        if last is None or self._slab is None or self._segment is None:
            return
        # A client that went on without it has set another.
        if load_word(self._segment.memory, _flag(last.places.slot, DONE)) != last.sequence:
            self._slab.wait()

    def tell_failed(self, slot: int, sequence: int) -> None:
        """Set the flags of a call that was not begun, whose error was sent."""
        assert self._segment is not None
        store_word(self._segment.memory, _flag(slot, REFUSED), TOLD)
        self._tell_done(slot, sequence)

    def _tell_done(self, slot: int, sequence: int) -> None:
        assert self._segment is not None
        store_word(self._segment.memory, _flag(slot, DONE), sequence)

    def wait_until_taken(self, is_gone: Callable[[], bool]) -> None:
        """Until the client's GPU has copied what is done out of device memory, which must not be
        freed under it; not for a client that is gone, nor for longer than 5 s."""
        if self._slab is None or not self._slab.handle or self._segment is None:
            return
        try:
            # What is on its way will be done.
            self._slab.wait()
        except DeviceError:
            return  # `close` tells of it
        deadline = time.monotonic() + _TAKEN_LIMIT_S
        memory = self._segment.memory
        for slot in range(SLOTS):
            done = load_word(memory, _flag(slot, DONE))
            while not wait_for_word(memory, _flag(slot, TAKEN), done, _TAKEN_SLICE_NS, 0):
                if is_gone() or time.monotonic() > deadline:
                    return

    def close(self) -> None:
        """Wait for what was begun, and let go of the memory; a second time does nothing."""
        slab, self._slab = self._slab, None
        if slab is not None:
            try:
                slab.close()
            except DeviceError as error:
                # A device that is lost has let go of it.
                _log.warning("a slab was not closed: %s", error)
        if self._segment is not None:
            self._segment.close()
        self._segment = None

    # --- making -------------------------------------------------------------------------------

    def _make_device(self, hello: Hello, data_bytes: int) -> tuple[SlabOffer, int]:
        backend = self._backend
        mine = backend.vendor if isinstance(backend, SlabUser) else backend.name
        if not isinstance(backend, SlabUser) or mine != hello.vendor:
            raise DeviceError(
                f"the worker computes on {mine!r}, the engine on {hello.vendor!r}; only GPUs of "
                "the same vendor open each other's memory"
            )
        segment, fd = Segment.create(0)
        with _closed_on_error(fd):
            self._slab = backend.open_slab(segment.memory, data_bytes)
        offer = SlabOffer("device", data_bytes, self._slab.handle, backend.bus_id)
        return self._made(segment, fd, offer)

    def _make_pinned(self, _hello: Hello, data_bytes: int) -> tuple[SlabOffer, int]:
        segment, fd = Segment.create(data_bytes)
        with _closed_on_error(fd):
            if isinstance(self._backend, SlabUser):
                try:
                    self._slab = self._backend.open_slab(segment.memory, 0)
                except DeviceError as error:
                    # Its words alone: the error's frames hold on to the memory.
                    self._why_host = [f"the host serves the slab for the device: {error}"]
                    _log.warning("%s", self._why_host[0])
        bus_id = self._backend.bus_id if isinstance(self._backend, SlabUser) else ""
        return self._made(segment, fd, SlabOffer("pinned", data_bytes, bus_id=bus_id))

    def _made(self, segment: Segment, fd: int, offer: SlabOffer) -> tuple[SlabOffer, int]:
        self._segment, self._data_bytes = segment, offer.data_bytes
        return offer, fd

    # --- calls --------------------------------------------------------------------------------

    def _known_of(self, descriptor: Descriptor, view: View) -> _Known:
        """Made once for each view, layer and id space."""
        known = self._known[descriptor.are_global]
        key = descriptor.view << 32 | descriptor.layer
        found = known.get(key)
        if found is None:
            if len(known) >= _MAX_KNOWN:
                # Views come and go; those in use are soon there again.
                known.clear()
            found = known[key] = _know(descriptor, view)
        return found

    def _compute_on_host(self, call: SlabCall, between_steps: BetweenSteps) -> None:
        ids = self._array(call.places.topk_ids, _INT32, call.n_tokens, call.top_k)
        # Copied before they are checked: the client could change them in between.
        slots = _slots(ids.copy(), call)
        shape = call.n_tokens, call.hidden_size
        self._ffn(
            call.layer,
            self._array(call.places.hidden_states, call.dtype.numpy, *shape),
            slots,
            self._array(call.places.topk_weights, _FLOAT32, call.n_tokens, call.top_k),
            self._array(call.places.out, call.dtype.numpy, *shape),
            between_steps,
        )

    def _array(self, offset: int, dtype: np.dtype[np.generic], rows: int, columns: int) -> Array:
        assert self._segment is not None
        found: Array = np.frombuffer(self._segment.data, dtype, rows * columns, offset)
        return found.reshape(rows, columns)


def _know(descriptor: Descriptor, view: View) -> _Known:
    info, table = view.layers[descriptor.layer], view.tables.get(descriptor.layer)
    if not descriptor.are_global or info.holds_all_experts:
        return _Known(info.hidden_size, info.top_k, len(info.experts), table)
    slots = np.full(info.num_experts + 1, -1, np.int32)
    held = np.arange(len(info.experts)) if table is None else table[:-1]
    slots[list(info.experts)] = held
    return _Known(info.hidden_size, info.top_k, info.num_experts, slots)


def _slots(ids: npt.NDArray[np.int32], call: SlabCall) -> npt.NDArray[np.int32]:
    """The backend's slots of these ids. InvalidCall names one that is not here."""
    _, wrong = inspect_ids(ids, call.n_ids)
    if wrong is not None:
        raise InvalidCall(
            f"expert id {wrong} of layer {call.layer}; ids are 0..{call.n_ids - 1}, and -1 for an "
            "empty slot"
        )
    if call.slots is None:
        return ids
    slots = call.slots[ids]
    missing = ids[(slots < 0) & (ids >= 0)]
    if missing.size:
        raise InvalidCall(
            f"expert {missing[0]} of layer {call.layer} is not on this worker; pass ids that the "
            "call's view lists"
        )
    return slots


def _flag(slot: int, which: int) -> int:
    return slot * SLOT_BYTES + which


@contextlib.contextmanager
def _closed_on_error(fd: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(fd)
        raise
