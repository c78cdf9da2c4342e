"""An offload's arrays on a GPU, CuPy's and torch's: whichever way they go, the sum is the same."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import moeshm
from moeshm.checkpoint import load
from moeshm.demo import tiny_moe_path
from moeshm.dtypes import DType, narrow
from moeshm.offload import ExpertOffload
from moeshm.placement import LayerPlacement, Placement

pytestmark = pytest.mark.gpu

LAYER, HIDDEN_SIZE, NUM_EXPERTS, TOP_K = 3, 128, 16, 4
HELD = {"a": tuple(range(4, 10)), "b": tuple(range(10, 16))}
PLACEMENT = Placement(["a", "b"], {LAYER: LayerPlacement(NUM_EXPERTS, tuple(range(4)), HELD)})
#: How `connect` names what gives each slab.
TRANSPORTS = {"pinned": "shared", "device": "device"}


@pytest.fixture
def cupy() -> Any:
    """The module, on the engine's GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cupy as module
    module.cuda.Device(0).use()
    return module


@pytest.fixture(scope="module", params=TRANSPORTS)
def slab(request: pytest.FixtureRequest) -> str:
    """Each kind."""
    return str(request.param)


@pytest.fixture(scope="module")
def offload(slab: str) -> Iterator[ExpertOffload]:
    """Two workers, on the last GPU, and hot experts on the engine's."""
    from cupy.cuda import runtime

    from moeshm.backends.gpu.backend import GpuBackend
    from moeshm.backends.gpu.cupy_device import open_device

    device = f"cuda:{runtime.getDeviceCount() - 1}"
    hot = load(tiny_moe_path(), experts={LAYER: list(range(4))})
    backend = GpuBackend(hot.layers, open_device("cuda:0"))
    with contextlib.ExitStack() as stack:
        clients = {
            name: stack.enter_context(
                moeshm.spawn_worker(
                    tiny_moe_path(),
                    device=device,
                    transport=TRANSPORTS[slab],
                    engine_device="cuda:0",
                    experts={LAYER: held},
                    timeout_s=600,
                )
            )
            for name, held in HELD.items()
        }
        made = ExpertOffload(clients, PLACEMENT, local=backend, engine_device="cuda:0")
        yield stack.enter_context(made)


def draw(seed: int, n_tokens: int, dtype: DType) -> tuple[Any, Any, Any]:
    random = np.random.default_rng(seed)
    hidden = narrow(random.standard_normal((n_tokens, HIDDEN_SIZE), np.float32), dtype)
    ids = np.stack([random.permutation(NUM_EXPERTS)[:TOP_K] for _ in range(n_tokens)])
    ids[random.random(ids.shape) < 0.3] = -1
    return hidden, ids.astype(np.int32), random.random(ids.shape, np.float32)


@contextlib.contextmanager
def only(offload: ExpertOffload, way: str) -> Iterator[None]:
    """Let forwards go this way."""
    choosers = [remote.chooser for remote in offload._remotes.values()]
    before = [chooser._paths for chooser in choosers]
    for chooser in choosers:
        chooser._paths = [path for path in chooser._paths if path.transport == way]
        chooser._buckets.clear()
    try:
        yield
    finally:
        for chooser, paths in zip(choosers, before, strict=True):
            chooser._paths = paths
            chooser._buckets.clear()


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("n_tokens", [0, 1, 9, 300])
def test_arrays_of_cupy(
    offload: ExpertOffload, slab: str, cupy: Any, n_tokens: int, dtype: DType
) -> None:
    call = draw(n_tokens, n_tokens, dtype) if n_tokens else draw(0, 1, dtype)
    call = call[0][:n_tokens], call[1][:n_tokens], call[2][:n_tokens]
    expected = offload.forward(LAYER, *call)
    stream = cupy.cuda.Stream(non_blocking=True)
    brought = offload.stats().brought
    with only(offload, slab), stream:
        given = [cupy.asarray(each) for each in call]
        for _ in range(3):
            found = offload.forward(LAYER, *given, stream=stream)
            assert isinstance(found, cupy.ndarray)
            np.testing.assert_array_equal(found.get(), expected)
    assert offload.stats().brought == brought
    with only(offload, "shared"):
        found = offload.forward(LAYER, *given, stream=stream)
    stream.synchronize()
    np.testing.assert_array_equal(found.get(), expected)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("n_tokens", [1, 9, 300])
def test_tensors(offload: ExpertOffload, slab: str, n_tokens: int, kind: str) -> None:
    torch = pytest.importorskip("torch")
    hidden, ids, weights = draw(n_tokens, n_tokens, DType.F32)
    tensors = (
        torch.from_numpy(hidden).to(getattr(torch, kind)),
        torch.from_numpy(ids).long(),
        torch.from_numpy(weights),
    )
    expected = offload.forward(LAYER, *tensors)
    given = [each.to("cuda:0") for each in tensors]
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    for way in (slab, "shared"):
        with only(offload, way):
            # On the default stream, and on another one.
            found = offload.forward(LAYER, *given)
            assert found.device.type == "cuda"
            assert found.dtype is expected.dtype
            assert torch.equal(found.cpu(), expected)
            found = offload.forward(LAYER, *given, stream=other)
            other.synchronize()
            assert torch.equal(found.cpu(), expected)


def test_auto_takes_one_of_all_ways(offload: ExpertOffload, slab: str, cupy: Any) -> None:
    given = [cupy.asarray(each) for each in draw(1, 16, DType.BF16)]
    for _ in range(50):
        offload.forward(LAYER, *given)
    for explanation in offload.explain(LAYER):
        ways = {verdict.transport for verdict in explanation.verdicts}
        assert ways == ({"shared", slab} if explanation.work.on_gpu else {"shared"})
    assert offload.stats().stepped_down == {}
