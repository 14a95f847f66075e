"""Results files of ``sdegen compare``, read and put together.

A comparison may lie in several files: the same solvers on other targets, or the parts of a sweep that was done on
several machines. :func:`gather` merges them into :class:`sdegen.standings.Standings`, cell by cell. Of a cell that is
in two files the later file's is taken; cells that differ in their seed only become one row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from sdegen import results
from sdegen.comparison.table import COLUMNS, GROUP, SCHEMA, identity
from sdegen.families import family
from sdegen.files import DamagedFile
from sdegen.results import Result
from sdegen.standings import MEASURES, Interval, Order, Pictures, Problem, Row, Source, Standings

__all__ = ["gather", "held", "merge", "source"]

LAW = tuple(name for name in MEASURES if f"{name}_floor" in COLUMNS)


def gather(files: Sequence[Path | str]) -> Standings:
    """Read and merge results files.

    Args:
        files: written by ``sdegen compare``.

    Raises:
        FileNotFoundError: a file is not there.
        DamagedFile: one is truncated or altered.
        ValueError: one holds no comparison, or was written by another version.
    """
    return merge([_read(Path(file)) for file in files])


def merge(sources: Sequence[Source]) -> Standings:
    """Put several results together; see :func:`source`."""
    cells: dict[tuple[Any, ...], tuple[Mapping[str, Any], Source]] = {}
    doubled = 0
    for source in sources:
        for row in source.rows:
            doubled += identity(row) in cells
            cells[identity(row)] = (row, source)
    grouped: dict[tuple[str, str], list[tuple[Mapping[str, Any], Source]]] = {}
    for row, source in cells.values():
        grouped.setdefault((row["target"], row["path"]), []).append((row, source))
    problems = tuple(_problem(*key, members) for key, members in grouped.items())
    return Standings(problems, tuple(sources), doubled)


def held(file: Path) -> list[str]:
    """The results in a file.

    Raises:
        DamagedFile: it cannot be read; the message says where the cells are safe, if they are.
    """
    try:
        return results.names(file)
    except DamagedFile as error:
        raise _rescued(error, file) from None


def _rescued(error: DamagedFile, file: Path) -> DamagedFile:
    journal = file.parent / "journal"
    safe = f"; its cells are safe in {journal}: the sweep's command, given again, makes it anew"
    return DamagedFile(f"{error}{safe if journal.is_dir() else ''}")


def _read(file: Path) -> Source:
    if not file.exists():
        raise FileNotFoundError(f"there is no results file {file}")
    names = held(file)
    if GROUP not in names:
        only = ", ".join(dict.fromkeys(name.partition("/")[0] for name in names))
        raise ValueError(f"{file} has no comparison{f', only {only}' if only else ''}: `sdegen compare` makes one")
    try:
        orders = results.read(file, "orders") if "orders" in names else None
        pictures = [results.read(file, name) for name in names if name.startswith("samples/")]
        return source(results.read(file, GROUP), file, orders, pictures)
    except DamagedFile as error:
        raise _rescued(error, file) from None


def source(
    found: Result, file: Path | str = "", orders: Result | None = None, pictures: Sequence[Result] = ()
) -> Source:
    """What :func:`sdegen.comparison.compare` returned, or what a file holds, to :func:`merge`.

    Args:
        found: the table of cells.
        file: where it was read.
        orders: measured orders.
        pictures: endpoints to look at.

    Raises:
        ValueError: it was written by another version.
    """
    schema = found.attributes.get("schema", "unknown")
    missing = [name for name in COLUMNS if name not in found.arrays]
    if schema != SCHEMA or missing:
        why = f"its schema is {schema}, this program reads {SCHEMA}" if schema != SCHEMA else f"no {missing[0]}"
        made_by = f" (commit {found.attributes['commit'][:12]})" if "commit" in found.attributes else ""
        raise ValueError(
            f"the comparison{f' in {file}' if file else ''} was written by another version{made_by}: {why}; measure it "
            "again"
        )
    values = zip(*(found[name].tolist() for name in COLUMNS), strict=True)
    rows = tuple(dict(zip(COLUMNS, row, strict=True)) for row in values)
    return Source(Path(file), found.attributes, rows, orders, tuple(pictures))


Cells = Sequence[tuple[Mapping[str, Any], Source]]


def _problem(target: str, path: str, cells: Cells) -> Problem:
    """Pool the seeds and name the rows of one target on one path."""
    grids: dict[str, set[str]] = {}
    for cell, _ in cells:
        grids.setdefault(cell["solver"], set()).add(cell["grid"])
    short = {solver: _short(solver) for solver in grids}
    twins = {name for name in short.values() if sum(name == other for other in short.values()) > 1}
    named = {
        (solver, grid): (solver if short[solver] in twins else short[solver]) + (f" · {grid}" if len(found) > 1 else "")
        for solver, found in grids.items()
        for grid in found
    }
    pools: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell, _ in cells:
        pools.setdefault((cell["solver"], cell["grid"], cell["budget"], str(cell["tol"])), []).append(cell)
    rows = tuple(_pooled(named[solver, grid], pool) for (solver, grid, *_), pool in pools.items())
    floors = {name: _middle(cell[f"{name}_floor"] for cell, _ in cells) for name in LAW}
    limits = {name: _middle(cell[f"{name}_floor_high"] for cell, _ in cells) for name in LAW}
    sources = tuple({id(source): source for _, source in cells}.values())
    orders = [order for source in sources for order in _orders(source, target, path, named)]
    shown = next((p for source in sources if (p := _pictures(source, target, path, named)) is not None), None)
    return Problem(target, path, rows, floors, limits, tuple(orders), shown, sources)


def _short(solver: str) -> str:
    """A solver's name for a table.

    >>> _short("heun"), _short("package.module:Leap"), _short("/home/me/leap.py"), _short("leap.py:Leap")
    ('heun', 'Leap', 'leap', 'Leap')
    """
    return Path(solver).stem if solver.endswith(".py") else solver.rpartition(":")[2]


def _pooled(label: str, cells: Sequence[Mapping[str, Any]]) -> Row:
    """One row of the cells that differ in their seed only."""
    good = [cell for cell in cells if cell["status"] == "ok"]
    first, values = (good or cells)[0], {}
    for name in MEASURES:
        numbers = np.array([[cell.get(name + end, math.nan) for end in ("", "_low", "_high")] for cell in good])
        if len(numbers) and np.isfinite(numbers[:, 0]).all():
            values[name] = _mean(numbers, 2.0 if name == "error" else 1.0)
    return Row(
        label=label,
        solver=first["solver"],
        grid=first["grid"],
        family=family(first["solver"]),
        stochastic=first["stochastic"],
        order=first["order"],
        start_order=first["start_order"],
        budget=first["budget"],
        tol=first["tol"],
        nfe=float(np.mean([cell["nfe"] for cell in good or cells])),
        seeds=len(cells),
        values=values,
        codes=tuple(dict.fromkeys(cell["code"] for cell in cells)),
        status=next((cell["status"] for cell in cells if cell["status"] != "ok"), "ok"),
    )


def _mean(numbers: np.ndarray, power: float) -> Interval:
    """The mean over seeds (the root mean square where ``power`` is 2), with the interval that the seeds leave."""
    value, low, high = numbers.T
    if len(value) == 1:
        return Interval(*map(float, numbers[0]))
    mean = float(np.mean(value**power)) ** (1 / power)
    if np.isfinite(low).all() and (low > 0).all():  # known of each, and independent: their logarithms average
        half = float(np.sqrt(np.mean((np.log(high / low) / 2) ** 2) / len(value)))
        return Interval(mean, mean * math.exp(-half), mean * math.exp(half))
    half = float(student.ppf(0.975, len(value) - 1)) * float(value.std(ddof=1)) / math.sqrt(len(value))
    return Interval(mean, mean - half, mean + half)


def _middle(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.median(known)) if known else math.nan


def _orders(source: Source, target: str, path: str, named: Mapping[tuple[str, str], str]) -> list[Order]:
    found = source.orders
    if found is None:
        return []
    keys = ("target", "path", "solver", "grid", "stochastic", "order", "start_order", "measured", "measured_low",
            "measured_high")  # fmt: skip
    rows = [dict(zip(keys, row, strict=True)) for row in zip(*(found[key].tolist() for key in keys), strict=True)]
    return [
        Order(
            named[row["solver"], row["grid"]], row["stochastic"], row["order"], row["start_order"],
            Interval(row["measured"], row["measured_low"], row["measured_high"]),
        )
        for row in rows
        if (row["target"], row["path"]) == (target, path) and (row["solver"], row["grid"]) in named
    ]  # fmt: skip


def _pictures(source: Source, target: str, path: str, named: Mapping[tuple[str, str], str]) -> Pictures | None:
    """The endpoints that a file keeps of this problem."""
    for found in source.pictures:
        if found.attributes.get("target") != target:
            continue
        shown, cells = {}, [source.rows[int(i)] for i in found["cell"]]
        for cell, x in zip(cells, found["x"], strict=True):
            if cell["path"] == path and cell["budget"]:
                shown[named[cell["solver"], cell["grid"]], cell["budget"]] = x
        exact = dict(zip(found["equation"].tolist(), found["exact"], strict=True)) if "exact" in found.arrays else {}
        if shown:
            return Pictures(shown, exact)
    return None
