"""Where the same noises end, solver by solver and budget by budget: images in strips, or points in the plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sdegen import plots
from sdegen.comparison_figures import KINDS, parts_of
from sdegen.pages import sig
from sdegen.plane import Plane, planes
from sdegen.standings import Problem
from sdegen.style import Canvas

__all__ = ["samples"]

POINTS = 80  # of a cloud that are drawn: every one is an element of the page


def samples(problem: Problem, *, on: Canvas | None = None) -> Canvas:
    """Where the same noises end with some solvers, the best among them, and every budget.

    Args:
        problem: with pictures, of images or of points in the plane.
        on: draw here in place of a new figure.
    """
    if problem.pictures is None:
        raise ValueError(f"there are no endpoints of {problem.title} to look at")
    shown, exact = problem.pictures
    budgets = [budget for budget in problem.budgets if any(b == budget for _, b in shown)][:4]
    known = {label for label, _ in shown}
    one, rows = next(iter(shown.values())), dict[str, list[str]]()
    for noisy, kind in KINDS.items():
        ranked = [label for label in problem.quality("error", stochastic=noisy) if label in known]
        rows[kind] = _some(ranked, best=1 if noisy or one.ndim == 2 else 3)
    draw = _strips if one.ndim == 4 else _clouds
    return draw(problem, {kind: labels for kind, labels in rows.items() if labels}, budgets, shown, exact, on)


def _some(ranked: Sequence[str], best: int) -> list[str]:
    """The best, one of the middle and one of the lower quarter: the best alone look all alike."""
    more = [ranked[int(share * (len(ranked) - 1))] for share in (0.5, 0.8)] if ranked else []
    return list(dict.fromkeys([*ranked[:best], *more]))


def _strips(
    problem: Problem,
    rows: Mapping[str, Sequence[str]],
    budgets: Sequence[int],
    shown: Mapping[tuple[str, int], np.ndarray],
    exact: Mapping[str, np.ndarray],
    on: Canvas | None,
    columns: int = 6,
) -> Canvas:
    """Images in rows, under what is exact."""
    nothing = np.full_like(next(iter(shown.values())), np.nan)
    names: list[str] = []
    breaks: list[int] = []
    blocks: dict[str, list[np.ndarray]] = {f"{budget} calls": [] for budget in budgets}
    notes: dict[str, list[str]] = {title: [] for title in blocks}
    for kind, labels in rows.items():
        breaks.append(len(names))
        names += [f"exact {kind}"] * (kind in exact) + list(labels)
        for budget, title in zip(budgets, blocks, strict=True):
            if kind in exact:
                blocks[title].append(exact[kind])
                notes[title].append("")
            for label in labels:
                row = problem.at(label, budget)
                blocks[title].append(shown.get((label, budget), nothing))
                notes[title].append("" if row is None else sig(row["error"].value, 1))
    images = {title: np.stack(block)[:, :columns].mean(2) for title, block in blocks.items()}
    return plots.strips(images, names, notes=notes, breaks=breaks, on=on)


def _clouds(
    problem: Problem,
    rows: Mapping[str, Sequence[str]],
    budgets: Sequence[int],
    shown: Mapping[tuple[str, int], np.ndarray],
    exact: Mapping[str, np.ndarray],
    on: Canvas | None,
) -> Canvas:
    """Points in the plane, with a hair from where the equation takes each."""
    labels = [(kind, label) for kind, mine in rows.items() for label in mine][:5]
    every = np.concatenate(list(exact.values()) or list(shown.values()))
    reach = 1.25 * float(np.quantile(np.abs(every), 0.995))
    parts = parts_of(on, (11, 11 / len(labels) * 0.98 * len(budgets)), len(budgets), 1)
    for part, budget in zip(parts, budgets, strict=True):
        panels = []
        for kind, label in labels:
            ends, title = shown.get((label, budget)), f"{label}, {budget} calls"
            hairs = None if ends is None or kind not in exact else np.stack([exact[kind], ends])[:, :POINTS]
            panels.append(Plane(title, points=None if ends is None else ends[:POINTS], twins=hairs))
        planes(panels, reach=reach, on=part)
    return parts[0].figure if on is None else on
