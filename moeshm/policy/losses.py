"""What failing calls cost, by the transport that they took."""

from __future__ import annotations

#: Of a new call in the rate of losses of its transport.
CALL_WEIGHT = 0.1
#: Of a success elsewhere: a transport that is avoided is forgiven as well, in time, and tried
#: again.
OTHER_WEIGHT = 0.02
#: Expected losses below this are none.
NEGLIGIBLE_NS = 10.0


class Losses:
    """Rate of losses times their mean cost, for each transport that ever lost a call."""

    def __init__(self) -> None:
        self.n_lost = 0
        self._rate: dict[str, float] = {}
        self._cost_ns: dict[str, float] = {}

    def lost(self, transport: str, cost_ns: float) -> None:
        """A call over this transport failed and cost so much."""
        self.n_lost += 1
        rate = self._rate.get(transport, 0.0)
        self._rate[transport] = rate + CALL_WEIGHT * (1 - rate)
        before_ns = self._cost_ns.get(transport, cost_ns)
        self._cost_ns[transport] = (before_ns + cost_ns) / 2

    def succeeded(self, transport: str) -> None:
        """A call over this transport went well."""
        if not self._rate:
            return
        for name in list(self._rate):
            self._rate[name] *= 1 - (CALL_WEIGHT if name == transport else OTHER_WEIGHT)
            if self.expected_ns(name) < NEGLIGIBLE_NS:
                del self._rate[name], self._cost_ns[name]

    def expected_ns(self, transport: str) -> float:
        """What a call over this transport is expected to lose."""
        rate = self._rate.get(transport)
        return 0.0 if rate is None else rate * self._cost_ns[transport]
