"""Memory that calls from slabs use, on a GPU made of the host: what goes when, what is refused."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from moeshm._claims import Claim
from moeshm._words import load_word
from moeshm.backends import Ids, SlabUser
from moeshm.backends.gpu import workspace
from moeshm.backends.gpu.backend import GpuBackend
from moeshm.backends.gpu.device import Memory
from moeshm.backends.reference import reference_ffn
from moeshm.dtypes import Array
from moeshm.errors import DeviceError, DeviceLost, InvalidCall, OutOfDeviceMemory
from moeshm.transport.slab import DONE, FLAGS_BYTES
from tests.checkpoints import random_layer
from tests.conformance.test_backends import assert_close, draw_call
from tests.simt.device import FEATURES, LazyDevice, SimtDevice
from tests.unit.test_gpu_experts import part

from .gpu_slabs import DATA_BYTES, LAYER, Engine, Noted, each_kind, engine

# --- what calls on their way still use ------------------------------------------------------


@each_kind
def test_a_larger_layer_comes_meanwhile(kind: str) -> None:
    """It brings another workspace."""
    device = LazyDevice()
    backend = GpuBackend({0: LAYER}, device)
    wide = random_layer(7, hidden_size=200, intermediate_size=136, top_k=6)
    with engine(backend, kind) as slab:
        call = draw_call(8, LAYER, 5, 2)
        claim = slab.begin(*call)
        backend.add(1, wide)
        assert device.n_freed_early == 0
        assert_close(slab.take(claim, call[0]), reference_ffn(LAYER, *call), 1e-5)
        for layer, number in ((LAYER, 0), (wide, 1)):
            call = draw_call(9, layer, 5, 2)
            claim = slab.begin(*call, layer=number)
            device.wait()
            assert_close(slab.take(claim, call[0]), reference_ffn(layer, *call), 1e-5)


def test_experts_go_meanwhile() -> None:
    """Their memory is freed when the call is done, or is given to others that come after it."""
    device = LazyDevice()
    backend = GpuBackend({0: part(LAYER, [0])}, device)
    whole = device.device_bytes
    slots = backend.add(0, part(LAYER, [1, 2]))
    hidden, _, weights = draw_call(8, LAYER, 5, 2)
    ids: Ids = np.tile(np.array([[1, 2]], np.int32), (5, 1))
    expected = reference_ffn(LAYER, hidden, ids, weights)
    with engine(backend) as slab:
        claim = slab.begin(hidden, ids, weights)
        backend.remove(0, slots)
        assert device.device_bytes == whole
        assert_close(slab.take(claim, hidden), expected, 1e-5)
        slots = backend.add(0, part(LAYER, [1, 2]))
        claim = slab.begin(hidden, ids, weights)
        backend.remove(0, slots[1:])
        backend.add(0, part(LAYER, [5]))
        assert_close(slab.take(claim, hidden), expected, 1e-5)
        assert device.n_freed_early == 0


def test_experts_go_from_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimtDevice()
    backend = GpuBackend({0: LAYER}, device)

    def fail() -> None:
        raise DeviceLost("simt is lost")

    before = device.device_bytes
    monkeypatch.setattr(device, "wait", fail)
    backend.remove(0, range(6))
    assert device.device_bytes < before


def test_a_table_of_experts_is_replaced_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a longer one, between whose upload and its use a call is begun."""
    device = LazyDevice()
    backend = GpuBackend({0: LAYER}, device)
    call = draw_call(8, LAYER, 5, 2)
    claims: list[Claim] = []
    held = backend._experts
    copy = held._copy
    with engine(backend) as slab:

        def copy_and_begin(to: int, n_bytes: int) -> None:
            copy(to, n_bytes)
            claims.append(slab.begin(*call))

        def enlarge(*arguments: Any) -> None:
            monkeypatch.setattr(held, "_copy", copy_and_begin)
            real(*arguments)
            monkeypatch.setattr(held, "_copy", copy)

        real = held._enlarge
        monkeypatch.setattr(held, "_enlarge", enlarge)
        backend.add(0, LAYER)
        assert (len(claims), device.n_freed_early) == (1, 0)
        assert_close(slab.take(claims[0], call[0]), reference_ffn(LAYER, *call), 1e-5)


@each_kind
def test_close_waits_for_what_was_begun(kind: str) -> None:
    device = LazyDevice()
    backend = GpuBackend({0: LAYER}, device)
    before = device.device_bytes
    made = Engine(backend, kind)
    call = draw_call(8, LAYER, 5, 2)
    claim = made.begin(*call)
    found: list[Array] = []
    # Read once it is waited for, before the memory is gone.
    made.slab._closers.insert(0, lambda: found.append(made.take(claim, call[0])))
    made.slab.close()
    assert_close(found[0], reference_ffn(LAYER, *call), 1e-5)
    assert (device.device_bytes, device.registered, device.n_freed_early) == (before, {}, 0)


# --- opening and closing --------------------------------------------------------------------


def test_the_backend_says_that_it_takes_slabs() -> None:
    backend = GpuBackend({0: LAYER}, SimtDevice())
    assert isinstance(backend, SlabUser)
    assert backend.vendor == "simt"


@each_kind
def test_memory_is_kept_until_close_and_no_longer(kind: str) -> None:
    device = SimtDevice()
    backend = GpuBackend({0: LAYER}, device)
    before = device.device_bytes
    made = Engine(backend, kind)
    is_pinned = kind == "pinned"
    assert [*device.registered.values()] == [FLAGS_BYTES + is_pinned * DATA_BYTES]
    assert device.device_bytes == before + (not is_pinned) * DATA_BYTES
    assert len(made.slab.handle) == (0 if is_pinned else 64)
    made.segment.close()
    assert len(device.registered) == 1
    made.slab.close()
    made.slab.close()
    assert (device.device_bytes, device.registered) == (before, {})


@pytest.mark.parametrize("method", ["register", "allocate", "export", "write_value", "wait"])
def test_where_the_device_refuses_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    device = SimtDevice()
    backend = GpuBackend({0: LAYER}, device)
    before = device.device_bytes

    def fail(*_arguments: Any, **_how: Any) -> None:
        raise DeviceError(f"{method} is refused")

    kept: list[Memory] = []
    allocate = device.allocate

    def keep(nbytes: int) -> Memory:
        # Not freed by its last reference.
        kept.append(allocate(nbytes))
        return kept[-1]

    with monkeypatch.context() as patch:
        patch.setattr(device, "allocate", keep)
        patch.setattr(device, method, fail)
        with pytest.raises(DeviceError, match=f"{method} is refused"):
            Engine(backend, "device")
    assert (device.device_bytes, device.registered) == (before, {})
    with engine(backend, "device") as slab:
        call = draw_call(8, LAYER, 5, 2)
        assert_close(slab.compute(*call), reference_ffn(LAYER, *call), 1e-5)


def test_a_slab_that_does_not_fit() -> None:
    """Beside what kernels may need."""
    device = SimtDevice()
    backend = GpuBackend({0: LAYER}, device)
    before = device.device_bytes
    device.features = FEATURES._replace(total_bytes=before + (131 << 20))
    message = r"a slab needs 4 MiB, and 128 MiB are for kernels, but 131 MiB are free on simt"
    with pytest.raises(OutOfDeviceMemory, match=message):
        Engine(backend, "device")
    assert (device.device_bytes, device.registered) == (before, {})
    device.features = FEATURES._replace(total_bytes=before + (132 << 20))
    with engine(backend, "device"):
        pass


@each_kind
def test_close_on_a_lost_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    device = SimtDevice()
    backend = GpuBackend({0: LAYER}, device)
    before = device.device_bytes
    made = Engine(backend, kind)

    def fail() -> None:
        raise DeviceLost("simt is lost")

    monkeypatch.setattr(device, "wait", fail)
    with caplog.at_level(logging.WARNING):
        made.slab.close()
    # The log has the error, which has this function's variables.
    made.segment.close()
    made.allocator.close()
    assert "simt is lost" in caplog.text
    assert (device.device_bytes, device.registered) == (before, {})


# --- errors ---------------------------------------------------------------------------------


def test_rows_that_kernels_take_padded() -> None:
    layer = random_layer(16, hidden_size=33)
    device = LazyDevice()
    backend = GpuBackend({0: layer}, device)
    with engine(backend) as slab:
        n_before = len(device.used_streams)
        with pytest.raises(
            InvalidCall, match="hidden_size=33 is no multiple of 8; pass arrays in host memory"
        ):
            slab.begin(*draw_call(17, layer, 2, 2))
        assert len(device.used_streams) == n_before


def test_more_slots_than_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "MAX_PAIRS", 5)
    device = LazyDevice()
    with engine(GpuBackend({0: LAYER}, device)) as slab:
        n_before = len(device.used_streams)
        with pytest.raises(InvalidCall, match="top_k=6 is more than this layer's calls"):
            slab.begin(*draw_call(17, LAYER, 2, 6))
        assert len(device.used_streams) == n_before


@pytest.mark.parametrize("kernel", ["admit", "decode_down"])
def test_an_error_is_that_calls_own_and_nothing_of_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    device = SimtDevice()
    call = draw_call(21, LAYER, 2, 2)
    with engine(GpuBackend({0: LAYER}, device)) as slab:
        launch = device.launch

        def fail(launched: Any, *how: Any) -> None:
            if launched.name == kernel:
                raise DeviceError(f"{kernel} is refused")
            launch(launched, *how)

        with monkeypatch.context() as patch:
            noted = Noted(device, patch)
            patch.setattr(device, "launch", fail)
            with pytest.raises(DeviceError, match=f"{kernel} is refused"):
                slab.begin(*call)
            assert noted.seen[-1] == "wait"
            assert "write_value" not in noted.seen
        assert load_word(slab.segment.memory, DONE) == 0
        assert_close(slab.compute(*call), reference_ffn(LAYER, *call), 1e-5)
