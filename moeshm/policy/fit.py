"""Linear costs learnt from measurements: non-negative, robust, and quick to follow a change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from operator import mul

#: A cell forgets: one more sample weighs at least this much.
SAMPLE_WEIGHT = 0.1
#: A sample further than this from what its cell makes expect counts as no further: a page fault
#: or a stolen CPU is no news about the cost.
OUTLIER_RATIO = 3.0
#: So many samples in a row, all of them off by so much to the same side, are no outliers.
DRIFT_SAMPLES = 8
DRIFT_RATIO = 1.25
#: Samples of a cell before any of them is judged.
FEW_SAMPLES = 3
#: Below this a relative error means nothing, since clocks and calls cost about as much.
FLOOR_NS = 100.0
#: Weight of the prior's proportions, against 1 for a measured cell: it decides only what the
#: cells leave open.
PRIOR_WEIGHT = 1e-6

Vector = Sequence[float]


class _Cell:
    """Decayed means over the samples of one kind of work."""

    __slots__ = ("anchor", "features", "n", "run", "run_began", "run_log", "scale", "seen", "value")

    def __init__(self, n_features: int) -> None:
        self.n = 0
        self.features = [0.0] * n_features
        self.value = 0.0
        self.scale = 0.0
        #: Length of the present run of samples that are too high (positive) or too low.
        self.run = 0
        self.run_log = 0.0
        #: Number of the run's first sample, and the mean before it.
        self.run_began = 0
        self.anchor = 0.0
        #: Number of the last sample.
        self.seen = 0

    def add(self, features: Vector, value: float, scale: float) -> None:
        self.n += 1
        weight = max(1 / self.n, SAMPLE_WEIGHT)
        self.features = [
            mean + weight * (new - mean) for mean, new in zip(self.features, features, strict=True)
        ]
        self.value += weight * (value - self.value)
        self.scale += weight * (scale - self.scale)


class LinearCost:
    """`cost = sum of coefficient * feature`, coefficients never negative.

    Samples are gathered in cells, one for each kind of work that the caller names, and each cell
    weighs the same in the fit, so that a million decode calls do not push out what is known of
    prefill. The fit minimises the squared *relative* error over the cells. `prior`: the
    coefficients before the first sample; afterwards only their proportions, and only where the
    samples leave them open. At most three features.

    When a cell drifts (DRIFT_SAMPLES in a row), all cells are scaled alike: what made this work
    slower makes other work slower too.
    """

    def __init__(self, prior: Vector) -> None:
        self._prior = tuple(prior)
        self._cells: dict[Hashable, _Cell] = {}
        self._coefficients = self._prior
        self._n_samples = self._n_new = 0

    @property
    def coefficients(self) -> tuple[float, ...]:
        """As fitted to the samples so far."""
        # What a sample changes shrinks with their number, and so does the need to look.
        if self._n_new and self._n_new * 8 >= min(self._n_samples, 256):
            self._fit()
        return self._coefficients

    def predict(self, features: Vector) -> float:
        """The cost of work with these features."""
        return float(sum(map(mul, self.coefficients, features)))

    def observe(
        self, kind: Hashable, features: Vector, cost: float, scale: float | None = None
    ) -> None:
        """Learn one sample of the kind of work `kind`.

        `scale`: what the error is relative to, by default the cost itself. With it the cost may
        be negative: a difference of measurements, as noisy as these are large.
        """
        cell = self._cells.get(kind)
        if cell is None:
            cell = self._cells[kind] = _Cell(len(self._prior))
        if scale is None:
            cost = max(cost, FLOOR_NS)
            if cell.n >= FEW_SAMPLES:
                expected = self._expected(cell, features)
                self._watch(cell, cost / expected)
                cost = min(cost, OUTLIER_RATIO * expected)
            scale = cost
        elif cell.n >= FEW_SAMPLES:
            cost = min(max(cost, cell.value - cell.scale), cell.value + cell.scale)
        cell.add(features, cost, scale)
        cell.seen = self._n_samples
        self._n_samples += 1
        self._n_new += 1

    def _expected(self, cell: _Cell, features: Vector) -> float:
        """The cell's mean, carried over to these features by the fit."""
        at_mean = self.predict(cell.features)
        if at_mean <= 0:
            return max(cell.value, FLOOR_NS)
        return max(cell.value * self.predict(features) / at_mean, FLOOR_NS)

    def _watch(self, cell: _Cell, ratio: float) -> None:
        """Scale everything once a cell has been off for DRIFT_SAMPLES in a row."""
        # While the run lasts the cell follows by itself; the ratio is to where the run began.
        if cell.run:
            ratio *= cell.value / cell.anchor
        side = (ratio > DRIFT_RATIO) - (ratio < 1 / DRIFT_RATIO)
        if side * cell.run <= 0:
            cell.run, cell.run_log, cell.anchor = 0, 0.0, cell.value
            cell.run_began = self._n_samples
        if not side:
            return
        cell.run += side
        cell.run_log += math.log(ratio)
        if abs(cell.run) < DRIFT_SAMPLES:
            return
        factor = math.exp(cell.run_log / DRIFT_SAMPLES)
        for each in self._cells.values():
            if each.run or each.seen >= cell.run_began:
                # Partly followed by itself: its next sample replaces what it has.
                each.n = each.run = 0
            else:
                each.value *= factor
                each.scale *= factor
                each.n = min(each.n, FEW_SAMPLES)
        cell.n, cell.value = 1, cell.anchor * factor
        self._fit()

    def _fit(self) -> None:
        self._n_new = 0
        cells = [cell for cell in self._cells.values() if cell.n]
        scaled = [[feature / cell.scale for feature in cell.features] for cell in cells]
        targets = [cell.value / cell.scale for cell in cells]
        weights = [cell.n / (cell.n + 1) for cell in cells]
        unit = _scale_to(self._prior, scaled, targets, weights)
        # In units of the scaled prior, so that one PRIOR_WEIGHT does for all coefficients.
        rows = [list(map(mul, unit, features)) for features in scaled]
        size = len(unit)
        matrix = [
            [sum(w * row[i] * row[j] for w, row in zip(weights, rows, strict=True))
             + PRIOR_WEIGHT * (i == j) for j in range(size)]
            for i in range(size)
        ]  # fmt: skip
        vector = [
            sum(w * row[i] * t for w, row, t in zip(weights, rows, targets, strict=True))
            + PRIOR_WEIGHT
            for i in range(size)
        ]
        self._coefficients = tuple(map(mul, unit, least_squares(matrix, vector)))


def _scale_to(
    prior: Vector, features: Sequence[Vector], targets: Vector, weights: Vector
) -> list[float]:
    """The prior times the one factor that fits best."""
    over = under = 0.0
    for row, target, weight in zip(features, targets, weights, strict=True):
        predicted = sum(map(mul, prior, row))
        over += weight * predicted * target
        under += weight * predicted * predicted
    factor = max(over / under, 1e-6) if under > 0 else 1.0
    return [factor * each for each in prior]


def least_squares(matrix: Sequence[Vector], vector: Vector) -> list[float]:
    """The x >= 0 that minimises `x . matrix x - 2 vector . x`, for a positive definite matrix.

    For each choice of the coefficients that are not zero the normal equations give the only
    candidate, and with at most three coefficients all choices can be tried. The optimum is one of
    them (Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23).
    """
    size = len(vector)
    best, best_error = [0.0] * size, 0.0
    for n_free in range(size, 0, -1):
        for free in itertools.combinations(range(size), n_free):
            found = _solve([[matrix[i][j] for j in free] for i in free], [vector[i] for i in free])
            if found is None or min(found) < 0:
                continue
            # At a solution of the normal equations, x . matrix x is vector . x.
            error = -sum(vector[i] * x for i, x in zip(free, found, strict=True))
            if error < best_error:
                best_error, best = error, [0.0] * size
                for i, x in zip(free, found, strict=True):
                    best[i] = x
            if n_free == size:
                return best  # no constraint is in the way
    return best


def _solve(matrix: list[list[float]], vector: list[float]) -> list[float] | None:
    """Gaussian elimination; without pivoting, since the matrix is positive definite."""
    size = len(vector)
    for i in range(size):
        if matrix[i][i] <= 0:
            return None
        for j in range(i + 1, size):
            factor = matrix[j][i] / matrix[i][i]
            for k in range(i, size):
                matrix[j][k] -= factor * matrix[i][k]
            vector[j] -= factor * vector[i]
    for i in reversed(range(size)):
        rest = sum(matrix[i][k] * vector[k] for k in range(i + 1, size))
        vector[i] = (vector[i] - rest) / matrix[i][i]
    return vector
