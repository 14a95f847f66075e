"""Who is best, at which cost: the cells of one or several sweeps, put in order.

A *problem* is a target on a path, such as "mixture16 on vp-linear". On it every solver, on every grid, has a row for
each budget of network calls or each tolerance; the seeds of a row are pooled. Three questions are then asked:

*which is best for a budget?*  :meth:`Problem.ranked`: of each solver the row that spends most of the budget, best
    first. A solver with a tolerance is given the smallest one that the budget allows.
*which is worth its cost?*  :func:`front`: the rows that no other row beats in error and cost together (Pareto).
*which are told apart?*  a row ties with another when their 95 % intervals overlap, and with the truth when its distance
    is within the floor, the distance of two exact samples of the same size.

Results of several files are merged: the same solver on different targets, or a sweep that was done in parts. Of a cell
that is in two files the later file's is taken, and :attr:`Standings.doubled` counts them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdegen import results
from sdegen.results import Result
from solvers import SOLVERS, Solver

__all__ = ["DISTANCES", "MEASURES", "Interval", "Problem", "Row", "Source", "Standings", "family", "front", "standings"]

GROUP = "comparison"

MEASURES = {
    "error": "pathwise error",
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

DISTANCES = ("sliced_w2", "w2", "energy")
"""The measures that compare distributions, the one that is shown first in front."""

_KEYS = ("target", "path", "grid", "solver", "stochastic", "order", "seed", "budget", "tol", "nfe", "status")


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
        budget: network calls it was allowed; 0 of a solver with a tolerance.
        tol: its tolerance, or NaN.
        nfe: network calls it made, counted.
        seeds: how many are pooled.
        values: measure -> number with interval.
        status: "ok", or what went wrong.
    """

    label: str
    solver: str
    grid: str
    family: str
    stochastic: bool
    order: int
    budget: int
    tol: float
    nfe: float
    seeds: int
    values: Mapping[str, Interval]
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
    """The measured order of a solver beside the one it declares."""

    label: str
    stochastic: bool
    declared: float
    measured: float


@dataclass(frozen=True)
class Source:
    """A results file: its path, and what it says about itself."""

    path: Path
    about: Mapping[str, Any]
    cells: int


@dataclass(frozen=True)
class Problem:
    """A target on a path, with every row that was measured on it.

    Args:
        target: name of the oracle or run.
        path: name of the path.
        rows: in the order of the files.
        floors: measure -> what two exact samples give.
        sources: the files it comes from.
    """

    target: str
    path: str
    rows: tuple[Row, ...]
    floors: Mapping[str, float] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()

    @property
    def title(self) -> str:
        """Name for people."""
        return f"{self.target} on {self.path}"

    @cached_property
    def budgets(self) -> list[int]:
        """Budgets of network calls, smallest first."""
        return sorted({row.budget for row in self.rows if row.budget})

    @cached_property
    def measures(self) -> list[str]:
        """What was measured of at least one row."""
        return [name for name in MEASURES if any(math.isfinite(row[name].value) for row in self.rows)]

    @property
    def distance(self) -> str | None:
        """The distance between distributions that is shown first."""
        return next((name for name in DISTANCES if name in self.measures), None)

    @cached_property
    def labels(self) -> list[str]:
        """Every solver, in the order of the files."""
        return list(dict.fromkeys(row.label for row in self.rows))

    @cached_property
    def orders(self) -> list[Order]:
        """How fast errors fell between the last two budgets of each solver that has an order."""
        found = []
        for label in self.labels:
            rows = [row for row in self.of(label) if row.budget and row["error"].value > 0]
            if len(rows) > 1 and rows[-1].order and rows[-1].nfe > rows[-2].nfe:
                ratio = rows[-2]["error"].value / rows[-1]["error"].value
                slope = math.log(ratio) / math.log(rows[-1].nfe / rows[-2].nfe)
                found.append(Order(label, rows[-1].stochastic, rows[-1].order, slope))
        return found

    def of(self, label: str) -> list[Row]:
        """The rows of one solver by network calls."""
        return sorted((row for row in self.rows if row.label == label), key=lambda row: row.nfe)

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
            known = row.nfe <= budget and row.budget <= budget and math.isfinite(row[measure].value)
            if known and (row.label not in chosen or row.nfe >= chosen[row.label].nfe):
                chosen[row.label] = row
        wanted = (row for row in chosen.values() if stochastic is None or row.stochastic == stochastic)
        floor, arrives = self.floors.get(measure, -math.inf), self._arrivals(measure)
        return sorted(
            wanted,
            key=lambda row: (max(row[measure].value, floor), arrives.get(row.label, math.inf), row[measure].value),
        )

    def _arrivals(self, measure: str) -> dict[str, float]:
        """Label -> the fewest calls with which the solver is within the floor."""
        floor, found = self.floors.get(measure, -math.inf), dict[str, float]()
        for row in self.rows:
            if row[measure].value <= floor:
                found[row.label] = min(row.nfe, found.get(row.label, math.inf))
        return found

    def quality(self, measure: str, *, stochastic: bool | None = None) -> list[str]:
        """Labels from best to worst over all budgets: by the mean of log(value / best value of the budget).

        Where a solver cannot spend a budget it is counted as the worst that could.
        """
        scores: dict[str, float] = {}
        for budget in self.budgets:
            rows = self.ranked(budget, measure, stochastic=stochastic)
            logs = {row.label: math.log(max(row[measure].value, 1e-300)) for row in rows}
            for row in rows:
                scores.setdefault(row.label, 0.0)
            best, worst = min(logs.values(), default=0.0), max(logs.values(), default=0.0)
            for label in self.labels:
                scores[label] = scores.get(label, 0.0) + logs.get(label, worst) - best
        known = {r.label for r in self.rows if math.isfinite(r[measure].value) and stochastic in (None, r.stochastic)}
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


def standings(files: Sequence[Path | str]) -> Standings:
    """Read and merge results files.

    Args:
        files: written by ``sdegen compare``.

    Raises:
        FileNotFoundError: a file is not there.
        DamagedFile: one is truncated or altered.
        ValueError: one holds no comparison, or was written by another version.
    """
    sources, cells, doubled = [], {}, 0
    for file in map(Path, files):
        if GROUP not in (held := results.names(file)):
            raise ValueError(f"{file} has no comparison, only {', '.join(held) or 'nothing'}: sdegen compare makes one")
        found = results.read(file, GROUP)
        rows = _table(file, found)
        source = Source(file, found.attributes, len(rows))
        sources.append(source)
        for row in rows:
            key = tuple(str(row[name]) for name in ("target", "path", "grid", "solver", "seed", "budget", "tol"))
            doubled += key in cells and cells[key][1] is not source
            cells[key] = (row, source)
    grouped: dict[tuple[str, str], list[tuple[dict[str, Any], Source]]] = {}
    for row, source in cells.values():
        grouped.setdefault((str(row["target"]), str(row["path"])), []).append((row, source))
    problems = tuple(_problem(*key, members) for key, members in grouped.items())
    return Standings(problems, tuple(sources), doubled)


def front(rows: Iterable[Row], measure: str, cost: str = "nfe", floor: float = -math.inf) -> list[Row]:
    """The Pareto front: rows that no other row beats in measure and cost together, cheapest first.

    Args:
        rows: of one problem.
        measure: what should be small.
        cost: "nfe" or "seconds".
        floor: below it nothing can be better.
    """
    known = [row for row in rows if math.isfinite(row[measure].value) and math.isfinite(row.cost(cost))]
    best, kept = math.inf, []
    for row in sorted(known, key=lambda row: (row.cost(cost), row[measure].value)):
        if row[measure].value < best and best > floor:
            best = row[measure].value
            kept.append(row)
    return kept


# --- Families ---------------------------------------------------------------------------------------------------------

FAMILIES = {
    "Runge-Kutta": ("runge_kutta", "external"),
    "Adams": ("multistep", "pndm"),
    "DDIM and DPM-Solver": ("ancestral", "dpm_solver"),
    "DEIS and UniPC": ("deis", "unipc", "exponential"),
    "Adaptive": ("adaptive",),
    "Ancestral": ("ancestral", "analytic"),
    "SDE Runge-Kutta": ("sde", "external"),
    "SDE exponential": ("exponential_sde", "seeds", "sa_solver", "er_sde"),
    "Churn and Langevin": ("churn", "langevin", "adaptive_sde"),
}
"""Kinds of solvers -> the modules they live in; the first five follow the ODE, the others the SDE."""


def family(solver: str) -> str:
    """The kind of a solver by its name: a key of :data:`FAMILIES`, or "Others" where it is not one of ours.

    >>> family("unipc_2"), family("edm_heun"), family("ancestral"), family("mine.code:Leapfrog")
    ('DEIS and UniPC', 'Runge-Kutta', 'Ancestral', 'Others')
    """
    method: Any = SOLVERS.get(solver)
    if method is None:
        return "Others"
    if method.nfe_per_step == 0 and not method.stochastic:
        return "Adaptive"
    while type(method).__module__ == "solvers.combine" and isinstance(inner := getattr(method, "solver", None), Solver):
        method = inner
    module = type(method).__module__.rpartition(".")[2]
    names = list(FAMILIES)
    kinds = names[5:] if SOLVERS[solver].stochastic else names[:5]
    return next((name for name in kinds if module in FAMILIES[name]), "Others")


# --- Reading ----------------------------------------------------------------------------------------------------------


def _table(file: Path, found: Result) -> list[dict[str, Any]]:
    """The cells of a result as dictionaries.

    Raises:
        ValueError: when columns are missing.
    """
    if missing := [name for name in (*_KEYS, "error") if name not in found.arrays]:
        made = found.attributes.get("versions", "")
        by = f" by sdegen {v}" if (v := _version(made)) else ""
        raise ValueError(f"{file}: its comparison has no {', '.join(missing)}; it was written{by}, another version")
    columns = {name: array.values.tolist() for name, array in found.arrays.items() if array.axes == ("cell",)}
    columns.pop("cell", None)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _version(versions: Any) -> str:
    import json

    try:
        return str(json.loads(versions).get("sdegen", ""))
    except (TypeError, ValueError, AttributeError):
        return ""


def _problem(target: str, path: str, members: Sequence[tuple[Mapping[str, Any], Source]]) -> Problem:
    """Pool the seeds and name the rows of one target on one path."""
    grids: dict[str, set[str]] = {}
    for cell, _ in members:
        grids.setdefault(str(cell["solver"]), set()).add(str(cell["grid"]))
    pools: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell, _ in members:
        key = (str(cell["solver"]), str(cell["grid"]), int(cell["budget"]), str(cell["tol"]))
        pools.setdefault(key, []).append(cell)
    rows = [
        _pooled(_label(solver) + (f" · {grid}" if len(grids[solver]) > 1 else ""), cells)
        for (solver, grid, *_), cells in pools.items()
    ]
    floors = {}
    for name in MEASURES:
        known = [float(cell[f"{name}_floor"]) for cell, _ in members if f"{name}_floor" in cell]
        if known and np.isfinite(known).any():
            floors[name] = float(np.nanmedian(known))
    sources = tuple({id(source): source for _, source in members}.values())
    return Problem(target, path, tuple(rows), floors, sources)


def _label(solver: str) -> str:
    """A short name: of "package.module:Class" the class."""
    return solver.rpartition(":")[2]


def _pooled(label: str, cells: Sequence[Mapping[str, Any]]) -> Row:
    good = [cell for cell in cells if cell["status"] == "ok"]
    first = (good or cells)[0]
    values = {}
    for name in MEASURES:
        numbers = np.array([[float(cell.get(name + end, math.nan)) for end in ("", "_low", "_high")] for cell in good])
        if len(numbers) and np.isfinite(numbers[:, 0]).any():
            values[name] = _root_mean(numbers) if name == "error" else _mean(numbers)
    solver, nfe = str(first["solver"]), float(np.mean([cell["nfe"] for cell in good or cells]))
    return Row(
        label, solver, str(first["grid"]), family(solver), bool(first["stochastic"]), int(first["order"]),
        int(first["budget"]), float(first["tol"]), nfe, len(cells), values, str(first["status"]),
    )  # fmt: skip


def _root_mean(numbers: np.ndarray) -> Interval:
    """Root mean square errors of several seeds as one, with its interval (the delta method)."""
    value, low, high = numbers.T
    pooled = math.sqrt(float(np.mean(value**2)))
    if len(value) == 1:
        return Interval(*map(float, numbers[0]))
    half = math.sqrt(float(np.sum((value * (high - low) / 2) ** 2))) / (len(value) * max(pooled, 1e-300))
    return Interval(pooled, pooled - half, pooled + half)


def _mean(numbers: np.ndarray) -> Interval:
    """The mean over seeds with what the seeds say about its interval; of one seed, what the file says."""
    if len(numbers) == 1:
        return Interval(*map(float, numbers[0]))
    value = numbers[:, 0]
    half = 1.96 * float(value.std(ddof=1)) / math.sqrt(len(value))
    return Interval(float(value.mean()), float(value.mean()) - half, float(value.mean()) + half)
