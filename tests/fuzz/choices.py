"""Bytes as decisions: what a fuzzer mutates are a target's choices, not the wire's bytes alone.

A parser behind a magic number and three lengths that must agree is hardly ever reached by bytes
that are changed at random. A target therefore makes what is right, and takes from its data what it
changes. Zeros change nothing, and data that is used up is zeros: no data is what is right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping

#: Numbers that arithmetic stumbles over: around powers of two.
_POWERS = (0, 1, 5, 6, 7, 8, 12, 13, 15, 16, 31, 32, 39, 62, 63, 64)
EDGES = tuple(sorted({(1 << power) + step for power in _POWERS for step in (-1, 0, 1)}))
#: Of data that is made from a seed: how many bytes are no zeros, at most.
_N_CHANGES = (0, 1, 2, 3, 4, 6, 8, 16, 64)
_DRAWN = 3 + 2 * max(_N_CHANGES)


class Choices:
    """Takes decisions from bytes, in their order."""

    __slots__ = ("_at", "_data", "_size")

    def __init__(self, data: bytes) -> None:
        # What follows would be zeros anyway.
        self._data = data.rstrip(b"\0")
        self._size = len(self._data)
        self._at = 0

    def byte(self) -> int:
        """0..255; 0 once the data is used up."""
        at = self._at
        if at >= self._size:
            return 0
        self._at = at + 1
        return self._data[at]

    def below(self, limit: int) -> int:
        """0..limit-1, for a limit of at most 2^16."""
        number = self.byte()
        if limit > 256:
            number |= self.byte() << 8
        return number % limit

    def are_left(self) -> bool:
        """There is more data."""
        return self._at < self._size

    def take(self, size: int) -> bytes:
        """So many bytes, or fewer at the end."""
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        """All that are left."""
        return self.take(self._size)

    def number(self, bits: int) -> int:
        """One of that width: an edge of some arithmetic more often than not."""
        how = self.byte()
        if how < 192:
            return EDGES[how % len(EDGES)] & ((1 << bits) - 1)
        return int.from_bytes(self.take(bits // 8), "little")

    def near(self, value: int, bits: int) -> int:
        """The value, or another one that is close in some way, or any."""
        how = self.byte()
        if how == 0:
            return value
        if how < 48:
            # Most limits are missed by one.
            value += 1 if how < 24 else -1
        elif how < 64:
            value += (how - 55) * 2
        elif how < 112:
            value ^= 1 << how % bits
        elif how < 128:
            # Offsets, that wrap.
            value -= 256 * (how - 111)
        elif how < 144:
            value *= how - 126
        else:
            return self.number(bits)
        return value & ((1 << bits) - 1)

    def change(self, fields: MutableMapping[str, int], widths: Mapping[str, int]) -> None:
        """Change up to three of these numbers, each of its width in bits."""
        for _ in range(self.below(4)):
            name = tuple(widths)[self.below(len(widths))]
            fields[name] = self.near(fields[name], widths[name])

    def edit(self, data: bytes) -> bytes:
        """Change up to three places of these bytes, or their length."""
        for _ in range(self.below(4)):
            how, at = self.byte(), self.below(len(data) + 1)
            if how < 64:
                data = data[:at] + bytes([self.byte()]) + data[at + 1 :]
            elif how < 128:
                data = data[:at] + self.number(64).to_bytes(8, "little") + data[at + 8 :]
            elif how < 160:
                data = data[:at]
            elif how < 192:
                data = data[:at] + data[at + 1 + self.below(16) :]
            elif how < 224:
                data = data[:at] + self.take(self.below(16)) + data[at:]
            else:
                data += bytes(self.below(256))
        return data


def data_of(seed: int, index: int) -> bytes:
    """The data of one execution of a run that a seed and its number repeat: 1 to 128 bytes."""
    # A hash of the two: to seed a generator takes longer than most executions.
    drawn = hashlib.shake_128(b"%d %d" % (seed, index)).digest(_DRAWN)
    size = 1 + (drawn[0] & 127)
    data = bytearray(size)
    # Few changes find what many hide: the first thing that is wrong ends most executions.
    for at in range(3, 3 + 2 * _N_CHANGES[drawn[1] % len(_N_CHANGES)], 2):
        data[drawn[at] % size] = drawn[at + 1]
    data[0] = drawn[2]
    return bytes(data)
