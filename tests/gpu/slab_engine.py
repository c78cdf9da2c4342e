"""An engine's process, with a slab of another's device memory: gives a call and takes its result.

usage: python -m tests.gpu.slab_engine FD HANDLE
"""

from __future__ import annotations

import os
import sys

import numpy as np

from moeshm._claims import Allocator
from moeshm._words import wait_for_word
from moeshm.backends import Ids, Weights
from moeshm.backends.gpu._launch import address_of
from moeshm.backends.gpu.device import Device
from moeshm.dtypes import Array, DType, narrow
from moeshm.transport.slab import DONE, FLAGS_BYTES, GIVEN, SLOT_BYTES, Places, Segment
from tests.checkpoints import random_layer
from tests.conformance.test_backends import draw_call

DATA_BYTES = 4 << 20
LAYER = random_layer(1, hidden_size=256, intermediate_size=192, weight_dtype=DType.BF16)
PATIENCE_NS = 60 * 10**9
#: Of its only call.
SEQUENCE = 1


def draw() -> tuple[Array, Ids, Weights]:
    """The arrays of the call."""
    hidden, ids, weights = draw_call(3, LAYER, 40, 2)
    return narrow(hidden, DType.BF16), ids, weights


def claim(hidden: Array, ids: Ids) -> Places:
    """Where they are in the slab, which both processes work out."""
    # Flags of its own: only the places are of interest.
    allocator = Allocator(bytearray(FLAGS_BYTES), DATA_BYTES)
    n_tokens, top_k = ids.shape
    found = allocator.claim(n_tokens, hidden.shape[1], top_k, DType.BF16)
    assert found is not None
    assert found.sequence == SEQUENCE
    return found.places


def play(device: Device, memory: memoryview, handle: bytes) -> Array:
    """Give the call, by copies and a flag on the device's stream, and take what comes of it."""
    arrays = draw()
    places = claim(*arrays[:2])
    offsets = places.hidden_states, places.topk_ids, places.topk_weights
    slab = device.open_exported(handle)
    flags = device.register(address_of(memory), memory.nbytes, read_only=False)
    staging = device.pin(DATA_BYTES)
    commands = device.command_list()
    for array, offset in zip(arrays, offsets, strict=True):
        staging.array[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        commands.copy_in(slab.address + offset, staging.address + offset, array.nbytes)
    at = places.slot * SLOT_BYTES
    given = flags.device_address + at + GIVEN
    commands.set_value(commands.write_value(given), given, SEQUENCE)
    commands.enqueue()
    assert wait_for_word(memory, at + DONE, SEQUENCE, PATIENCE_NS, 0), "the call is not done"
    hidden = arrays[0]
    commands = device.command_list()
    commands.copy_out(staging.address, slab.address + places.out, hidden.nbytes)
    commands.enqueue()
    device.wait()
    found: Array = staging.array[: hidden.nbytes].view(hidden.dtype).reshape(hidden.shape).copy()
    flags.close()
    slab.close()
    staging.close()
    return found


def main(fd: int, handle: bytes) -> None:
    """On the first GPU; prints the result's bytes."""
    from moeshm.backends.gpu.cupy_device import open_device

    segment = Segment.attach(fd, 0)
    os.close(fd)
    device = open_device("auto")
    device.use()
    print(play(device, segment.memory, handle).tobytes().hex())


if __name__ == "__main__":
    main(int(sys.argv[1]), bytes.fromhex(sys.argv[2]))
