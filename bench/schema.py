"""What `moeshm bench … --json` prints; docs/benchmarks.md explains every field."""

from __future__ import annotations

import msgspec


class Meta(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Where, when and how a report was measured."""

    benchmark: str
    date: str
    machine: str
    cpu: str
    cpus_usable: int
    kernel: str
    versions: dict[str, str | None]
    seed: int
    repeats: int
    seconds_per_cell: float
    messages_per_cell: int | None
    client_cpu: int
    server_cpu: int
    load_average_before: float
    notes: list[str]


class Timing(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The figures of one cell over all repeats; all of them null when every repeat failed."""

    #: Median over the repeats of each repeat's median, and of each repeat's 99th percentile.
    p50_us: float | None = None
    p99_us: float | None = None
    #: The spread: least and greatest of the repeats' medians.
    p50_min_us: float | None = None
    p50_max_us: float | None = None
    #: Messages timed, over all repeats.
    n: int = 0
    repeats: int = 0
    error: str | None = None


class Floor(Timing, kw_only=True):
    """What the machine allows at best, measured in the same run."""

    floor: str
    size_bytes: int
    gb_per_s: float | None = None


class RingRow(Timing, kw_only=True):
    """One contender, mode and size of `moeshm bench ring`."""

    contender: str
    mode: str
    size_bytes: int
    gb_per_s: float | None = None
    messages_per_s: float | None = None
    floor_ratio: float | None = None
    memcpy_ratio: float | None = None


class CallRow(Timing, kw_only=True):
    """One contender, mode and number of tokens of `moeshm bench call`."""

    contender: str
    mode: str
    dtype: str
    n_tokens: int | None = None
    request_bytes: int | None = None
    reply_bytes: int | None = None
    gb_per_s: float | None = None
    three_pipes_ratio: float | None = None
    floor_ratio: float | None = None
    idle_worker_cpu_percent: float | None = None


class RingReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The one object of `moeshm bench ring --json`."""

    meta: Meta
    floors: list[Floor]
    results: list[RingRow]


class CallReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The one object of `moeshm bench call --json`."""

    meta: Meta
    floors: list[Floor]
    results: list[CallRow]
