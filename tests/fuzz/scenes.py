"""What live targets keep between executions: a process under attack, and sessions with it."""

from __future__ import annotations

import abc
from typing import Generic, TypeVar

from tests.fuzz.keeper import Closes
from tests.fuzz.victims import Victim

TRANSPORTS = ("shared", "stream")
#: Executions between two looks at the victim.
LOOK_EVERY = 256

_Session = TypeVar("_Session", bound=Closes)


class Scene(abc.ABC, Generic[_Session]):
    """A victim, and a session with it over each transport."""

    def __init__(self, victim: Victim) -> None:
        self.victim = victim
        self.sessions: dict[str, _Session] = {}
        self.n_executions = 0

    @abc.abstractmethod
    def look(self) -> None:
        """Assert that the victim serves as it should; it has none of these sessions."""

    def drop(self, transport: str) -> None:
        """The session is over, or to be over."""
        session = self.sessions.pop(transport, None)
        if session is not None:
            session.close()

    def _drop_all(self) -> None:
        for transport in TRANSPORTS:
            self.drop(transport)

    def count(self) -> None:
        """One execution more; looks after the victim from time to time."""
        self.n_executions += 1
        if self.n_executions % LOOK_EVERY == 0:
            self._drop_all()
            self.look()
            self.victim.check()

    def close(self) -> None:
        """End all."""
        self._drop_all()
        self.victim.close()
