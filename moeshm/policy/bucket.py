"""One kind of work: its candidates, what was measured of each, and which is taken."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..dtypes import DType
from .fit import DRIFT_RATIO, DRIFT_SAMPLES, FEW_SAMPLES, OUTLIER_RATIO
from .losses import Losses
from .model import CostModel
from .rules import Choice, Shape, Times, Verdict, Work

#: By what share another candidate must be better: by the most while measurements are few or
#: scatter, by the least once this much can be told apart.
MOST_MARGIN = 0.05
LEAST_MARGIN = 0.02
#: Standard errors of a difference that is believed.
CONFIDENCE = 2.0
#: Scatter of times, as a share, before it was measured.
FIRST_SCATTER = 0.1
#: Of a new forward in the scatter.
SCATTER_WEIGHT = 0.1
#: Measurements that a candidate needs before it can be taken for good, and those that the
#: best gets while it does not seem better by enough.
ENOUGH = 2
RUN_OFF = 8
#: Candidates expected to take up to so many times the best's time are worth a try...
TRY_BELOW = 1.5
#: ...while tries have cost no more than this share of the bucket's time, and one forward.
TRY_SHARE = 0.02
#: The best candidate of a transport and format that was never measured in the bucket is worth one
#: up to here: a calibration that had bad luck once must not keep a whole way out.
PATH_BELOW = 4.0
#: What is further away may only seem so, by a calibration that had bad luck: it is tried after so
#: many forwards, once that is expected to cost no more than this share of the time spent.
FAR_AFTER = 1000
FAR_SHARE = 0.003
#: One this near, by measurement or by the model, is tried again after so many forwards for each
#: measurement of it: those may have been unlucky, or paid for cold memory. The new one
#: then counts as much as all before.
RETRY_BELOW = 1.15
RETRY_EVERY = 32
#: Forwards of a try over another transport or format, of which the first are not learnt from: a way
#: that was not used for a while has cold memory and a worker's thread that sleeps. Short forwards
#: are disturbed more, and can be had more of.
TRY_RUN, TRY_COLD = 2, 1
SHORT_TRY_RUN, SHORT_TRY_COLD = 6, 3
#: How strongly a candidate that was measured once or twice is judged by the others.
SHRINKAGE = 0.5
#: ...if it is off by no more than this factor; where the model is that wrong, it has no say.
SHRINK_BELOW = 2.0
#: So many surprises in a row are waited out before anything is decided.
SUSPICIOUS_RUN = 2
#: A settled decision is looked at again after so many forwards.
REVIEW_EVERY = 16
#: Of forwards shorter than this only every so many are learnt from once the bucket is settled, and
#: looks at it become rarer up to this many forwards: either takes some 20 us, and decode has no
#: time for that.
SHORT_NS = 2e6
LEARN_EVERY = 8
REVIEW_SHORT_EVERY = 256
#: Of a new forward in a candidate's means.
FORWARD_WEIGHT = 0.05


class Option:
    """A candidate, with decayed means over the forwards that went this way."""

    __slots__ = ("busy_ns", "choice", "elapsed_ns", "last_call", "n", "work")

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        self.forget()

    def forget(self) -> None:
        """As if never measured."""
        self.n = 0
        #: Number of the bucket's forward that went this way last.
        self.last_call = 0
        self.busy_ns = self.elapsed_ns = 0.0
        self.work: Work | None = None

    def is_old(self, call: int) -> bool:
        """Whether it was measured long ago, for how often it was."""
        return call - self.last_call > RETRY_EVERY * self.n

    def add(self, work: Work, busy_ns: float, elapsed_ns: float, call: int) -> None:
        """Take in one forward, number `call` of the bucket."""
        least_weight = 1 / 2 if self.is_old(call) else FORWARD_WEIGHT
        self.n += 1
        self.last_call = call
        mean = self.work
        if mean is None:
            self.work, self.busy_ns, self.elapsed_ns = work, busy_ns, elapsed_ns
            return
        weight = max(1 / self.n, least_weight)
        self.work = mean._replace(
            n_tokens=round(mean.n_tokens + weight * (work.n_tokens - mean.n_tokens)),
            rows=mean.rows + weight * (work.rows - mean.rows),
            slots=mean.slots + weight * (work.slots - mean.slots),
            experts=mean.experts + weight * (work.experts - mean.experts),
        )
        self.busy_ns += weight * (busy_ns - self.busy_ns)
        self.elapsed_ns += weight * (elapsed_ns - self.elapsed_ns)


class Estimate(NamedTuple):
    """What is expected of an option for the bucket's usual work."""

    option: Option
    #: By the model alone.
    predicted_ns: float
    #: As if it were as far from the prediction as the bucket's usual choice.
    unseen_ns: float
    #: With its own measurements, and losses.
    expected_ns: float


class Bucket:
    """Chooses among candidates for one kind of work; not for several threads at a time."""

    def __init__(
        self, shape: Shape, choices: list[Choice], model: CostModel, losses: Losses
    ) -> None:
        self._shape = shape
        self._model = model
        self._losses = losses
        self._options = {choice: Option(choice) for choice in choices}
        #: What is usually taken; None before the first review.
        self._incumbent: Option | None = None
        #: Of the incumbent's times about what was expected, as a share.
        self._scatter = FIRST_SCATTER
        #: What the next forward takes: the incumbent, or one to try.
        self.current = next(iter(self._options.values()))
        self.n_calls = 0
        self.next_review: float = 0
        #: Forwards until the next look after one that changed nothing.
        self._review_every = REVIEW_EVERY
        self.n_switches = self.n_tries = self.n_reopened = 0
        #: Time of all forwards, and by how much tries took longer than the incumbent would have.
        self._spent_ns = self._tried_ns = 0.0
        #: Length of the present run of forwards that took too long (positive) or too short.
        self._run = 0
        #: Whether nothing was left to do at the last look.
        self._is_settled = False
        #: Forwards of the present try that are still not learnt from.
        self._n_cold = 0
        #: Ways that are not taken at present.
        self._left_out: frozenset[str] = frozenset()
        if len(choices) == 1:
            self._is_settled = True
            self._incumbent = self.current
            self.next_review = math.inf

    # --- choosing ---------------------------------------------------------------------------

    def leave_out(self, ways: frozenset[str]) -> None:
        """Take none of these, which are not all, until told otherwise."""
        if ways != self._left_out:
            self._left_out = ways
            self.look_again()

    def review(self, work: Work) -> None:
        """Decide anew what to take."""
        self._is_settled = False
        self._n_cold = 0
        incumbent_is_open = self._incumbent is not None and self._is_taken(self._incumbent)
        if abs(self._run) >= SUSPICIOUS_RUN and incumbent_is_open:
            # Perhaps a drift: what is known of the others may be as old as what fails here.
            assert self._incumbent is not None
            self.current = self._incumbent
            self.next_review = self.n_calls + 1
            return
        estimates = [each for each in self._estimates(work) if self._is_taken(each.option)]
        incumbent = self._pick_incumbent(estimates)
        if self._incumbent is not incumbent.option:
            self.n_switches += self._incumbent is not None
            self._incumbent = incumbent.option
            self._run = 0
        self.current = incumbent.option
        self.next_review = self.n_calls + 1
        if incumbent.option.n < ENOUGH and not self._has_losses(incumbent):
            return
        tried = self._pick_try(estimates, incumbent)
        if tried is not None:
            self.current = tried.option
            self.n_tries += 1
            self._begin_try(tried, incumbent)
        elif incumbent.option.n >= FEW_SAMPLES:
            self._is_settled = True
            self.next_review = self.n_calls + self._review_every
            if incumbent.expected_ns < SHORT_NS:
                self._review_every = min(2 * self._review_every, REVIEW_SHORT_EVERY)
            return
        self._review_every = REVIEW_EVERY

    def _begin_try(self, tried: Estimate, incumbent: Estimate) -> None:
        """How many forwards it takes, and from which on they count."""
        n_forwards, self._n_cold = _run_of(tried, incumbent)
        self.next_review = self.n_calls + n_forwards

    def look_again(self) -> None:
        """Something new is known: decide with the next forward."""
        if len(self._options) > 1:
            self.next_review = 0

    def _estimates(self, work: Work) -> list[Estimate]:
        """Of every option, for what work was like in the incumbent's forwards, else for `work`."""
        incumbent = self._incumbent
        usual, busy_ns = work, work.local_ns
        common = 1.0
        if incumbent is not None and incumbent.work is not None:
            usual, busy_ns = incumbent.work, incumbent.busy_ns
            common = self._correction(incumbent)
        estimates = []
        for option in self._options.values():
            choice = option.choice
            predicted_ns = self._model.predict_ns(self._shape, usual, choice, busy_ns)
            loss_ns = self._losses.expected_ns(choice.transport)
            unseen_ns = expected_ns = predicted_ns * common
            if option.n:
                trust = 1.0 if option is incumbent else option.n / (option.n + SHRINKAGE)
                own = self._correction(option) / common
                doubt = min(max(own, 1 / SHRINK_BELOW), SHRINK_BELOW) ** (trust - 1)
                expected_ns *= own * doubt
            estimates.append(
                Estimate(option, predicted_ns, unseen_ns + loss_ns, expected_ns + loss_ns)
            )
        return estimates

    def _correction(self, option: Option) -> float:
        """Measured over predicted time of the forwards that went this way.

        By the model as it is now: a fit that has become better changes both.
        """
        assert option.work is not None
        predicted_ns = self._model.predict_ns(
            self._shape, option.work, option.choice, option.busy_ns
        )
        return option.elapsed_ns / max(predicted_ns, 1.0)

    def _pick_incumbent(self, estimates: list[Estimate]) -> Estimate:
        incumbent = self._incumbent_of(estimates)
        if incumbent is None or not (incumbent.option.n or self.n_reopened):
            return min(estimates, key=_expected)
        if incumbent.option.n < FEW_SAMPLES and not self._has_losses(incumbent):
            return incumbent
        better = [
            each
            for each in estimates
            if each.option.n >= ENOUGH
            and each.expected_ns < (1 - self._margin(each.option)) * incumbent.expected_ns
        ]
        return min(better, key=_expected, default=incumbent)

    def _incumbent_of(self, estimates: list[Estimate]) -> Estimate | None:
        return next((each for each in estimates if each.option is self._incumbent), None)

    def _margin(self, option: Option) -> float:
        """By what share it must be better than the incumbent."""
        assert self._incumbent is not None
        most = 1 / FORWARD_WEIGHT  # forwards that count in a decayed mean
        share = 1 / min(option.n, most) + 1 / min(max(self._incumbent.n, 1), most)
        believed = CONFIDENCE * self._scatter * math.sqrt(share)
        return min(max(believed, LEAST_MARGIN), MOST_MARGIN)

    def _is_taken(self, option: Option) -> bool:
        return option.choice.transport not in self._left_out

    def _has_losses(self, estimate: Estimate) -> bool:
        return self._losses.expected_ns(estimate.option.choice.transport) > 0

    def _pick_try(self, estimates: list[Estimate], incumbent: Estimate) -> Estimate | None:
        affordable_ns = TRY_SHARE * self._spent_ns + incumbent.expected_ns - self._tried_ns
        worth_trying = [
            each
            for each in self._open_ones(estimates, incumbent)
            if _run_of(each, incumbent)[0] * (each.expected_ns - incumbent.expected_ns)
            < affordable_ns
            # Expected to pay for itself.
            or each.expected_ns < (1 - MOST_MARGIN) * incumbent.expected_ns
        ]
        return min(worth_trying, key=_expected, default=None)

    def _open_ones(self, estimates: list[Estimate], incumbent: Estimate) -> list[Estimate]:
        """Those of which more should be known, if a try can be afforded."""
        best = min(estimates, key=_expected)
        known = {_path_of(option) for option in self._options.values() if option.n}
        first_of_path = [
            min(group, key=_expected)
            for path, group in _by_path(estimates).items()
            if path not in known
        ]
        return [
            each
            for each in estimates
            if each is not incumbent
            and self._is_open(each, incumbent.expected_ns, each is best, each in first_of_path)
        ]

    def _is_open(
        self, estimate: Estimate, incumbent_ns: float, is_best: bool, is_first_of_path: bool
    ) -> bool:
        """Whether more should be known of it."""
        option = estimate.option
        if option.n < ENOUGH:
            extra_ns = min(estimate.unseen_ns, estimate.expected_ns) - incumbent_ns
            limit = PATH_BELOW if is_first_of_path else TRY_BELOW
            is_near = estimate.unseen_ns < limit * incumbent_ns
            is_cheap = self.n_calls > FAR_AFTER and extra_ns < FAR_SHARE * self._spent_ns
            return is_near or is_cheap
        if is_best and option.n < RUN_OFF:
            return True
        is_near = min(estimate.unseen_ns, estimate.expected_ns) < RETRY_BELOW * incumbent_ns
        return is_near and option.is_old(self.n_calls)

    # --- learning ---------------------------------------------------------------------------

    def observe(self, work: Work, choice: Choice, times: Times) -> None:
        """Take in a forward that went as chosen."""
        elapsed_ns, busy_ns = float(times.elapsed_ns), float(times.busy_ns)
        self._spent_ns += elapsed_ns
        incumbent = self._incumbent
        if elapsed_ns < SHORT_NS and self._is_settled and self.n_calls % LEARN_EVERY:
            return
        option = self._options.get(choice)
        if self._n_cold and option is self.current:
            self._n_cold -= 1
            if incumbent is not None:
                self._tried_ns += max(0.0, elapsed_ns - incumbent.elapsed_ns)
            return
        if option is not None:
            if incumbent is not None and incumbent.work is not None:
                expected_ns = self._correction(incumbent) * self._model.predict_ns(
                    self._shape, work, incumbent.choice, busy_ns
                )
                if option is not incumbent:
                    self._tried_ns += max(0.0, elapsed_ns - expected_ns)
                elif incumbent.n >= FEW_SAMPLES:
                    if self._has_drifted(elapsed_ns / max(expected_ns, 1.0)):
                        self._model.learn(self._shape, work, choice, times)
                        self._reopen()
                        return
                    elapsed_ns = min(elapsed_ns, OUTLIER_RATIO * expected_ns)
            option.add(work, busy_ns, elapsed_ns, self.n_calls)
        self._model.learn(self._shape, work, choice, times)

    def wasted(self, choice: Choice, cost_ns: float) -> None:
        """Take in a forward that failed."""
        # Slow ones before it were no drift: nothing may keep the decision from being looked at.
        self._run = 0
        self._spent_ns += cost_ns
        if self._incumbent is not None and choice != self._incumbent.choice:
            self._tried_ns += cost_ns

    def _has_drifted(self, ratio: float) -> bool:
        """Take in measured over expected time of the incumbent."""
        self._scatter += SCATTER_WEIGHT * (min(abs(ratio - 1), 1.0) - self._scatter)
        side = (ratio > DRIFT_RATIO) - (ratio < 1 / DRIFT_RATIO)
        self._run = self._run + side if side * self._run > 0 else side
        return abs(self._run) >= DRIFT_SAMPLES

    def _reopen(self) -> None:
        """What was measured no longer holds; the incumbent stays until others are measured."""
        self._scatter = FIRST_SCATTER
        self.n_reopened += 1
        self._run = 0
        self._review_every = REVIEW_EVERY
        self._spent_ns = self._tried_ns = 0.0
        for option in self._options.values():
            option.forget()
        self.next_review = 0

    # --- explaining -------------------------------------------------------------------------

    def explain(self, work: Work) -> list[Verdict]:
        """A verdict on every candidate; before the first forward, for work like this one."""
        estimates = self._estimates(work)
        incumbent = self._incumbent_of(estimates) or self._pick_incumbent(estimates)
        best_ns = min(map(_expected, estimates))
        open_ones = self._open_ones(estimates, incumbent)
        verdicts = []
        for each in estimates:
            option = each.option
            is_chosen = option is incumbent.option
            if is_chosen:
                why = self._why_chosen(each, best_ns)
            else:
                why = self._why_not(each, incumbent.expected_ns, each in open_ones)
            verdicts.append(
                Verdict(
                    *option.choice,
                    predicted_ns=each.predicted_ns,
                    expected_ns=each.expected_ns,
                    measured_ns=option.elapsed_ns if option.n else None,
                    n_measured=option.n,
                    is_chosen=is_chosen,
                    why=why,
                )
            )
        return verdicts

    def _why_chosen(self, estimate: Estimate, best_ns: float) -> str:
        if len(self._options) == 1:
            return "the settings leave no other"
        if estimate.expected_ns > best_ns:
            share = 1 - best_ns / estimate.expected_ns
            if share < MOST_MARGIN:
                return f"kept: within {share:.0%} of the best"
            return f"kept until a better one is measured: {share:.0%} from the best"
        return "fastest as measured" if estimate.option.n else "fastest as predicted"

    def _why_not(self, estimate: Estimate, incumbent_ns: float, is_open: bool) -> str:
        change = estimate.expected_ns / incumbent_ns - 1
        words = f"{abs(change):.0%} {'slower' if change >= 0 else 'faster'}"
        if self._has_losses(estimate):
            words += ", losses counted"
        if not self._is_taken(estimate.option):
            return f"left alone after a loss: {words}"
        if self.n_calls and estimate.option is self.current:
            return f"being tried: {words}"
        if estimate.option.n:
            return f"measured: {words}"
        return f"predicted: {words}, {'to be tried' if is_open else 'too far to be tried yet'}"


def _run_of(tried: Estimate, incumbent: Estimate) -> tuple[int, int]:
    """Forwards of a try, and how many of them are not learnt from."""
    if _path_of(tried.option) == _path_of(incumbent.option):
        return 1, 0
    if max(tried.expected_ns, incumbent.expected_ns) < SHORT_NS:
        return SHORT_TRY_RUN, SHORT_TRY_COLD
    return TRY_RUN, TRY_COLD


def _path_of(option: Option) -> tuple[str, DType]:
    return option.choice.transport, option.choice.wire_dtype


def _by_path(estimates: list[Estimate]) -> dict[tuple[str, DType], list[Estimate]]:
    groups: dict[tuple[str, DType], list[Estimate]] = {}
    for each in estimates:
        groups.setdefault(_path_of(each.option), []).append(each)
    return groups


def _expected(estimate: Estimate) -> float:
    return estimate.expected_ns
