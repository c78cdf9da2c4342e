"""Experts in a device's memory: how they lie there, what is allocated, and what is refused."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from moeshm.backends.gpu import experts as experts_module
from moeshm.backends.gpu.choice import Shape
from moeshm.backends.gpu.device import Memory
from moeshm.backends.gpu.experts import BlockPool, DeviceExperts, has_bias
from moeshm.backends.gpu.packing import pack
from moeshm.backends.gpu.turn import Turn
from moeshm.checkpoint import ExpertLayer, ExpertWeights
from moeshm.dtypes import Array, DType, widen
from moeshm.errors import CheckpointError, OutOfDeviceMemory
from tests.checkpoints import STORAGES, random_layer
from tests.simt.device import FEATURES, SimtDevice


def part(layer: ExpertLayer, experts: Sequence[int]) -> ExpertLayer:
    """These experts of a layer that is here as a whole."""
    info = msgspec.structs.replace(layer.info, experts=tuple(experts))
    return ExpertLayer(info, [layer.expert(each) for each in experts])


def read(address: int, n_bytes: int) -> npt.NDArray[np.uint8]:
    """A copy of device memory."""
    found: npt.NDArray[np.uint8] = np.frombuffer(ctypes.string_at(address, n_bytes), np.uint8)
    return found


def expected_block(shape: Shape, weights: ExpertWeights) -> bytes:
    """The block as kernels/ffn.cuh describes it, written the plain way."""

    def padded(matrix: Array, rows: int, columns: int) -> bytes:
        result = np.zeros(rows * columns, matrix.dtype)
        row, k = np.indices(matrix.shape)
        if matrix.itemsize == 2:
            tile = row // 64 * columns // 64 + k // 64
            block = tile * 16 + row % 64 // 8 * 2 + k % 64 // 32
            place = (k // 8 ^ row // 2) % 4
            index = block * 256 + row % 8 * 32 + place * 8 + k % 8
        else:
            index = row * columns + k
        result[index] = matrix
        return result.tobytes()

    def bias(values: Array | None, size: int) -> bytes:
        result = np.zeros(size, np.float32)
        if values is not None:
            result[: len(values)] = widen(values)
        return result.tobytes()

    inner, hidden = shape.inner, shape.hidden_padded
    block = padded(weights.gate_proj, inner, hidden) + padded(weights.up_proj, inner, hidden)
    block += padded(weights.down_proj, hidden, inner)
    if shape.has_bias:
        block += bias(weights.gate_bias, inner) + bias(weights.up_bias, inner)
        block += bias(weights.down_bias, hidden)
    return block


def build(device: SimtDevice, layers: dict[int, ExpertLayer]) -> DeviceExperts:
    held = DeviceExperts(device, Turn())
    for number, layer in layers.items():
        held.add_layer(number, layer.info, has_bias(layer))
        held.add(number, layer)
    return held


def assert_held(
    held: DeviceExperts, number: int, layer: ExpertLayer, slots: dict[int, int]
) -> None:
    """The table leads to each slot's expert."""
    kept = held.layers[number]
    assert sorted(kept.blocks) == sorted(slots)
    for slot, expert in slots.items():
        address = int(read(kept.table.address + 8 * slot, 8).view(np.uint64)[0])
        assert address == kept.blocks[slot]
        assert address % 256 == 0
        block = expected_block(kept.shape, layer.expert(expert))
        assert len(block) == kept.shape.block_bytes
        assert read(address, len(block)).tobytes() == block


# --- packing --------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("staging_bytes", [1 << 14, 50_000, 1 << 20])
def test_a_block_is_as_kernels_expect_it(
    storage: str, dtype: DType, has_biases: bool, staging_bytes: int
) -> None:
    layer = random_layer(1, weight_dtype=dtype, storage=storage, has_bias=has_biases)
    shape = Shape.of(layer.info, has_biases)
    staging = np.full(staging_bytes, 0xFF, np.uint8)
    block, end = b"", 0
    for offset, n_bytes in pack(shape, layer.expert(2), staging):
        assert offset == end
        end += n_bytes
        block += staging[:n_bytes].tobytes()
        staging.fill(0xFF)
    assert block == expected_block(shape, layer.expert(2))


def test_an_expert_without_biases_in_a_layer_with_some() -> None:
    plain, biased = random_layer(1), random_layer(1, has_bias=True)
    layer = ExpertLayer(plain.info, [(biased if i % 2 else plain).expert(i) for i in range(6)])
    assert has_bias(layer)
    held = build(SimtDevice(), {0: layer})
    assert_held(held, 0, layer, {i: i for i in range(6)})


# --- blocks ---------------------------------------------------------------------------------


def test_blocks_are_taken_again_before_more_is_allocated() -> None:
    device = SimtDevice()
    pool = BlockPool(device, 1000)
    first = pool.take(4)
    assert len({address // 1024 for address in first}) == 4
    assert device.device_bytes == 4 * 1024
    pool.give_back(first[1:3])
    assert pool.bytes_for([2]) == 0
    assert sorted(pool.take(2)) == sorted(first[1:3])
    assert device.device_bytes == 4 * 1024
    # Three in all are asked for, two of them new; whole pages are what that takes.
    pool.give_back(first[:1])
    assert pool.bytes_for([3]) == 2 << 20
    pool.take(3)
    assert device.device_bytes == 6 * 1024


def test_memory_is_freed_when_all_of_it_is_given_back() -> None:
    device = SimtDevice()
    pool = BlockPool(device, 512)
    first, second = pool.take(3), pool.take(2)
    pool.give_back(first[::-1])
    assert device.device_bytes == 2 * 512
    pool.give_back(second)
    assert device.device_bytes == 0


@pytest.mark.parametrize("seed", range(20))
def test_no_block_is_given_twice(seed: int) -> None:
    rng = random.Random(seed)
    device = SimtDevice()
    pool = BlockPool(device, 300)
    taken: set[int] = set()
    for _ in range(100):
        if taken and rng.random() < 0.5:
            gone = rng.sample(sorted(taken), rng.randint(1, len(taken)))
            pool.give_back(gone)
            taken -= set(gone)
        else:
            new = pool.take(rng.randint(1, 5))
            assert not taken & set(new)
            assert len(set(new)) == len(new)
            taken |= set(new)
        assert device.device_bytes >= 512 * len(taken)
    pool.give_back(sorted(taken))
    assert device.device_bytes == 0


# --- layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_any_additions_and_removals(dtype: DType, has_biases: bool, seed: int) -> None:
    rng = random.Random(seed)
    whole = random_layer(seed, weight_dtype=dtype, has_bias=has_biases)
    device = SimtDevice()
    held = build(device, {4: part(whole, [2, 4])})
    slots = {0: 2, 1: 4}
    for _ in range(8):
        missing = sorted(set(range(6)) - set(slots.values()))
        if missing and rng.random() < 0.6:
            new = rng.sample(missing, rng.randint(1, len(missing)))
            slots.update(zip(held.add(4, part(whole, new)), new, strict=True))
        else:
            gone = rng.sample(sorted(slots), rng.randint(0, len(slots)))
            held.remove(4, gone)
            slots = {slot: expert for slot, expert in slots.items() if slot not in gone}
        assert_held(held, 4, whole, slots)
        assert held.layers[4].n_slots == max(slots, default=0) + 1
    held.remove(4, sorted(slots))
    assert device.device_bytes == 8 * whole.info.num_experts


def test_layers_of_one_size_share_blocks() -> None:
    device = SimtDevice()
    layers = {n: random_layer(n) for n in range(2)}
    held = build(device, layers)
    before = device.device_bytes
    held.remove(0, [1, 3])
    third = random_layer(9)
    held.add_layer(2, third.info, False)
    held.add(2, part(third, [0, 5]))
    assert device.device_bytes == before + 8 * third.info.num_experts
    assert_held(held, 2, third, {0: 0, 1: 5})
    assert_held(held, 1, layers[1], {i: i for i in range(6)})


def test_a_failed_upload_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_layer(1)
    device = SimtDevice()
    held = build(device, {0: part(whole, [0, 1])})
    before = device.device_bytes

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(experts_module, "pack", fail)
        with pytest.raises(OSError, match="the disk is gone"):
            held.add(0, part(whole, [2, 3]))
    assert device.device_bytes == before
    assert_held(held, 0, whole, {0: 0, 1: 1})
    assert held.layers[0].n_slots == 2
    assert held.add(0, part(whole, [5])) == [2]


def test_biases_that_come_late() -> None:
    held = build(SimtDevice(), {3: random_layer(1)})
    with pytest.raises(CheckpointError, match=r"layer 3 was loaded without biases.*start the"):
        held.add_layer(3, random_layer(1).info, True)


# --- room -----------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_sizes() -> None:
    shape = Shape(2048, 768, DType.BF16, random_layer(1).info.activation, False)
    device = SimtDevice(FEATURES._replace(total_bytes=2 << 30))
    held = DeviceExperts(device, Turn())
    # 9 MiB each, and 128 MiB stay free.
    held.check_room([(shape, 200)], other_bytes=0)
    with pytest.raises(OutOfDeviceMemory) as refused:
        held.check_room([(shape, 200)], other_bytes=130 << 20)
    assert str(refused.value) == (
        "200 experts need 1.88 GiB with what calls use, and 0.12 GiB for kernels, but 2.00 GiB of "
        "2.00 GiB are free on simt (SIMT shim); hold fewer experts there"
    )
    assert device.device_bytes == 0


@pytest.mark.parametrize("seed", range(10))
def test_room_is_what_a_driver_that_rounds_each_allocation_takes(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Layers are added one by one, each with an allocation of its own."""
    rng = random.Random(seed)
    taken: list[int] = []
    device = SimtDevice()
    allocate = device.allocate

    def note(nbytes: int) -> Memory:
        taken.append(-(-nbytes // (2 << 20)) * (2 << 20))
        return allocate(nbytes)

    monkeypatch.setattr(device, "allocate", note)
    pool = BlockPool(device, rng.choice([300, 700_000, 3 << 20]))
    if kept := pool.take(rng.randint(0, 4)):
        pool.give_back(kept[: len(kept) // 2])
    parts = [rng.randint(0, 5) for _ in range(4)]
    needed = pool.bytes_for(parts)
    taken.clear()
    for n_blocks in parts:
        pool.take(n_blocks)
    assert needed == sum(taken)


def test_room_counts_what_is_rounded_of_every_layer_and_of_the_rest() -> None:
    activation = random_layer(1).info.activation
    small = [Shape(hidden, 64, DType.BF16, activation, False) for hidden in (64, 128)]
    layers = [(small[i % 2], 1) for i in range(50)]
    device = SimtDevice(FEATURES._replace(total_bytes=(128 + 2 * 51) << 20))
    held = DeviceExperts(device, Turn())
    held.check_room(layers, other_bytes=1)
    with pytest.raises(OutOfDeviceMemory, match="51 experts need"):
        held.check_room([*layers, layers[0]], other_bytes=1)
    device.features = FEATURES._replace(total_bytes=device.features.total_bytes - 1)
    with pytest.raises(OutOfDeviceMemory, match="50 experts need"):
        held.check_room(layers, other_bytes=1)


def test_experts_that_are_still_here_when_they_come_again() -> None:
    """More slots than the model has experts: what one engine gives up, another asks for again."""
    layer = random_layer(11)
    device = SimtDevice()
    experts = build(device, {0: layer})
    again = experts.add(0, part(layer, [2, 0]))
    third = experts.add(0, part(layer, [5]))
    assert [*again, *third] == [6, 7, 8]
    held = experts.layers[0]
    assert held.n_slots == 9 <= held.capacity
    table = read(held.table.address, 9 * 8).view(np.uint64).tolist()
    assert table == [held.blocks[slot] for slot in range(9)]
    experts.remove(0, [0, 2])
    assert experts.add(0, part(layer, [2])) == [0]


def test_what_needs_no_more_memory_fits_however_little_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = random_layer(12)
    device = SimtDevice()
    experts = build(device, {0: layer})
    experts.remove(0, [3])
    monkeypatch.setattr(device, "free_bytes", lambda: 1 << 20)
    shape = experts.layers[0].shape
    experts.check_room([(shape, 1)], 0)
    with pytest.raises(OutOfDeviceMemory):
        experts.check_room([(shape, 2)], 0)
