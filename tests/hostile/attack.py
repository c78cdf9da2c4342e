"""What an attack is: a module of `attacks/`, named by its file.

A module has

- a docstring: what the attacker does, in one sentence, and then why it would hurt;
- `REFUSAL`: how it is answered, and `VARIANTS`, by name, where one differs in what is done;
- `attack(attacker, what)`, which does it over one connection and leaves the answer to be read; or
  `scene(victim, transport, what, refusal)`, which needs more than that and checks answers itself.

What is not said is usual: a session over each transport that was served once before.
`TRANSPORTS`, `HAS_SESSION`, `N_SERVED`, `SLAB` say otherwise, and `VICTIM` or `VICTIMS` name other
workers of conftest.py. With `SIDE = "worker"` a worker attacks a client: then `scene` gets a folder
for its socket instead of the victim, and checks what the client raises.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple

from moeshm.errors import MoeshmError

from . import attacks

BOTH = ("shared", "stream")
#: Of an attack with fds: as before Linux 6.16, and since.
TAKING_AND_REFUSING = ("victim", "refusing_victim")


class Refusal(NamedTuple):
    """What the attacker gets, as the error that a client of ours would raise from it, or that a
    client which is attacked raises; and what the log says. None: the worker goes on as usual."""

    error: type[MoeshmError] | None
    says: str = ""
    log: str = ""


class Variant(NamedTuple):
    """One way to do it."""

    #: Whatever the module's function takes.
    what: Any = None
    #: Where it is answered in other words than `REFUSAL.says`.
    says: str = ""
    #: Where it is answered by another error.
    error: type[MoeshmError] | None = None


class Attack:
    """A module of `attacks/`."""

    def __init__(self, module: ModuleType) -> None:
        assert module.__doc__ is not None
        self.module = module
        self.name = module.__name__.rpartition(".")[2]
        self.what, _, self.why = module.__doc__.strip().partition("\n\n")
        self.refusal: Refusal = module.REFUSAL
        self.variants: Mapping[str, Variant] = getattr(module, "VARIANTS", {"": Variant()})
        self.transports: tuple[str, ...] = getattr(module, "TRANSPORTS", BOTH)
        self.has_session: bool = getattr(module, "HAS_SESSION", True)
        self.n_served: int = getattr(module, "N_SERVED", 1)
        self.slab: str = getattr(module, "SLAB", "")
        victim: str = getattr(module, "VICTIM", "victim")
        self.victims: tuple[str, ...] = getattr(module, "VICTIMS", (victim,))
        self.side: str = getattr(module, "SIDE", "client")

    def refusal_of(self, variant: Variant) -> Refusal:
        """How this variant is answered."""
        return self.refusal._replace(
            error=variant.error or self.refusal.error, says=variant.says or self.refusal.says
        )


class Case(NamedTuple):
    """One test."""

    attack: Attack
    variant: str
    transport: str
    victim: str

    def __str__(self) -> str:
        which = self.victim if len(self.attack.victims) > 1 else ""
        parts = (self.attack.name, self.variant, self.transport, which)
        return "-".join(part for part in parts if part)


def load_all() -> list[Attack]:
    """Every attack, by name."""
    names = sorted(info.name for info in pkgutil.iter_modules(attacks.__path__))
    return [Attack(importlib.import_module(f"{attacks.__name__}.{name}")) for name in names]


def cases(side: str) -> list[Case]:
    """Every variant over every transport on every victim, of attacks by a client or by a worker."""
    return [
        Case(attack, variant, transport, victim)
        for attack in load_all()
        if attack.side == side
        for variant in attack.variants
        for transport in attack.transports
        for victim in attack.victims
    ]
