"""What one forward is given, and the sum that it gives back, in the host's memory."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from .. import arrays
from ..arrays import Inputs
from ..backends import Backend, Ids
from ..call import CallFuture
from ..client import ExpertClient
from ..dtypes import DType, FloatArray
from ..errors import WorkerDied
from ..held import HeldView
from ..policy import Choice
from ..stats import CallTimes


class WayLost(WorkerDied):
    """One way to a worker cannot be taken; others may do."""


class Pending(Protocol):
    """A worker's part on its way."""

    #: What it took, once it was taken.
    times: CallTimes | None


class Activations(Protocol):
    """One forward's arrays, wherever they are, and the sum of its parts. One thread's."""

    #: The model's, checked, int32 [n_tokens, top_k] in the host's memory.
    topk_ids: Ids
    dtype: DType
    #: Whether they are on the engine's GPU.
    on_gpu: bool

    def inputs(self) -> Inputs:
        """All of it in the host's memory, where it is brought by the first who asks."""
        ...

    def submit(
        self,
        client: ExpertClient,
        layer: int,
        local_ids: Ids,
        choice: Choice,
        view: HeldView,
        timeout_s: float | None,
    ) -> Pending:
        """Send the rows that have an id; as `ExpertClient.submit`, and WayLost."""
        ...

    def take(self, pending: Pending) -> None:
        """Wait for a worker's part, and add it. WorkerDied, DeadlineExceeded: nothing was added."""
        ...

    def run(self, backend: Backend, layer: int, local_ids: Ids) -> None:
        """Let a backend of this process compute these ids of its own, and add it."""
        ...

    def add(self, part: FloatArray) -> None:
        """Add what was computed in this process, [n_tokens, hidden_size]; it is kept."""
        ...

    def result(self) -> Any:
        """The sum, like hidden_states."""
        ...

    def close(self) -> None:
        """Let go of what it used beside the caller's arrays."""
        ...


class HostActivations:
    """`Activations` in the host's memory."""

    on_gpu = False

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self.topk_ids = inputs.topk_ids
        self.dtype = inputs.dtype
        self._total: FloatArray | None = None

    def inputs(self) -> Inputs:
        """As `Activations.inputs`."""
        return self._inputs

    def submit(
        self,
        client: ExpertClient,
        layer: int,
        local_ids: Ids,
        choice: Choice,
        view: HeldView,
        timeout_s: float | None,
    ) -> Pending:
        """As `Activations.submit`."""
        return submit_rows(client, layer, self._inputs, local_ids, choice, view, timeout_s)

    def take(self, pending: Any) -> None:
        """As `Activations.take`; what `submit` gave adds its rows where they lie."""
        pending.add_to(self._sum())

    def run(self, backend: Backend, layer: int, local_ids: Ids) -> None:
        """As `Activations.run`."""
        self.add(compute(backend, layer, self._inputs, local_ids))

    def add(self, part: FloatArray) -> None:
        """As `Activations.add`."""
        if self._total is None:
            self._total = part
        else:
            self._total += part

    def result(self) -> Any:
        """As `Activations.result`."""
        return arrays.as_output(self._sum(), self._inputs)

    def close(self) -> None:
        """As `Activations.close`: nothing."""

    def _sum(self) -> FloatArray:
        if self._total is None:
            self._total = np.zeros(self._inputs.hidden_states.shape, np.float32)
        return self._total


def submit_rows(
    client: ExpertClient,
    layer: int,
    inputs: Inputs,
    local_ids: Ids,
    choice: Choice,
    view: HeldView,
    timeout_s: float | None,
) -> CallFuture:
    """Send rows that are in the host's memory, as the policy chose."""
    return client.submit(
        layer,
        inputs.hidden_states,
        local_ids,
        inputs.topk_weights,
        timeout_s=timeout_s,
        wire_dtype=choice.wire_dtype,
        slice_tokens=choice.slice_tokens,
        view=view,
    )


def compute(backend: Backend, layer: int, inputs: Inputs, local_ids: Ids) -> FloatArray:
    """What a backend computes of these ids instead of the inputs'."""
    result = np.empty(inputs.hidden_states.shape, np.float32)
    backend.ffn(layer, inputs.hidden_states, local_ids, inputs.topk_weights, result)
    return result
