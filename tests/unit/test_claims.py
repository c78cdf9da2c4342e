"""Claims of a slab: which call has which part of it, its flags, and the descriptor that tells."""

from __future__ import annotations

import gc
import itertools
import mmap
import threading
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeshm import descriptors
from moeshm._claims import Allocator, Claim, sizes
from moeshm._ring import RingConsumer, RingProducer
from moeshm._words import load_word, store_word
from moeshm.descriptors import DESCRIPTOR, Descriptor
from moeshm.dtypes import DType
from moeshm.transport.slab import (
    ALIGNMENT,
    DONE,
    FLAGS_BYTES,
    GIVEN,
    REFUSED,
    SLOT_BYTES,
    SLOTS,
    TAKEN,
    Places,
)

DATA_BYTES = 64 << 10
#: Of sequences: whoever waits for an abandoned call must still find one more than that reached, by
#: comparing plain numbers.
LAST = 0xFFFFFFFE
#: Tokens, hidden_size, top_k, format.
Shape = tuple[int, int, int, DType]
SHAPES = st.tuples(
    st.integers(0, 20), st.integers(0, 600), st.integers(0, 40), st.sampled_from(DType)
)
#: Four arrays, each as long as the alignment or shorter.
SMALL: Shape = (1, 4, 1, DType.F32)
each_flag = pytest.mark.parametrize("flag", [GIVEN, DONE, REFUSED, TAKEN])


def flags() -> bytearray:
    """A segment without data."""
    return bytearray(FLAGS_BYTES)


def claimed(allocator: Allocator, shape: Shape) -> Claim:
    """There must be room."""
    claim = allocator.claim(*shape)
    assert claim is not None
    return claim


def expected_sizes(
    n_tokens: int, hidden_size: int, top_k: int, dtype: DType
) -> tuple[int, int, int, int]:
    """Bytes of hidden states, ids, weights and output."""
    rows, pairs = n_tokens * hidden_size * dtype.itemsize, n_tokens * top_k * 4
    return rows, pairs, pairs, rows


def parts(claim: Claim, shape: Shape) -> list[tuple[int, int]]:
    """Where its arrays begin and end."""
    return [
        (at, at + size) for at, size in zip(claim.places[1:], expected_sizes(*shape), strict=True)
    ]


@given(st.lists(st.one_of(SHAPES, st.just("free")), max_size=200))
def test_claims_never_overlap(steps: list[Shape | str]) -> None:
    allocator = Allocator(flags(), DATA_BYTES)
    live: list[tuple[Claim, Shape]] = []
    last = 0
    for step in steps:
        if isinstance(step, str):
            if live:
                allocator.free_oldest()
                live.pop(0)
            continue
        claim = allocator.claim(*step)
        if claim is None:
            assert live or step[0] > allocator.most_tokens(*step[1:])
            continue
        assert claim.sequence == last + 1
        last = claim.sequence
        live.append((claim, step))
        assert len({each.places.slot for each, _ in live}) == len(live) <= SLOTS
        regions = sorted(region for each, shape in live for region in parts(each, shape))
        assert regions[-1][1] <= DATA_BYTES
        assert all(begin % ALIGNMENT == 0 for begin, _ in regions)
        used = [region for region in regions if region[0] < region[1]]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(used))
        assert sizes(*step) == expected_sizes(*step)
        assert claim.out_bytes == expected_sizes(*step)[3]
        assert claim.given_bytes == sum(expected_sizes(*step)[:3])


def test_there_are_as_many_claims_as_slots() -> None:
    allocator = Allocator(flags(), DATA_BYTES)
    claims = [claimed(allocator, SMALL) for _ in range(SLOTS)]
    assert allocator.claim(*SMALL) is None
    allocator.free_oldest()
    assert claimed(allocator, SMALL).places.slot == claims[0].places.slot


def test_room_that_is_free_is_given_out_again() -> None:
    """Lap after lap, though the slab is never empty."""
    half = (1, 256, 1, DType.F32)
    allocator = Allocator(flags(), 2 * (2 * 1024 + 2 * ALIGNMENT))
    places = [claimed(allocator, half).places.hidden_states for _ in range(2)]
    for lap in range(3 * SLOTS):
        assert allocator.claim(*half) is None
        allocator.free_oldest()
        assert claimed(allocator, half).places.hidden_states == places[lap % 2]


def test_an_empty_slab_begins_anew() -> None:
    """What was used last is in caches."""
    allocator = Allocator(flags(), DATA_BYTES)
    for _ in range(100):
        assert claimed(allocator, (4, 256, 4, DType.F32)).places.hidden_states == 0
        allocator.free_oldest()


@pytest.mark.parametrize("dtype", DType)
def test_the_longest_call_fits_and_no_longer_one(dtype: DType) -> None:
    allocator = Allocator(flags(), 1 << 18)
    most = allocator.most_tokens(128, 4, dtype)
    assert allocator.claim(most + 4, 128, 4, dtype) is None
    claimed(allocator, (most, 128, 4, dtype))


@pytest.mark.parametrize("data_bytes", [1, 4 * ALIGNMENT, 4 * ALIGNMENT + 39])
def test_a_slab_without_room_for_a_token(data_bytes: int) -> None:
    assert Allocator(flags(), data_bytes).most_tokens(4, 1, DType.F32) == 0


def test_what_no_allocator_is_made_of() -> None:
    with pytest.raises(ValueError, match=f"{FLAGS_BYTES - 1} bytes"):
        Allocator(bytearray(FLAGS_BYTES - 1), DATA_BYTES)
    with pytest.raises(ValueError, match="0 bytes"):
        Allocator(flags(), 0)
    with pytest.raises(ValueError, match=f"last_sequence={LAST}"):
        Allocator(flags(), DATA_BYTES, LAST)
    with pytest.raises(BufferError):
        Allocator(bytes(FLAGS_BYTES), DATA_BYTES)


def test_what_was_not_claimed_is_not_freed() -> None:
    allocator = Allocator(flags(), DATA_BYTES)
    with pytest.raises(IndexError, match="nothing is claimed"):
        allocator.free_oldest()
    claimed(allocator, SMALL)
    allocator.free_oldest()
    with pytest.raises(IndexError, match="nothing is claimed"):
        allocator.free_oldest()


@pytest.mark.parametrize("n_held", [0, 1, SLOTS - 1])
def test_sequences_never_wrap(n_held: int) -> None:
    """Not every driver's waits compare in a circle."""
    memory = flags()
    allocator = Allocator(memory, DATA_BYTES, LAST - 2 * SLOTS)
    held: list[Claim] = [claimed(allocator, SMALL) for _ in range(n_held)]
    while claim := allocator.claim(*SMALL):
        for flag in (GIVEN, DONE, TAKEN):
            now = load_word(memory, claim.flag(flag))
            assert now < claim.sequence
            claim.set(flag, claim.sequence)
        held.append(claim)
        if len(held) > n_held:
            held.pop(0)
            allocator.free_oldest()
            if not held and claim.sequence < LAST:
                break  # it has begun anew at once
    if n_held:
        assert held[-1].sequence == LAST
    for each in held:
        assert allocator.claim(*SMALL) is None
        allocator.free_oldest()
        assert each.has_reached(TAKEN)
    claim = claimed(allocator, SMALL)
    assert (claim.sequence, claim.places.slot) == (1, 0)
    for slot in range(SLOTS):
        for flag in (GIVEN, DONE, TAKEN, REFUSED):
            assert load_word(memory, slot * SLOT_BYTES + flag) == 0
    assert not claim.has_reached(DONE)


def test_sequences_go_on_while_there_are_enough() -> None:
    """To begin anew is for sessions that are long."""
    allocator = Allocator(flags(), DATA_BYTES, 1 << 31)
    for number in range(1, 2 * SLOTS):
        assert claimed(allocator, SMALL).sequence == (1 << 31) + number
        allocator.free_oldest()


@each_flag
def test_flags_are_where_transport_slab_says(flag: int) -> None:
    memory = flags()
    allocator = Allocator(memory, DATA_BYTES, 30)
    for slot in (30, 31, 0):
        claim = claimed(allocator, SMALL)
        assert claim.flag(flag) == slot * SLOT_BYTES + flag
        claim.set(flag, 77)
        assert load_word(memory, slot * SLOT_BYTES + flag) == 77
    claim.set(REFUSED, 5)
    assert claim.refused == 5


@pytest.mark.parametrize(
    ("now", "sequence", "is_there"),
    [
        (4, 5, False),
        (5, 5, True),
        (6, 5, True),
        (0xFFFFFFFF, 0xFFFFFFFE, True),
        (0, 0xFFFFFFFE, True),
        (0xFFFFFFFF, 1, False),
        (0x80000004, 5, True),
        (0x80000006, 5, False),
    ],
)
@each_flag
def test_a_flag_that_is_reached(flag: int, now: int, sequence: int, is_there: bool) -> None:
    claim = claimed(Allocator(flags(), DATA_BYTES, sequence - 1), SMALL)
    assert claim.sequence == sequence
    claim.set(flag, now)
    assert claim.has_reached(flag) == claim.wait(flag, 0, 0) == is_there


def test_a_flag_is_waited_for() -> None:
    memory = flags()
    claim = claimed(Allocator(memory, DATA_BYTES), SMALL)
    setter = threading.Thread(target=store_word, args=(memory, claim.flag(TAKEN), 1))
    setter.start()
    assert claim.wait(TAKEN, 20 * 10**9, 0)
    setter.join()


@pytest.mark.parametrize("sequence", [1, 40, LAST - 1, LAST])
def test_an_abandoned_call_is_passed_when_the_worker_says_so(sequence: int) -> None:
    """Whoever waits for it goes on before, and is not held up again."""
    memory = flags()
    claim = claimed(Allocator(memory, DATA_BYTES, sequence - 1), SMALL)
    # Of the slot's last call, abandoned or not.
    for before in (sequence - SLOTS, sequence - SLOTS + 1):
        claim.set(DONE, before % (1 << 32))
        claim.abandon()
        assert claim.has_reached(DONE)
        assert not claim.is_passed
    store_word(memory, claim.flag(DONE), sequence)
    assert claim.has_reached(DONE)
    assert claim.is_passed


def test_what_is_passed_cannot_be_abandoned() -> None:
    """The worker says it once."""
    claim = claimed(Allocator(flags(), DATA_BYTES), SMALL)
    claim.set(DONE, claim.sequence)
    claim.abandon()
    assert claim.is_passed


def test_a_call_in_the_slot_of_an_abandoned_one_is_to_be_done() -> None:
    memory = flags()
    allocator = Allocator(memory, DATA_BYTES)
    for _ in range(SLOTS):
        claim = claimed(allocator, SMALL)
        claim.abandon()
        claim.abandon_taken()
        assert load_word(memory, claim.flag(DONE)) == load_word(memory, claim.flag(TAKEN))
        allocator.free_oldest()
    for _ in range(SLOTS):
        claim = claimed(allocator, SMALL)
        assert not claim.has_reached(DONE)
        assert not claim.has_reached(TAKEN)
        assert not claim.is_passed


def test_a_new_call_is_not_refused() -> None:
    """Though the last one of its slot was."""
    memory = flags()
    for slot in range(SLOTS):
        store_word(memory, slot * SLOT_BYTES + REFUSED, 9)
    allocator = Allocator(memory, DATA_BYTES)
    assert [claimed(allocator, SMALL).refused for _ in range(SLOTS)] == [0] * SLOTS


@pytest.mark.parametrize("place", [2, SLOT_BYTES, SLOT_BYTES + GIVEN + 4, (1 << 32) - 4])
def test_what_is_no_flag(place: int) -> None:
    for claim in (claimed(Allocator(flags(), DATA_BYTES), SMALL), Claim()):
        for use in (claim.flag, claim.has_reached, lambda place: claim.set(place, 1)):  # noqa: B023
            with pytest.raises(IndexError, match=f"no flag at {place}"):
                use(place)
    with pytest.raises(IndexError, match="no flag"):
        _ = Claim().refused


def test_the_flags_stay_mapped_for_who_has_a_claim() -> None:
    mapping = mmap.mmap(-1, FLAGS_BYTES)
    allocator, is_mapped = Allocator(mapping, DATA_BYTES), weakref.ref(mapping)
    claim = claimed(allocator, SMALL)
    del mapping
    allocator.close()
    assert allocator.claim(*SMALL) is None
    claim.set(DONE, 1)
    assert claim.has_reached(DONE)
    assert is_mapped() is not None
    del claim
    gc.collect()
    assert is_mapped() is None


@pytest.mark.parametrize("are_global", [False, True])
@pytest.mark.parametrize("dtype", DType)
def test_its_descriptor_arrives_as_it_was(dtype: DType, are_global: bool) -> None:
    allocator = Allocator(flags(), 1 << 42, (1 << 32) - 38)
    # Offsets are longer than 32 bits.
    claimed(allocator, ((1 << 24) - 1, 1 << 14, 3, dtype))
    claim = claimed(allocator, (5, 64, (1 << 16) - 1, dtype))
    call_id, layer, view = (1 << 64) - 2, (1 << 32) - 3, (1 << 32) - 7
    record = claim.describe(call_id, layer, 12345.678901234, view, are_global)
    with (
        RingProducer.create(None, 4096) as producer,
        RingConsumer.attach(producer.fileno()) as consumer,
    ):
        producer.write((record,), DESCRIPTOR)
        with consumer.acquire(1.0) as received:
            found = descriptors.read(received)
    assert found == Descriptor(
        call_id, layer, 12345678901234, 5, 64, (1 << 16) - 1, are_global, dtype,
        claim.sequence, claim.places, view,
    )  # fmt: skip
    assert type(claim.places) is Places
    assert claim.places.slot == 27
    assert claim.places.hidden_states > 1 << 32
