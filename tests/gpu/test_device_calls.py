"""Calls of arrays on a GPU, computed by a worker process on the same GPU or on another one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import moeshm
from moeshm.backends.cpu import CpuBackend
from moeshm.checkpoint import load
from moeshm.demo import tiny_moe_path
from moeshm.dtypes import DType, narrow, widen
from moeshm.errors import DeadlineExceeded, InvalidCall, WorkerDied
from tests.crash.processes import stop

pytestmark = pytest.mark.gpu

LAYER, HIDDEN_SIZE, NUM_EXPERTS, TOP_K = 3, 128, 16, 4
PATIENCE_S = 60.0
#: Keeps a stream busy for so many ns.
_BUSY = """
extern "C" __global__ void busy(unsigned long long ns) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    while (now - start < ns);
}
"""


class Way(NamedTuple):
    """The worker's GPU, and how arrays go there."""

    worker: str
    transport: str


@pytest.fixture(
    scope="module",
    params=[Way(f"cuda:{n}", how) for n in (0, 1) for how in ("shared", "device")],
    ids=lambda way: f"{way.worker} {way.transport}",
)
def way(request: pytest.FixtureRequest) -> Way:
    """Each."""
    from cupy.cuda import runtime

    found: Way = request.param
    if int(found.worker.removeprefix("cuda:")) >= runtime.getDeviceCount():
        pytest.skip("there is one GPU; another one for the worker is tested where there are two")
    return found


@pytest.fixture(scope="module")
def client(way: Way) -> Iterator[moeshm.ExpertClient]:
    """Of a worker that lives."""
    with spawned(way) as made:
        yield made


@pytest.fixture
def cupy() -> Any:
    """The module, on the engine's GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cupy as module
    module.cuda.Device(0).use()
    return module


def spawned(way: Way, **options: Any) -> moeshm.ExpertClient:
    """A client of a new worker."""
    client = moeshm.spawn_worker(
        tiny_moe_path(),
        device=way.worker,
        transport=way.transport,
        engine_device="cuda:0",
        layers=[LAYER],
        **options,
    )
    assert client.slab == {"shared": "pinned", "device": "device"}[way.transport]
    return client


def draw(seed: int, n_tokens: int, dtype: DType = DType.F32) -> tuple[Any, Any, Any]:
    """hidden_states, topk_ids and topk_weights in the host's memory."""
    random = np.random.default_rng(seed)
    hidden = narrow(random.standard_normal((n_tokens, HIDDEN_SIZE), np.float32), dtype)
    ids = np.stack([random.permutation(NUM_EXPERTS)[:TOP_K] for _ in range(n_tokens)])
    ids[random.random(ids.shape) < 0.1] = -1
    return hidden, ids.astype(np.int32), random.random(ids.shape, np.float32)


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [1, 16, 200, 3000])
def test_results_are_those_of_arrays_in_the_hosts_memory(
    client: moeshm.ExpertClient, cupy: Any, n_tokens: int, dtype: DType
) -> None:
    inputs = draw(n_tokens, n_tokens, dtype)
    expected = client.compute(LAYER, *inputs)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        given = [cupy.asarray(each) for each in inputs]
        future = client.submit(LAYER, *given, stream=stream)
        # On the stream, before anybody has waited.
        copy = future.result().copy()
    np.testing.assert_array_equal(cupy.asnumpy(future.wait(PATIENCE_S)), expected)
    stream.synchronize()
    np.testing.assert_array_equal(cupy.asnumpy(copy), expected)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_tensors(client: moeshm.ExpertClient, kind: str) -> None:
    torch = pytest.importorskip("torch")
    hidden, ids, weights = draw(5, 7)
    tensors = (
        torch.from_numpy(hidden).to(getattr(torch, kind)),
        torch.from_numpy(ids).long(),
        torch.from_numpy(weights),
    )
    expected = client.compute(LAYER, *tensors)
    given = [each.to("cuda:0") for each in tensors]
    out = client.compute(LAYER, *given)
    assert out.device.type == "cuda"
    assert torch.equal(out.cpu(), expected)
    future = client.submit(LAYER, *given, stream=torch.cuda.current_stream())
    doubled = future.result() * 2
    assert torch.equal(doubled.cpu(), expected * 2)


def test_the_host_waits_for_no_gpu(client: moeshm.ExpertClient, cupy: Any) -> None:
    """While the stream is busy with something else, calls are enqueued behind it."""
    busy = cupy.RawKernel(_BUSY, "busy")
    stream = cupy.cuda.Stream(non_blocking=True)
    inputs = draw(1, 4)
    expected = client.compute(LAYER, *inputs)
    given = [cupy.asarray(each) for each in inputs]
    outs = [cupy.empty_like(given[0]) for _ in range(5)]
    cupy.cuda.Device(0).synchronize()
    with stream:
        busy((1,), (1,), (np.uint64(2_000_000_000),))
    futures = [client.submit(LAYER, *given, out=out, stream=stream) for out in outs]
    assert not stream.done, "a submit waited for the stream"
    assert not any(future.done() for future in futures)
    for future in futures:
        np.testing.assert_array_equal(cupy.asnumpy(future.wait(PATIENCE_S)), expected)


def test_many_calls_on_their_way(client: moeshm.ExpertClient, cupy: Any) -> None:
    """More than there are slots, on two streams."""
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    calls = []
    for seed in range(100):
        inputs = draw(seed, 1 + seed % 5)
        stream = streams[seed % 2]
        with stream:
            given = [cupy.asarray(each) for each in inputs]
        calls.append((inputs, client.submit(LAYER, *given, out=None, stream=stream)))
    for inputs, future in calls:
        out = cupy.asnumpy(future.wait(PATIENCE_S))
        np.testing.assert_array_equal(out, client.compute(LAYER, *inputs))


def test_wrong_ids(client: moeshm.ExpertClient, cupy: Any) -> None:
    hidden, ids, weights = draw(2, 5)
    ids[3, 1] = NUM_EXPERTS
    given = [cupy.asarray(each) for each in (hidden, ids, weights)]
    with pytest.raises(InvalidCall, match=r"topk_ids\[3, 1\]"):
        client.compute(LAYER, *given)
    inputs = draw(3, 5)
    found = client.compute(LAYER, *(cupy.asarray(each) for each in inputs))
    np.testing.assert_array_equal(cupy.asnumpy(found), client.compute(LAYER, *inputs))


def test_a_worker_that_is_killed(way: Way, cupy: Any) -> None:
    """Futures end, the stream goes on, this process's context lives, the dead one's memory is
    back, and the next call finds another worker."""
    inputs = draw(1, 200)
    given = [cupy.asarray(each) for each in inputs]
    stream = cupy.cuda.Stream(non_blocking=True)
    before = _free_bytes(cupy, way)
    with spawned(way) as client:
        expected = client.compute(LAYER, *inputs)
        client.compute(LAYER, *given)
        futures = [client.submit(LAYER, *given, stream=stream) for _ in range(30)]
        os.kill(client.worker_pid, signal.SIGKILL)
        for future in futures:
            # Those that were computed before it died are right.
            with contextlib.suppress(WorkerDied):
                np.testing.assert_array_equal(cupy.asnumpy(future.wait(PATIENCE_S)), expected)
        stream.synchronize()
        assert int(cupy.arange(10).sum()) == 45
        # All of them may have been done before it died, and then this one finds out.
        with contextlib.suppress(WorkerDied):
            client.compute(LAYER, *given)
        found = client.compute(LAYER, *given)
        np.testing.assert_array_equal(cupy.asnumpy(found), expected)
        assert client.stats().worker_restarts == 1
    deadline = time.monotonic() + PATIENCE_S
    # What this process itself has taken meanwhile, as for kernels, is far less than a worker's.
    while _free_bytes(cupy, way) < before - (64 << 20):
        assert time.monotonic() < deadline, "memory of the dead is not back"
        time.sleep(0.05)


def test_a_worker_that_hangs(way: Way, cupy: Any) -> None:
    given = [cupy.asarray(each) for each in draw(1, 3)]
    stream = cupy.cuda.Stream(non_blocking=True)
    with spawned(way) as client:
        client.compute(LAYER, *given)
        stop(client.worker_pid)
        future = client.submit(LAYER, *given, stream=stream, timeout_s=0.5)
        with pytest.raises(DeadlineExceeded):
            future.wait(PATIENCE_S)
        stream.synchronize()
        assert int(cupy.arange(10).sum()) == 45


def test_a_fallback(way: Way, cupy: Any) -> None:
    inputs = draw(1, 9)
    given = [cupy.asarray(each) for each in inputs]
    stream = cupy.cuda.Stream(non_blocking=True)
    fallback = CpuBackend(load(tiny_moe_path(), layers=[LAYER]).layers)
    with spawned(way, fallback=fallback) as client:
        expected = widen(client.compute(LAYER, *inputs))
        client.compute(LAYER, *given)
        stop(client.worker_pid)
        future = client.submit(LAYER, *given, stream=stream)
        os.kill(client.worker_pid, signal.SIGKILL)
        found = cupy.asnumpy(future.wait(PATIENCE_S))
        # In between the GPU rounds to the weights' bfloat16, and the fallback does not.
        assert np.linalg.norm(found - expected) < 1e-2 * np.linalg.norm(expected)
        assert client.stats().fallbacks == {"worker_died": 1}


def _free_bytes(cupy: Any, way: Way) -> int:
    with cupy.cuda.Device(int(way.worker.removeprefix("cuda:"))):
        return int(cupy.cuda.runtime.memGetInfo()[0])


def test_a_transformers_model(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the engine's GPU: what it says when activations go through the host's memory."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5")
    from moeshm.integrations import transformers as integration

    prompt = torch.tensor([list(b"import os\n\n\ndef ")], device="cuda:0")
    with moeshm.spawn_worker(
        tiny_moe_path(), device=way.worker, transport=way.transport, engine_device="cuda:0"
    ) as client:
        assert client.engine_device == "cuda:0"
        model = integration.offload(tiny_moe_path(), client).to("cuda:0")
        with torch.inference_mode():
            found = model(prompt).logits
            monkeypatch.setattr(integration, "_stays_on_gpu", lambda _client, _rows: False)
            assert torch.equal(model(prompt).logits, found)
