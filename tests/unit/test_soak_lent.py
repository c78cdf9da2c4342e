"""An offload's calls in a soak: each worker's part must have its own cause, also where it is
hidden."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from moeshm.backends.cpu import CpuBackend
from moeshm.checkpoint import load
from moeshm.demo import tiny_moe_path
from moeshm.errors import DeadlineExceeded, WorkerDied
from moeshm.held import HeldView
from moeshm.soak import pool
from moeshm.soak.books import Books, Line, Losses, OwnWork
from moeshm.soak.calls import OpenLine
from moeshm.soak.ledger import Ledger
from moeshm.soak.lent import LentClient
from moeshm.soak.messages import Counts, Failed, Lost, Message, Unexpected
from moeshm.soak.moves import Moves
from moeshm.stats import CallTimes

LAYERS = load(tiny_moe_path()).layers
CASES = [case for case in pool.draw(LAYERS, seed=7) if len(case.topk_ids) < 10]
BACKEND = CpuBackend(LAYERS, threads=1)


class Future:
    times = CallTimes(1, 1, 1, 1, 1, 1, 1, 1)

    def __init__(self, client: Client, arguments: tuple[int, Any, Any, Any]) -> None:
        self._client = client
        self._arguments = arguments

    def add_to(self, total: Any) -> None:
        self._client.fail()
        out = np.empty(total.shape, np.float32)
        BACKEND.ffn(*self._arguments, out)
        total += out


class Client:
    """Of a worker that holds everything, and dies on demand."""

    has_fallback = False
    wire_dtype = slab = None
    transport, max_tokens, buffer_bytes = "stream", 1024, 1 << 20
    layers = BACKEND.layers

    def __init__(self) -> None:
        self.view = HeldView(BACKEND.layers)
        self.error: Exception | None = None

    def fail(self) -> None:
        if self.error is not None:
            raise self.error

    def submit(self, layer: int, *arrays: Any, **_options: Any) -> Future:
        hidden_states, topk_ids, topk_weights = arrays
        return Future(self, (layer, hidden_states, topk_ids, topk_weights))

    def hold(self, experts: Any, **_options: Any) -> HeldView:
        self.fail()
        assert experts
        return self.view

    def release(self, view: HeldView) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
def told() -> list[Message]:
    return []


@pytest.fixture
def clients() -> dict[str, Client]:
    return {"a": Client(), "b": Client()}


def moves_of(told: list[Message], clients: dict[str, Client], has_fallback: bool) -> Moves:
    own = OwnWork(BACKEND)
    opened = {
        name: [OpenLine(Line(f"{name}, client 1", (name,), answered=-1.0), client, client.view)]  # type: ignore[arg-type]
        for name, client in clients.items()
    }
    line = Line("a and b", ("a", "b"))
    moves = Moves(Books(told.append, own), CASES, line, opened, own, has_fallback)
    # Of the experts, which both have, each is asked for some.
    assert moves._offload.placement.layers[0].hot == ()
    return moves


def forward(moves: Moves, times: int = 20) -> None:
    rng = random.Random(3)
    for _ in range(times):
        moves.forward(rng)


def failed(told: list[Message]) -> list[Failed]:
    found = [message for message in told if not isinstance(message, Counts)]
    assert all(isinstance(message, Failed) for message in found)
    return [message for message in found if isinstance(message, Failed)]


def n_unexpected(told: list[Message], target: str) -> int:
    """When something is being done to this worker all the time."""
    ledger = Ledger()
    ledger.cause(target, "", -1.0, None)
    for message in told:
        ledger.told("caller 0", message)
    ledger.settle(is_end=True)
    return ledger.unexpected


def test_what_is_done_to_one_worker_is_no_cause_for_the_death_of_the_other(
    told: list[Message], clients: dict[str, Client]
) -> None:
    moves = moves_of(told, clients, has_fallback=False)
    for client in clients.values():
        client.error = WorkerDied("gone")
    forward(moves)
    assert {message.targets for message in failed(told)} == {("a",), ("b",)}
    n_of_b = sum(message.targets == ("b",) for message in failed(told))
    assert n_unexpected(told, "a") == n_of_b > 0


@pytest.mark.parametrize("has_fallback", [False, True])
def test_a_death_that_the_offload_hides_must_have_a_cause(
    told: list[Message], clients: dict[str, Client], has_fallback: bool
) -> None:
    """Another worker takes over, or the fallback."""
    moves = moves_of(told, clients, has_fallback)
    clients["b"].error = WorkerDied("gone")
    forward(moves)
    assert n_unexpected(told, "a") == len(failed(told)) > 0
    assert n_unexpected(told, "b") == 0


def test_a_part_that_was_given_up_explains_the_others_of_that_client(
    told: list[Message], clients: dict[str, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = moves_of(told, clients, has_fallback=True)
    monkeypatch.setattr("moeshm.soak.moves._TIMEOUTS_S", ((1e-9, 1.0),))
    monkeypatch.setattr("moeshm.offload.cold.ColdPart._left_s", lambda _self: 1e-9)
    clients["b"].error = DeadlineExceeded("late")
    forward(moves)
    lost = {message.line for message in told if isinstance(message, Lost)}
    assert "b, client 1" in lost
    assert "a, client 1" not in lost


def test_an_answer_of_one_worker_says_nothing_of_the_other(
    told: list[Message], clients: dict[str, Client]
) -> None:
    moves = moves_of(told, clients, has_fallback=True)
    (a,), (b,) = moves._offload._remotes["a"].sessions, moves._offload._remotes["b"].sessions
    clients["b"].error = WorkerDied("gone")
    a._line.answered = b._line.answered = -1.0  # type: ignore[attr-defined]
    forward(moves)
    assert a._line.answered > 0 > b._line.answered  # type: ignore[attr-defined]


def test_a_death_that_no_part_had_is_unexpected(
    told: list[Message], clients: dict[str, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_arguments: Any, **_options: Any) -> None:
        raise WorkerDied("somehow")

    moves = moves_of(told, clients, has_fallback=True)
    clients["b"].error = WorkerDied("gone")
    forward(moves)
    told.clear()
    monkeypatch.setattr(moves._offload, "forward", lose)
    moves.forward(random.Random(1))
    (message,) = told
    assert isinstance(message, Unexpected)
    assert "none of its parts ended so" in message.detail


def test_a_placement_that_a_lost_worker_stops_is_judged_by_that_worker(
    told: list[Message], clients: dict[str, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeshm.soak.moves._PAUSE_S", (0.0, 0.0))
    moves = moves_of(told, clients, has_fallback=True)
    clients["b"].error = WorkerDied("gone")
    moves.move(random.Random(1))
    (message,) = failed(told)
    assert message.targets == ("b",)
    assert message.what.startswith("hold on b, client 1")


def test_all_else_is_the_clients_own(told: list[Message]) -> None:
    client = Client()
    line = Line("a, client 1", ("a",))
    lent = LentClient(Books(told.append), OpenLine(line, client, client.view), Losses())  # type: ignore[arg-type]
    assert (lent.transport, lent.view, lent.layers) == ("stream", client.view, client.layers)
    assert not hasattr(lent, "no_such_thing")
