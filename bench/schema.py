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


class TraceSummary(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What `moeshm bench replay` played."""

    source: str
    shape: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    layers: int
    prompt: int
    completion: int
    chunk: int
    hot: float
    #: Shares of the (layer, token) pairs of the prompt, of its windows of four tokens, and of the
    #: pairs of the completion, that have a cold expert.
    cold_prompt_share: float
    cold_window_share: float
    cold_completion_share: float
    null_compute: bool
    scale: int
    #: Who computes the local part, and the worker: "cpu", "cuda:0"; and the experts' format.
    engine_device: str = "cpu"
    worker_device: str = "cpu"
    weight_dtype: str = "f32"


class Candidate(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the policy thought of one way to send a layer's call."""

    n_tokens: int
    transport: str
    wire_dtype: str
    slice_tokens: int
    #: By the cost model alone; and corrected by what was measured, which is what is compared.
    predicted_us: float
    expected_us: float
    measured_us: float | None
    n_measured: int
    is_chosen: bool
    why: str


class ReplayRow(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One mode, transport, dtype and speed of `moeshm bench replay`: medians over the repeats."""

    mode: str
    transport: str
    wire_dtype: str
    remote_speed: float
    calls: int | None = None
    prefill_calls: int | None = None
    rows: int | None = None
    payload_bytes: int | None = None
    prefill_s: float | None = None
    #: The spread: least and greatest of the repeats.
    prefill_min_s: float | None = None
    prefill_max_s: float | None = None
    #: Of the prefill, and of a token of the completion: its time over that of the best fixed way
    #: of this speed and dtype; the median of the repeats' ratios.
    ratio_to_best: float | None = None
    decode_ratio_to_best: float | None = None
    decode_tokens_per_s: float | None = None
    decode_min_tokens_per_s: float | None = None
    decode_max_tokens_per_s: float | None = None
    #: Sums over the repeats: each of them should be 0.
    fallback_calls: int | None = None
    losses: int | None = None
    transport_s: float | None = None
    exchange_s: float | None = None
    #: The cold part with nothing to hide behind: its calls, and the forwards around them.
    alone_s: float | None = None
    alone_forward_s: float | None = None
    #: What `auto` had chosen after the prefill and after the completion, once a repeat.
    prefill_choices: list[str] = []
    decode_choices: list[str] = []
    #: What `auto` thought of every way by then, in the first repeat.
    candidates: list[Candidate] = []
    repeats: int = 0
    error: str | None = None


class PipesRow(Timing, kw_only=True):
    """The three-pipe protocol with the calls of `batched`, f16, of the same trace."""

    contender: str
    calls: int
    payload_bytes: int
    reply_bytes: int
    total_s: float | None = None
    #: `total_s` over `alone_s`; the others are over what the local part left to wait for.
    alone_ratio: float | None = None
    exchange_ratio: float | None = None
    transport_ratio: float | None = None


class PublishedRow(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A row of the original's table."""

    mode: str
    wire_dtype: str
    calls: int
    payload_bytes: int
    prefill_s: float
    decode_tokens_per_s: float


class Reduction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """From `stream`, f32 to `batched`, f16, in per cent; negative is less."""

    source: str
    remote_speed: float | None
    calls_percent: float
    payload_percent: float
    prefill_percent: float


class ReplayReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The one object of `moeshm bench replay --json`."""

    meta: Meta
    trace: TraceSummary
    results: list[ReplayRow]
    contenders: list[PipesRow]
    published: list[PublishedRow]
    reductions: list[Reduction]


class Overlap(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How well the two parts of a forward run side by side; medians over its forwards."""

    n_tokens: int
    forward_us: float
    #: The same tokens without their cold experts, and without their hot ones.
    local_us: float
    remote_us: float
    #: `forward_us` over the longer of the two.
    overlap_ratio: float


class PolicyReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The one object of `moeshm bench policy --json`."""

    meta: Meta
    trace: TraceSummary
    remote_speed: float
    results: list[Candidate]
    overlaps: list[Overlap]


class GpuInfo(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A device that computes, and what limits of `moeshm bench kernels` are taken from."""

    name: str
    arch: str
    multiprocessors: int
    total_bytes: int
    l2_bytes: int
    versions: dict[str, str | None]
    #: A large copy within the device's memory, bytes read and bytes written.
    copy_gb_per_s: float
    limit_gb_per_s: float
    #: By format of the weights; empty where no datasheet says.
    limit_tflops: dict[str, float]
    limit_source: str


class KernelRow(Timing, kw_only=True):
    """One contender, shape, format and number of tokens of `moeshm bench kernels`."""

    contender: str
    shape: str
    dtype: str
    n_tokens: int
    #: Experts that a call uses, mean over the calls.
    distinct_experts: float | None = None
    limit_us: float | None = None
    limit_reason: str | None = None
    limit_percent: float | None = None
    gb_per_s: float | None = None
    tflops: float | None = None
    goal_us: float | None = None
    #: `p50_us` over those of the peers in this run; below 1 is faster.
    grouped_ratio: float | None = None
    triton_ratio: float | None = None
    relative_error: float | None = None
    is_repeatable: bool | None = None
    call_us: float | None = None
    first_call_us: float | None = None
    rested_call_us: float | None = None
    enqueue_us: float | None = None
    plan: str | None = None


class KernelReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The one object of `moeshm bench kernels --json`."""

    meta: Meta
    gpu: GpuInfo
    results: list[KernelRow]


class CopyRow(Timing, kw_only=True):
    """One contender, direction and size of `moeshm bench copies`: a copy's time."""

    contender: str
    direction: str
    size_bytes: int
    gb_per_s: float | None = None
    #: Its bandwidth over that of pinned memory in this run; 1 is as fast.
    pinned_ratio: float | None = None


class CopyReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The one object of `moeshm bench copies --json`."""

    meta: Meta
    #: As its driver calls it.
    device: str
    results: list[CopyRow]


class DeviceCallRow(Timing, kw_only=True):
    """One way and number of tokens of `moeshm bench device-calls`: of `client.compute`."""

    way: str
    shape: str
    dtype: str
    n_tokens: int
    #: The host's time of `client.submit`, without waiting for the result.
    submit_us: float | None = None
    #: The time of a `client.submit` on the engine's stream, until the output is there, by the GPU's
    #: clock; null for arrays of the host's.
    stream_us: float | None = None
    #: What the worker's kernels take by themselves, and what a call takes beside that.
    kernels_us: float | None = None
    overhead_us: float | None = None
    #: The time of the bare copies over `overhead_us`; 1 is a call that costs no more than these.
    copy_ratio: float | None = None


class DeviceCallReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The one object of `moeshm bench device-calls --json`."""

    meta: Meta
    engine_device: str
    worker_device: str
    engine_gpu: GpuInfo
    worker_gpu: GpuInfo
    floors: list[Floor]
    results: list[DeviceCallRow]
    #: The worker had a resident kernel for calls of few tokens.
    is_resident: bool = False


class OverloadRow(Timing, kw_only=True):
    """Clients of one kind in one phase of `moeshm bench overload`: a call's time at its client."""

    #: "decode" or "prefill".
    kind: str
    #: "alone", "alone-no-steps", "steps" or "no-steps".
    phase: str
    clients: int
    n_tokens: int
    max_us: float | None = None
    tokens_per_s: float | None = None
    #: Calls that ended with DeadlineExceeded, and sessions that were opened anew.
    missed: int = 0
    reconnects: int = 0
    #: Of the calls that ended after their deadline, by how much; null where none did.
    late_p99_us: float | None = None
    late_max_us: float | None = None
    #: By how much plain sleeps of these clients, between their calls, ended late.
    sleep_late_p99_us: float | None = None
    sleep_late_max_us: float | None = None


class OverloadReport(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The one object of `moeshm bench overload --json`."""

    meta: Meta
    device: str
    shape: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    weight_dtype: str
    deadline_ms: float
    results: list[OverloadRow]
