"""Pictures in the plane, where everything about a diffusion can be seen: densities, fields, points, trajectories.

A :class:`Plane` is one square with layers, and :func:`planes` draws some side by side:

    density = raster(lambda z: truth.log_prob_t(z, path, t).exp())
    planes([Plane("the score", density, arrows=field(lambda z: truth.score(z, path, t)), points=z)])

Layers are plain arrays, so that they can be kept and drawn again; :func:`raster` and :func:`field` make them from
functions. How things look is in :mod:`sdegen.style`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as attribute
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sdegen.style import CLOUD, COLORS, GREY, INK, Canvas, Look, looks, styled

__all__ = ["Plane", "field", "planes", "raster"]

REACH = 2.5  # half the side of the square


@dataclass(frozen=True)
class Plane:
    """One square of :func:`planes`; layers from the bottom up.

    Args:
        title: above it.
        density: (n, n) from :func:`raster`, drawn as shades, scaled to its own maximum.
        arrows: positions (M, 2) and directions (M, 2) from :func:`field`, drawn with equal length and the speed as
            opacity.
        points: (N, 2), drawn as dots.
        twins: trajectories (N + 1, B, 2), drawn as thin lines: the same starts under another equation.
        paths: trajectories (N + 1, B, 2), drawn as lines with an arrowhead, an open dot where they start and a full
            one where they end.
        steps: label -> trajectories (N + 1, B, 2), drawn as polygons with a mark at every node.
        note: a line below.
    """

    title: str = ""
    density: ArrayLike | None = None
    arrows: tuple[ArrayLike, ArrayLike] | None = None
    points: ArrayLike | None = None
    twins: ArrayLike | None = None
    paths: ArrayLike | None = None
    steps: Mapping[str, ArrayLike] = attribute(default_factory=dict)
    note: str = ""


@styled
def planes(
    panels: Sequence[Plane],
    *,
    reach: float = REACH,
    look: Mapping[str, Look] | None = None,
    size: tuple[float, float] | None = None,
    on: Canvas | None = None,
) -> Canvas:
    """Squares side by side, each from -reach to reach in both directions.

    Args:
        panels: left to right.
        reach: half the side.
        look: label of ``steps`` -> look; by position where missing.
        size: width and height in inches, of a new figure.
        on: draw here in place of a new figure.
    """
    noted = any(panel.note for panel in panels)
    side = min(11.0 / len(panels), 5.5)
    figure = Figure(size or (side * len(panels), side + (0.55 if noted else 0.35))) if on is None else on
    row = figure.subplots(1, len(panels), squeeze=False, gridspec_kw={"wspace": 0.02})[0]
    for axes, panel in zip(row, panels, strict=True):
        _layers(axes, panel, reach, {**looks(list(panel.steps)), **(look or {})})
        axes.set(title=panel.title, xticks=[], yticks=[], xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        if panel.note:
            axes.set_xlabel(panel.note, loc="left")
    return figure


def raster(function: Callable[[Tensor], Tensor], *, reach: float = REACH, size: int = 140) -> NDArray[Any]:
    """Values of a function on a grid of points, for :attr:`Plane.density`.

    Args:
        function: (N, 2) float64 -> (N,).
        reach: half the side of the square.
        size: points in each direction.

    Returns:
        (size, size), rows from the bottom up.

    >>> raster(lambda z: z[:, 0], reach=1.0, size=3)[0]
    array([-1.,  0.,  1.])
    """
    axis = torch.linspace(-reach, reach, size, dtype=torch.float64)
    return function(torch.cartesian_prod(axis, axis).flip(1)).detach().reshape(size, size).numpy()


def field(
    function: Callable[[Tensor], Tensor], *, reach: float = 0.88 * REACH, size: int = 15
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Values of a vector field on a coarse grid, for :attr:`Plane.arrows`.

    Args:
        function: (N, 2) float64 -> (N, 2).
        reach: half the side of the square.
        size: arrows in each direction.

    Returns:
        Positions and directions, (size^2, 2) each.
    """
    axis = torch.linspace(-reach, reach, size, dtype=torch.float64)
    at = torch.cartesian_prod(axis, axis)
    return at.numpy(), function(at).detach().numpy()


def _layers(axes: Axes, panel: Plane, reach: float, look: Mapping[str, Look]) -> None:
    if panel.density is not None:
        cloud = np.asarray(panel.density, float)
        extent = (-reach, reach, -reach, reach)
        # A square root lifts the tails, where most lines run.
        shades = np.sqrt(np.maximum(cloud, 0) / cloud.max())
        axes.imshow(shades, origin="lower", extent=extent, cmap=CLOUD, vmin=0, vmax=1.15, interpolation="bilinear")
    if panel.arrows is not None:
        at, vectors = (np.asarray(part, float) for part in panel.arrows)
        speed = np.linalg.norm(vectors, axis=-1)
        shade = np.clip(speed / np.quantile(speed, 0.9), 0.15, 1)
        unit = vectors / np.maximum(speed, 1e-12)[:, None]
        form: dict[str, Any] = {"scale": 26, "width": 0.0042, "headwidth": 4.2, "pivot": "mid"}
        axes.quiver(*at.T, *unit.T, alpha=shade, color=INK, angles="xy", **form)
    if panel.points is not None:
        dots = np.asarray(panel.points, float)
        area, alpha = (2.2, 0.5) if len(dots) > 300 else (9.0, 0.8)
        axes.scatter(*dots.T, s=area, color=INK, alpha=alpha, linewidths=0)
    for line in [] if panel.twins is None else np.swapaxes(np.asarray(panel.twins, float), 0, 1):
        axes.plot(*line.T, color=COLORS["rust"], lw=0.45, alpha=0.55)
    if panel.paths is not None:
        _trajectories(axes, np.asarray(panel.paths, float))
    for label, lines in panel.steps.items():
        mark: dict[str, Any] = {
            "marker": look[label].marker,
            "ms": 4.2,
            "markeredgecolor": "white",
            "markeredgewidth": 0.5,
        }
        for i, line in enumerate(np.swapaxes(np.asarray(lines, float), 0, 1)):
            name: dict[str, Any] = {} if i else {"label": label}
            axes.plot(*line.T, color=look[label].color, ls=look[label].dash, lw=1.1, **mark, **name)
    if any(panel.steps):  # an empty label is none
        axes.legend(loc="lower left", borderpad=0.1, labelcolor=GREY)


def _trajectories(axes: Axes, paths: NDArray[Any]) -> None:
    for path in np.swapaxes(paths, 0, 1):
        axes.plot(*path.T, color=INK, lw=0.8, alpha=0.85)
        length = np.concatenate([[0], np.linalg.norm(np.diff(path, axis=0), axis=1).cumsum()])
        middle = int(np.searchsorted(length, 0.55 * length[-1]))
        a, b = path[max(middle - 1, 0)], path[middle]
        if length[-1] > 0.2 and np.any(a != b):
            arrow = {"arrowstyle": "-|>", "lw": 0, "color": INK, "mutation_scale": 7, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", b, a, arrowprops=arrow)
    axes.plot(*paths[0].T, "o", ms=3.2, markerfacecolor="white", markeredgecolor=INK, markeredgewidth=0.7)
    axes.plot(*paths[-1].T, "o", ms=3.2, color=COLORS["indigo"], markeredgecolor="white", markeredgewidth=0.4)
