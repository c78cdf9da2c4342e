"""Which experts a worker holds, and for whom: views, and the backend's slots behind them."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import msgspec
import numpy as np

from .backends import Backend, GrowingBackend
from .checkpoint.layer import ExpertLayer
from .errors import DeviceLost, InvalidCall
from .layers import LayerInfo, without_experts
from .logs import limited
from .protocol import SlotTable

_log = limited(__name__)

#: `(layer -> the model's experts)`: reads them from the checkpoint, each layer in that order. Asked
#: for one layer at a time.
Load = Callable[[Mapping[int, Sequence[int]]], Mapping[int, ExpertLayer]]
#: Layer, and the model's id.
_Expert = tuple[int, int]
#: By layer, slots of the backend.
_Slots = Mapping[int, Sequence[int]]


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
    them. Every method may be called by several threads; only `hold` waits for what is loaded.

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
        """The view that a new session gets: what was offered last, at first what the backend was
        made with. `release` it."""
        with self._lock:
            self._leases[self._default] += 1
            return self._default

    def offer(self, view: View) -> None:
        """`lease` gives it from now on; its holder may release it. Where nothing comes or goes,
        newcomers get all there is, and this does nothing."""
        if not self._can_load:
            return
        with self._lock:
            self._leases[view] += 1
            before, self._default = self._default, view
            unused = self._release(before)
        self._drop(unused)

    def hold(
        self,
        experts: Mapping[int, Sequence[int]],
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> View:
        """A view of these experts, by layer in local order, once all of them are loaded; `release`
        it. `is_wanted`: asked before each layer is loaded.

        InvalidCall: an expert that this worker cannot load, none, or one twice in a layer; or they
        are not wanted any more. What `load` and the backend raise. Nothing has changed then.
        """
        wanted = {layer: tuple(ids) for layer, ids in experts.items()}
        self._check(wanted)
        with self._lock:
            if not self._missing(wanted):
                return self._make(wanted)
        with self._loading:
            with self._lock:
                missing = self._missing(wanted)
                # So that nobody's release drops meanwhile what is here.
                kept = [each for each in _listed(wanted) if each in self._slots]
                self._uses.update(kept)
            try:
                added = self._add(missing, is_wanted)
                with self._lock:
                    self._slots.update(added)
                    return self._make(wanted)
            finally:
                with self._lock:
                    unused = self._forget(kept)
                self._drop(unused)

    def release(self, view: View) -> None:
        """The view's holder needs it no more."""
        with self._lock:
            unused = self._release(view)
        self._drop(unused)

    def _release(self, view: View) -> _Slots:
        """One lease less; what nobody uses now. Holds the lock."""
        self._leases[view] -= 1
        if self._leases[view]:
            return {}
        del self._leases[view]
        return self._forget(view.experts())

    def _forget(self, experts: Iterable[_Expert]) -> _Slots:
        """One use less of each; those that nobody uses are to be dropped. Holds the lock."""
        unused: dict[int, list[int]] = {}
        for expert in experts:
            self._uses[expert] -= 1
            if not self._uses[expert]:
                del self._uses[expert]
                unused.setdefault(expert[0], []).append(self._slots.pop(expert))
        return unused

    def _drop(self, unused: _Slots) -> None:
        """Take out of the backend what is in no slot of ours. Without the lock: whoever else needs
        it must not wait for the backend."""
        if not unused:
            return
        try:
            self._remove(unused)
        except DeviceLost as error:
            # What it held is gone, and the next call will say so.
            _log.warning("experts were not dropped: %s", error)
        else:
            _log.info("dropped %d experts", sum(map(len, unused.values())))

    def _make(self, wanted: Mapping[int, tuple[int, ...]]) -> View:
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

    def _add(
        self, missing: Mapping[int, tuple[int, ...]], is_wanted: Callable[[], bool]
    ) -> dict[_Expert, int]:
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
        added: dict[int, list[int]] = {}
        n_bytes = 0
        try:
            for layer, ids in missing.items():
                if not is_wanted():
                    raise InvalidCall("nobody waits any more for the experts that were to be held")
                loaded = self._load({layer: ids})[layer]
                self._check_loaded(layer, ids, loaded)
                added[layer] = backend.add(layer, loaded)
                n_bytes += loaded.nbytes
        except BaseException:
            self._remove(added)
            raise
        _log.info(
            "loaded %d experts of %d layers, %.1f MiB, in %.1f s",
            sum(map(len, added.values())),
            len(added),
            n_bytes / 2**20,
            time.monotonic() - start,
        )
        return {
            (layer, expert): slot
            for layer, slots in added.items()
            for expert, slot in zip(missing[layer], slots, strict=True)
        }

    def _check_loaded(self, layer: int, ids: tuple[int, ...], loaded: ExpertLayer) -> None:
        info = loaded.info
        if info.experts != ids:
            raise ValueError(f"layer {layer}: asked to load {ids}, and got {info}")
        known = self._infos.setdefault(layer, without_experts(info))
        if without_experts(info) != known:
            raise ValueError(
                f"layer {layer} of the checkpoint is another than before: {info.summary()}, "
                f"and was {known.summary()}; start the worker anew"
            )

    def _remove(self, slots: _Slots) -> None:
        # Without it nothing is ever missing, or dropped.
        assert isinstance(self.backend, GrowingBackend)
        for layer, each in slots.items():
            self.backend.remove(layer, each)


def _listed(wanted: Mapping[int, tuple[int, ...]]) -> list[_Expert]:
    return [(layer, each) for layer, ids in wanted.items() for each in ids]
