"""The table of a comparison: from measured cells to a result with named columns.

Who is best is read off it by :mod:`sdegen.standings`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from sdegen.comparison.distances import DISTANCES
from sdegen.comparison.settings import Cell, Comparison, begins
from sdegen.comparison.truth import Truths
from sdegen.results import Array, Result
from solvers import resolve

__all__ = ["COLUMNS", "GROUP", "SCHEMA", "TIMINGS", "identity", "tables"]

GROUP = "comparison"
"""Name of the table in a results file."""

SCHEMA = 2
"""Version of the table and of the folder of a sweep; another one is refused. It changes when the columns do."""


class Column(NamedTuple):
    """What a column holds.

    Attributes:
        empty: its value where it is unknown, which also says its type.
        meaning: in words.
        unit: of the number, "" where it has none.
    """

    empty: Any
    meaning: str
    unit: str = ""


NUMBER = math.nan
_LAW = {
    "sliced_w2": ("sliced Wasserstein-2 distance to exact samples", "data"),
    "w2": ("Wasserstein-2 distance to exact samples", "data"),
    "energy": ("energy distance to exact samples", "data^(1/2)"),
    "mode_error": ("half the sum of |weight found - true weight| over the mixture's components", ""),
    "mean_error": ("|mean found - true mean| / standard deviation of the data", ""),
    "cov_error": ("relative error of the covariance, Frobenius", ""),
    "log_density": ("mean log-density of the endpoints under the truth", "nat"),
}

COLUMNS: dict[str, Column] = {
    "target": Column("", "oracle, run folder or package.module:function"),
    "path": Column("", "Gaussian path; own: the model's"),
    "grid": Column("", "time grid; none: the solver chooses its own steps"),
    "solver": Column("", "name or package.module:Class"),
    "stochastic": Column(False, "it draws noise"),
    "order": Column(0, "declared order of convergence; 0: none, or by tolerance"),
    "start_order": Column(0, "declared order that the first steps leave to the whole, where they weigh; at most order"),
    "equation": Column("", "ODE, SDE, SDE with its eta, own (the solver's own limit), none (it has no limit)"),
    "seed": Column(0, "of noises, Brownian motion and data"),
    "budget": Column(0, "network calls that were allowed; 0: a tolerance was given"),
    "tol": Column(NUMBER, "tolerance; NaN: a budget was given"),
    "steps": Column(0, "steps of the grid"),
    "nfe": Column(0, "network calls, counted"),
    "nfe_mean": Column(NUMBER, "network calls of a sample, mean over samples that differ in it"),
    "error": Column(NUMBER, "pathwise error, root mean square over noises and coordinates", "data"),
    "error_low": Column(NUMBER, "lower end of its 95 % interval", "data"),
    "error_high": Column(NUMBER, "upper end of its 95 % interval", "data"),
    "error_median": Column(
        NUMBER, "pathwise error, median over noises of the root mean square over coordinates", "data"
    ),
    "error_median_low": Column(NUMBER, "lower end of its 95 % interval", "data"),
    "error_median_high": Column(NUMBER, "upper end of its 95 % interval", "data"),
    "reference_error": Column(NUMBER, "bound for the error of the converged solution, root mean square", "data"),
    "reference_error_median": Column(NUMBER, "bound for the error of the converged solution, median", "data"),
    **{
        name + end: Column(NUMBER, meaning + words, unit)
        for name, (meaning, unit) in _LAW.items()
        for end, words in (
            ("", ""),
            ("_floor", ", of exact samples, on average"),
            ("_floor_high", ", of exact samples, upper end of 95 %"),
        )
    },
    "seconds": Column(NUMBER, "of the solve of all noises, fastest of some", "s"),
    "network_seconds": Column(NUMBER, "in the network", "s"),
    "noise_seconds": Column(NUMBER, "in drawing the Brownian motion", "s"),
    "overhead_us": Column(NUMBER, "the solver's own time per step (per call where it chooses its steps)", "us"),
    "peak_mib": Column(NUMBER, "tensors that the solver holds beyond the network, for all noises, counted", "MiB"),
    "samples": Column(0, "noises of the pathwise error"),
    "cloud": Column(0, "endpoints of the distances in distribution"),
    "code": Column("", "mark of the code that measured the cell"),
    "status": Column("", "ok, or why there are no numbers"),
}
"""Every column of the table."""

TIMINGS = ("seconds", "network_seconds", "noise_seconds", "overhead_us")
"""The columns that differ from run to run; all others are the same bit for bit."""

assert set(_LAW) == set(DISTANCES)


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a row another row."""
    return (*(row[name] for name in ("target", "path", "grid", "solver", "seed", "budget")), repr(float(row["tol"])))


def tables(settings: Comparison, rows: Sequence[Mapping[str, Any]], truths: Truths) -> dict[str, Result]:
    """The results of a comparison by the name of their group; see :mod:`sdegen.comparison`.

    Args:
        settings: the comparison.
        rows: as :func:`sdegen.comparison.measure.measure` returns them, in the order of the table.
        truths: what they were measured against.
    """
    arrays = {
        name: Array(
            ("cell",),
            np.array([row.get(name, column.empty) for row in rows], dtype=_dtype(column.empty)),
            {"long_name": column.meaning, **({"units": column.unit} if column.unit else {})},
        )
        for name, column in COLUMNS.items()
    }
    about = {"schema": SCHEMA, "settings": {**asdict(settings), "solvers": settings.names}, "targets": truths.about}
    found = {GROUP: Result(arrays, about)}
    if any(row["status"] == "ok" for row in rows):
        found["orders"] = _orders(found[GROUP])
    for number, name in enumerate(truths.targets):
        if (shown := _pictures(name, rows, truths)) is not None:
            found[f"samples/{number}"] = shown
    return found


def _dtype(empty: Any) -> Any:
    return {str: object, bool: bool, int: np.int64, float: np.float64}[type(empty)]


# --- Orders -----------------------------------------------------------------------------------------------------------


def _orders(found: Result) -> Result:
    """The slope of every solver's error between its two finest budgets, as far as the reference resolves them.

    Of the median: a few noises that end in another mode can rule the root mean square, and know no order.
    """
    groups: dict[tuple[str, ...], dict[int, list[int]]] = {}
    for i, status in enumerate(found["status"]):
        if status == "ok" and found["steps"][i] and found["error_median"][i] > 0:
            key = tuple(str(found[name][i]) for name in ("target", "path", "grid", "solver"))
            groups.setdefault(key, {}).setdefault(int(found["steps"][i]), []).append(i)
    rows = []
    for key, by_steps in groups.items():
        method = resolve(key[-1])
        points = [(steps, *_pooled(found, by_steps[steps])) for steps in sorted(by_steps)]
        known = [(steps, error, spread) for steps, error, spread, limit in points if error > 5 * limit]
        if len(known) < 2:
            continue
        (m, e, d), (n, f, g) = known[-2:]
        slope, half = math.log(e / f) / math.log(n / m), 1.96 * math.hypot(d, g) / math.log(n / m)
        order = method.strong_order if method.stochastic else method.order
        start = order if method.stochastic else begins(method)
        rows.append((*key, method.stochastic, float(order), float(start), slope, slope - half, slope + half, m, n))
    names = ("target", "path", "grid", "solver", "stochastic", "order", "start_order", "measured", "measured_low",
             "measured_high", "steps_from", "steps_to")  # fmt: skip
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(names)
    kinds = [object] * 4 + [bool] + [float] * 5 + [int] * 2
    return Result(
        {
            name: (("row",), np.array(column, dtype=kind))
            for name, column, kind in zip(names, columns, kinds, strict=True)
        },
        {"order": "declared; of strong convergence where stochastic", "measured": "slope between two numbers of steps"},
    )


def _pooled(found: Result, cells: Sequence[int]) -> tuple[float, float, float]:
    """Median error of several seeds, the standard error of its logarithm, and the reference's error."""
    error, low, high = (found[f"error_median{end}"][cells] for end in ("", "_low", "_high"))
    spread = float(np.sqrt(np.mean((np.log(high / np.maximum(low, 1e-300)) / 3.92) ** 2) / len(cells)))
    return float(np.exp(np.mean(np.log(error)))), spread, float(np.max(found["reference_error_median"][cells]))


# --- Pictures ---------------------------------------------------------------------------------------------------------


def _pictures(name: str, rows: Sequence[Mapping[str, Any]], truths: Truths) -> Result | None:
    """Endpoints of the first noises, cell by cell, beside where the ODE and the SDE take the same noises."""
    shown = [i for i, row in enumerate(rows) if row["target"] == name and "kept" in row]
    if not shown:
        return None
    x = np.stack([rows[i]["kept"] for i in shown])
    target, exact = truths.targets[name], {}
    for row in rows:
        what = row.get("equation", "")
        if row["target"] == name and what[:3] in ("ODE", "SDE") and what not in exact and "kept" in row:
            cell = Cell(name, row["path"], "own", row["solver"], row["seed"], row["budget"], row["tol"])
            reference = truths.reference(cell)
            if reference is not None:
                exact[what] = target.decode(reference.x[: x.shape[1]].to(target.dtype)).float().cpu().numpy()
    axes = ("noise", *(("channel", "y", "x_") if x.ndim == 5 else ("coordinate",)))
    arrays: dict[str, Any] = {"cell": (("cell",), shown), "x": (("cell", *axes), x)}
    if exact:
        arrays |= {
            "equation": (("equation",), list(exact)),
            "exact": (("equation", *axes), np.stack([*exact.values()])),
        }
    return Result(arrays, {"target": name, "about": target.about})
