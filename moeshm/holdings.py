"""Which experts a worker holds, and for whom: views, and the backend's slots behind them."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import msgspec
import numpy as np

from .backends import Backend, GrowingBackend
from .checkpoint.layer import ExpertLayer
from .errors import InvalidCall
from .layers import LayerInfo, without_experts
from .protocol import SlotTable

_log = logging.getLogger(__name__)

#: `(layer -> the model's experts)`: reads them from the checkpoint, each layer in that order.
Load = Callable[[Mapping[int, Sequence[int]]], Mapping[int, ExpertLayer]]
#: Layer, and the model's id.
_Expert = tuple[int, int]


class View:
    """A set of experts by layer, in local order: what the local ids of a call mean.

    Made by `Holdings`, whose experts stay as long as a view lists them.
    """

    def __init__(self, layers: Mapping[int, LayerInfo], tables: Mapping[int, SlotTable]) -> None:
        #: `experts` of each is the view's local order.
        self.layers = MappingProxyType(dict(layers))
        #: Of the layers whose local ids are not the backend's slots.
        self.tables = MappingProxyType(dict(tables))

    def experts(self) -> list[_Expert]:
        """Every expert that it lists."""
        return [(layer, each) for layer, info in self.layers.items() for each in info.experts]


class Holdings:
    """A backend's experts, loaded when a view asks for them and dropped with the last that lists
    them. Every method may be called by several threads.

    `load` reads experts that are not held; without one, or with a backend that cannot grow, a view
    can only list what is held already, and nothing is dropped.
    """

    def __init__(self, backend: Backend, load: Load | None = None) -> None:
        self.backend = backend
        self._load = load
        self._lock = threading.Lock()
        # One load at a time: what another asked for as well is then there already.
        self._loading = threading.Lock()
        #: Of each layer that was ever held, without its experts.
        self._infos = {n: without_experts(info) for n, info in backend.layers.items()}
        self._default = View(backend.layers, {})
        self._slots: dict[_Expert, int] = {
            (layer, expert): slot
            for layer, info in backend.layers.items()
            for slot, expert in enumerate(info.experts)
        }
        self._uses = Counter(self._default.experts())
        self._can_load = load is not None and isinstance(backend, GrowingBackend)
        # For its being the default.
        self._leases = Counter([self._default])

    def lease(self) -> View:
        """The view that a new session gets: the last default that was held, at first what the
        backend was made with. `release` it."""
        with self._lock:
            self._leases[self._default] += 1
            return self._default

    def hold(self, experts: Mapping[int, Sequence[int]], is_default: bool = True) -> View:
        """A view of these experts, by layer in local order, once all of them are loaded; `release`
        it. `is_default`: `lease` gives it from then on.

        InvalidCall: an expert that this worker cannot load, none, or one twice in a layer. What
        `load` and the backend raise. Nothing has changed then.
        """
        wanted = {layer: tuple(ids) for layer, ids in experts.items()}
        self._check(wanted)
        with self._lock:
            if not self._missing(wanted):
                return self._make(wanted, is_default)
        with self._loading:
            with self._lock:
                missing = self._missing(wanted)
                # So that nobody's release drops meanwhile what is here.
                kept = [each for each in _listed(wanted) if each in self._slots]
                self._uses.update(kept)
            try:
                added = self._add(missing)
                with self._lock:
                    self._slots.update(added)
                    return self._make(wanted, is_default)
            finally:
                with self._lock:
                    self._forget(kept)

    def release(self, view: View) -> None:
        """The view's holder needs it no more."""
        with self._lock:
            self._release(view)

    def _release(self, view: View) -> None:
        self._leases[view] -= 1
        if not self._leases[view]:
            del self._leases[view]
            self._forget(view.experts())

    def _forget(self, experts: list[_Expert]) -> None:
        """One use less of each; those that nobody uses leave the backend. Holds the lock."""
        self._uses.subtract(experts)
        unused: dict[int, list[int]] = {}
        for expert in experts:
            if not self._uses[expert]:
                del self._uses[expert]
                unused.setdefault(expert[0], []).append(self._slots.pop(expert))
        if unused:
            self._remove(unused)
            _log.info("dropped %d experts", sum(map(len, unused.values())))

    def _make(self, wanted: Mapping[int, tuple[int, ...]], is_default: bool) -> View:
        """A view of what is all there. Holds the lock."""
        layers, tables = {}, {}
        for layer, ids in wanted.items():
            layers[layer] = msgspec.structs.replace(self._infos[layer], experts=ids)
            slots = [self._slots[layer, expert] for expert in ids]
            if slots != list(range(len(slots))):
                tables[layer] = np.array([*slots, -1], np.int32)
        view = View(layers, tables)
        self._uses.update(view.experts())
        self._leases[view] = 1
        # Where nothing comes or goes, all of it stays for newcomers.
        if is_default and self._can_load:
            self._leases[view] += 1
            before, self._default = self._default, view
            self._release(before)
        return view

    # --- what is missing --------------------------------------------------------------------

    def _check(self, wanted: Mapping[int, tuple[int, ...]]) -> None:
        if not wanted:
            raise InvalidCall("a view of no layer; name an expert, or release the views instead")
        for layer, ids in wanted.items():
            if not ids:
                raise InvalidCall(f"layer {layer}: no expert is asked for; leave the layer out")
            if len(set(ids)) != len(ids):
                raise InvalidCall(f"layer {layer}: an expert is asked for twice in {ids!r:.200}")
            info = self._infos.get(layer)
            wrong = [] if info is None else [e for e in ids if not 0 <= e < info.num_experts]
            if info is not None and wrong:
                raise InvalidCall(
                    f"layer {layer} has no expert {wrong[0]}; its experts are "
                    f"0-{info.num_experts - 1}"
                )

    def _missing(self, wanted: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
        """What no slot holds; only layers with some."""
        found = {
            layer: tuple(expert for expert in ids if (layer, expert) not in self._slots)
            for layer, ids in wanted.items()
        }
        return {layer: ids for layer, ids in found.items() if ids}

    def _add(self, missing: Mapping[int, tuple[int, ...]]) -> dict[_Expert, int]:
        """Load these and give them to the backend; their slots. All, or none."""
        if not missing:
            return {}
        backend = self.backend
        if self._load is None or not isinstance(backend, GrowingBackend):
            layer, ids = next(iter(missing.items()))
            raise InvalidCall(
                f"expert {ids[0]} of layer {layer} is not on this worker, which cannot load more "
                f"(backend {backend.name}); start it with these experts"
            )
        start = time.monotonic()
        loaded = self._load(missing)
        self._check_loaded(missing, loaded)
        added: dict[int, list[int]] = {}
        try:
            for layer, experts in loaded.items():
                added[layer] = backend.add(layer, experts)
        except BaseException:
            self._remove(added)
            raise
        _log.info(
            "loaded %d experts of %d layers, %.1f MiB, in %.1f s",
            sum(map(len, missing.values())),
            len(loaded),
            sum(each.nbytes for each in loaded.values()) / 2**20,
            time.monotonic() - start,
        )
        return {
            (layer, expert): slot
            for layer, slots in added.items()
            for expert, slot in zip(missing[layer], slots, strict=True)
        }

    def _check_loaded(
        self, missing: Mapping[int, tuple[int, ...]], loaded: Mapping[int, ExpertLayer]
    ) -> None:
        found = {layer: each.info for layer, each in loaded.items()}
        for layer, ids in missing.items():
            info = found.get(layer)
            if info is None or info.experts != ids:
                raise ValueError(f"layer {layer}: asked to load {ids}, and got {info}")
            known = self._infos.setdefault(layer, without_experts(info))
            if without_experts(info) != known:
                raise ValueError(
                    f"layer {layer} of the checkpoint is another than before: {info.summary()}, "
                    f"and was {known.summary()}; start the worker anew"
                )

    def _remove(self, slots: Mapping[int, Sequence[int]]) -> None:
        # Without it nothing is ever missing, or dropped.
        assert isinstance(self.backend, GrowingBackend)
        for layer, each in slots.items():
            self.backend.remove(layer, each)


def _listed(wanted: Mapping[int, tuple[int, ...]]) -> list[_Expert]:
    return [(layer, each) for layer, ids in wanted.items() for each in ids]
