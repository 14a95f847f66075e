"""The page of a comparison: which solver is best for a budget, and everything that the answer rests on.

:func:`build` draws it from results files of ``sdegen compare`` alone. The order of the page is that of a reader's
questions: the answer in ten seconds, the price of accuracy, every solver at a glance, families, orders, every cell, and
how it was measured. Words live in ``templates/comparison.html.j2``, pictures in :mod:`sdegen.comparison_figures`, who
wins in :mod:`sdegen.standings`.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from sdegen import comparison_figures as pictures
from sdegen import pages
from sdegen.files import write_bytes
from sdegen.likelihood.tables import SIGNS
from sdegen.provenance import versions
from sdegen.standings import MEASURES, Interval, Problem, Row, Source, Standings
from sdegen.style import Canvas, Look, looks, save, svg

__all__ = ["Best", "build"]

BUDGET = 10  # network calls of the question that people ask first

Draw = Callable[[str, Callable[[], Canvas], str], None]
"""``draw(name, make, alt)`` puts a figure into the page."""

PIECES = {
    "cost": "Error and cost",
    "shades": "All solvers at a glance",
    "families": "Families",
    "orders": "Orders",
}
COLUMNS = {
    "error": "Pathwise error",
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


class Best(NamedTuple):
    """Who is best for a budget.

    Attributes:
        ranked: best first; never empty.
        measure: by which they are ranked.
        inside: how many are within the floor, and cannot be told apart.
    """

    ranked: Sequence[Row]
    measure: str
    inside: int

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
        found: of :func:`sdegen.standings.standings`.
        out: the page.
        figures: a folder for the figures, each as SVG and as PNG; made when it is not there.
        scored: rows of :func:`sdegen.likelihood.store.everything`: what else is known of the models.

    Returns:
        Path of the page.
    """
    drawn = dict[str, Markup]()
    folder = Path(figures) if figures is not None else None

    def draw(name: str, make: Callable[[], Canvas], alt: str) -> None:
        figure = make()
        drawn[name] = Markup(svg(figure, name, alt))
        if folder is not None:
            for suffix in (".svg", ".png"):
                save(figure, folder / f"{name}{suffix}")

    context = _context(found, draw, scored) | {"figures": drawn}
    write_bytes(out, pages.render("comparison.html.j2", context))
    return Path(out)


def _context(found: Standings, draw: Draw, scored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the template names; figures are drawn on the way."""
    look = looks(list(dict.fromkeys(name for problem in found.problems for name in _named(problem))))
    parts = [_part(f"p{i}", problem, look, draw) for i, problem in enumerate(found.problems, start=1)]
    sources = [_Described(source) for source in found.sources]
    single = len(parts) == 1
    titles = {f"{k}-p1": v for k, v in PIECES.items()} if single else {part["id"]: part["title"] for part in parts}
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
        "measures": [name for name in MEASURES if any(math.isfinite(row[name].value) for _, row in cells)],
        "columns": COLUMNS,
        "scored": scored,
        "signs": SIGNS,
        "budget": BUDGET,
        "sources": sources,
        "warnings": _warnings(found, sources),
        "facts": _facts(found),
        "commit": commits.pop() if len(commits) == 1 else "",
        "created": max((source.created for source in sources), default=""),
        "command": shlex.join(["sdegen", "report", *words]),
        "program": f"sdegen {versions().get('sdegen', '')}".strip(),
    }


def _named(problem: Problem) -> list[str]:
    """The solvers that have a look of their own: the same in every figure of the page."""
    budget = _budget(problem)
    found = [problem.handful("error", budget, stochastic=noisy) for noisy in (False, True)]
    found += [problem.handful(problem.distance, budget)] if problem.distance else []
    return [name for names in found for name in names]


def _budget(problem: Problem) -> int:
    """The budget of the headline: ten calls, or what is nearest to it."""
    return min(problem.budgets, key=lambda budget: abs(math.log(budget / BUDGET)), default=BUDGET)


def _part(name: str, problem: Problem, look: Mapping[str, Look], draw: Draw) -> dict[str, Any]:
    """A problem's answers and figures."""
    budget = _budget(problem)
    best = {b: _bests(problem, b) for b in problem.budgets or [budget]}
    first = best[budget]
    heard = "; ".join(f"{kind} {one.first.label} {one.value(0):.2g}" for kind, one in first.items() if one is not None)
    draw(f"{name}ranking", lambda: pictures.ranking(problem, budget, look), f"Best for {budget} calls: {heard}")
    for cost, words in (("nfe", "calls"), ("seconds", "seconds")):
        alt = f"Error and distance of every solver against {words}, with the Pareto front"
        draw(f"{name}{words}", lambda cost=cost: pictures.costs(problem, cost, budget, look), alt)
    draw(f"{name}shades", lambda: pictures.shades(problem), "Pathwise error of every solver with every budget")
    draw(f"{name}families", lambda: pictures.families(problem, look), "Error against calls, one family at a time")
    if problem.orders:
        alt = "Error against calls by declared order, with reference slopes, and measured orders"
        draw(f"{name}orders", lambda: pictures.orders(problem, look), alt)
    return {
        "id": name, "title": problem.title, "budget": budget, "best": best,
        "distance": problem.distance, "floor": problem.floors.get(problem.distance or "", math.nan),
    }  # fmt: skip


def _bests(problem: Problem, budget: int) -> dict[str, Best | None]:
    views = {"ODE": ("error", False), "SDE": ("error", True), "either": (problem.distance or "", None)}
    found: dict[str, Best | None] = {}
    for name, (measure, noisy) in views.items():
        ranked = problem.ranked(budget, measure, stochastic=noisy)
        floor = problem.floors.get(measure, -math.inf)
        inside = sum(row[measure].value <= floor for row in ranked)
        found[name] = Best(ranked, measure, inside) if ranked else None
    return found


# --- How it was measured ----------------------------------------------------------------------------------------------


class _Described:
    """A results file with what it says about itself, for people."""

    def __init__(self, source: Source) -> None:
        self.path, self.cells, self.about = source.path, source.cells, source.about
        self.versions: Mapping[str, Any] = _parsed(source.about.get("versions", {}))
        self.commit = str(source.about.get("commit", ""))
        self.created = pages.moment(str(source.about["created"])) if "created" in source.about else "unknown"
        words = str(source.about.get("command", "")).split(" ")
        self.command = " ".join([Path(words[0]).name, *words[1:]])


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
        ("devices", {str(source.about.get("device", "?")): source.path.name for source in sources}),
    ):
        if len(values) > 1:
            each = ", ".join(f"{value} ({name})" for value, name in values.items())
            said.append(f"these files come from different {what}: {each}.")
    if failed := [row for _, row in found.rows if row.status != "ok"]:
        names = ", ".join(dict.fromkeys(row.label for row in failed))
        said.append(f"cells failed: {len(failed)} ({names}); the table of cells says why.")
    if found.doubled:
        said.append(f"cells in more than one file: {found.doubled}; those of the later file are shown.")
    return said


def _facts(found: Standings) -> dict[str, str]:
    """How each kind of number came about."""
    rows = [row for _, row in found.rows]
    seeds = max((row.seeds for row in rows), default=1)
    facts = {
        "Pathwise error": "root mean square distance, over the noises of a cell, between where a solver takes a noise "
        "and where the exact solution of its own equation takes it: the probability-flow ODE, or the reverse SDE along "
        "the same Brownian motion. All solvers start from the same noises",
        "Intervals": "95 %, over noises" + (f", pooled over {seeds} seeds" if seeds > 1 else ""),
        "Network calls": "counted by wrapping the network, one for each batch; a budget is never exceeded",
        "Seconds": "wall clock of one solve of all noises of a cell; on a busy machine, an upper limit",
    }
    if any(problem.distance for problem in found.problems):
        facts["Distances"] = "between endpoints and as many exact samples, at the time where solvers stop"
        facts["Floors"] = (
            "the same distance between two independent exact samples of that size: below it there is only noise, "
            "and “within the floor” means that a solver cannot be told from the truth"
        )
    for problem in found.problems:
        about = problem.sources[-1].about
        known = [str(about[key]) for key in ("truth", "path_repr") if key in about]
        counts = (("samples", "noises"), ("cloud", "endpoints"))
        known += [f"{about[key]} {words}" for key, words in counts if key in about]
        facts[problem.title] = ", ".join(known)
    return {name: text for name, text in facts.items() if text}
