"""What a forward costs: the engine's and one worker's timelines side by side."""

from __future__ import annotations

from collections.abc import Sequence

from ..dtypes import DType
from .fit import LinearCost
from .rules import SLABS, Choice, Path, Shape, Times, Work, bucket_of

#: An id and a weight for each slot of a row, beside its activations.
_SLOT_BYTES = 8
#: A shorter wait is a look at replies that were there already.
_WAIT_MIN_NS = 2000
_WAIT_MIN_SHARE = 0.02


class _TransportPrior:
    """Rough costs before the first measurement: only orders of magnitude, and who is cheaper."""

    def __init__(self, message_ns: float, kib_ns: float, latency_ns: float) -> None:
        self.message_ns = message_ns
        self.kib_ns = kib_ns
        self.latency_ns = latency_ns


_PRIORS = {
    "shared": _TransportPrior(message_ns=5e3, kib_ns=100, latency_ns=2e4),
    "stream": _TransportPrior(message_ns=1.5e4, kib_ns=300, latency_ns=4e4),
    # What the engine enqueues: the rows are copied while it waits.
    "pinned": _TransportPrior(message_ns=5e4, kib_ns=1, latency_ns=0),
    "device": _TransportPrior(message_ns=5e4, kib_ns=1, latency_ns=0),
}
#: To bring a forward's rows from the engine's GPU, or there, beside what their bytes take.
_BRING_NS = 2e4
#: To convert one element to another dtype, there or back.
_CONVERT_NS = 1.0
#: Of a backend: a call, and its arithmetic and weight traffic.
_CALL_NS = 2e4
_MULTIPLY_ADDS_PER_NS = 5.0
_WEIGHT_BYTES_PER_NS = 5.0
#: Of a worker whose slabs are used: a call, and how many times as fast it is. Between what a GPU
#: takes and a CPU: cells correct proportions that are too large, but not those far too small.
_SLAB_CALL_NS = 3e5
_SLAB_SPEED = 60.0


def count_messages(n_tokens: float, rows: float, slice_tokens: int) -> float:
    """Slices that hold at least one of the rows, on average if these lie anywhere."""
    n_slices = -(-n_tokens // slice_tokens)
    if n_slices <= 1 or rows >= n_tokens:
        return max(1, n_slices)
    missed = (1 - rows / n_tokens) ** (n_tokens / n_slices)
    return float(max(1.0, n_slices * (1 - missed)))


def distinct_per_message(slots: float, experts: float, messages: float) -> float:
    """Distinct experts in one of several equal messages that together use `experts`.

    An expert that is used k times is missed by a message with probability (1 - 1/messages)^k
    (random placement: Coleman, Mathematical Biosciences 54, 1981), with k = slots / experts for
    all. Exact for one message.
    """
    if messages <= 1:
        return experts
    return float(experts * (1 - (1 - 1 / messages) ** (slots / experts)))


def forward_ns(
    messages: float,
    pack_ns: float,
    worker_ns: float,
    unpack_ns: float,
    latency_ns: float,
    busy_ns: float,
    buffered: float,
) -> float:
    """Time of a forward whose messages are computed while later ones are packed.

    `pack_ns`, `worker_ns`, `unpack_ns`: of all messages together. `buffered`: messages that may
    be on their way before the sender blocks.

        engine   pack pack pack | busy ............ | wait | unpack unpack unpack
        worker        work.. work.. work..

    The worker ends after the first message and its own work, or one piece of work after the last
    message left, whichever is later. The engine ends after its own work and all unpacking, or,
    where it has to wait, one unpacking after the last reply: it unpacks earlier ones meanwhile.
    """
    first_ns = pack_ns / messages
    one_ns = worker_ns / messages
    sent_ns = pack_ns
    # A message beyond the buffer leaves only when the worker has finished enough of those before.
    n_awaited = messages - max(1.0, buffered)
    if n_awaited > 0:
        sent_ns = max(sent_ns, first_ns + n_awaited * one_ns)
    arrived_ns = max(first_ns + worker_ns, sent_ns + one_ns) + latency_ns
    return max(sent_ns + busy_ns + unpack_ns, arrived_ns + unpack_ns / messages)


class _Way:
    """Costs of one transport, wire dtype, dtype of the engine, its place, and hidden size."""

    def __init__(
        self, transport: str, wire_dtype: DType, dtype: DType, on_gpu: bool, hidden_size: int
    ) -> None:
        prior = _PRIORS.get(transport, _PRIORS["stream"])
        row_ns = prior.kib_ns * hidden_size * wire_dtype.itemsize / 1024
        if wire_dtype is not dtype:
            row_ns += _CONVERT_NS * hidden_size
        message_ns = prior.message_ns
        is_slab = transport in SLABS
        if on_gpu and not is_slab:
            message_ns += _BRING_NS
        #: Of (messages, rows).
        self.pack = LinearCost((message_ns, row_ns))
        self.unpack = LinearCost((message_ns, row_ns))
        #: Of (1, messages in sequence): what nothing else explains, such as waking up and the
        #: worker's own work on a message. Through a slab it is part of the worker's cost.
        self.latency = LinearCost((prior.latency_ns, 0.0 if is_slab else prior.message_ns))


class CostModel:
    """What is known of one worker: the costs of its ways, and of its layers' shapes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = {path.transport: path for path in paths}
        self._ways: dict[tuple[str, DType, DType, bool, int], _Way] = {}
        #: Of (messages, slots, distinct experts summed over messages). Of each kind of slab by
        #: itself, as nobody tells it from the latency there; "" for all other ways.
        self._compute: dict[tuple[Shape, str], LinearCost] = {}

    def predict_ns(self, shape: Shape, work: Work, choice: Choice, busy_ns: float) -> float:
        """The time of a forward that goes this way while the engine is busy for so long."""
        way = self._way(shape, work, choice)
        rows, slots = work.rows, work.slots
        messages = count_messages(work.n_tokens, rows, choice.slice_tokens)
        experts = messages * distinct_per_message(slots, work.experts, messages)
        wake_ns, handle_ns = way.latency.coefficients
        return forward_ns(
            messages,
            way.pack.predict((messages, rows)),
            self._compute_of(shape, choice.transport).predict((messages, slots, experts))
            + handle_ns * messages,
            way.unpack.predict((messages, rows)),
            wake_ns,
            busy_ns,
            self._buffered(shape, work, choice, messages),
        )

    def learn(self, shape: Shape, work: Work, choice: Choice, times: Times) -> None:
        """Refine the costs with one measured forward."""
        messages, rows, slots = times.messages, work.rows, work.slots
        if not messages:
            return
        way = self._way(shape, work, choice)
        bucket = bucket_of(messages)
        kind = bucket, bucket_of(rows / messages)
        # A sender that blocked has measured the worker.
        if messages <= max(1.0, self._buffered(shape, work, choice, messages)):
            way.pack.observe(kind, (messages, rows), times.pack_ns)
        way.unpack.observe(kind, (messages, rows), times.unpack_ns)
        experts = messages * distinct_per_message(slots, work.experts, messages)
        has_waited = times.wait_ns > max(_WAIT_MIN_NS, _WAIT_MIN_SHARE * times.elapsed_ns)
        compute_ns = times.compute_ns
        if compute_ns is None and has_waited:
            compute_ns = times.elapsed_ns - times.pack_ns - times.unpack_ns
        elif compute_ns is not None and has_waited:
            _learn_latency(way.latency, kind, times, compute_ns)
        if compute_ns is not None:
            self._learning_compute_of(shape, choice.transport).observe(
                (bucket, bucket_of(slots / messages)), (messages, slots, experts), compute_ns
            )

    def _way(self, shape: Shape, work: Work, choice: Choice) -> _Way:
        key = (choice.transport, choice.wire_dtype, work.dtype, work.on_gpu, shape.hidden_size)
        found = self._ways.get(key)
        if found is None:
            found = self._ways[key] = _Way(*key)
        return found

    def _compute_of(self, shape: Shape, transport: str) -> LinearCost:
        """What is known of the worker, if need be by another way."""
        own = _compute_key(shape, transport)
        for key in (own, *((shape, each) for each in ("", *SLABS))):
            if key in self._compute:
                return self._compute[key]
        return LinearCost(_compute_prior(shape, ""))  # nothing was measured

    def _learning_compute_of(self, shape: Shape, transport: str) -> LinearCost:
        key = _compute_key(shape, transport)
        found = self._compute.get(key)
        if found is None:
            found = self._compute[key] = LinearCost(_compute_prior(*key))
        return found

    def _buffered(self, shape: Shape, work: Work, choice: Choice, messages: float) -> float:
        """How many messages fit on their way."""
        row_bytes = shape.hidden_size * choice.wire_dtype.itemsize + work.top_k * _SLOT_BYTES
        return self._paths[choice.transport].buffer_bytes * messages / (row_bytes * work.rows)


def _compute_key(shape: Shape, transport: str) -> tuple[Shape, str]:
    return shape, transport if transport in SLABS else ""


def _compute_prior(shape: Shape, slab: str) -> tuple[float, float, float]:
    slot_ns, expert_ns = _expert_priors(shape)
    if slab:
        return _SLAB_CALL_NS, slot_ns / _SLAB_SPEED, expert_ns / _SLAB_SPEED
    return _CALL_NS, slot_ns, expert_ns


def _learn_latency(
    latency: LinearCost, kind: tuple[int, int], times: Times, compute_ns: int
) -> None:
    """What is left of the time of a forward that waited for its worker; see `forward_ns`."""
    messages = times.messages
    until_arrived_ns = times.elapsed_ns - times.unpack_ns / messages
    worker_bound_ns = times.pack_ns / messages + compute_ns
    engine_bound_ns = times.pack_ns + compute_ns / messages
    n_in_sequence = messages if worker_bound_ns >= engine_bound_ns else 1
    rest_ns = until_arrived_ns - max(worker_bound_ns, engine_bound_ns)
    latency.observe(kind, (1, n_in_sequence), rest_ns, scale=times.elapsed_ns)


def _expert_priors(shape: Shape) -> tuple[float, float]:
    """A slot's arithmetic and an expert's float32 weights."""
    n_weights = 3 * shape.hidden_size * shape.intermediate_size
    return n_weights / _MULTIPLY_ADDS_PER_NS, 4 * n_weights / _WEIGHT_BYTES_PER_NS


class LocalCost:
    """Time of the experts that the engine computes itself, by their layer's shape.

    Not for several threads without a lock.
    """

    def __init__(self) -> None:
        #: Of (1, slots, distinct experts).
        self._costs: dict[Shape, LinearCost] = {}

    def observe(self, shape: Shape, slots: float, experts: float, ns: float) -> None:
        """Learn one measured local part."""
        if slots:
            self._cost_of(shape).observe(bucket_of(slots), (1, slots, experts), ns)

    def predict(self, shape: Shape, slots: float, experts: float) -> float:
        """The expected time in ns; 0 without a slot."""
        return self._cost_of(shape).predict((1, slots, experts)) if slots else 0.0

    def _cost_of(self, shape: Shape) -> LinearCost:
        found = self._costs.get(shape)
        if found is None:
            found = self._costs[shape] = LinearCost((_CALL_NS, *_expert_priors(shape)))
        return found
