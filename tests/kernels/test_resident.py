"""kernels/resident.cu: it computes what the two launches of decode_mma.cu compute, call after call,
and ends when it is told to or when nothing comes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from moeshm._words import load_word, store_word, wait_for_word
from moeshm.backends.gpu._mailbox import ENDED, FINISHED, MAILBOX_BYTES, Mailbox
from moeshm.backends.gpu.abi import ROOMS_BYTES, Admitted, Asked, Command, Resident
from moeshm.backends.gpu.choice import RESIDENT_PAIRS
from moeshm.backends.reference import reference_ffn
from moeshm.checkpoint import ExpertLayer
from moeshm.dtypes import Array, DType, dtype_of, narrow, widen
from moeshm.kernels import source
from moeshm.layers import Activation
from tests.simt import Module, Order, compile, compile_text, guarded
from tests.wire import meanwhile

from .harness import ORDERS, Case, Problem, assert_close, draw, same_bits

BF16, F16, F32 = DType.BF16, DType.F16, DType.F32
CASE = Case(136, 136, BF16, Activation.SWIGLU_CLAMPED, True, 32)
MACROS = {"GATE_UP_WARPS": 4, "DOWN_WARPS": 16, "DOWN_SPLIT": 2, "DOWN_ROWS": 16}
GRID = 3
#: Commands that a mailbox has room for.
COMMANDS = 16
#: Of `Command.what`.
COMPUTE, STOP = 0, 1
MINUTE_NS = 60 * 10**9
#: Offsets of words of `Rooms`, and of one of the mailbox that nobody uses.
STOPPED_AT, UNUSED_AT = 12, FINISHED + 64


class Room:
    """What kernels of one device keep."""

    def __init__(self, macros: Mapping[str, int] = MACROS, grid: int = GRID) -> None:
        self.macros = macros
        self.grid = grid
        self.memory = guarded(np.zeros(MAILBOX_BYTES, np.uint8))
        self.mailbox = Mailbox(self.memory)
        self.rooms = guarded(np.zeros(ROOMS_BYTES // 4, np.uint32))
        self.rooms[:2] = 1
        self.n_launched = 0

    def post(self, command: Command) -> int:
        number = self.mailbox.post(ctypes.addressof(command))
        assert number is not None
        return number

    def stop(self, launch: int | None = None) -> None:
        """Up to that kernel, by default the next one."""
        self.post(Command(what=STOP, launch=self.n_launched + 1 if launch is None else launch))

    def run(
        self,
        problem: Problem,
        *,
        idle_ns: int = MINUTE_NS,
        order: Order = "forward",
        module: Module | None = None,
    ) -> None:
        """One kernel until it ends."""
        self.n_launched += 1
        module = module or compile("resident.cu", {**problem.shape.macros(), **self.macros})
        asked = Resident(self.memory.ctypes.data, self.rooms.ctypes.data, idle_ns, self.n_launched)
        # Of both kinds of sums, as choice.resident has it.
        shared = max(32 << 10, self.macros["DOWN_SPLIT"] * RESIDENT_PAIRS * 64)
        module.launch("resident", self.grid, 512, shared, asked, order=order)
        assert self.mailbox.n_ended == self.n_launched


class Asking:
    """A call as the host asks for it, and where its output is."""

    def __init__(
        self,
        layer: ExpertLayer,
        x: Array,
        ids: Array,
        weights: Array,
        *,
        brings_x: bool = True,
        checks_ids: bool = False,
        macros: Mapping[str, int] = MACROS,
    ) -> None:
        self._call = layer, narrow(widen(x), layer.info.weight_dtype), ids, weights, macros
        self.problem = Problem(
            layer, x, ids, weights, out_dtype=BF16, kept_dtype=layer.info.weight_dtype
        )
        self.done = guarded(np.zeros(1, np.uint32), 4)
        call = self.problem.call
        #: What the client wrote, and what kernels read instead.
        self._kept = (guarded(x), guarded(ids, 4), guarded(weights, 4))
        self._admitted = (
            guarded(np.zeros(x.shape, layer.info.weight_dtype.numpy)),
            guarded(np.full(ids.shape, 77, np.int32), 4),
            guarded(np.zeros(ids.shape, np.float32), 4),
        )
        at = [each.ctypes.data for each in self._admitted]
        asked = Asked(n_pairs=ids.size, n_ids=len(layer), x_dtype=dtype_of(x))
        admitted = Admitted(ids=at[1], weights=at[2], x=at[0], x_dtype=layer.info.weight_dtype)
        call.ids, call.weights = at[1], at[2]
        if brings_x:
            asked.x, admitted.n_values = self._kept[0].ctypes.data, x.size
            call.x, call.x_dtype = at[0], layer.info.weight_dtype
        self.refused = guarded(np.zeros(1, np.uint32), 4)
        admitted.refused = self.refused.ctypes.data
        self.command = Command(
            call, asked, admitted, done=self.done.ctypes.data, done_value=7, what=COMPUTE
        )
        if len(x) == 1 and not checks_ids:
            table = (ctypes.c_uint64 * len(layer)).from_address(call.experts)
            for pair, slot in enumerate(ids[0].tolist()):
                self.command.slot[pair] = slot
                self.command.expert[pair] = 0 if slot < 0 else table[slot]
                self.command.weight[pair] = weights[0, pair]
        else:
            self.command.asked.ids = self._kept[1].ctypes.data
            self.command.asked.weights = self._kept[2].ctypes.data

    @property
    def out(self) -> Array:
        return self.problem.out

    @functools.cached_property
    def expected(self) -> Array:
        """What two launches give."""
        return launched_twice(*self._call)

    def assert_done(self) -> None:
        """With the bits of the two launches, and nothing was refused."""
        assert self.done.tolist() == [7]
        assert self.refused.tolist() == [0]
        assert same_bits(self.out, self.expected)

    def assert_untouched(self) -> None:
        assert self.done.tolist() == [0]
        assert np.isnan(widen(self.out)).all()


def launched_twice(
    layer: ExpertLayer,
    x: Array,
    ids: Array,
    weights: Array,
    macros: Mapping[str, int] = MACROS,
) -> Array:
    """By decode_gate_up and decode_down."""
    problem = Problem(layer, x, ids, weights, out_dtype=BF16, kept_dtype=layer.info.weight_dtype)
    shared = macros["DOWN_SPLIT"] * ids.size * 64
    gate_up = 32 * macros["GATE_UP_WARPS"]
    problem.launch("decode_mma.cu", "decode_gate_up", 4, gate_up, **macros)
    problem.launch("decode_mma.cu", "decode_down", 4, 512, shared, **macros)
    return problem.out


#: Tokens and pairs of each, up to as many as it takes, and as a command has room for.
SIZES: Sequence[tuple[int, int]] = [(1, 8), (1, 1), (2, 4), (3, 5), (16, 8), (1, 16)]


def ask(seed: int, n_tokens: int = 1, top_k: int = 3, **how: Any) -> Asking:
    """A call of CASE."""
    layer = the_layer()
    return Asking(layer, *draw(seed, layer, n_tokens, top_k, x_dtype=BF16), **how)


@functools.cache
def the_layer() -> ExpertLayer:
    """Of CASE."""
    return CASE.layer(3)


# --- what it computes -------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_calls_one_after_the_other(order: Order) -> None:
    asking = [ask(i, *size, brings_x=i % 2 == 0) for i, size in enumerate(SIZES)]
    room = Room()
    for each in asking:
        room.post(each.command)
    room.stop()
    room.run(asking[0].problem, order=order)
    assert room.mailbox.n_finished == len(SIZES)
    for each in asking:
        each.assert_done()


@pytest.mark.parametrize(
    ("gate_up", "split", "grid"), [(4, 2, 1), (4, 2, 5), (8, 1, 5), (16, 4, 1), (16, 4, 5)]
)
def test_teams_and_blocks(gate_up: int, split: int, grid: int) -> None:
    """As many of each as there may be."""
    macros = {**MACROS, "GATE_UP_WARPS": gate_up, "DOWN_SPLIT": split}
    asking = [ask(i, *size, macros=macros) for i, size in enumerate(((1, 8), (9, 2)))]
    room = Room(macros, grid)
    for each in asking:
        room.post(each.command)
    room.stop()
    room.run(asking[0].problem, order=1)
    for each in asking:
        each.assert_done()


@pytest.mark.parametrize("n_tokens", [1, 4])
@pytest.mark.parametrize("weight_dtype", [BF16, F16])
def test_activations_of_another_format_are_narrowed(weight_dtype: DType, n_tokens: int) -> None:
    layer = Case(136, 136, weight_dtype, CASE.activation, True, 32).layer(3)
    x, ids, weights = draw(4, layer, n_tokens, 3)
    one = Asking(layer, x, ids, weights)
    room = Room()
    room.post(one.command)
    room.stop()
    room.run(one.problem)
    one.assert_done()
    assert_close(one.out, reference_ffn(layer, x, ids, np.nan_to_num(weights)), BF16)


@pytest.mark.parametrize("n_tokens", [1, 4])
def test_calls_whose_slots_are_all_empty(n_tokens: int) -> None:
    layer = the_layer()
    x, ids, weights = draw(4, layer, n_tokens, 3, x_dtype=BF16, empty=1)
    one, after = Asking(layer, x, ids, weights), ask(5, 2)
    room = Room()
    for each in (one, after):
        room.post(each.command)
    room.stop()
    room.run(one.problem)
    assert one.done.tolist() == [7]
    assert not one.out.view(np.uint16).any()
    after.assert_done()


@pytest.mark.parametrize("wrong", [6, -2, (1 << 31) - 1])
def test_ids_that_are_refused_count_as_empty(wrong: int) -> None:
    """Also those of a single token, where a client may still change them."""
    layer, room, asking = the_layer(), Room(), []
    for n_tokens in (1, 3):
        x, ids, weights = draw(4, layer, n_tokens, 4, x_dtype=BF16, empty=0)
        ids[-1, 2] = wrong
        one = Asking(layer, x, ids.copy(), weights, checks_ids=True)
        ids[-1, 2] = -1
        one.expected = launched_twice(layer, x, ids, weights)
        room.post(one.command)
        asking.append(one)
    room.stop()
    room.run(asking[0].problem)
    for one, pair in zip(asking, (2, 10), strict=True):
        assert one.refused.tolist() == [1 + pair]
        assert one.done.tolist() == [7]
        assert same_bits(one.out, one.expected)


def test_ids_that_stand_for_slots() -> None:
    layer = the_layer()
    x, ids, weights = draw(4, layer, 3, 4, x_dtype=BF16)
    slots = guarded(np.array([3, -1, 5, 0, 1, 2], np.int32), 4)
    there = np.where(ids < 0, -1, slots[ids]).astype(np.int32)
    one = Asking(layer, x, ids, weights)
    one.command.asked.slots = slots.ctypes.data
    room = Room()
    room.post(one.command)
    room.stop()
    room.run(one.problem)
    assert same_bits(one.out, launched_twice(layer, x, there, weights))
    refused = one.refused.item()
    assert refused
    assert ids.ravel()[refused - 1] == 1


def test_a_call_that_nobody_is_told_of() -> None:
    """But for the mailbox."""
    one, room = ask(1), Room()
    one.command.done = 0
    room.post(one.command)
    room.stop()
    room.run(one.problem)
    assert room.mailbox.n_finished == 1
    assert one.done.tolist() == [0]
    assert same_bits(one.out, one.expected)


# --- its end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["reverse", 1])
@pytest.mark.parametrize("idle_ns", [0, 100_000])
def test_it_ends_when_nothing_comes_and_the_next_goes_on(idle_ns: int, order: Order) -> None:
    first, second = ask(1), ask(2, 4)
    room = Room()
    room.run(first.problem, idle_ns=idle_ns, order=order)
    assert room.mailbox.n_finished == 0
    for each in (first, second):
        room.post(each.command)
        room.run(first.problem, idle_ns=idle_ns, order=order)
        each.assert_done()
    assert room.mailbox.n_finished == 2
    assert room.n_launched == 3


def test_a_command_that_comes_at_the_last_look_is_computed() -> None:
    """The kernel is held after it has said that it ends, until the command is there."""
    text, at = (
        source("resident.cu"),
        "        if (!look_for(letter, number, command)) return false;",
    )
    assert text.count(at) == 1
    held = "while (!*(volatile u32*)&mailbox->padding[15]) wait_for_host();\n"
    one, room = ask(1), Room()
    macros = {**one.problem.shape.macros(), **MACROS}
    module = compile_text(text.replace(at, held + at), macros, name="resident.cu")
    seen = []

    def post() -> None:
        assert wait_for_word(room.memory, ENDED, 1, MINUTE_NS, 0)
        room.post(one.command)
        # By this the host decides whether another kernel is needed, to no harm.
        seen.append(room.mailbox.n_ended)
        store_word(room.memory, UNUSED_AT, 1)
        assert wait_for_word(room.memory, FINISHED, 1, MINUTE_NS, 0)
        seen.append(room.mailbox.n_ended)

    with meanwhile(post):
        room.run(one.problem, idle_ns=2_000_000, module=module)
    one.assert_done()
    assert seen[0] == 1


def test_what_was_to_stop_an_older_kernel_is_passed_over() -> None:
    first, second, room = ask(1), ask(2), Room()
    room.run(first.problem, idle_ns=0)
    # They came too late for it.
    room.stop(1)
    room.stop(1)
    room.post(first.command)
    room.stop(1)
    room.post(second.command)
    room.stop(2)
    room.run(first.problem)
    for each in (first, second):
        each.assert_done()
    assert room.mailbox.n_finished == 5
    assert load_word(room.rooms, STOPPED_AT) == 2


def test_old_stops_and_nothing_else() -> None:
    """It ends by itself, and the next does not find them again."""
    one, room = ask(1), Room()
    room.run(one.problem, idle_ns=0)
    room.stop(1)
    room.run(one.problem, idle_ns=0)
    room.post(one.command)
    room.run(one.problem, idle_ns=0)
    one.assert_done()


def test_one_stop_ends_kernels_that_were_launched_before_it() -> None:
    """The second without a look at the mailbox; what comes behind is for the third."""
    first, second, room = ask(1), ask(2), Room()
    room.post(first.command)
    room.stop(2)
    room.post(second.command)
    room.run(first.problem)
    first.assert_done()
    second.assert_untouched()
    room.run(first.problem, idle_ns=0)
    second.assert_untouched()
    room.stop(3)
    room.run(first.problem)
    second.assert_done()


# --- the mailbox ------------------------------------------------------------------------------


def test_more_commands_than_the_mailbox_has_room_for() -> None:
    """Places of what is done are used again, while the kernel runs."""
    asking = [ask(i, top_k=1) for i in range(COMMANDS + 10)]
    room = Room()

    def post(command: Command) -> None:
        while room.mailbox.post(ctypes.addressof(command)) is None:
            assert wait_for_word(room.memory, FINISHED, room.mailbox.n_posted - 8, MINUTE_NS, 0)

    for each in asking[:COMMANDS]:
        room.post(each.command)
    assert room.mailbox.post(ctypes.addressof(asking[0].command)) is None

    def post_the_rest() -> None:
        for each in asking[COMMANDS:]:
            post(each.command)
        post(Command(what=STOP, launch=1))

    with meanwhile(post_the_rest):
        room.run(asking[0].problem)
    for each in asking:
        each.assert_done()
    assert room.mailbox.n_finished == len(asking)


def test_a_block_that_begins_late_is_waited_for() -> None:
    """When it begins, the leader has been told to stop already."""
    text, at = source("resident.cu"), "    if (has_reached(rooms->stopped, resident.launch)) {"
    assert text.count(at) == 1
    late = "    if (blockIdx.x == 2) for (int i = 0; i < 300; ++i) wait_for_host();\n"
    one, room = ask(1), Room()
    module = compile_text(
        text.replace(at, late + at), {**one.problem.shape.macros(), **MACROS}, name="resident.cu"
    )
    room.stop()
    room.run(one.problem, module=module)
