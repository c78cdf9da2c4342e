"""What a call of arrays on the engine's GPU asks of the driver, traced: nothing that waits."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from moeshm.backends.gpu.mover import Mover
from moeshm.device_arrays import DeviceInputs
from moeshm.dtypes import DType
from moeshm.transport.slab import Places, Segment

from .fake_cupy import H100, FakeCupy, opened

OWN, ANOTHER = "0000:1a:00.0", "0000:1b:00.0"
HIDDEN_SIZE = 2048
LAUNCH, WAIT = "cuLaunchKernel", "cuStreamWaitValue32_v2"
AT = Places(3, 0, 4 << 20, 5 << 20, 6 << 20)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    made, _ = opened(monkeypatch, H100, "cuda:0")
    made.bus_id = OWN
    return made


@pytest.fixture
def segment() -> Iterator[Segment]:
    made, fd = Segment.create(16 << 20)
    os.close(fd)
    yield made
    made.close()


def inputs(n_tokens: int) -> DeviceInputs:
    return DeviceInputs(
        hidden_states=1 << 40,
        topk_ids=2 << 40,
        topk_weights=3 << 40,
        n_tokens=n_tokens,
        hidden_size=HIDDEN_SIZE,
        top_k=8,
        dtype=DType.BF16,
        ids_itemsize=8,
        weights_dtype=DType.F32,
        owners=(None, None, None),
    )


def enqueue(mover: Mover, n_tokens: int) -> None:
    """As `DeviceCalls` does."""
    arrays = inputs(n_tokens)
    if mover.is_capturing(99):
        raise AssertionError
    if mover.exchange(99, arrays, 4 << 40, arrays.n_bytes, AT, 7):
        return
    mover.give(99, arrays, AT, 7)
    mover.take(99, 4 << 40, arrays.n_bytes, AT, 7)


@pytest.mark.parametrize(
    ("worker_bus_id", "n_tokens", "launches"),
    [
        (ANOTHER, 1, [LAUNCH]),
        (ANOTHER, 8, [LAUNCH]),
        (ANOTHER, 512, [LAUNCH, LAUNCH, LAUNCH]),
        (OWN, 1, [LAUNCH, WAIT, LAUNCH]),
        ("", 1, [LAUNCH, WAIT, LAUNCH]),
    ],
)
def test_it_only_enqueues(
    cupy: FakeCupy, segment: Segment, worker_bus_id: str, n_tokens: int, launches: list[str]
) -> None:
    """Also the first of its size: everything is loaded when the slab is opened."""
    mover = Mover("cuda:0", segment.memory, b"", worker_bus_id)
    for _ in range(2):
        cupy.calls.clear()
        enqueue(mover, n_tokens)
        asked = [call[0] for call in cupy.calls]
        allowed = {"getDevice", "setDevice", "streamIsCapturing"}
        assert [name for name in asked if name not in allowed] == launches
    mover.close()
