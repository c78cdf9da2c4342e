"""The policy's settings, what it is told, and which candidates the settings leave it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

from ..dtypes import DType
from ..errors import SettingError
from ..settings import (
    MAX_BATCH_CAPACITY,
    MODES,
    TRANSPORTS,
    WIRE_DTYPES,
    Settings,
    check_choice,
    check_range,
)

#: Tokens of a slice in mode "stream".
STREAM_SLICE_TOKENS = 4
#: Slices that mode "auto" considers beside the whole capacity. Powers of 4, like the buckets: all
#: work of a bucket has the same candidates.
SLICES = (STREAM_SLICE_TOKENS, 16, 64, 256)
#: Ways through a slab, for rows on the engine's GPU, which travel as they are: through pinned
#: memory of the host, and through that of the worker's GPU.
SLABS = ("pinned", "device")
#: By setting, the ways that it allows; `auto` allows all.
_ALLOWED = {"shared": ("shared", "pinned"), "stream": ("stream",), "device": ("device",)}
#: Largest relative error of rounding to the nearest bfloat16, which has 8 significant bits.
BF16_ROUNDING = 2.0**-8


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How a layer's tokens travel, as far as the user has said: fields as MOESHM_* settings.

    SettingError names a value that is not allowed.
    """

    mode: str = "auto"
    transport: str = "auto"
    wire_dtype: str = "auto"
    batch_capacity: int = 1024
    #: Relative rounding error of activations that wire dtype "auto" may add.
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)
        check_choice("transport", self.transport, TRANSPORTS)
        check_choice("wire_dtype", self.wire_dtype, WIRE_DTYPES)
        check_range("batch_capacity", self.batch_capacity, 1, MAX_BATCH_CAPACITY)
        check_range("tolerance", self.tolerance, 0, 1)

    @classmethod
    def from_settings(cls, settings: Settings) -> Policy:
        """What the MOESHM_* variables say."""
        return cls(**{name: getattr(settings, name) for name in cls.__struct_fields__})


class Shape(NamedTuple):
    """A layer on a worker, as far as it decides costs: equal shapes share what is learnt."""

    hidden_size: int
    intermediate_size: int


class Path(NamedTuple):
    """One way to a worker."""

    #: "shared", "stream", or one of SLABS.
    transport: str
    #: Most tokens in one message.
    max_tokens: int
    #: Bytes that may be on their way to the worker before the sender blocks.
    buffer_bytes: int


class Work(NamedTuple):
    """One worker's part of one forward, or the mean of several."""

    #: Of the whole forward.
    n_tokens: int
    #: Tokens with an expert on this worker, (token, expert) pairs, and distinct experts.
    rows: float
    slots: float
    experts: float
    top_k: int
    #: Of the engine's activations.
    dtype: DType
    #: Expected time of what the engine does meanwhile.
    local_ns: float
    #: Whether the activations are on the engine's GPU, from where other ways than SLABS bring them.
    on_gpu: bool = False


class Choice(NamedTuple):
    """How the rows travel.

    The tokens are cut at multiples of `slice_tokens`; what has no row in it is not sent.
    """

    transport: str
    wire_dtype: DType
    slice_tokens: int


class Times(NamedTuple):
    """One worker's part of one forward as it was measured."""

    messages: int
    pack_ns: int
    wait_ns: int
    unpack_ns: int
    #: The worker's own time in its backend, over all messages; None where it does not tell.
    compute_ns: int | None
    #: From the start of sending until the result was there.
    elapsed_ns: int

    @property
    def busy_ns(self) -> int:
        """What the engine did meanwhile: the local part, other workers' parts."""
        return max(0, self.elapsed_ns - self.pack_ns - self.wait_ns - self.unpack_ns)


class Verdict(NamedTuple):
    """One candidate, as `Chooser.explain` shows it; all times are of one forward."""

    transport: str
    wire_dtype: DType
    slice_tokens: int
    #: By the cost model alone.
    predicted_ns: float
    #: What is compared: the prediction, corrected by what was measured, and the cost of losses.
    expected_ns: float
    #: Decayed mean of the forwards that went this way; None before the first.
    measured_ns: float | None
    n_measured: int
    is_chosen: bool
    why: str


def usable_paths(policy: Policy, paths: Mapping[str, Path]) -> list[Path]:
    """Those that the policy allows; SettingError: there is none."""
    found = [path for path in paths.values() if may_take(policy.transport, path.transport)]
    if not found:
        offered = ", ".join(sorted(paths)) or "none"
        raise SettingError(
            f"transport={policy.transport!r}, but this worker offers {offered}; "
            "choose one of these, or auto"
        )
    return found


def may_take(setting: str, transport: str) -> bool:
    """Whether a transport's setting leaves this way open."""
    return setting == "auto" or transport in _ALLOWED[setting]


def candidates(
    policy: Policy, paths: Sequence[Path], dtype: DType, n_tokens: int, on_gpu: bool = False
) -> list[Choice]:
    """Every way that the settings leave open for activations of this dtype; SettingError: none."""
    found = [
        Choice(path.transport, wire_dtype, slice_tokens)
        for path in paths_for(paths, on_gpu)
        for wire_dtype in wire_dtypes(policy, path, dtype)
        for slice_tokens in slices(policy, path, n_tokens)
    ]
    if not found:
        where = "on the engine's GPU" if on_gpu else "in the host's memory"
        raise SettingError(
            f"transport={policy.transport!r}, wire_dtype={policy.wire_dtype!r} and rows of {dtype} "
            f"{where}: no way carries them so; choose auto"
        )
    return found


def paths_for(paths: Sequence[Path], on_gpu: bool) -> list[Path]:
    """Those that rows can take which are there."""
    return [path for path in paths if on_gpu or path.transport not in SLABS]


def slices(policy: Policy, path: Path, n_tokens: int) -> list[int]:
    """The slices to consider; those that hold all tokens are one and the same."""
    capacity = min(policy.batch_capacity, path.max_tokens)
    if policy.mode == "stream":
        return [min(STREAM_SLICE_TOKENS, capacity)]
    if policy.mode == "batched":
        return [capacity]
    if path.transport in SLABS:
        # Parts of a call follow each other on its stream: none is sent while another is computed.
        return [capacity]
    return [*(each for each in SLICES if each < min(n_tokens, capacity)), capacity]


def wire_dtypes(policy: Policy, path: Path, dtype: DType) -> list[DType]:
    """The formats to consider for activations of this one; a slab takes no other."""
    if path.transport in SLABS:
        return [dtype] if policy.wire_dtype in ("auto", str(dtype)) else []
    if policy.wire_dtype != "auto":
        return [DType.parse(policy.wire_dtype)]
    # Never f16 for f32: it rounds less than bf16, but beyond 65504 it makes infinities, which no
    # relative tolerance covers. A 16-bit engine gains no bytes from another format.
    if dtype is DType.F32 and policy.tolerance >= BF16_ROUNDING:
        return [dtype, DType.BF16]
    return [dtype]


def bucket_of(count: float) -> int:
    """0 for 1, 1 for 2..4, 2 for 5..16, 3 for 17..64: a bucket ends at each power of 4."""
    return ((max(int(count), 1) - 1).bit_length() + 1) >> 1
