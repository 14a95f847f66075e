"""Pictures: every figure of the report, the notebooks and the README, drawn in one style from plain arrays.

Four kinds of picture, and those in the plane of :mod:`sdegen.plane`, are enough for the whole subject:

    lines     curves with direct labels: error against NFE, bounds against T, training
    dots      one number for each row, with error bars: who scored what, which solver wins
    gallery   images side by side: samples beside data
    strips    rows of images under one another: one noise and many solvers, a film of the process

Each returns a matplotlib ``Figure``, or draws into the figure or subfigure ``on``, so that a small picture is part of a
large one. How things look is in :mod:`sdegen.style`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from sdegen.style import FAINT, GREY, INK, MODELS, PIXELS, SUPERSCRIPT, Canvas, Look, curve_id, looks, styled

__all__ = ["Dot", "Panel", "Series", "dots", "gallery", "lines", "mosaic", "strips"]

ZOOM = 4  # copies of each pixel in each direction: viewers that smooth small images then cannot blur them


class Series(NamedTuple):
    """A curve: abscissae, ordinates and, where known, the ends of an interval around each."""

    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None


class Dot(NamedTuple):
    """One row of :func:`dots`: a name, its number, half-widths of its intervals, and how it looks.

    ``span`` has the ends of the outer interval, where it is not symmetric.
    """

    label: str
    value: float
    inner: float = 0.0
    outer: float = 0.0
    look: Look = MODELS["VP-SDE"]
    text: str = ""
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes of :func:`lines`.

    Args:
        series: label -> curve; a label that starts with "_" is drawn thin and not named.
        title: above the axes.
        xlabel, ylabel: with units.
        log: which axes are logarithmic, "", "x", "y" or "xy".
        floor: (low, high, label) of a band that no curve can be read below.
        marks: label -> ordinate of a thin horizontal line.
        look: label -> look; :func:`looks` by position where missing.
        front: a broad band behind the curves, along the best of them.
        labels: "end" writes names at the curves' right ends, "" writes none.
        ticks: places of the labels on a logarithmic x and y axis, decades where empty.
        ylim: limits, where the data's own are not wanted.
    """

    series: Mapping[str, Series]
    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    log: str = ""
    floor: tuple[float, float, str] | None = None
    marks: Mapping[str, float] = field(default_factory=dict)
    look: Mapping[str, Look] = field(default_factory=dict)
    front: Series | None = None
    labels: str = "end"
    ticks: tuple[Sequence[float], Sequence[float]] = ((), ())
    ylim: tuple[float, float] | None = None


@styled
def lines(panels: Sequence[Panel], *, size: tuple[float, float] = (11, 3.8), on: Canvas | None = None) -> Canvas:
    """Panels of curves side by side, each curve named at its end.

    Args:
        panels: left to right.
        size: width and height in inches, of a new figure.
        on: draw here in place of a new figure.
    """
    figure = Figure(size) if on is None else on
    for place, (axes, panel) in enumerate(zip(_row(figure, len(panels)), panels, strict=True)):
        found = {**looks(list(panel.series)), **panel.look}
        _scales(axes, panel.log)
        if panel.floor is not None:
            low, high, label = panel.floor
            axes.axhspan(low, high, color=FAINT, alpha=0.55, lw=0, zorder=0.5)
            axes.text(0.03, 0.02, label, transform=axes.transAxes, **_note(va="bottom", size=8))
        for label, value in panel.marks.items():
            axes.axhline(value, color=GREY, lw=0.8, ls=(0, (2, 2)), zorder=1)
            below = len(panel.marks) > 1 and value == min(panel.marks.values())
            note = _note(ha="right", va="top" if below else "bottom", size=8)
            axes.text(0.985, value, f" {label} ", transform=axes.get_yaxis_transform(), **note)
        if panel.front is not None:
            axes.plot(panel.front.x, panel.front.y, color=FAINT, lw=8, solid_capstyle="round", zorder=0.8)
        ends = {}
        for label, curve in panel.series.items():
            x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
            look, thin = found[label], label.startswith("_")
            if curve.low is not None and curve.high is not None:
                band = axes.fill_between(x, np.asarray(curve.low, float), np.asarray(curve.high, float))
                band.set(color=look.color, alpha=0.15, lw=0)
            axes.plot(
                x,
                y,
                color=look.color,
                ls=look.dash,
                lw=0.7 if thin else None,
                alpha=0.5 if thin else 1,
                marker="." if thin and len(x) == 1 else "" if thin or len(x) > 40 else look.marker,
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=1.5 if thin else 2,
                gid=curve_id(label.removeprefix("_"), place),
                in_layout=False,
            )
            good = np.isfinite(x) & np.isfinite(y)
            if not thin and good.any():
                ends[label] = (x[good][-1], y[good][-1], look.color)
        if panel.ylim:
            axes.set_ylim(*panel.ylim)
        for axis, ticks in zip((axes.xaxis, axes.yaxis), panel.ticks, strict=True):
            _ticks(axis, ticks)
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        if panel.labels == "end":
            _name_ends(axes, ends, panel.log)
    return figure


@styled
def dots(
    rows: Sequence[Dot],
    *,
    title: str = "",
    xlabel: str = "",
    marks: Mapping[str, float] | None = None,
    log: bool = False,
    xlim: tuple[float, float] | None = None,
    size: tuple[float, float] = (5.4, 2.6),
    on: Canvas | None = None,
) -> Canvas:
    """One number in each row, best read from top to bottom: thick bar for the inner interval, thin for the outer.

    Args:
        rows: top to bottom.
        title: above the axes.
        xlabel: of the number, with its unit.
        marks: label -> value of a dashed vertical line (baselines).
        log: logarithmic axis.
        xlim: limits of the axis.
        size: width and height in inches, of a new figure.
        on: draw here in place of a new figure.
    """
    figure = Figure(size) if on is None else on
    (axes,) = _row(figure, 1)
    _scales(axes, "x" if log else "")
    axes.grid(visible=False, axis="y")
    for y, row in enumerate(rows):
        axes.axhline(y, color="#efede7", lw=0.8, zorder=0.5)
        outer = row.span or (row.value - row.outer, row.value + row.outer)
        inner = (row.value - row.inner, row.value + row.inner)
        for span, width, alpha in ((outer, 1.1, 1.0), (inner, 4.0, 0.45)):
            axes.plot(span, [y, y], color=row.look.color, lw=width, alpha=alpha)
        axes.plot(
            row.value, y, row.look.marker, color=row.look.color, ms=6.5, markeredgecolor="white", markeredgewidth=0.8
        )
        if row.text:
            axes.text(1.0, y, row.text, transform=axes.get_yaxis_transform(), **_note(ha="right", color=INK))
    for label, value in (marks or {}).items():
        axes.axvline(value, color=GREY, lw=0.8, ls=(0, (2, 2)), zorder=1)
        axes.text(value, 1.0, label, transform=axes.get_xaxis_transform(), **_note(ha="center", va="bottom", size=8))
    axes.set_yticks(range(len(rows)), [row.label for row in rows], color=INK)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=xlabel)
    axes.set_title(title, pad=18 if marks else None)
    if xlim:
        axes.set_xlim(*xlim)
    if log:
        _ticks(axes.xaxis)
    return figure


def mosaic(images: ArrayLike, columns: int, *, gap: int = 1, zoom: int = ZOOM) -> NDArray[Any]:
    """Many images as one, row by row, with transparent (NaN) gaps.

    Args:
        images: (N, H, W), or (N, 1, H, W) for one channel.
        columns: images in a row.
        gap: pixels between images.
        zoom: copies of each pixel in each direction.

    >>> mosaic(np.zeros((3, 8, 8)), columns=2, zoom=1).shape
    (17, 17)
    """
    tiles = np.asarray(images, float)
    tiles = tiles.reshape(len(tiles), *tiles.shape[-2:])
    n, height, width = tiles.shape
    rows = -(-n // columns)
    out = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), np.nan)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        out[top : top + height, left : left + width] = tile
    return np.kron(out, np.ones((zoom, zoom)))


@styled
def gallery(
    panels: Mapping[str, ArrayLike],
    *,
    columns: int = 6,
    notes: Mapping[str, str] | None = None,
    size: tuple[float, float] | None = None,
    on: Canvas | None = None,
) -> Canvas:
    """Groups of images side by side, each under its title.

    Args:
        panels: title -> images (N, H, W) or (N, 1, H, W) in model units [-1, 1].
        columns: images in a row of one group.
        notes: title -> a line below the group.
        size: width and height in inches, of a new figure.
        on: draw here in place of a new figure.
    """
    tiled = [mosaic(images, columns) for images in panels.values()]
    tall = max(tile.shape[0] / tile.shape[1] for tile in tiled)
    width = 11.0
    figure = Figure(size or (width, width / len(panels) * 0.93 * tall + 0.55)) if on is None else on
    for axes, (title, tile) in zip(_row(figure, len(panels), 0.06), zip(panels, tiled, strict=True), strict=True):
        _image(axes, tile)
        axes.set_title(title)
        if notes and title in notes:
            axes.set_xlabel(notes[title], loc="left")
    return figure


@styled
def strips(
    blocks: Mapping[str, ArrayLike],
    rows: Sequence[str],
    *,
    columns: Sequence[str] = (),
    notes: Mapping[str, Sequence[str]] | None = None,
    breaks: Sequence[int] = (),
    size: tuple[float, float] | None = None,
    on: Canvas | None = None,
) -> Canvas:
    """Rows of images under one another: every row a solver (or a process), every column a noise (or a time).

    Args:
        blocks: title -> images (rows, columns, H, W) in model units; blocks stand side by side.
        rows: the name of each row.
        columns: the name of each column, written above the first row.
        notes: title of a block -> a short text at the right of each of its rows.
        breaks: rows with more room above them.
        size: width and height in inches, of a new figure.
        on: draw here in place of a new figure.
    """
    stacked = {title: _stack(np.asarray(images, float), breaks) for title, images in blocks.items()}
    wide = sum(tile.shape[1] for tile, _ in stacked.values())
    room = 11 - 0.3 - 0.085 * max(map(len, rows)) - (0.5 if notes else 0.1) * len(blocks)
    tall = next(iter(stacked.values()))[0].shape[0]
    figure = (
        Figure(size or (11, min(room / wide, 0.8 / (9 * ZOOM)) * tall + (0.62 if columns else 0.4)))
        if on is None
        else on
    )
    ratios = {"width_ratios": [tile.shape[1] for tile, _ in stacked.values()], "wspace": 0.03}
    for axes, (title, (tile, centers)) in zip(
        figure.subplots(1, len(blocks), squeeze=False, gridspec_kw=ratios)[0], stacked.items(), strict=True
    ):
        _image(axes, tile)
        axes.set_title(title, pad=18 if columns and title else 6)
        first = axes.get_subplotspec().is_first_col()
        axes.set_yticks(centers, rows if first else [""] * len(rows))
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=9)
        step = tile.shape[1] / max(1, len(columns))
        for c, text in enumerate(columns):
            where = {"xycoords": axes.get_xaxis_transform(), "xytext": (0, 3), "textcoords": "offset points"}
            axes.annotate(text, ((c + 0.5) * step, 1.0), **where, **_note(ha="center", va="bottom"))
        for y, note in zip(centers, (notes or {}).get(title, ()), strict=False):
            axes.text(1.012, y, note, transform=axes.get_yaxis_transform(), **_note())
    return figure


def _stack(images: NDArray[Any], breaks: Sequence[int]) -> tuple[NDArray[Any], list[float]]:
    """Rows of images as one image, and the height of each row's middle in it."""
    lines, centers, height = [], [], 0
    for i, row in enumerate(images):
        line = mosaic(row, len(row))
        gap = ZOOM * (0 if i == 0 else 5 if i in breaks else 1)
        lines += [np.full((gap, line.shape[1]), np.nan), line]
        centers.append(height + gap + (line.shape[0] - 1) / 2)
        height += gap + line.shape[0]
    return np.concatenate(lines), centers


def _row(figure: Canvas, count: int, gap: float = 0.02) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False, gridspec_kw={"wspace": gap})[0])


def _note(**more: Any) -> dict[str, Any]:
    return {"color": GREY, "va": "center", "size": 8.5, "zorder": 5, **more}


def _image(axes: Axes, tile: NDArray[Any]) -> None:
    axes.imshow(tile, cmap=PIXELS, vmin=-1, vmax=1, interpolation="none")
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _power(value: float, _: Any = None) -> str:
    """Decades as people write them: plain from 0.01 to 10000, powers of ten beyond.

    >>> _power(0.1), _power(1e-5), _power(100)
    ('0.1', '10⁻⁵', '100')
    """
    if value <= 0:
        return ""
    exponent = round(np.log10(value))
    return f"{value:g}" if -2 <= exponent <= 4 else f"10{str(exponent).translate(SUPERSCRIPT)}"


def _scales(axes: Axes, log: str) -> None:
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if name in log:
            axes.set(**{f"{name}scale": "log"})
            axis.set_major_locator(LogLocator(numticks=8))
            axis.set_major_formatter(FuncFormatter(_power))
            axis.set_minor_locator(NullLocator())  # they would be too small to see, and half of the drawing time


def _ticks(axis: Axis, places: Sequence[float] = ()) -> None:
    """Label these places of a logarithmic axis, as far as they are in view; where none are given, 1-2-5 or decades."""
    low, high = sorted(axis.get_view_interval())
    if not places and axis.get_scale() == "log" and high < 100 * low:
        places = [m * 10.0**e for e in range(-9, 9) for m in (1, 2, 5)]
    if seen := [place for place in places if low <= place <= high]:
        axis.set_major_locator(FixedLocator(seen))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _name_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str]], log: str) -> None:
    """Write each curve's name right of its last point, names pushed apart until none covers another."""
    if not ends:
        return
    axes.autoscale_view()
    low, high = axes.get_ylim()
    scale = np.log10 if "y" in log else np.asarray
    bottom, top = float(scale(low)), float(scale(high))
    order = sorted(ends, key=lambda name: ends[name][1])
    place = np.array([(float(scale(ends[name][1])) - bottom) / (top - bottom) for name in order])
    # Text of 8.5 points needs 0.165 inches; title and labels of the axis take about 0.75.
    height = axes.figure.bbox.height / axes.figure.dpi - 0.75
    place = _spread(place, 0.165 / max(height, 1.0), 0.0, 1.0)
    for name, y in zip(order, place, strict=True):
        x0, y0, color = ends[name]
        line = {"arrowstyle": "-", "color": color, "lw": 0.5, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
        note = _note(color=color, annotation_clip=False)
        axes.annotate(name, (x0, y0), (1.04, y), textcoords="axes fraction", arrowprops=line, **note)


def _spread(place: NDArray[Any], gap: float, low: float = -np.inf, high: float = np.inf) -> NDArray[Any]:
    """The nearest increasing positions within [low, high] that are at least ``gap`` apart (pool adjacent violators).

    >>> _spread(np.array([0.0, 0.0, 1.0]), 0.1).round(2).tolist()
    [-0.05, 0.05, 1.0]
    >>> _spread(np.array([0.0, 0.0, 1.0]), 0.1, low=0.0).round(2).tolist()
    [0.0, 0.1, 1.0]
    """
    shift = gap * np.arange(len(place))
    groups: list[list[float]] = []  # (sum, count) of positions that move together
    for value in place - shift:
        groups.append([float(value), 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    flat = np.concatenate([np.full(int(n), total / n) for total, n in groups])
    return flat.clip(low, max(low, high - gap * (len(place) - 1))) + shift
