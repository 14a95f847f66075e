"""The page of a comparison: which solver is best for a budget, and everything that the answer rests on.

:func:`build` draws it from results files of ``sdegen compare`` alone. The order of the page is that of a reader's
questions: the answer in ten seconds, the price of accuracy, every solver at a glance, families, orders, every cell, and
how it was measured. Words live in ``templates/comparison.html.j2``, pictures in :mod:`sdegen.comparison_figures` and
:mod:`sdegen.comparison_samples`, who wins in :mod:`sdegen.standings`.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from sdegen import comparison_figures as pictures
from sdegen import pages
from sdegen.comparison import table
from sdegen.comparison_samples import samples
from sdegen.figures import BUDGET
from sdegen.files import write_bytes
from sdegen.likelihood.tables import SIGNS
from sdegen.provenance import versions
from sdegen.standings import DISTANCES, MEASURES, Interval, Problem, Row, Source, Standings
from sdegen.style import COLORS, Canvas, Look, looks, save, svg

__all__ = ["Best", "build"]


Draw = Callable[[str, Canvas, str], None]
"""``draw(name, figure, alt)`` puts a figure into the page."""

PIECES = {
    "cost": "Error and cost",
    "shades": "All solvers at a glance",
    "families": "Families",
    "orders": "Orders",
    "samples": "Where the same noises end",
}
COLUMNS = {
    "error": "Pathwise error",
    "error_median": "Median error",
    "sliced_w2": "Sliced W₂",
    "w2": "W₂",
    "energy": "Energy",
    "mode_error": "Modes",
    "mean_error": "Mean",
    "cov_error": "Covariance",
    "log_density": "Log-density",
    "seconds": "Seconds",
    "overhead_us": "µs / step",
    "peak_mib": "MiB",
}
"""The measures as heads of columns."""

SHOWN = ("error", "error_median", "sliced_w2", "seconds", "overhead_us")
"""Of these, the columns that fit a laptop's screen; the others are shown on demand."""


class Best(NamedTuple):
    """Who is best for a budget.

    Attributes:
        ranked: best first; never empty.
        measure: by which they are ranked.
        inside: how many are within the floor, and cannot be told apart.
        calls: the fewest with which the first is within the floor; infinite where it is not.
    """

    ranked: Sequence[Row]
    measure: str
    inside: int
    calls: float

    @property
    def first(self) -> Row:
        """The winner."""
        return self.ranked[0]

    @property
    def second(self) -> Row | None:
        """The next, if there is one."""
        return self.ranked[1] if len(self.ranked) > 1 else None

    @property
    def tied(self) -> bool:
        """The intervals of the first two overlap."""
        return self.second is not None and self.first.ties(self.second, self.measure)

    @property
    def interval(self) -> Interval:
        """The winner's number with its interval."""
        return self.first[self.measure]

    def value(self, place: int) -> float:
        """What the solver in this place reaches."""
        return self.ranked[place][self.measure].value


def build(
    found: Standings, out: Path | str, *, figures: Path | str | None = None, scored: Sequence[Mapping[str, Any]] = ()
) -> Path:
    """Write the page of a comparison.

    Args:
        found: of :func:`sdegen.sweeps.gather`.
        out: the page.
        figures: a folder for the figures, each as SVG and as PNG; made when it is not there.
        scored: rows of :func:`sdegen.likelihood.store.everything`: what else is known of the models.

    Returns:
        Path of the page.
    """
    drawn = dict[str, Markup]()
    folder = Path(figures) if figures is not None else None

    def draw(name: str, figure: Canvas, alt: str) -> None:
        drawn[name] = Markup(svg(figure, name, alt))
        if folder is not None:
            for suffix in (".svg", ".png"):
                save(figure, folder / f"{name}{suffix}")

    context = _context(found, draw, scored) | {"figures": drawn}
    write_bytes(out, pages.render("comparison.html.j2", context))
    return Path(out)


def _context(found: Standings, draw: Draw, scored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the template names; figures are drawn on the way."""
    look = _looks([group for problem in found.problems for group in pictures.together(problem, _budget(problem))])
    parts = [_part(f"p{i}", problem, look, draw) for i, problem in enumerate(found.problems, start=1)]
    sources = [_Described(source) for source in found.sources]
    single = len(parts) == 1
    titles = {f"{k}-p1": v for k, v in PIECES.items() if k in parts[0]["drawn"]} if single else {}
    titles |= {} if single else {part["id"]: part["title"] for part in parts}
    titles |= {"cells": "Every cell"} | ({"scored": "Likelihoods"} if scored else {}) | {"made": "How it was measured"}
    cells, words = found.rows, [str(source.path) for source in sources]
    commits = {source.commit for source in sources}
    return {
        "parts": parts,
        "pieces": PIECES,
        "sections": [{"id": name, "title": title, "number": i} for i, (name, title) in enumerate(titles.items(), 1)],
        "solvers": len({row.solver for _, row in cells}),
        "cells": cells,
        "grids": len({row.grid for _, row in cells}),
        "codes": len({code for _, row in cells for code in row.codes}),
        "cold": any(row.start_order < row.order for _, row in cells),
        "shown": SHOWN,
        "measures": [name for name in MEASURES if any(math.isfinite(row[name].value) for _, row in cells)],
        "columns": COLUMNS,
        "scored": scored,
        "signs": SIGNS,
        "budget": BUDGET,
        "sources": sources,
        "warnings": _warnings(found, sources),
        "facts": _facts(found, sources),
        "commit": commits.pop() if len(commits) == 1 else "",
        "created": max((source.created for source in sources), default=""),
        "command": shlex.join(["sdegen", "report", *words]),
        "program": f"sdegen {versions().get('sdegen', '')}".strip(),
    }


def _looks(groups: Sequence[Sequence[str]]) -> dict[str, Look]:
    """A look for every name, the same in all figures of the page, so that no two of one group have one colour.

    >>> look = _looks([["a", "b"], ["c", "a"]])
    >>> len({look["a"].color, look["b"].color}), len({look["a"].color, look["c"].color})
    (2, 2)
    """
    every, found = list(looks([str(i) for i in range(len(COLORS))]).values()), dict[str, Look]()
    for name in dict.fromkeys(name for group in groups for name in group):
        near = {found[other].color for group in groups if name in group for other in group if other in found}
        free = [look for look in every if look.color not in near] or every
        found[name] = free[len(found) % len(free)]
    return found


def _budget(problem: Problem) -> int:
    """The budget of the headline: ten calls, or what is nearest to it."""
    return min(problem.budgets, key=lambda budget: abs(math.log(budget / BUDGET)))


def _part(name: str, problem: Problem, look: Mapping[str, Look], draw: Draw) -> dict[str, Any]:
    """A problem's answers and figures."""
    budget = _budget(problem)
    best = {b: _bests(problem, b) for b in problem.budgets}
    known = [one for one in best[budget].values() if one is not None]
    drawn: list[str] = []
    for piece, (needs, figures) in _FIGURES.items():
        if needs(problem):
            drawn.append(piece)
            for words, make, alt in figures:
                draw(f"{name}{words}", make(problem, budget, look), alt)
    if known:
        heard = "; ".join(f"{one.first.label} {one.value(0):.2g}" for one in known)
        draw(f"{name}ranking", pictures.ranking(problem, budget, look), f"Best with {budget} calls: {heard}")
    return {
        "id": name, "title": problem.title, "drawn": drawn, "budget": budget, "best": best,
        "distance": problem.distance, "floor": problem.limit(problem.distance or ""),
    }  # fmt: skip


def _measured(problem: Problem) -> bool:
    return "error" in problem.measures


_FIGURES: dict[str, tuple[Callable[[Problem], bool], list[tuple[str, Callable[..., Canvas], str]]]] = {
    "cost": (_measured, [
        ("calls", lambda p, b, look: pictures.costs(p, "nfe", b, look), "Error and distance against network calls"),
        ("seconds", lambda p, b, look: pictures.costs(p, "seconds", b, look), "Error and distance against seconds"),
    ]),
    "shades": (_measured, [
        ("shades", lambda p, b, look: pictures.shades(p), "Error of every solver with every budget, as shades"),
    ]),
    "families": (_measured, [
        ("families", lambda p, b, look: pictures.families(p, look), "Error against calls, one family at a time"),
    ]),
    "orders": (lambda p: bool(p.orders), [
        ("orders", lambda p, b, look: pictures.orders(p, look), "Error against calls by order, and measured orders"),
    ]),
    "samples": (lambda p: p.pictures is not None, [
        ("samples", lambda p, b, look: samples(p), "Endpoints, a row or column for each solver and budget"),
    ]),
}  # fmt: skip
"""The pieces of a problem: when they can be drawn, and their figures as (name, how, alternative text)."""


def _bests(problem: Problem, budget: int) -> dict[str, Best | None]:
    views = {
        "ODE": ("error", False), "SDE": ("error", True), "either": (problem.distance or "", None),
        "ODE typical": ("error_median", False), "SDE typical": ("error_median", True),
    }  # fmt: skip
    found: dict[str, Best | None] = {}
    for name, (measure, noisy) in views.items():
        ranked = problem.ranked(budget, measure, stochastic=noisy)
        inside, arrives = sum(problem.inside(row, measure) for row in ranked), problem.arrivals(measure)
        found[name] = Best(ranked, measure, inside, arrives.get(ranked[0].label, math.inf)) if ranked else None
    return found


# --- How it was measured ----------------------------------------------------------------------------------------------


class _Described:
    """A results file with what it says about itself, for people."""

    def __init__(self, source: Source) -> None:
        self.path, self.cells, self.about = source.path, len(source.rows), source.about
        self.settings: Mapping[str, Any] = _parsed(source.about.get("settings", {}))
        self.versions: Mapping[str, Any] = _parsed(source.about.get("versions", {}))
        self.commit = str(source.about.get("commit", ""))
        self.created = pages.moment(str(source.about["created"])) if "created" in source.about else "unknown"
        self.command = pages.command(str(source.about.get("command", "")))


def _parsed(value: Any) -> Any:
    """An attribute that may be JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return {}


def _warnings(found: Standings, sources: Sequence[_Described]) -> list[str]:
    """What a reader should know before believing a number."""
    said = []
    for what, values in (
        ("commits", {source.commit[:12] or "none": source.path.name for source in sources}),
        ("versions of sdegen", {str(source.versions.get("sdegen", "?")): source.path.name for source in sources}),
        ("versions of torch", {str(source.versions.get("torch", "?")): source.path.name for source in sources}),
        ("devices", {str(source.settings.get("device", "?")): source.path.name for source in sources}),
    ):
        if len(values) > 1:
            each = ", ".join(f"{value} ({name})" for value, name in values.items())
            said.append(f"these files come from different {what}: {each}.")
    for problem in found.problems:
        codes = dict.fromkeys(code for row in problem.rows for code in row.codes)
        if len(codes) > 1:
            each = ", ".join(
                f"{code} ({_some(row.label for row in problem.rows if code in row.codes)})" for code in codes
            )
            said.append(f"on {problem.title}, cells were measured by different code: {each}.")
    if failed := [row for _, row in found.rows if row.status != "ok" and "needs at least" not in row.status]:
        said.append(f"cells failed: {len(failed)} ({_some(row.label for row in failed)}); the table of cells says why.")
    if found.doubled:
        said.append(f"cells in more than one file: {found.doubled}; those of the later file are shown.")
    return said


def _some(names: Iterable[str], most: int = 6) -> str:
    """Names, each once, and how many more there are."""
    known = list(dict.fromkeys(names))
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


def _facts(found: Standings, sources: Sequence[_Described]) -> dict[str, str]:
    """How each kind of number came about."""
    seeds = max((row.seeds for _, row in found.rows), default=1)
    facts = {
        "Pathwise error": "how far a solver ends from where the solution of its own equation takes the same noise: the "
        "probability-flow ODE, or the reverse SDE along the same Brownian motion; root mean square over noises and "
        "coordinates, in units of the data. All solvers start from the same noises. A noise at the border of two modes "
        "may be sent to the wrong one; a few of those can be most of the root mean square, and nothing of the median",
        "Intervals": "95 %, over noises" + (f", of {seeds} seeds together" if seeds > 1 else ""),
        "Network calls": "counted by wrapping the network, one for each batch; a budget is never exceeded",
    }
    names = {name for problem in found.problems for name in problem.measures} - {"error"}
    facts |= {COLUMNS[name]: _meaning(name) for name in MEASURES if name in names}
    if names & set(DISTANCES):
        facts["Floor"] = (
            "the upper end of the 95 % range of that distance for exact samples, as many as there are endpoints, or "
            "what the most accurate ODE solver has, if that is more: what lies below cannot be told from the truth"
        )
    for source in sources:
        sizes = {key: value for key, value in source.settings.items() if isinstance(value, int) and key in SIZES}
        text = "; ".join(f"{name}: {what}" for name, what in _parsed(source.about.get("targets", {})).items())
        facts[f"{source.path.parent.name}/{source.path.name}"] = ", ".join(
            [text, *(f"{value} {SIZES[key]}" for key, value in sizes.items())]
        )
    return facts


SIZES = {
    "samples": "noises",
    "cloud": "endpoints for the distances",
    "transport": "of them for exact transport",
    "reference_steps": "steps of the SDE's solution",
}


UNITS = {
    "data": "in units of the data",
    "data^(1/2)": "in √ units of the data",
    "us": "µs",
    "nat": "nats",
    "s": "seconds",
}


def _meaning(name: str) -> str:
    column = table.COLUMNS[name]
    return column.meaning + (f", {UNITS.get(column.unit, column.unit)}" if column.unit else "")
