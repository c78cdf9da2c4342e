"""What threads of a calling process do to one worker through `ExpertClient`, at random."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backends import Ids
from ..client import ExpertClient
from ..errors import InvalidCall, NotReady
from ..held import HeldView
from ..layers import LayerInfo
from .books import LONG_S, Books, Call, Line
from .pool import Case

#: Deadlines, by how often: what a busy worker keeps, what it may miss, and what none can keep.
TIMEOUTS_S = ((LONG_S, 0.85), (1.0, 0.08), (0.1, 0.04), (0.002, 0.03))
_HOLD_S = LONG_S
#: A client leaves a worker alone that it could not reach, for up to a minute.
_RECOVERY_S = 100.0
#: Calls of one burst that are on their way together.
_BURST = 8
#: After an error a caller waits: it would otherwise only count how often nobody answers.
_AFTER_ERROR_S = 0.05


@dataclass(eq=False)
class OpenLine:
    """A client, its line in the books, and the view of all experts that its calls are of."""

    line: Line
    client: ExpertClient
    whole: HeldView


#: Opens a client anew, in the place of one that was closed.
Open = Callable[[], OpenLine | None]


class Talk:
    """Calls of one client, by several threads; each `step` is one thing that an engine does.

    `reopen`: makes the next client, as a step may close this one; `reopen_share`: of the steps that
    could, those that do.
    """

    def __init__(
        self,
        books: Books,
        cases: Sequence[Case],
        opened: OpenLine,
        reopen: Open,
        reopen_share: float,
    ) -> None:
        self._books = books
        self._cases = cases
        self._now = opened
        self._reopen = reopen
        self._reopen_share = reopen_share
        self._reopening = threading.Lock()
        #: By thread, an earlier call and its result, which later ones must leave alone.
        self._kept = threading.local()

    def step(self, rng: random.Random) -> None:
        """One thing, at random."""
        drawn = rng.random()
        if drawn < 0.55:
            self._compute(rng)
        elif drawn < 0.85:
            self._burst(rng)
        elif drawn < 0.93:
            self._held(rng)
        elif drawn < 0.97:
            self._refused(rng)
        else:
            self._anew(rng)

    def recover(self) -> None:
        """Until the worker answers, as it must now that nothing is done to it any more."""
        now, end = self._now, time.monotonic() + _RECOVERY_S
        case = min((c for c in self._cases if not c.is_empty), key=lambda c: len(c.topk_ids))
        arguments = case.layer, case.hidden_states, case.topk_ids, case.topk_weights

        def ask() -> Any:
            return now.client.compute(*arguments, view=now.whole, global_ids=True, timeout_s=LONG_S)

        while True:
            call = self._books.begin(now.line, f"last call of {now.line.name}", LONG_S)
            result = self._books.attempt(call, ask)
            self._books.count("calls")
            if result is not None:
                self._books.check(call, case, result)
                if not call.is_own_work:
                    return
            if time.monotonic() > end:
                self._books.unanswered(
                    call, f"the worker runs, and is not found in {_RECOVERY_S:g} s"
                )
                return
            time.sleep(_AFTER_ERROR_S)

    def close(self) -> None:
        """Close the client."""
        close_line(self._books, self._now)

    def _compute(self, rng: random.Random) -> None:
        now, case = self._now, rng.choice(self._cases)
        ids, options = _named(case, now.whole, rng)
        timeout_s = _draw_timeout(rng)
        call = self._books.begin(now.line, f"compute on {now.line.name}", timeout_s)
        out = np.empty_like(case.hidden_states) if rng.random() < 0.3 else None
        arguments = case.layer, case.hidden_states, ids, case.topk_weights
        result = self._books.attempt(
            call,
            lambda: now.client.compute(*arguments, out=out, timeout_s=timeout_s, **options),
        )
        self._books.count("calls")
        if result is None:
            time.sleep(_AFTER_ERROR_S)
            return
        self._books.check(call, case, result)
        if out is not None and result is not out:
            self._books.wrong(call, "the result is not the `out` that was given")
        self._look_at_earlier(call, result)

    def _look_at_earlier(self, call: Call, result: Any) -> None:
        """The last result of this thread must be what it was; this one is looked at next."""
        earlier = getattr(self._kept, "result", None)
        if earlier is not None and earlier.tobytes() != self._kept.bytes:
            self._books.wrong(self._kept.call, "its result changed with a later call")
        self._kept.call, self._kept.result, self._kept.bytes = call, result, result.tobytes()

    def _burst(self, rng: random.Random) -> None:
        now = self._now
        sent = []
        for _ in range(rng.randint(2, _BURST)):
            case = rng.choice(self._cases)
            ids, options = _named(case, now.whole, rng)
            timeout_s = _draw_timeout(rng)
            call = self._books.begin(now.line, f"submit on {now.line.name}", timeout_s)
            options.update(timeout_s=timeout_s, wire_dtype=case.wire)
            if rng.random() < 0.2:
                options["slice_tokens"] = max(1, len(ids) // rng.randint(1, 10))
            future = self._books.attempt(call, _submit(now.client, case, ids, options))
            self._books.count("calls")
            if future is None:
                time.sleep(_AFTER_ERROR_S)
                break
            self._books.sent(call)
            sent.append((call, case, future))
        rng.shuffle(sent)
        for call, case, future in sent:
            if rng.random() < 0.1:
                self._books.count("forgotten futures")
                continue
            if rng.random() < 0.1:
                self._books.attempt(call, _result(future, 1e-4), (NotReady,))
            result = self._books.attempt(call, _result(future))
            if result is not None:
                self._books.check(call, case, result)

    def _held(self, rng: random.Random) -> None:
        """Calls of a view of some experts in an order of their own."""
        now, case = self._now, rng.choice(self._cases)
        others = [e for e in now.whole.layers[case.layer].experts if e not in case.experts]
        experts = [*case.experts, *rng.sample(others, rng.randint(not case.experts, len(others)))]
        rng.shuffle(experts)
        call = self._books.begin(now.line, f"hold on {now.line.name}", _HOLD_S)
        view = self._books.attempt(
            call, lambda: now.client.hold({case.layer: experts}, timeout_s=_HOLD_S)
        )
        if view is None:
            time.sleep(_AFTER_ERROR_S)
            return
        self._books.count("views held")
        ids = _local_ids(case, view.layers[case.layer])
        for _ in range(rng.randint(1, 4)):
            call = self._books.begin(now.line, f"compute of a view on {now.line.name}", _HOLD_S)
            arguments = case.layer, case.hidden_states, ids, case.topk_weights
            result = self._books.attempt(call, _computed(now.client, arguments, view))
            self._books.count("calls")
            if result is not None:
                self._books.check(call, case, result)
        call = self._books.begin(now.line, f"release on {now.line.name}", _HOLD_S)
        self._books.do(call, lambda: now.client.release(view))

    def _refused(self, rng: random.Random) -> None:
        """A call that is not allowed, and must not be felt by the others."""
        now, case = self._now, rng.choice(self._cases)
        wrong = np.full_like(case.topk_ids, case.topk_ids.max() + 1_000_000)
        call = self._books.begin(now.line, f"bad ids on {now.line.name}", _HOLD_S)
        arguments = case.layer, case.hidden_states, wrong, case.topk_weights
        result = self._books.attempt(
            call,
            lambda: now.client.compute(*arguments, timeout_s=_HOLD_S),
            (InvalidCall,),
        )
        if result is not None:
            self._books.wrong(call, "ids that no layer has, and a result instead of InvalidCall")

    def _anew(self, rng: random.Random) -> None:
        """Close the client, with other threads' calls on their way, and open another."""
        if rng.random() >= self._reopen_share:
            return
        if not self._reopening.acquire(blocking=False):
            return
        try:
            last = self._now
            opened = self._reopen()
            if opened is not None:
                self._now = opened
                close_line(self._books, last)
                self._books.count("clients opened anew")
        finally:
            self._reopening.release()


def close_line(books: Books, opened: OpenLine) -> None:
    """Close its client."""
    opened.line.is_closed = True
    call = books.begin(opened.line, f"close of {opened.line.name}", _HOLD_S)
    books.do(call, opened.client.close)


def open_whole(
    books: Books, line: Line, open_client: Callable[[], ExpertClient], timeout_s: float
) -> OpenLine | None:
    """A client whose calls are of all experts, whatever the worker began its session with; None
    when there is none to be had, which is noted."""
    call = books.begin(line, f"open {line.name}", timeout_s)
    client = books.attempt(call, open_client)
    if client is None:
        return None
    everything = {n: list(range(info.num_experts)) for n, info in client.layers.items()}
    if client.view.experts == {n: tuple(experts) for n, experts in everything.items()}:
        return OpenLine(line, client, client.view)
    call = books.begin(line, f"hold all on {line.name}", _HOLD_S)
    view = books.attempt(call, lambda: client.hold(everything, timeout_s=_HOLD_S))
    if view is not None:
        return OpenLine(line, client, view)
    call = books.begin(line, f"close of {line.name}", _HOLD_S)
    books.do(call, client.close)
    return None


def _named(case: Case, view: HeldView, rng: random.Random) -> tuple[Ids, dict[str, Any]]:
    """The ids of a call of this view, and its options: the model's, or the view's own."""
    if rng.random() < 0.3:
        return case.topk_ids, {"global_ids": True, "view": view}
    return _local_ids(case, view.layers[case.layer]), {"view": view}


def _local_ids(case: Case, info: LayerInfo) -> Ids:
    table = np.full(info.num_experts + 1, -1, np.int32)
    table[list(info.experts)] = np.arange(len(info.experts))
    ids: Ids = table[case.topk_ids]
    return ids


def _draw_timeout(rng: random.Random) -> float:
    timeouts_s, weights = zip(*TIMEOUTS_S, strict=True)
    return float(rng.choices(timeouts_s, weights)[0])


# Functions of what changes from turn to turn: a lambda in a loop would see the last.


def _submit(
    client: ExpertClient, case: Case, ids: Ids, options: dict[str, Any]
) -> Callable[[], Any]:
    return lambda: client.submit(case.layer, case.hidden_states, ids, case.topk_weights, **options)


def _result(future: Any, timeout_s: float | None = None) -> Callable[[], Any]:
    return lambda: future.result(timeout_s)


def _computed(
    client: ExpertClient, arguments: tuple[Any, ...], view: HeldView
) -> Callable[[], Any]:
    return lambda: client.compute(*arguments, view=view, timeout_s=_HOLD_S)
