"""Pictures of likelihoods: where the bits are, and how many levels they take.

Each takes a result as it lies in a file, or reports, and draws one figure, or draws into ``on``, part of a larger
one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sdegen import plots
from sdegen.likelihood.report import LikelihoodReport, gap
from sdegen.plots import Panel, Series
from sdegen.results import Result
from sdegen.style import COLORS, GREY, INK, MODELS, Canvas, Look, looks, styled

__all__ = ["denoising", "levels"]

LINEAR = Look(COLORS["ochre"], "", (0, (5, 1.6)))


@styled
def denoising(
    found: Result,
    *,
    ranges: int = 10,
    title: str = "What the model does not know",
    size: tuple[float, float] = (7.6, 4.3),
    on: Canvas | None = None,
) -> Canvas:
    """The denoising error against logsnr, beside the linear denoiser's, and the share of the bits in ranges of levels.

    The area under the curve is the latent term of the bound: the error per dimension, times the width in logsnr, over
    2 log 2, is bits per dimension; of a density it is written in nats.

    Args:
        found: of :meth:`sdegen.likelihood.DenoisingProfile.to_result`.
        ranges: number of ranges whose shares are written.
        title: above the axes.
        size: width and height in inches, of a new figure.
        on: draw here in place of a new figure.
    """
    figure = Figure(size) if on is None else on
    axes: Axes = figure.subplots()
    dims, look = int(found.attributes["dims"]), MODELS["VP-SDE"]
    logsnr, low, high = found["band"], found["low"], found["high"]
    error, linear = found["error"] / dims, found["linear"] / dims
    se = np.nan_to_num(found["estimator_se"]) / dims
    spread = np.hypot(se, np.nan_to_num(found["data_se"]) / dims)

    parts = np.array_split(np.arange(len(logsnr)), min(ranges, len(logsnr)))
    shares = np.array([found["share"][i].sum() for i in parts])
    for i, share in zip(parts, shares, strict=True):
        left, right = float(low[i[0]]), float(high[i[-1]])
        axes.axvspan(left, right, color=_tint(share / shares.max()), lw=0, zorder=0.4)
        text = f"{100 * share:.0f} %" if share >= 0.005 else "<1 %"
        where = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "top", "size": 8.5, "color": INK}
        axes.text((left + right) / 2, 0.985, text, **where)
    axes.plot(logsnr, linear, color=LINEAR.color, ls=LINEAR.dash)
    axes.fill_between(logsnr, error - 2 * spread, error + 2 * spread, color=look.color, alpha=0.25, lw=0)
    axes.plot(logsnr, error, color=look.color, lw=2)
    top = 1.13 * max(float(linear.max()), float((error + 2 * spread).max()))
    for curve, name, color in ((linear, "best linear denoiser", LINEAR.color), (error, "the model", look.color)):
        _name(axes, logsnr, curve, name, color, top)
    nats, bits = found["nats"].sum(), found.attributes.get("bits_offset") is not None
    axes.set(
        xlabel="noise   ←   logsnr   →   data",
        ylabel="denoising error E|eps − eps_hat|² / D",
        xlim=(low[0], high[-1]),
        ylim=(0, top),
    )
    axes.grid(visible=False, axis="x")
    axes.set_title(title)
    area = f"area / (2 log 2) = {nats / (dims * math.log(2)):.3f} bits/dim" if bits else f"area D / 2 = {nats:.3f} nats"
    note = f"{area}, shaded by its share"
    axes.text(1.0, 1.02, note, transform=axes.transAxes, ha="right", va="bottom", size=8.5, color=GREY)
    return figure


def levels(
    ladders: Mapping[str, Mapping[int, LikelihoodReport]],
    limit: LikelihoodReport,
    *,
    size: tuple[float, float] = (6.4, 4.0),
    on: Canvas | None = None,
) -> Canvas:
    """How much larger the bound with T levels is than in continuous time, for some grids and variances.

    Args:
        ladders: name -> T -> report, as :func:`sdegen.likelihood.bound_of_every_T` gives them.
        limit: the bound in continuous time, of the same profile: the two are compared example by example.
        size: width and height in inches, of a new figure.
        on: draw here in place of a new figure.
    """
    series: dict[str, Series] = {}
    for name, ladder in ladders.items():
        gaps = np.array([[limit.in_bits(nats) for nats in gap(report, limit)] for report in ladder.values()])
        y, se = gaps.T
        series[name] = Series(np.array(list(ladder)), y, y - 2 * se, y + 2 * se)
    panel = Panel(
        series,
        f"With T levels, above the {limit.bits_per_dim:.3f} of continuous time",
        "number of levels T",
        "bits per dimension",
        log="xy",
        look=looks(list(ladders)),
        ticks=(sorted({T for ladder in ladders.values() for T in ladder}), ()),
    )
    return plots.lines([panel], size=size, on=on)


def _tint(share: float) -> tuple[float, ...]:
    """White where there are no bits, a pale blue where most of them are."""
    pale = 1 - (1 - np.array(to_rgb(COLORS["steel"]))) * 0.62
    return tuple(1 + share * (pale - 1))


def _name(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], name: str, color: str, top: float) -> None:
    """Write a curve's name above its highest place, or left of it where there is no room above."""
    i = int(np.argmax(y))
    right = x[i] > (x[0] + x[-1]) / 2
    where = {"xytext": (-6 if right else 6, 3), "textcoords": "offset points"}
    axes.annotate(
        name, (x[i], min(y[i], 0.9 * top)), color=color, ha="right" if right else "left", va="bottom", **where
    )
