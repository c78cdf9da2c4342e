"""What mypy must make of the client's interface; checked, never run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

import moeshm
from moeshm import Activation, CallFuture, ClientStats, ExpertClient, LayerInfo
from moeshm.backends import Backend
from moeshm.errors import CallError, MoeshmError, RingError, SegmentError, SessionError

assert_type(moeshm.__version__, str)


def open_clients(fallback: Backend) -> None:
    assert_type(moeshm.connect("unix:/w.sock"), ExpertClient)
    assert_type(
        moeshm.connect(
            "unix:/w.sock", transport="shared", wire_dtype="bf16", timeout_s=1, fallback=fallback
        ),
        ExpertClient,
    )
    assert_type(moeshm.spawn_worker("model", layers=[1], threads=2), ExpertClient)
    moeshm.connect(("host", 1))  # type: ignore[arg-type]
    moeshm.connect("unix:/w.sock", "shared")  # type: ignore[call-arg]


def call(client: ExpertClient, x: npt.NDArray[np.float32], ids: npt.NDArray[np.int32]) -> None:
    with client as same:
        assert_type(same, ExpertClient)
    assert_type(client.layers, Mapping[int, LayerInfo])
    assert_type(client.transport, str)
    assert_type(client.worker_pid, int)
    # NumPy arrays give arrays and tensors give tensors, which types cannot say without torch.
    assert_type(client.compute(3, x, ids, x), Any)
    future = client.submit(3, x, ids, x, out=x, timeout_s=0.5, global_ids=True)
    assert_type(future, CallFuture)
    assert_type(future.done(), bool)
    assert_type(future.result(1.0), Any)
    assert_type(client.stats(), ClientStats)
    client.compute("3", x, ids, x)  # type: ignore[arg-type]
    client.compute(3, x, ids)  # type: ignore[call-arg]
    client.layers[3] = client.layers[2]  # type: ignore[index]


def read(stats: ClientStats, info: LayerInfo) -> None:
    assert_type(stats.calls, int)
    assert_type(stats.wait_s, float)
    assert_type(stats.fallbacks, dict[str, int])
    assert_type(info.hidden_size, int)
    assert_type(info.activation, Activation)


def catch(error: RingError | SegmentError | SessionError | CallError) -> MoeshmError:
    return error
