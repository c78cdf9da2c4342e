"""A placement in use: the tables of its layers, and what local ids mean at each worker."""

from __future__ import annotations

from collections.abc import Mapping

from ..backends import Backend
from ..held import HeldView
from ..layers import LayerInfo
from ..placement import Placement, PlacementError
from . import dispatch
from .layer import LocalExperts, OffloadedLayer
from .remote import Remote

#: By worker and transport, what calls name.
Views = Mapping[str, Mapping[str, HeldView]]


class Plan:
    """Immutable, but for how many forwards use it."""

    def __init__(
        self,
        placement: Placement,
        views: Views,
        held: Mapping[str, Mapping[int, LayerInfo]],
        local: LocalExperts | Backend | None,
        fallback: Backend | None,
    ) -> None:
        self.placement = placement
        self.views = views
        self.local = local
        self.fallback = fallback
        #: By worker, the layers as it holds them.
        self.held = held
        self.layers = {
            number: OffloadedLayer(number, placement, held, local, fallback)
            for number in placement.layers
        }
        #: Forwards that are under way by it.
        self.n_users = 0

    @classmethod
    def first(
        cls,
        placement: Placement,
        remotes: Mapping[str, Remote],
        local: LocalExperts | Backend | None,
        fallback: Backend | None,
    ) -> Plan:
        """With what the workers hold as they were found; PlacementError."""
        views = {}
        for name, remote in remotes.items():
            for client in remote.clients.values():
                dispatch.check_layers(placement, name, client.layers)
            views[name] = {each: client.view for each, client in remote.clients.items()}
        held = {name: remote.layers for name, remote in remotes.items()}
        return cls(placement, views, held, local, fallback)

    @classmethod
    def with_views(
        cls,
        placement: Placement,
        views: Views,
        local: LocalExperts | Backend | None,
        fallback: Backend | None,
    ) -> Plan:
        """With what the workers hold by now, which calls will name."""
        held = {name: next(iter(each.values())).layers for name, each in views.items()}
        for name, layers in held.items():
            dispatch.check_layers(placement, name, layers)
        plan = cls(placement, views, held, local, fallback)
        for layer in plan.layers.values():
            layer.dispatch.routes(frozenset())  # which the first forward would have to make
        return plan

    def check(
        self,
        placement: Placement,
        remotes: Mapping[str, Remote],
        local: LocalExperts | Backend | None,
        fallback: Backend | None,
    ) -> None:
        """PlacementError unless a placement can follow this one."""
        if placement.layers.keys() != self.layers.keys():
            raise PlacementError(
                f"the placement has layers {list(placement.layers)}, this offload "
                f"{list(self.layers)}; place all of them"
            )
        for number, layer in placement.layers.items():
            if layer.num_experts != self.layers[number].dispatch.num_experts:
                raise PlacementError(
                    f"layer {number} has {layer.num_experts} experts in the placement and "
                    f"{self.layers[number].dispatch.num_experts} here; it is another model's"
                )
        for name in placement.workers:
            if placement.experts_of(name) and name not in remotes:
                raise PlacementError(
                    f"no worker {name!r}; this offload has {', '.join(remotes) or 'none'}"
                )
        Plan(placement, {}, self.held, local, fallback)
