"""Kills a worker with a call on its way, to show what happens then."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..backends import Ids, Weights
from ..call import CallFuture
from ..client import ExpertClient
from ..dtypes import FloatArray


class Kill(NamedTuple):
    """SIGKILL to the worker: which process, and during which call."""

    pid: int
    #: The token, counted from 0, that was being computed.
    token: int
    layer: int


class Victim:
    """A client that kills its worker once; all else is the client's.

    `forwards`: grows by one whenever the decoder asks for a layer's experts. `kill_at`: how many
    come first; the next call to the worker is the fatal one. None: never.
    """

    def __init__(
        self, client: ExpertClient, n_layers: int, forwards: Sequence[Any], kill_at: int | None
    ) -> None:
        self._client = client
        self._n_layers = n_layers
        self._forwards = forwards
        self._kill_at = kill_at
        self.kill: Kill | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def submit(
        self,
        layer: int,
        hidden_states: FloatArray,
        topk_ids: Ids,
        topk_weights: Weights,
        **options: Any,
    ) -> CallFuture:
        """As `ExpertClient.submit`."""
        n_forwards = len(self._forwards)
        is_due = self._kill_at is not None and n_forwards > self._kill_at
        is_fatal = is_due and self.kill is None
        # It answers one row sooner than a signal arrives. More rows take their time, and might
        # not all fit into a transport that nobody reads.
        if is_fatal and len(hidden_states) == 1:
            _stop(self._client.worker_pid)
        future: CallFuture = self._client.submit(
            layer, hidden_states, topk_ids, topk_weights, **options
        )
        if is_fatal:
            token = (n_forwards - 1) // self._n_layers
            self.kill = Kill(self._client.worker_pid, token, layer)
            os.kill(self.kill.pid, signal.SIGKILL)
        return future


def _stop(pid: int) -> None:
    """Stop a child process, and return when it does not run any more."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
