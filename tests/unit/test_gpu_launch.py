"""Commands to a driver that is made up: what it is called with, how often, and where it stops."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moeshm.backends.gpu import _launch
from moeshm.backends.gpu._launch import CommandList, Driver, Fields
from moeshm.backends.gpu.abi import Call, Route
from moeshm.dtypes import DType

STREAM = 0x7FFF_0000_4711
#: Of a kernel, and of both memories: wider than 32 bits.
FUNCTION, DEVICE, HOST = 0x5555_0000_1000, 0x7F12_3456_7800, 0x7FFE_9876_5400

_U32, _U64 = ctypes.c_uint32, ctypes.c_uint64


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h: an int of its 64 bytes of value."""

    _fields_ = (("id", _U32), ("padding", _U32), ("value", ctypes.c_int32), ("rest", _U32 * 15))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", _U32 * 3),
        ("block", _U32 * 3),
        ("shared_bytes", _U32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("n_attributes", _U32),
    )


class FakeDriver:
    """Notes every call; the one of number `refused` returns 719."""

    def __init__(self, has_overlap: bool = False, wait_takes_mask: bool = False) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.refused: int | None = None
        copy = (_U64, _U64, ctypes.c_size_t, ctypes.c_void_p)
        launch = (ctypes.c_void_p, *[_U32] * 7, *[ctypes.c_void_p] * 3)
        overlapping = (ctypes.POINTER(LaunchConfig), *[ctypes.c_void_p] * 3)
        on_value = (ctypes.c_void_p, _U64, _U32, _U32)
        mask = (_U32,) if wait_takes_mask else ()
        self._functions = [
            self._made(self._copy_in, copy),
            self._made(self._copy_out, copy),
            self._made(self._launch, launch),
            self._made(self._launch_overlapping, overlapping),
            self._made(self._write_value, on_value),
            self._made(self._wait_value, (*on_value, *mask)),
        ]
        addresses = [address_of(function) for function in self._functions]
        self.driver = Driver(
            copy_in=addresses[0],
            copy_out=addresses[1],
            launch=addresses[2],
            launch_overlapping=addresses[3] if has_overlap else 0,
            write_value=addresses[4],
            wait_value=addresses[5],
            wait_takes_mask=wait_takes_mask,
            stream=STREAM,
        )

    def _made(self, function: Callable[..., None], types: tuple[Any, ...]) -> Any:
        def call(*arguments: Any) -> int:
            function(*arguments)
            return 719 if len(self.calls) - 1 == self.refused else 0

        return ctypes.CFUNCTYPE(ctypes.c_int, *types)(call)

    def _copy_in(self, *arguments: int) -> None:
        self.calls.append(("copy_in", *arguments))

    def _copy_out(self, *arguments: int) -> None:
        self.calls.append(("copy_out", *arguments))

    def _write_value(self, *arguments: int) -> None:
        self.calls.append(("write_value", *arguments))

    def _wait_value(self, *arguments: int) -> None:
        self.calls.append(("wait_value", *arguments))

    def _launch(self, function: int, *how: int) -> None:
        *sizes, stream, parameters, extra = how
        self.calls.append(("launch", function, sizes, stream, *arguments_of(parameters), extra))

    def _launch_overlapping(
        self, config: Any, function: int, parameters: int, extra: int | None
    ) -> None:
        found: LaunchConfig = config[0]
        sizes = [*found.grid, *found.block, found.shared_bytes]
        attributes = [
            (found.attributes[i].id, found.attributes[i].value) for i in range(found.n_attributes)
        ]
        self.calls.append(
            (
                *("launch_overlapping", function, sizes, found.stream),
                *(*arguments_of(parameters), extra, attributes),
            )
        )


def address_of(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def arguments_of(parameters: int) -> tuple[bytes, bytes]:
    """The bytes of a kernel's two arguments."""
    call, route = (_U64 * 2).from_address(parameters)
    sizes = (ctypes.sizeof(Call), ctypes.sizeof(Route))
    return ctypes.string_at(call, sizes[0]), ctypes.string_at(route, sizes[1])


@pytest.mark.parametrize("has_overlap", [False, True])
def test_everything_is_enqueued_in_order_each_time(has_overlap: bool) -> None:
    fake = FakeDriver(has_overlap)
    commands = CommandList(fake.driver)
    first, second, route = Call(x=DEVICE, n_tokens=3), Call(alpha=1.5), Route(begin=HOST, tiles=5)
    commands.copy_in(DEVICE, HOST, 3 << 32)
    commands.launch(FUNCTION, 132, 256, 200_000, first, route)
    commands.launch(FUNCTION + 1, 1, 512, 0, second, route)
    commands.copy_out(HOST + 1, DEVICE + 1, 16)
    assert fake.calls == []
    for _ in range(2):
        assert commands.enqueue() is None
    # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    end: list[Any] = [None, [(6, 1)]] if has_overlap else [None]
    launch = "launch_overlapping" if has_overlap else "launch"
    sizes = ([132, 1, 1, 256, 1, 1, 200_000], [1, 1, 1, 512, 1, 1, 0])
    expected = [
        ("copy_in", DEVICE, HOST, 3 << 32, STREAM),
        (launch, FUNCTION, sizes[0], STREAM, bytes(first), bytes(route), *end),
        (launch, FUNCTION + 1, sizes[1], STREAM, bytes(second), bytes(route), *end),
        ("copy_out", HOST + 1, DEVICE + 1, 16, STREAM),
    ]
    assert fake.calls == expected * 2


def test_arguments_are_read_when_they_are_enqueued() -> None:
    fake = FakeDriver()
    commands = CommandList(fake.driver)
    call = Call(n_tokens=1)
    commands.launch(FUNCTION, 1, 32, 0, call, Route())
    del fake.calls[:]
    call.n_tokens, call.out = 2, DEVICE
    commands.enqueue()
    assert fake.calls[0][4] == bytes(Call(n_tokens=2, out=DEVICE))


def test_a_list_keeps_what_it_points_to() -> None:
    fake = FakeDriver(has_overlap=True)
    commands = CommandList(fake.driver)
    for n_tokens in range(8):
        commands.launch(FUNCTION, 1, 32, 0, Call(n_tokens=n_tokens), Route(tiles=n_tokens))
    del fake.driver
    gc.collect()
    others = [(Call(n_tokens=99), Route(tiles=99)) for _ in range(1000)]
    commands.enqueue()
    assert [call[4:6] for call in fake.calls] == [
        (bytes(Call(n_tokens=n_tokens)), bytes(Route(tiles=n_tokens))) for n_tokens in range(8)
    ]
    assert {call[-1][0] for call in fake.calls} == {(6, 1)}
    del others


@pytest.mark.parametrize("has_overlap", [False, True])
@pytest.mark.parametrize("refused", range(4))
def test_nothing_is_enqueued_after_what_the_driver_refuses(refused: int, has_overlap: bool) -> None:
    fake = FakeDriver(has_overlap)
    commands = CommandList(fake.driver)
    commands.copy_in(DEVICE, HOST, 1)
    for _ in range(2):
        commands.launch(FUNCTION, 1, 32, 0, Call(), Route())
    commands.copy_out(HOST, DEVICE, 1)
    fake.refused = refused
    assert commands.enqueue() == (refused, 719)
    assert len(fake.calls) == refused + 1
    fake.refused = None
    del fake.calls[:]
    assert commands.enqueue() is None
    assert len(fake.calls) == 4


def test_a_copys_address_of_the_host_is_set_call_by_call() -> None:
    fake = FakeDriver()
    commands = CommandList(fake.driver)
    first = commands.copy_in(DEVICE, HOST, 1)
    commands.launch(FUNCTION, 1, 32, 0, Call(), Route())
    second = commands.copy_in(DEVICE + 64, HOST + 64, 2)
    last = commands.copy_out(HOST + 128, DEVICE + 128, 3)
    assert (first, second, last) == (0, 2, 3)
    for shift in (1 << 20, 1 << 40):
        commands.set_host_address(second, HOST + shift)
        commands.set_host_address(last, HOST + 2 * shift)
        del fake.calls[:]
        commands.enqueue()
        assert [fake.calls[n] for n in (0, 2, 3)] == [
            ("copy_in", DEVICE, HOST, 1, STREAM),
            ("copy_in", DEVICE + 64, HOST + shift, 2, STREAM),
            ("copy_out", HOST + 2 * shift, DEVICE + 128, 3, STREAM),
        ]


@pytest.mark.parametrize("wait_takes_mask", [False, True])
def test_values_are_set_call_by_call(wait_takes_mask: bool) -> None:
    """Both with flags 0: a write after all that is before it, and a wait for as much or more."""
    fake = FakeDriver(wait_takes_mask=wait_takes_mask)
    commands = CommandList(fake.driver)
    wait = commands.wait_value(DEVICE)
    commands.launch(FUNCTION, 1, 32, 0, Call(), Route())
    write = commands.write_value(DEVICE + 128)
    assert (wait, write) == (0, 2)
    mask = (0xFFFF_FFFF,) if wait_takes_mask else ()
    for value in (0xFFFF_FFFF, 0, 1):
        commands.set_value(wait, DEVICE + 512, value)
        commands.set_value(write, DEVICE + 640 + value, value + 1 & 0xFFFF_FFFF)
        del fake.calls[:]
        assert commands.enqueue() is None
        assert [fake.calls[n] for n in (0, 2)] == [
            ("wait_value", STREAM, DEVICE + 512, value, 0, *mask),
            ("write_value", STREAM, DEVICE + 640 + value, value + 1 & 0xFFFF_FFFF, 0),
        ]


@pytest.mark.parametrize("number", [-1, 0, 1, 3, 8])
def test_only_a_write_or_a_wait_has_a_value(number: int) -> None:
    commands = CommandList(FakeDriver().driver)
    commands.copy_in(DEVICE, HOST, 1)
    commands.launch(FUNCTION, 1, 32, 0, Call(), Route())
    commands.set_value(commands.write_value(DEVICE), DEVICE, 1)
    with pytest.raises(IndexError, match=f"command {number} of 3 has no value; pass a number"):
        commands.set_value(number, DEVICE, 1)
    with pytest.raises(IndexError, match="command 2 of 3 is no copy"):
        commands.set_host_address(2, HOST)


@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_a_value_of_more_than_32_bits(value: int) -> None:
    fake = FakeDriver()
    commands = CommandList(fake.driver)
    number = commands.write_value(DEVICE)
    commands.set_value(number, DEVICE, 5)
    with pytest.raises(OverflowError):
        commands.set_value(number, HOST, value)
    commands.enqueue()
    assert fake.calls == [("write_value", STREAM, DEVICE, 5, 0)]


@pytest.mark.parametrize("stream", [0, 2, 0x7FFF_0000_0815])
@pytest.mark.parametrize("has_overlap", [False, True])
def test_another_stream(stream: int, has_overlap: bool) -> None:
    """0 is the default one, of which the driver knows no other number."""
    fake = FakeDriver(has_overlap, wait_takes_mask=True)
    commands = CommandList(fake.driver)
    commands.wait_value(DEVICE)
    commands.copy_in(DEVICE, HOST, 1)
    commands.launch(FUNCTION, 1, 32, 0, Call(), Route())
    commands.write_value(DEVICE)
    for where in (stream, None):
        del fake.calls[:]
        commands.enqueue(where)
        wait, copy, launch, write = fake.calls
        found = [wait[1], copy[4], launch[3], write[1]]
        assert [each or 0 for each in found] == [STREAM if where is None else stream] * 4


def test_launches_that_must_not_overlap() -> None:
    """Some of a list's."""
    fake = FakeDriver(has_overlap=True)
    commands = CommandList(fake.driver)
    for overlaps in (False, True, False):
        commands.launch(FUNCTION, 4, 32, 0, Call(n_tokens=3), Route(), overlaps)
    commands.enqueue()
    assert [call[0] for call in fake.calls] == ["launch", "launch_overlapping", "launch"]
    assert fake.calls[0][:6] == fake.calls[2][:6]
    assert fake.calls[0][2:5] == ([4, 1, 1, 32, 1, 1, 0], STREAM, bytes(Call(n_tokens=3)))


def test_arguments_are_any_two_structs() -> None:
    class Wide(ctypes.Structure):
        _fields_ = (("call", Call), ("more", _U64))

    class Narrow(ctypes.Structure):
        _fields_ = (("route", Route),)

    fake = FakeDriver()
    commands = CommandList(fake.driver)
    commands.launch(FUNCTION, 1, 32, 0, Wide(call=Call(n_tokens=9)), Narrow(route=Route(tiles=8)))
    commands.enqueue()
    assert fake.calls[0][4:6] == (bytes(Call(n_tokens=9)), bytes(Route(tiles=8)))


@pytest.mark.parametrize("number", [-1, 1, 2, 8])
def test_only_a_copy_has_an_address_of_the_host(number: int) -> None:
    commands = CommandList(FakeDriver().driver)
    commands.copy_in(DEVICE, HOST, 1)
    commands.launch(FUNCTION, 1, 32, 0, Call(), Route())
    with pytest.raises(IndexError, match=f"command {number} of 2 is no copy; pass a number"):
        commands.set_host_address(number, HOST)


def test_addresses_of_buffers() -> None:
    rows = np.zeros((4, 6), np.uint16)
    rows.flags.writeable = False
    start = rows.ctypes.data
    assert _launch.address_of(rows) == _launch.address_of(rows.data) == start
    assert _launch.address_of(rows[2:]) == start + 24
    assert _launch.address_of(rows[:, 1:]) == _launch.address_of(rows.T) == 0
    held = bytearray(8)
    _launch.address_of(held)
    held.append(1)  # refused while a view of it is in use


class EveryKind(ctypes.Structure):
    """The kinds of fields that kernels' arguments have."""

    _fields_ = (
        ("wide", _U64),
        ("number", ctypes.c_uint32),
        ("share", ctypes.c_float),
        ("signed", ctypes.c_int32),
        ("wide_signed", ctypes.c_int64),
    )


def test_fields_are_set_together_and_nothing_else_is() -> None:
    """In the order in which they were named, of several structs."""
    first, second = EveryKind(*[7] * 5), EveryKind(*[7] * 5)
    names = [name for name, _ in EveryKind._fields_]
    fields = Fields(*((first, name) for name in reversed(names)), (second, "signed"))
    for sign in (-1, 1):
        fields.set(sign << 62, sign * 5, 0.1, (1 << 32) - 1, (1 << 64) - 1, DType.BF16)
        assert (first.wide, first.number) == ((1 << 64) - 1, (1 << 32) - 1)
        assert (first.signed, first.wide_signed) == (sign * 5, sign << 62)
        assert first.share == ctypes.c_float(0.1).value
        assert [getattr(second, name) for name in names] == [7, 7, 7, DType.BF16, 7]
    fields.set(0, 0, 3, 0, 0, 0)
    assert first.share == 3


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ((1, 2), TypeError),
        ((1, 2, 3, 4), TypeError),
        ((1, 2, "3"), TypeError),
        ((1, 2, 1 << 31), OverflowError),
        ((1, 1 << 32, 3), OverflowError),
        ((-1, 2, 3), OverflowError),
        ((1 << 64, 2, 3), OverflowError),
        ((1, 2, -(1 << 31) - 1), OverflowError),
    ],
)
def test_values_that_do_not_fit_change_nothing(
    values: tuple[Any, ...], error: type[Exception]
) -> None:
    struct = EveryKind(*[7] * 5)
    before = bytes(struct)
    fields = Fields((struct, "wide"), (struct, "number"), (struct, "signed"))
    with pytest.raises(error):
        fields.set(*values)
    assert bytes(struct) == before
    fields.set(1, 2, 3)
    assert bytes(struct) != before


def test_fields_keep_what_they_write_to() -> None:
    every = [Fields((Call(), "x"), (Route(), "tiles")) for _ in range(100)]
    gc.collect()
    others = [(Call(x=9), Route(tiles=9)) for _ in range(1000)]
    for fields in every:
        fields.set(1, 2)
    assert all((call.x, route.tiles) == (9, 9) for call, route in others)


def test_fields_that_are_none() -> None:
    class Odd(ctypes.Structure):
        _fields_ = (("small", ctypes.c_uint8), ("call", Call))

    with pytest.raises(AttributeError, match="nothing"):
        Fields((Call(), "nothing"))
    with pytest.raises(TypeError, match="field 'small' is c_ubyte; pass one of an integer of 32"):
        Fields((Odd(), "small"))
    with pytest.raises(TypeError, match="field 'call' is Call"):
        Fields((Odd(), "call"))
    call = Call()
    Fields(*[(call, "x")] * 16).set(*range(16))
    assert call.x == 15
    with pytest.raises(IndexError, match="17 fields; 16 are the most"):
        Fields(*[(call, "x")] * 17)


def test_a_list_with_nothing() -> None:
    assert CommandList(FakeDriver().driver).enqueue() is None


def test_more_commands_than_a_list_takes() -> None:
    commands = CommandList(FakeDriver().driver)
    for _ in range(8):
        commands.copy_in(DEVICE, HOST, 1)
    with pytest.raises(IndexError, match="full with 8 commands; make another"):
        commands.launch(FUNCTION, 1, 32, 0, Call(), Route())
    with pytest.raises(IndexError, match="full with 8 commands; make another"):
        commands.copy_out(HOST, DEVICE, 1)
    for add in (commands.write_value, commands.wait_value):
        with pytest.raises(IndexError, match="full with 8 commands; make another"):
            add(DEVICE)


def test_other_threads_run_meanwhile() -> None:
    """A driver's function that waits for another thread: it would wait in vain with the GIL."""

    class Timespec(ctypes.Structure):
        _fields_ = (("s", ctypes.c_int64), ("ns", ctypes.c_int64))

    library = ctypes.CDLL(None)
    blocked, freed = (ctypes.create_string_buffer(64) for _ in range(2))
    for semaphore in (blocked, freed):
        library.sem_init(semaphore, 0, 0)
    deadline = Timespec(s=int(time.time()) + 20)
    post, wait = address_of(library.sem_post), address_of(library.sem_timedwait)
    driver = Driver(
        copy_in=post,
        copy_out=wait,
        launch=0,
        launch_overlapping=0,
        write_value=0,
        wait_value=0,
        wait_takes_mask=False,
        stream=0,
    )
    commands = CommandList(driver)
    commands.copy_in(ctypes.addressof(blocked), 0, 0)
    commands.copy_out(ctypes.addressof(freed), ctypes.addressof(deadline), 0)
    refused: list[tuple[int, int] | None] = []
    thread = threading.Thread(target=lambda: refused.append(commands.enqueue()))
    thread.start()
    library.sem_timedwait(blocked, ctypes.byref(deadline))
    library.sem_post(freed)
    thread.join()
    assert refused == [None]
