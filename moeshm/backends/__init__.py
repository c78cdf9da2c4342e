"""What computes experts: reference (float64 oracle), cpu, gpu, null (for benchmarks).

Every backend is a `Backend`; the serve loop, the fallback and the tests know nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import msgspec
import numpy as np
import numpy.typing as npt

from ..dtypes import DType
from ..layers import LayerInfo
from ..transport.slab import Places

if TYPE_CHECKING:
    from ..checkpoint.layer import ExpertLayer

Ids = npt.NDArray[np.int32]
Weights = npt.NDArray[np.float32]


class Backend(Protocol):
    """Computes the routed experts of the layers it holds."""

    #: Short name for logs, stats and the handshake: "cpu", "gpu", "reference", "null".
    name: str
    #: Layer number to what is held of it.
    layers: Mapping[int, LayerInfo]

    def ffn(
        self,
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
    ) -> None:
        """Write the weighted sum of the selected experts' outputs into `out`.

        `hidden_states` and `out`: [n_tokens, hidden_size], float32, float16 or bfloat16 as
        uint16, each in its own format. `topk_ids`: [n_tokens, top_k] int32 *local* ids, -1 for
        an empty slot, already checked to be in range. `topk_weights`: [n_tokens, top_k]
        float32. Every element of `out` is written; a row without an expert becomes zeros. The
        arrays may be shared memory: none of them may be referred to afterwards.
        """
        ...


class BetweenSteps(Protocol):
    """What a call that takes long is interrupted by."""

    def is_due(self) -> bool:
        """Whether somebody waits, or the call is of no more use; asks the kernel."""
        ...

    def __call__(self) -> None:
        """Let others compute, by this backend, too; returns when it is this call's turn again.

        Whatever it raises is the end of the call, which `ffn_in_steps` lets pass: another call may
        be computed then.
        """
        ...


@runtime_checkable
class SteppingBackend(Backend, Protocol):
    """A backend whose long calls can be interrupted."""

    def ffn_in_steps(
        self,
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
        between_steps: BetweenSteps,
    ) -> None:
        """As `ffn`, of the same bits; calls `between_steps` on this thread where it is due.

        How long a step is at most is in docs/overload.md. Nothing is in use meanwhile that another
        call needs, such as threads or a workspace.
        """
        ...


def in_steps(backend: Backend) -> Callable[..., None]:
    """Its `ffn_in_steps`; of one that has none, `ffn` with that's arguments, which never pauses."""
    if isinstance(backend, SteppingBackend):
        return backend.ffn_in_steps

    def at_once(
        layer: int,
        hidden_states: npt.NDArray[Any],
        topk_ids: Ids,
        topk_weights: Weights,
        out: npt.NDArray[Any],
        _: BetweenSteps,
    ) -> None:
        backend.ffn(layer, hidden_states, topk_ids, topk_weights, out)

    return at_once


class UsedMemory(Protocol):
    """Memory that a backend was given to use."""

    #: Of it, what the backend's device copies from and to by itself: all of it, or less.
    direct_bytes: int

    def close(self) -> None:
        """Take it back; a second time does nothing. No call may use it meanwhile or afterwards."""
        ...


@runtime_checkable
class MemoryUser(Backend, Protocol):
    """A backend that computes faster when it knows beforehand where arrays of calls will lie."""

    def use_memory(self, memory: memoryview) -> UsedMemory:
        """Prepare for arrays that lie in this memory, whole pages which are mapped for good.

        It is read-only where it is mapped so, and may be two halves that are the same pages. Any
        thread may call it. Arrays in memory that cannot be prepared are taken like any others.
        The view is kept until `close`.
        """
        ...


class SlabCall(msgspec.Struct, frozen=True, gc=False):
    """A call whose arrays lie in a slab (transport/slab.py), checked but for what is in them.

    At `places`: hidden_states [n_tokens, hidden_size] in `dtype`, topk_ids int32 and topk_weights
    float32 [n_tokens, top_k], and `out` like hidden_states, to be written.
    """

    layer: int
    n_tokens: int
    hidden_size: int
    top_k: int
    dtype: DType
    places: Places
    #: Of its flags.
    sequence: int
    #: Ids are -1 for an empty slot or below it; others count as -1, and are told of in the flags.
    n_ids: int
    #: Id to the backend's slot, int32 [n_ids + 1], where -1 stands for none and is also in the last
    #: place; None for ids that are slots. It stays as it is.
    slots: npt.NDArray[np.int32] | None
    call_id: int = 0
    #: Of CLOCK_MONOTONIC in ns; 0 or less for none.
    deadline_ns: int = 0


class WorkerSlab(Protocol):
    """A slab that a backend computes in, by the device's own order. One thread at a time."""

    #: What the engine opens its data by, if that is device memory; else empty.
    handle: bytes

    def share_of_step(self, call: SlabCall) -> float:
        """How much of a step's work (docs/overload.md) the call is: 1 for all of it, more for a
        call that is computed in several."""
        ...

    def prepare(self, call: SlabCall) -> None:
        """Do what can be done before the call's arrays are there; the same thread enqueues it next,
        or never. InvalidCall, as by `enqueue`."""
        ...

    def enqueue(self, call: SlabCall, between_steps: BetweenSteps) -> None:
        """Begin the call, whose arrays are in the slab, after those that were begun before.

        The flag `done` is set once the output is there, and before it `refused`, if an id is
        wrong. InvalidCall: nothing was begun.

        Of a call of several steps all but the last are waited for, and `between_steps` is called on
        this thread where it is due, as by `ffn_in_steps`. After what it raises nothing of the call
        is on its way, and the flag `done` is not set.
        """
        ...

    def wait(self) -> None:
        """Until every call that was begun is done. DeviceLost: they never will be."""
        ...

    def close(self) -> None:
        """Wait for the calls that were begun, and let go of it; a second time does nothing."""
        ...


@runtime_checkable
class SlabUser(Backend, Protocol):
    """A backend whose device takes calls from slabs by itself."""

    #: What its device memory can be opened by: "cuda" or "hip".
    vendor: str
    #: Where on the host's PCI bus the device is, like "0000:1b:00.0"; empty if that is not known.
    bus_id: str

    def open_slab(self, memory: memoryview, device_bytes: int) -> WorkerSlab:
        """Use a slab. `memory`: its segment's, whole pages which are mapped for good. Its data is
        the rest of that, or, if `device_bytes` is not 0, so much device memory, made here.

        DeviceError: the device cannot, or has no room; nothing is left then.
        """
        ...


@runtime_checkable
class GrowingBackend(Backend, Protocol):
    """A backend whose experts come and go while it computes.

    Each is in a slot of its layer, and `ffn` takes slots for local ids. What it was made with,
    `layers`, is in the slots of its local ids; `add` and `remove` leave `layers` as it is. Any
    thread may add or remove, several at a time, while others compute, which do not use the slots
    concerned. `remove` is called by threads that serve: it must not wait for a layer's weights.
    """

    def add(self, layer: int, experts: ExpertLayer) -> list[int]:
        """Take in these experts, of a layer that is known or new; the slot of each.

        Where it fails, as for want of memory, nothing has changed.
        """
        ...

    def remove(self, layer: int, slots: Sequence[int]) -> None:
        """Forget the experts in these slots, and free what memory is theirs alone: weights that
        are mapped from a file stay in the page cache, which the kernel empties when it needs to."""
        ...
