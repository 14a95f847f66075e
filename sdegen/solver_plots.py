"""Pictures of solvers: which prediction feeds which state.

A solver is a table of numbers (:mod:`solvers.tables`), and a table can be looked at. Two views belong together:

*what each step adds*: the weights of its formula. A one-step method is a diagonal, a multistep method a band as wide as
its memory (narrower at the start, where the memory is short), a Runge-Kutta method one block for each step;

*what each state is made of*: the sum of all that. The last row is the sample, as a combination of everything the
network said, and where it is dark an error of the network is not forgiven.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import AsinhNorm, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdegen.style import COLORS, Canvas, styled
from solvers import Table
from solvers.tables import Form

__all__ = ["heat_map"]

SIGNED = LinearSegmentedColormap.from_list("signed", [COLORS["indigo"], "#ffffff", COLORS["rust"]])
"""Negative blue, positive red, nothing white."""


@styled
def heat_map(
    table: Table, *, form: Form = "x0", size: tuple[float, float] = (10, 4.4), on: Canvas | None = None
) -> Canvas:
    """Which prediction feeds which state: a row for each step, a column for each evaluation.

    Args:
        table: the solver on its grid.
        form: which half of a prediction is counted, "x0" or "eps".
        size: width and height in inches, of a new figure.
        on: draw here in place of a new figure.
    """
    figure = Figure(size) if on is None else on
    views = {
        "what each step adds": table.weights(form),
        "what each state is made of": table.states(form)[:, 1 : 1 + table.nfe],
    }
    largest = max(float(np.abs(values).max()) for values in views.values()) or 1.0
    norm = AsinhNorm(linear_width=largest / 20, vmin=-largest, vmax=largest)
    axes: Axes
    row = figure.subplots(1, len(views), squeeze=False)[0]
    image = None
    for axes, (title, values) in zip(row, views.items(), strict=True):
        edges = (0.5, table.nfe + 0.5, table.steps + 0.5, 0.5)
        image = axes.imshow(values, cmap=SIGNED, norm=norm, extent=edges, aspect="auto", interpolation="none")
        axes.set(title=title, xlabel="evaluation", ylabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(False)
    if image is not None:
        ticks = [-largest, -largest / 10, 0, largest / 10, largest]
        bar = figure.colorbar(image, ax=list(row), label=f"weight of {form}", shrink=0.9, ticks=ticks, format="%.2g")
        bar.ax.minorticks_off()
    figure.suptitle(f"{table.name}, {table.steps} steps, {table.nfe} evaluations", fontsize=9)
    return figure
