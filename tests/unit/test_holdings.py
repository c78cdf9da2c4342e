"""A worker holds what some view lists, and nothing else; each view means what it was asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeshm.backends import Ids
from moeshm.backends.null import NullBackend
from moeshm.checkpoint import ExpertLayer
from moeshm.errors import InvalidCall
from moeshm.holdings import Holdings, View
from moeshm.protocol import SlotTable
from tests.growing import (
    LAYERS,
    NUM_EXPERTS,
    Experts,
    GrowingArithmetic,
    draw,
    expected,
    globally,
    layer_of,
    load,
)
from tests.wire import PATIENCE_S, meanwhile

FIRST = {0: (0, 1, 2, 3), 1: (5, 1)}


class CountingLoad:
    """Loads, and remembers what."""

    def __init__(self) -> None:
        self.loaded: list[tuple[int, int]] = []
        self.error: Exception | None = None

    def __call__(self, experts: Experts) -> dict[int, ExpertLayer]:
        self.loaded += [(n, e) for n, ids in experts.items() for e in ids]
        if self.error is not None:
            raise self.error
        return load(experts)


class GatedLoad(CountingLoad):
    """Waits until it is let, and tells that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)

    def __call__(self, experts: Experts) -> dict[int, ExpertLayer]:
        self.begun.release()
        assert self.may_end.acquire(timeout=PATIENCE_S)
        return super().__call__(experts)


def held(backend: GrowingArithmetic) -> list[tuple[int, int]]:
    """Layer and expert of every slot."""
    return sorted((layer, expert) for (layer, _), expert in backend.slots.items())


def listed(*experts: Experts) -> list[tuple[int, int]]:
    """What all of these list, each once."""
    return sorted({(n, e) for each in experts for n, ids in each.items() for e in ids})


def slots(table: SlotTable | None, ids: Ids) -> Ids:
    return ids if table is None else table[ids]


def assert_means(holdings: Holdings, view: View, experts: Experts, seed: int = 0) -> None:
    """Calls of the view's local ids are of these experts."""
    rng = np.random.default_rng(seed)
    assert {n: info.experts for n, info in view.layers.items()} == {
        n: tuple(ids) for n, ids in experts.items()
    }
    for layer, ids in experts.items():
        assert view.layers[layer] == layer_of(ids)
        hidden, local, weights = draw(rng, len(ids), 8)
        out = np.empty_like(hidden)
        holdings.backend.ffn(layer, hidden, slots(view.tables.get(layer), local), weights, out)
        wanted = expected(layer, hidden, globally(local, ids), weights)
        np.testing.assert_array_equal(out, wanted)


@pytest.fixture
def backend() -> GrowingArithmetic:
    return GrowingArithmetic(FIRST)


# --- anything at all ----------------------------------------------------------------------

_EXPERTS = st.dictionaries(
    st.sampled_from(LAYERS),
    st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True),
    min_size=1,
)
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), _EXPERTS),
        st.tuples(st.just("offer"), st.integers(0, 99)),
        st.tuples(st.just("fail"), _EXPERTS),
        st.tuples(st.just("lease"), st.none()),
        st.tuples(st.just("release"), st.integers(0, 99)),
    ),
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(_STEPS)
def test_any_holds_and_releases(steps: Sequence[tuple[str, object]]) -> None:
    backend, load = GrowingArithmetic(FIRST), CountingLoad()
    holdings = Holdings(backend, load)
    views: list[tuple[View, Experts]] = []
    default: Experts = FIRST
    for what, argument in steps:
        before = held(backend)
        load.loaded.clear()
        if what == "hold":
            experts: Experts = argument  # type: ignore[assignment]
            views.append((holdings.hold(experts), experts))
            assert sorted(load.loaded) == sorted(set(listed(experts)) - set(before))
        elif what == "fail":
            missing = set(listed(argument)) - set(before)  # type: ignore[arg-type]
            if missing:
                backend.refused = max(missing)
                with pytest.raises(MemoryError):
                    holdings.hold(argument)  # type: ignore[arg-type]
                backend.refused = None
                assert held(backend) == before
        elif what == "lease":
            views.append((holdings.lease(), default))
        elif what == "offer" and views:
            view, default = views[argument % len(views)]  # type: ignore[operator]
            holdings.offer(view)
        elif views:
            holdings.release(views.pop(argument % len(views))[0])  # type: ignore[operator]
        assert held(backend) == listed(default, *(experts for _, experts in views))
        for seed, (view, experts) in enumerate(views):
            assert_means(holdings, view, experts, seed)
    for view, _ in views:
        holdings.release(view)
    assert held(backend) == listed(default)


# --- sessions -----------------------------------------------------------------------------


def test_a_new_session_gets_the_view_that_was_offered_last(backend: GrowingArithmetic) -> None:
    holdings = Holdings(backend, load)
    newest = {1: (1, 5), 2: (4,)}
    view = holdings.hold(newest)
    # To hold one changes nothing for others.
    assert_means(holdings, holdings.lease(), FIRST)
    holdings.offer(view)
    holdings.release(view)
    assert holdings.lease() is view
    assert_means(holdings, view, newest)


def test_the_first_view_costs_no_table(backend: GrowingArithmetic) -> None:
    holdings = Holdings(backend, load)
    assert not holdings.lease().tables
    assert not holdings.hold(FIRST).tables
    view = holdings.hold({0: (0, 1), 1: (1, 5)})
    assert list(view.tables) == [1]


def test_two_that_ask_for_the_same_load_it_once(backend: GrowingArithmetic) -> None:
    load = GatedLoad()
    holdings = Holdings(backend, load)
    views: list[View] = []

    def hold() -> None:
        views.append(holdings.hold({2: (0, 3)}))

    with meanwhile(hold, hold):
        assert load.begun.acquire(timeout=PATIENCE_S)
        load.may_end.release()
    assert load.loaded == [(2, 0), (2, 3)]
    for view in views:
        assert_means(holdings, view, {2: (0, 3)})
        holdings.release(view)


class Waiting:
    """While somebody waits for experts 2 (there already) and 5 of layer 0."""

    def __init__(self, backend: GrowingArithmetic) -> None:
        self.load = GatedLoad()
        self.holdings = Holdings(backend, self.load)
        self.views: list[View] = []
        self.is_over = threading.Event()

    def hold(self) -> None:
        """In another thread."""
        self.views.append(self.holdings.hold({0: (5, 2)}))
        self.is_over.set()


@pytest.fixture
def waiting(backend: GrowingArithmetic) -> Iterator[Waiting]:
    waits = Waiting(backend)
    with meanwhile(waits.hold):
        assert waits.load.begun.acquire(timeout=PATIENCE_S)
        try:
            yield waits
        finally:
            waits.load.may_end.release()


def test_what_is_there_is_held_while_another_loads(waiting: Waiting) -> None:
    view = waiting.holdings.hold({0: (3, 1)})
    assert not waiting.views
    assert_means(waiting.holdings, view, {0: (3, 1)})
    assert waiting.load.loaded == []


def test_a_release_meanwhile_drops_nothing_that_is_waited_for(
    backend: GrowingArithmetic, waiting: Waiting
) -> None:
    # The default becomes a view without expert 2, and nobody else lists it.
    view = waiting.holdings.hold({1: (5,)})
    waiting.holdings.offer(view)
    waiting.holdings.release(view)
    assert held(backend) == [(0, 2), (1, 5)]
    waiting.load.may_end.release()
    assert waiting.is_over.wait(PATIENCE_S)
    assert_means(waiting.holdings, waiting.views[0], {0: (5, 2)})
    assert held(backend) == [(0, 2), (0, 5), (1, 5)]


@pytest.mark.parametrize("n_loaded", [0, 1])
def test_what_nobody_wants_any_more_is_not_loaded(
    backend: GrowingArithmetic, n_loaded: int
) -> None:
    """It is asked again before each layer; those that were loaded are dropped."""
    load = CountingLoad()
    answers = iter([True] * n_loaded + [False])
    holdings = Holdings(backend, load)
    with pytest.raises(InvalidCall, match="nobody waits any more"):
        holdings.hold({0: (4, 5), 2: (1,)}, lambda: next(answers))
    assert load.loaded == [(0, 4), (0, 5)][: 2 * n_loaded]
    assert held(backend) == listed(FIRST)


def test_nobody_waits_for_what_is_dropped(backend: GrowingArithmetic) -> None:
    """The backend may be busy; a session that only begins, or releases, needs nothing of it."""
    holdings = Holdings(backend, load)
    view = holdings.hold({2: (3,)})
    begun, may_end = threading.Event(), threading.Event()
    remove = backend.remove

    def slowly(layer: int, slots: Sequence[int]) -> None:
        begun.set()
        assert may_end.wait(PATIENCE_S)
        remove(layer, slots)

    backend.remove = slowly  # type: ignore[method-assign]
    with meanwhile(lambda: holdings.release(view)):
        try:
            assert begun.wait(PATIENCE_S)
            is_over = threading.Event()

            def others() -> None:
                holdings.release(holdings.lease())
                # What is on its way out is loaded anew.
                assert_means(holdings, holdings.hold({2: (3,)}), {2: (3,)})
                is_over.set()

            with meanwhile(others):
                assert is_over.wait(PATIENCE_S)
                may_end.set()
        finally:
            may_end.set()
    assert held(backend) == listed(FIRST, {2: (3,)})


# --- what cannot be -----------------------------------------------------------------------


def test_a_load_that_fails_changes_nothing(backend: GrowingArithmetic) -> None:
    load = CountingLoad()
    holdings = Holdings(backend, load)
    load.error = OSError("the disk is gone")
    with pytest.raises(OSError, match="the disk is gone"):
        holdings.hold({0: (1, 5), 2: (0,)})
    assert held(backend) == listed(FIRST)
    load.error = None
    assert_means(holdings, holdings.hold({0: (1, 5), 2: (0,)}), {0: (1, 5), 2: (0,)})


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        ({}, "a view of no layer"),
        ({0: ()}, "layer 0: no expert is asked for"),
        ({0: (1, 1)}, "layer 0: an expert is asked for twice"),
        ({0: (0, 6)}, "layer 0 has no expert 6; its experts are 0-5"),
        ({1: (0, -1)}, "layer 1 has no expert -1"),
    ],
)
def test_a_view_that_cannot_be_is_refused(
    backend: GrowingArithmetic, experts: Experts, says: str
) -> None:
    load = CountingLoad()
    holdings = Holdings(backend, load)
    with pytest.raises(InvalidCall, match=says):
        holdings.hold(experts)
    assert held(backend) == listed(FIRST)
    assert load.loaded == []


def test_a_checkpoint_that_changed_is_refused(backend: GrowingArithmetic) -> None:
    other = layer_of((5,), hidden_size=16)
    weights = load({0: (5,)})[0].expert(0)
    wide = np.ones((1, 16), np.float32)
    layer = ExpertLayer(other, [type(weights)(wide, wide, wide.T.copy())])
    holdings = Holdings(backend, lambda _experts: {0: layer})
    with pytest.raises(ValueError, match="another than before"):
        holdings.hold({0: (5,)})
    with pytest.raises(ValueError, match="asked to load"):
        holdings.hold({0: (4,)})
    assert held(backend) == listed(FIRST)


@pytest.mark.parametrize("can_grow", [True, False])
def test_without_a_loader_experts_stay_and_none_come(
    backend: GrowingArithmetic, can_grow: bool
) -> None:
    holdings = (
        Holdings(backend)
        if can_grow
        else Holdings(NullBackend({n: layer_of(ids) for n, ids in FIRST.items()}), load)
    )
    with pytest.raises(InvalidCall, match=r"expert 5 of layer 0 .*cannot load more \(backend"):
        holdings.hold({0: (1, 5)})
    part = holdings.hold({0: (1, 0)})
    np.testing.assert_array_equal(part.tables[0], [1, 0, -1])
    # All the others would be nobody's, and could not be loaded again.
    holdings.offer(part)
    holdings.release(holdings.hold(FIRST))
    holdings.release(part)
    assert held(backend) == listed(FIRST)
    # Newcomers are not confined to what one client asked for.
    assert holdings.lease().layers[0].experts == FIRST[0]
