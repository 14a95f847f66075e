"""Who is best, at which cost: the cells of one or several sweeps, put in order.

A *problem* is a target on a path, such as "mixture16 on vp-linear". On it every solver, on every grid, has a row for
each budget of network calls or each tolerance; the seeds of a row are pooled. Three questions are then asked:

*which is best for a budget?*  :meth:`Problem.ranked`: of each solver the row that spends most of the budget, best
    first. A solver with a tolerance is given the smallest one that the budget allows.
*which is worth its cost?*  :func:`front`: the rows that no other row beats in error and cost together (Pareto).
*which are told apart?*  a row ties with another when their 95 % intervals overlap, and with the truth when its distance
    is within the floor, what exact samples of the same size have by chance.

:mod:`sdegen.sweeps` makes these from results files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdegen.results import Result

__all__ = [
    "DISTANCES",
    "MEASURES",
    "NEAR",
    "Interval",
    "Order",
    "Pictures",
    "Problem",
    "Row",
    "Source",
    "Standings",
    "front",
]

MEASURES = {
    "error": "pathwise error",
    "error_median": "median error",
    "sliced_w2": "sliced Wasserstein distance",
    "w2": "Wasserstein distance",
    "energy": "energy distance",
    "mode_error": "error of the mode weights",
    "mean_error": "error of the mean",
    "cov_error": "error of the covariance",
    "log_density": "log-density, nats",
    "seconds": "seconds",
    "overhead_us": "overhead, µs per step",
    "peak_mib": "peak memory, MiB",
}
"""What may be measured of a cell, in reading order: column of the results file -> words."""

NEAR = ("log_density",)
"""Measures that should be near to those of exact samples, and neither small nor large."""

LADDER = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)

DISTANCES = ("sliced_w2", "w2", "energy")
"""The measures that compare distributions, the one that is shown first in front."""


class Interval(NamedTuple):
    """A number and its 95 % interval; NaN where it is unknown."""

    value: float
    low: float = math.nan
    high: float = math.nan


UNKNOWN = Interval(math.nan)


@dataclass(frozen=True)
class Row:
    """A solver on a grid with one budget or tolerance, its seeds pooled.

    Args:
        label: name for people, unique together with the budget in a problem.
        solver: name in the file.
        grid: its time grid.
        family: see :func:`family`.
        stochastic: it draws noise.
        order: declared.
        start_order: declared of the whole where the first steps weigh; at most ``order``.
        budget: network calls it was allowed; 0 of a solver with a tolerance.
        tol: its tolerance, or NaN.
        nfe: network calls it made, counted.
        seeds: how many are pooled.
        values: measure -> number with interval.
        codes: marks of the code that measured it.
        status: "ok", or what went wrong.
    """

    label: str
    solver: str
    grid: str
    family: str
    stochastic: bool
    order: int
    start_order: int
    budget: int
    tol: float
    nfe: float
    seeds: int
    values: Mapping[str, Interval]
    codes: tuple[str, ...] = ()
    status: str = "ok"

    def __getitem__(self, measure: str) -> Interval:
        return self.values.get(measure, UNKNOWN)

    def cost(self, kind: str) -> float:
        """Network calls ("nfe") or another measure."""
        return self.nfe if kind == "nfe" else self[kind].value

    def ties(self, other: Row, measure: str) -> bool:
        """Their intervals overlap; never where one is unknown."""
        a, b = self[measure], other[measure]
        return a.low <= b.high and b.low <= a.high


class Order(NamedTuple):
    """The measured order of a solver beside the one it declares.

    Attributes:
        label: the solver.
        stochastic: it draws noise, and the orders are those of strong convergence.
        declared: of its own steps.
        start: of the whole where its first steps weigh; at most that.
        measured: slope between the two largest budgets.
    """

    label: str
    stochastic: bool
    declared: float
    start: float
    measured: Interval

    @property
    def short(self) -> bool:
        """Below what it promises even for a cold start, by more than chance and 0.2."""
        return self.measured.high < self.start - 0.2


@dataclass(frozen=True)
class Source:
    """A results file: its path, what it says about itself, and what is in it."""

    path: Path
    about: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...] = field(repr=False)
    orders: Result | None = field(default=None, repr=False)
    pictures: tuple[Result, ...] = field(default=(), repr=False)


class Pictures(NamedTuple):
    """Endpoints to look at: (label, budget) -> states of the first noises; equation -> where it takes them."""

    shown: Mapping[tuple[str, int], np.ndarray]
    exact: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """A target on a path, with every row that was measured on it.

    Args:
        target: name of the oracle or run.
        path: name of the path.
        rows: in the order of the files.
        floors: measure -> what exact samples of the same size have, on average.
        limits: measure -> the upper end of the 95 % range of that: a distance below it cannot be told from zero.
        orders: measured and declared.
        pictures: endpoints, where a target can be looked at.
        sources: the files it comes from.
    """

    target: str
    path: str
    rows: tuple[Row, ...]
    floors: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)
    orders: tuple[Order, ...] = ()
    pictures: Pictures | None = None
    sources: tuple[Source, ...] = ()

    @property
    def title(self) -> str:
        """Name for people."""
        return self.target if self.path == "own" else f"{self.target} on {self.path}"

    @cached_property
    def budgets(self) -> list[int]:
        """Budgets of network calls, smallest first; where there are tolerances only, those that some solver keeps."""
        if given := sorted({row.budget for row in self.rows if row.budget}):
            return given
        calls = [row.nfe for row in self.rows] or [1.0]
        return [b for b in LADDER if min(calls) <= b <= 2 * max(calls)] or [math.ceil(max(calls))]

    @cached_property
    def measures(self) -> list[str]:
        """What was measured of at least one row."""
        return [name for name in MEASURES if any(math.isfinite(row[name].value) for row in self.rows)]

    @property
    def distance(self) -> str | None:
        """The distance between distributions that is shown first."""
        return next((name for name in DISTANCES if name in self.measures), None)

    def loss(self, row: Row, measure: str) -> float:
        """What should be small: the number itself; of the log-density, how far it is from that of exact samples.

        A solver that draws its samples towards the modes has a higher log-density than the data, and is no better.
        """
        value = row[measure].value
        return abs(value - self.floors.get(measure, math.nan)) if measure in NEAR else value

    def limit(self, measure: str) -> float:
        """Below it a :meth:`loss` cannot be told from zero; minus infinity where there is no floor.

        All solvers start from the same noises, and those may be a little off the law by chance. So the limit is not
        less than what the endpoints of the most accurate ODE solver have, which has no error to speak of.
        """
        limit = self.limits.get(measure, math.nan) - (self.floors.get(measure, math.nan) if measure in NEAR else 0.0)
        if not math.isfinite(limit):
            return -math.inf
        known = [r for r in self.rows if not r.stochastic and math.isfinite(r["error"].value + self.loss(r, measure))]
        best = min(known, key=lambda row: row["error"].value, default=None)
        return limit if best is None else max(limit, self.loss(best, measure))

    def inside(self, row: Row, measure: str) -> bool:
        """A row cannot be told from exact samples."""
        return self.loss(row, measure) <= self.limit(measure)

    @cached_property
    def labels(self) -> list[str]:
        """Every solver, in the order of the files."""
        return list(dict.fromkeys(row.label for row in self.rows))

    def of(self, label: str) -> list[Row]:
        """The rows of one solver by network calls."""
        return sorted((row for row in self.rows if row.label == label), key=lambda row: row.nfe)

    def at(self, label: str, budget: int) -> Row | None:
        """The row of a solver with a budget, if it has one."""
        return next((row for row in self.rows if row.label == label and row.budget == budget), None)

    def ranked(self, budget: int, measure: str, *, stochastic: bool | None = None) -> list[Row]:
        """Solvers from best to worst with at most ``budget`` calls, one row each: the one that spends most of it.

        Those within the floor are equal; of them the first is the one that gets there with the fewest calls.

        Args:
            budget: network calls.
            measure: a key of :data:`MEASURES`.
            stochastic: only those that draw noise, or only those that do not.
        """
        chosen: dict[str, Row] = {}
        for row in self.rows:
            known = row.nfe <= budget and row.budget <= budget and math.isfinite(self.loss(row, measure))
            if known and (row.label not in chosen or row.nfe >= chosen[row.label].nfe):
                chosen[row.label] = row
        wanted = (row for row in chosen.values() if stochastic is None or row.stochastic == stochastic)
        floor, arrives = self.limit(measure), self.arrivals(measure)

        def place(row: Row) -> tuple[float, float, float]:
            loss = self.loss(row, measure)
            return max(loss, floor), arrives.get(row.label, math.inf), loss

        return sorted(wanted, key=place)

    def arrivals(self, measure: str) -> dict[str, float]:
        """Label -> the fewest calls with which the solver is within the floor."""
        found = dict[str, float]()
        for row in self.rows:
            if self.inside(row, measure):
                found[row.label] = min(row.nfe, found.get(row.label, math.inf))
        return found

    def quality(self, measure: str, *, stochastic: bool | None = None) -> list[str]:
        """Labels from best to worst over all budgets: by the mean of log(loss / least loss of the budget).

        Where a solver cannot spend a budget it is counted as the worst that could.
        """
        scores: dict[str, float] = {}
        for budget in self.budgets:
            rows = self.ranked(budget, measure, stochastic=stochastic)
            logs = {row.label: math.log(max(self.loss(row, measure), 1e-300)) for row in rows}
            for row in rows:
                scores.setdefault(row.label, 0.0)
            best, worst = min(logs.values(), default=0.0), max(logs.values(), default=0.0)
            for label in self.labels:
                scores[label] = scores.get(label, 0.0) + logs.get(label, worst) - best
        known = {
            r.label for r in self.rows if math.isfinite(self.loss(r, measure)) and stochastic in (None, r.stochastic)
        }
        return sorted(known, key=lambda label: scores.get(label, math.inf))

    def handful(self, measure: str, budget: int, *, stochastic: bool | None = None, count: int = 6) -> list[str]:
        """The solvers worth a name in a picture: the best for ``budget``, then for every budget, then the second best.

        Args:
            measure: by which they are ranked.
            budget: the one that people ask for first.
            stochastic: as for :meth:`ranked`.
            count: at most so many.
        """
        budgets = [budget, *(b for b in self.budgets if b != budget)]
        ranks = [[row.label for row in self.ranked(b, measure, stochastic=stochastic)] for b in budgets]
        places = range(max(map(len, ranks), default=0))
        wanted = (rank[place] for place in places for rank in ranks if place < len(rank))
        return list(dict.fromkeys(wanted))[:count]


@dataclass(frozen=True)
class Standings:
    """All problems of some results files.

    Args:
        problems: in the order of the files.
        sources: the files.
        doubled: cells that were in more than one file.
    """

    problems: tuple[Problem, ...]
    sources: tuple[Source, ...]
    doubled: int = 0

    @property
    def rows(self) -> list[tuple[Problem, Row]]:
        """Every row with its problem."""
        return [(problem, row) for problem in self.problems for row in problem.rows]

    @property
    def labels(self) -> list[str]:
        """Every solver once."""
        return list(dict.fromkeys(label for problem in self.problems for label in problem.labels))


def front(rows: Iterable[Row], measure: str, cost: str = "nfe", floor: float = -math.inf) -> list[Row]:
    """The Pareto front: rows that no other row beats in measure and cost together, cheapest first.

    Args:
        rows: of one problem.
        measure: what should be small.
        cost: "nfe" or "seconds".
        floor: below it nothing can be better.
    """
    if measure in NEAR:
        raise ValueError(f"a front is of what should be small, not of {measure}")
    known = [row for row in rows if math.isfinite(row[measure].value) and math.isfinite(row.cost(cost))]
    best, kept = math.inf, []
    for row in sorted(known, key=lambda row: (row.cost(cost), row[measure].value)):
        if row[measure].value < best and best > floor:
            best = row[measure].value
            kept.append(row)
    return kept
