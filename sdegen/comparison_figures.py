"""The figures of a comparison of solvers: from :class:`sdegen.standings.Problem` to pictures.

A hundred solvers have no hundred colours. In every figure a handful is named (the best for the budget that people ask
for, then the best for the others), all others are thin and grey, and a family at a time they come forward:

    ranking     the best for one budget, with their intervals
    costs       error and distance against calls or seconds, with the Pareto front
    shades      every solver and every budget as a table of shades
    families    one small picture for each kind of solver, the others behind
    orders      errors beside the slope that each declared order promises, and the orders that were measured

Where the same noises end, solver by solver and budget by budget, is drawn by :mod:`sdegen.comparison_samples`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdegen import plots
from sdegen.families import FAMILIES
from sdegen.pages import sig
from sdegen.plots import Dot, Panel, Series
from sdegen.standings import MEASURES, Problem, Row, front
from sdegen.style import FAINT, GREY, INK, Canvas, Look, style, styled

__all__ = ["KINDS", "costs", "families", "orders", "parts_of", "ranking", "shades", "together"]

REST, PALE, INKY = Look(GREY, "", "-"), Look("#c9c7c0", "", "-"), Look("#000000", "", "-")
PROMISE, COLD = Look(INK, "", (0, (2, 2))), Look(GREY, "", (0, (1, 1.5)))
SHADES = LinearSegmentedColormap.from_list("shades", ["#27348b", "#4f66ad", "#8a9bc9", "#c3cce2", "#fbfaf6"])
"""Dark is accurate. The lightness falls evenly, so that the order survives a greyscale printer."""

FEW = 9  # solvers that can all be named in one picture
OF_FAMILY, OF_ORDER = 2, 3  # that are named in the pictures of one
LETTER = 0.0178  # of the width of a small picture

KINDS = {False: "ODE", True: "SDE"}


def ranking(
    problem: Problem,
    budget: int,
    look: Mapping[str, Look],
    *,
    count: int = 5,
    width: float = 4.4,
    on: Canvas | None = None,
) -> Canvas:
    """The best solvers of each equation for one budget, with 95 % intervals.

    Args:
        problem: the solvers and what is known of them.
        budget: network calls.
        look: of each.
        count: of each equation, at most.
        width: of a new figure, in inches.
        on: draw here in place of a new figure.
    """
    rows = [row for noisy in KINDS for row in problem.ranked(budget, "error", stochastic=noisy)[:count]]
    dots = [
        Dot(
            f"{row.label} ({KINDS[row.stochastic]})",
            row["error"].value,
            look=look.get(row.label, Look(GREY, "o", "-")),
            text=sig(row["error"].value),
            span=row["error"][1:] if row["error"].low > 0 else None,
        )
        for row in rows
    ]
    ends = [dot.span or (dot.value, dot.value) for dot in dots]
    xlabel = f"pathwise error with {budget} calls (less is better)"
    limits = (min(low for low, _ in ends) / 1.3, max(high for _, high in ends) * 3)
    return plots.dots(dots, xlabel=xlabel, log=True, xlim=limits, size=(width, 0.5 + 0.21 * len(dots)), on=on)


def parts_of(on: Canvas | None, size: tuple[float, float], rows: int, columns: int) -> list[Any]:
    """A new figure, or the given one, in parts."""
    with style():
        figure = Figure(size, layout="constrained") if on is None else on
        return list(np.ravel(np.asarray(figure.subfigures(rows, columns), dtype=object)))


def costs(
    problem: Problem,
    cost: str,
    budget: int,
    look: Mapping[str, Look],
    *,
    panels: slice = slice(None),
    on: Canvas | None = None,
) -> Canvas:
    """Error of ODE solvers, of SDE solvers, and distance of all, against calls ("nfe") or "seconds".

    Args:
        problem: the solvers and what is known of them.
        cost: "nfe" or "seconds".
        budget: network calls, for which the best are named first.
        look: of those that are named; where there are few, all are.
        panels: which of the three.
        on: draw here in place of a new figure.
    """
    xlabel = "network calls" if cost == "nfe" else "seconds"
    drawn, few = [], len(problem.labels) <= FEW
    views: list[tuple[str, str, bool | None]] = [
        ("ODE solvers", "error", False),
        ("SDE solvers", "error", True),
        ("In distribution", problem.distance or "", None),
    ]
    for title, measure, noisy in views:
        rows = [r for r in problem.rows if noisy in (None, r.stochastic) and math.isfinite(r[measure].value)]
        if not rows:
            continue
        named = problem.handful(measure, budget, stochastic=noisy)
        if few:
            named = list(dict.fromkeys([*named, *(row.label for row in rows)]))
        floor = problem.limit(measure)
        best = front(rows, measure, cost, floor)
        drawn.append(
            Panel(
                _curves(problem, rows, measure, cost, named),
                title, xlabel, MEASURES[measure], log="xy", look=_looked(rows, look),
                front=Series([row.cost(cost) for row in best], [row[measure].value for row in best]),
                floor=(1e-12, floor, "exact samples") if floor > 0 else None,
                ticks=(problem.budgets if cost == "nfe" else (), ()), ylim=_limits(rows, measure, floor, whole=few),
            )
        )  # fmt: skip
    return plots.lines(drawn[panels], size=(11, 4.3), on=on)


def _curves(problem: Problem, rows: Sequence[Row], measure: str, cost: str, named: Sequence[str]) -> dict[str, Series]:
    """The curve of each solver, those without a name first so that they lie behind."""
    shown = {row.label for row in rows}
    order = [*(f"_{label}" for label in problem.labels if label in shown and label not in named), *named]
    found = {}
    for label in order:
        mine = [row for row in problem.of(label.removeprefix("_")) if math.isfinite(row[measure].value)]
        mine.sort(key=lambda row: row.cost(cost))
        found[label] = Series([row.cost(cost) for row in mine], [row[measure].value for row in mine])
    return found


def _looked(rows: Sequence[Row], look: Mapping[str, Look]) -> dict[str, Look]:
    return {**{f"_{row.label}": REST for row in rows}, **look}


def _limits(rows: Sequence[Row], measure: str, floor: float = -math.inf, *, whole: bool = False) -> tuple[float, float]:
    """The part of the axis where solvers are: a few that run away do not press the others into a line."""
    worst: dict[str, float] = {}
    for row in rows:
        worst[row.label] = max(row[measure].value, worst.get(row.label, 0.0))
    low = min(row[measure].value for row in rows if row[measure].value > 0)
    high = max(worst.values())
    if not whole:
        high = min(high, 5 * float(np.median(list(worst.values()))))
    return (min(low, floor) if floor > 0 else low) / 1.6, max(high, floor, low) * 1.6


@styled
def shades(problem: Problem, measure: str = "error", *, on: Canvas | None = None) -> Canvas:
    """Every solver with every budget: dark is accurate, best solver on top, each equation by itself."""
    blocks = {kind: problem.quality(measure, stochastic=noisy) for noisy, kind in KINDS.items()}
    blocks = {kind: labels for kind, labels in blocks.items() if labels}
    tall = max(map(len, blocks.values()))
    figure = Figure((11, 0.55 + 0.172 * tall)) if on is None else on
    for axes, (kind, labels) in zip(figure.subplots(1, 2, squeeze=False)[0], blocks.items(), strict=False):
        _shaded(axes, problem, measure, kind, labels, tall)
    for axes in figure.axes[len(blocks) :]:
        axes.set_axis_off()
    return figure


def _shaded(axes: Any, problem: Problem, measure: str, kind: str, labels: Sequence[str], tall: int) -> None:
    """One block of :func:`shades`."""
    ranks = [problem.ranked(budget, measure, stochastic=kind == "SDE") for budget in problem.budgets]
    values = np.full((len(labels), len(ranks)), np.nan)
    for column, rank in enumerate(ranks):
        for row in rank:
            if row.budget in (0, problem.budgets[column]):  # what a cheaper budget reaches has a cell of its own
                values[labels.index(row.label), column] = row[measure].value
    shade = np.log10(np.maximum(values, 1e-300))
    low, high = np.nanquantile(shade, [0.0, 0.9])
    axes.imshow(shade, cmap=SHADES, vmin=low, vmax=high, aspect="auto", extent=(0, len(ranks), len(labels), 0))
    for row, column in np.ndindex(values.shape):
        value, place = float(values[row, column]), (shade[row, column] - low) / max(high - low, 1e-9)
        winner = value == np.nanmin(values[:, column])
        form = {"ha": "center", "va": "center", "size": 7.5, "color": "white" if place < 0.35 else INK}
        axes.text(column + 0.5, row + 0.54, sig(value), weight="bold" if winner else "normal", in_layout=False, **form)
        if winner:
            axes.add_patch(_frame(column, row))
    families = {row.label: row.family for row in problem.rows}
    for y, label in enumerate(labels):
        axes.text(len(ranks) + 0.08, y + 0.54, families[label], va="center", size=7, color=GREY)
    axes.set_yticks(np.arange(len(labels)) + 0.5, labels, size=7.5)
    axes.set_xticks(np.arange(len(ranks)) + 0.5, [str(b) for b in problem.budgets])
    axes.tick_params(length=0, labeltop=True, labelbottom=False, pad=2, labelcolor=INK)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set(xlim=(0, len(ranks) * 1.38), ylim=(tall, 0))
    axes.set_title(f"{kind} solvers, by network calls", pad=18)


def _frame(column: int, row: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column + 0.03, row + 0.06), 0.94, 0.88, fill=False, ec=INK, lw=1.1, zorder=4)


def together(problem: Problem, budget: int) -> list[list[str]]:
    """The solvers that are named in one pair of axes, and should not look alike there; for every pair of axes."""
    found = [problem.handful("error", budget, stochastic=noisy) for noisy in KINDS]
    found += [problem.handful(problem.distance, budget)] if problem.distance else []
    if len(problem.labels) <= FEW:
        found.append(problem.labels)
    ranked = problem.quality("error")
    members = [{row.label for row in problem.rows if row.family == name} for name in _families(problem)]
    found += [_first(ranked, inside, OF_FAMILY) for inside in members]
    found += [_first(ranked, {row.label for row in rows}, OF_ORDER) for rows in _by_order(problem).values()]
    return found


def _first(ranked: Sequence[str], inside: Collection[str], count: int) -> list[str]:
    return [label for label in ranked if label in inside][:count]


def _families(problem: Problem) -> list[str]:
    """Those with a member that has an error to show."""
    known = {row.family for row in problem.rows if math.isfinite(row["error"].value)}
    return [name for name in (*FAMILIES, "Others") if name in known]


def _by_order(problem: Problem) -> dict[str, list[Row]]:
    """Rows of fixed steps by what they declare, under a title."""
    fixed = [row for row in problem.rows if row.order and math.isfinite(row["error"].value)]
    ode = [row for row in fixed if not row.stochastic]
    groups = {f"ODE solvers of order {p}": [row for row in ode if row.order == p] for p in (1, 2, 3)}
    groups["ODE solvers of order 4 and more"] = [row for row in ode if row.order >= 4]
    groups["SDE solvers, along one path"] = [row for row in fixed if row.stochastic]
    return {title: rows for title, rows in groups.items() if rows}


def families(problem: Problem, look: Mapping[str, Look], *, on: Canvas | None = None) -> Canvas:
    """One small picture for each kind of solver: its members dark, the others of the same equation pale behind."""
    known = _families(problem)
    rows = -(-len(known) // 3)
    parts = parts_of(on, (11, 2.5 * rows), rows, 3)
    for part, name in zip(parts, known, strict=False):
        plots.lines([_family(problem, name, look)], on=part)
    _align(parts, 2.5)
    return parts[0].figure if on is None else on


def _align(parts: Sequence[Any], height: float) -> None:
    """Small pictures in columns and rows: axes of one size at one place of each, with room for names at the right.

    Args:
        parts: the small pictures, a third of the page wide.
        height: of each, in inches.
    """
    pictures = [axes for part in parts for axes in part.axes]
    longest = max((len(text.get_text()) for axes in pictures for text in axes.texts), default=0)
    width = min(0.54, 0.79 - LETTER * longest)
    for axes in pictures:
        axes.set_position((0.16, 0.46 / height, width, 1 - 0.82 / height))


def _family(problem: Problem, name: str, look: Mapping[str, Look]) -> Panel:
    known = [row for row in problem.rows if math.isfinite(row["error"].value)]
    noisy = {row.stochastic for row in known if row.family == name}
    rows = [row for row in known if row.stochastic in noisy]
    inside = {row.label for row in rows if row.family == name}
    looked = {f"_{row.label}": INKY if row.label in inside else PALE for row in rows}
    return _errors(problem, rows, inside, name, {**look, **looked}, count=OF_FAMILY)


def orders(problem: Problem, look: Mapping[str, Look], *, on: Canvas | None = None) -> Canvas:
    """Errors of the solvers of each declared order beside the slope that it promises; measured orders of all."""
    panels = []
    for title, rows in _by_order(problem).items():
        p = 1 if rows[0].stochastic else min(row.order for row in rows)
        q = p if rows[0].stochastic else min(row.start_order for row in rows)
        promised = {f"order {p}": p} | ({f"cold start: {q}": q} if q < p else {})
        panel = _errors(problem, rows, {row.label for row in rows}, title, look, count=OF_ORDER)
        lines = {name: _promise(rows, order) for name, order in promised.items()}
        known = {**panel.look, f"cold start: {q}": COLD, f"order {p}": PROMISE}
        panels.append(replace(panel, series={**panel.series, **lines}, look=known))
    parts = parts_of(on, (11, 6.6), 2, 3)
    for part, panel in zip(parts, panels, strict=False):
        plots.lines([panel], on=part)
    _measured(parts[len(panels)], problem)
    _align(parts, 3.3)
    return parts[0].figure if on is None else on


def _errors(
    problem: Problem, rows: Sequence[Row], inside: Collection[str], title: str, look: Mapping[str, Look], count: int
) -> Panel:
    """Error against calls of some rows, the best of those inside named."""
    best = _first(problem.quality("error"), inside, count)
    looked = {**{f"_{row.label}": REST for row in rows}, **look}
    curves = _curves(problem, rows, "error", "nfe", best)
    curves = dict(sorted(curves.items(), key=lambda item: (item[0] in best, item[0].removeprefix("_") in inside)))
    return Panel(
        curves, title, "network calls", "pathwise error", log="xy", look=looked, ticks=(problem.budgets, ()),
        ylim=_limits(rows, "error"),
    )  # fmt: skip


def _promise(rows: Sequence[Row], p: int) -> Series:
    """A straight line of slope -p through the middle of the most expensive rows."""
    last = max(row.nfe for row in rows if row.budget)
    middle = float(np.median([row["error"].value for row in rows if row.nfe > 0.8 * last]))
    x = np.array([last / 8, last])
    return Series(x, middle * (last / x) ** p)


@styled
def _measured(on: Canvas, problem: Problem) -> None:
    """Measured order of every solver beside the declared one; those that fall short even for a cold start are named."""
    axes, found = on.subplots(), problem.orders
    ends = np.array([0.4, max(order.declared for order in found) + 0.9])
    axes.fill_between(ends, ends - 0.2, ends + 0.2, color=FAINT, alpha=0.7, lw=0)
    for noisy, mark in ((False, "o"), (True, "D")):
        mine = [order for order in found if order.stochastic == noisy]
        x = np.array([order.declared + 0.06 * (i % 5 - 2) for i, order in enumerate(mine)])
        y = np.clip([order.measured.value for order in mine], -0.2, ends[1] + 0.4)
        axes.plot(x, y, mark, color=INK, ms=3.6, alpha=0.5, mew=0)
        for place, order in zip(x, mine, strict=True):
            if order.start < order.declared:  # what is promised of a cold start, and up to where
                axes.plot([place, place], [order.start, order.declared], "_-", color=GREY, lw=0.6, ms=4, alpha=0.7)
    named: list[float] = []
    for order in sorted(found, key=lambda order: order.measured.high - order.start)[:12]:
        value = order.measured.value
        apart = all(abs(value - other) > 0.05 * (ends[1] + 1) for other in named)
        if order.short and value > -0.2 and apart:
            named.append(value)
            axes.annotate(order.label, (order.declared + 0.2, value), size=7.5, color=GREY, va="center")
    axes.set(title="Measured: ● ODE, ◆ SDE", xlabel="declared order", ylabel="measured order", xlim=ends)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(-0.4, ends[1] + 0.6)
