"""Commands in a mailbox, whose kernel the host plays: numbers, room, and where everything lies."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import numpy.typing as npt
import pytest

from moeshm._words import store_word
from moeshm.backends.gpu import abi
from moeshm.backends.gpu._mailbox import ENDED, FINISHED, MAILBOX_BYTES, Mailbox, set_pairs
from moeshm.backends.gpu.abi import COMMAND_PAIRS, Command
from moeshm.kernels import source

COMMANDS, WORDS = 16, 128


@pytest.fixture
def memory() -> npt.NDArray[np.uint8]:
    """Of a mailbox, which is to clear it."""
    return np.full(MAILBOX_BYTES, 0xFF, np.uint8)


def post(mailbox: Mailbox, command: Command) -> int | None:
    return mailbox.post(ctypes.addressof(command))


def letter(memory: npt.NDArray[np.uint8], number: int) -> npt.NDArray[np.uint32]:
    """[128, 2]: the words of a command, each with the number beside it."""
    n_bytes = COMMANDS * WORDS * 8
    letters = memory[:n_bytes].view(np.uint32).reshape(COMMANDS, WORDS, 2)
    found: npt.NDArray[np.uint32] = letters[number % COMMANDS]
    return found


# --- commands ---------------------------------------------------------------------------------


def test_a_mailbox_is_empty_at_first(memory: npt.NDArray[np.uint8]) -> None:
    mailbox = Mailbox(memory)
    assert not memory.any()
    assert (mailbox.n_posted, mailbox.n_finished, mailbox.n_ended) == (0, 0, 0)


def test_each_word_of_a_command_has_its_number_beside_it(memory: npt.NDArray[np.uint8]) -> None:
    mailbox = Mailbox(memory)
    for number in (1, 2):
        drawn = np.random.default_rng(number).integers(0, 1 << 32, WORDS, np.uint32)
        command = Command.from_buffer_copy(drawn.tobytes())
        assert post(mailbox, command) == number
        assert mailbox.n_posted == number
        found = letter(memory, number)
        assert (found[:, 1] == number).all()
        there = Command.from_buffer_copy(found[:, 0].tobytes())
        # The number is the mailbox's own.
        assert there.number == number
        command.number = number
        assert bytes(there) == bytes(command)


def test_what_the_kernel_says_is_read(memory: npt.NDArray[np.uint8]) -> None:
    mailbox = Mailbox(memory)
    store_word(memory, FINISHED, (1 << 32) - 1)
    store_word(memory, ENDED, 7)
    assert (mailbox.n_posted, mailbox.n_finished, mailbox.n_ended) == (0, (1 << 32) - 1, 7)


def test_a_full_mailbox_takes_nothing(memory: npt.NDArray[np.uint8]) -> None:
    mailbox = Mailbox(memory)
    for number in range(1, COMMANDS + 1):
        assert post(mailbox, Command(launch=number)) == number
    before = memory.copy()
    assert post(mailbox, Command(launch=99)) is None
    assert mailbox.n_posted == COMMANDS
    np.testing.assert_array_equal(memory, before)
    store_word(memory, FINISHED, 1)
    assert post(mailbox, Command(launch=17)) == 17
    assert post(mailbox, Command(launch=99)) is None
    # In the place of the first, and of no other.
    for number in range(2, COMMANDS + 2):
        assert (letter(memory, number)[:, 1] == number).all()
        assert letter(memory, number)[Command.launch.offset // 4, 0] == number
    store_word(memory, FINISHED, 17)
    for number in range(18, 34):
        assert post(mailbox, Command()) == number
    assert post(mailbox, Command()) is None


def test_another_mailbox_in_the_same_memory_begins_anew(memory: npt.NDArray[np.uint8]) -> None:
    first = Mailbox(memory)
    post(first, Command(what=1, launch=3))
    store_word(memory, FINISHED, 1)
    second = Mailbox(memory)
    assert not memory.any()
    assert post(second, Command()) == 1


@pytest.mark.parametrize("n_bytes", [0, MAILBOX_BYTES - 1])
def test_memory_that_is_too_small(n_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"{n_bytes} bytes for a mailbox, which takes"):
        Mailbox(np.zeros(n_bytes, np.uint8))


def test_memory_that_is_read_only() -> None:
    memory = np.zeros(MAILBOX_BYTES, np.uint8)
    memory.flags.writeable = False
    with pytest.raises((BufferError, ValueError), match=r"read-only|writable"):
        Mailbox(memory)


# --- pairs ------------------------------------------------------------------------------------


def pairs_of(command: Command, n_pairs: int) -> list[tuple[int, int, float]]:
    return [(command.slot[i], command.expert[i], command.weight[i]) for i in range(n_pairs)]


def test_pairs_with_where_their_experts_are() -> None:
    command = Command()
    addresses = np.array([0x7F00_0000_1000, 1 << 63, 3], np.uint64)
    ids = np.array([[2, -1, 0, 1]], np.int32)
    weights = np.array([[0.5, np.inf, -2, 0]], np.float32)
    before = Command.from_buffer_copy(command)
    set_pairs(ctypes.addressof(command), ids, weights, addresses)
    assert pairs_of(command, 4) == [
        (2, 3, 0.5),
        (-1, 0, np.inf),
        (0, 0x7F00_0000_1000, -2),
        (1, 1 << 63, 0),
    ]
    # And nothing else.
    for at in range(4):
        command.slot[at] = command.expert[at] = 0
        command.weight[at] = 0
    assert bytes(command) == bytes(before)


def test_as_many_pairs_as_there_is_room_for() -> None:
    command = Command()
    command.padding[:] = [5] * len(command.padding)
    ids = np.full((1, COMMAND_PAIRS), 1023, np.int32)
    weights = np.arange(COMMAND_PAIRS, dtype=np.float32)[None]
    addresses = np.arange(1024, dtype=np.uint64)
    set_pairs(ctypes.addressof(command), ids, weights, addresses)
    assert pairs_of(command, 16) == [(1023, 1023, float(i)) for i in range(16)]
    assert command.padding[:] == [5] * len(command.padding)


@pytest.mark.parametrize(
    ("ids", "n_weights", "message"),
    [
        ([0] * 17, 17, "17 ids and 17 weights; a command has room for 16 each"),
        ([0, 1], 1, "2 ids and 1 weights"),
        ([0, 3], 2, "slot 3; 3 are known, -1 is an empty one"),
        ([0, -2], 2, "slot -2; 3 are known"),
        ([0, -(1 << 31)], 2, "slot -2147483648"),
    ],
)
def test_pairs_that_cannot_be(ids: list[int], n_weights: int, message: str) -> None:
    """Nothing is set."""
    command = Command()
    arrays = np.array([ids], np.int32), np.ones((1, n_weights), np.float32)
    with pytest.raises(IndexError, match=message):
        set_pairs(ctypes.addressof(command), *arrays, np.array([7, 8, 9], np.uint64))
    assert not any(bytes(command))


def test_a_layer_without_experts() -> None:
    command = Command()
    arrays = np.full((1, 2), -1, np.int32), np.ones((1, 2), np.float32)
    set_pairs(ctypes.addressof(command), *arrays, np.zeros(0, np.uint64))
    assert command.slot[:2] == [-1, -1]


# --- where everything lies --------------------------------------------------------------------


def test_commands_are_what_the_mailbox_takes_them_for() -> None:
    """By what it writes: the offsets are its own."""
    assert ctypes.sizeof(Command) == WORDS * 4
    memory = np.zeros(MAILBOX_BYTES, np.uint8)
    mailbox = Mailbox(memory)
    post(mailbox, Command())
    (at,) = np.flatnonzero(letter(memory, 1)[:, 0])
    assert at * 4 == Command.number.offset
    command = Command()
    arrays = np.array([[0]], np.int32), np.ones((1, 1), np.float32)
    command.slot[0] = 1
    set_pairs(ctypes.addressof(command), *arrays, np.array([9], np.uint64))
    assert pairs_of(command, 1) == [(0, 9, 1.0)]


def test_numbers_are_those_of_the_kernel() -> None:
    """What only text says there; sizes of structs are held against each other by every launch."""
    text = source("resident.cu")
    macros = dict(re.findall(r"#define (MAILBOX_COMMANDS|COMMAND_WORDS|COMMAND_PAIRS) (\d+)", text))
    assert macros == {
        "MAILBOX_COMMANDS": str(COMMANDS),
        "COMMAND_WORDS": str(WORDS),
        "COMMAND_PAIRS": str(COMMAND_PAIRS),
    }
    for struct, name in ((Command, "Command"), (abi.Resident, "Resident")):
        found = re.search(rf"struct {name} {{(.*?)}};", text, re.DOTALL)
        assert found is not None
        fields = re.findall(r"(\w+)(?:\[\w+\])?;", re.sub(r"//.*", "", found[1]))
        assert fields == [name for name, *_ in struct._fields_]
    # Letters, then two words with as much between them as a line has.
    assert (FINISHED, ENDED) == (COMMANDS * WORDS * 8, FINISHED + 128)
    assert "u32 padding[31];\n    u32 ended;" in text
