"""The figures of a run: from results, as they lie in ``results.h5``, to pictures.

Each function takes a :class:`sdegen.results.Result` and draws one figure, or draws it into a part ``on`` of a larger
one. How things look is in :mod:`sdegen.plots`; here is what is shown.

    found = report.read_all(Run.open("runs/demo"))
    figures.errors(found["errors"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure, SubFigure

from sdegen import comparison_figures, plots
from sdegen.plane import Plane, planes
from sdegen.plots import Dot, Panel, Series
from sdegen.results import Result
from sdegen.standings import Problem
from sdegen.style import GREY, MODELS, Canvas, Look, looks, style
from sdegen.sweeps import merge, source

__all__ = [
    "Score",
    "bounds",
    "errors",
    "film",
    "flow",
    "overview",
    "problem",
    "ranking",
    "samples",
    "scores",
    "scores_of",
    "strips",
    "training",
]

BUDGET = 10  # network calls of the question that people ask first


class Score(NamedTuple):
    """A model's number in bits per pixel, with what it is made of.

    Attributes:
        model: "VAE", "DDPM", "VP-SDE", "ODE" or the name of a baseline.
        T: number of levels, of a DDPM.
        kind: "exact", "upper bound" or "estimate".
        bits: the number.
        estimator_se: its standard error from random draws; NaN where there are none.
        data_se: its standard error as an estimate for all digits.
        reconstruction, latent, prior: its terms; NaN where it has none.
        forward: network calls for each example.
        vjp: products with the Jacobian for each example.
        seconds: it took, for all examples.
        examples: how many were scored.
        gap: how much more it is than the VP-SDE's bound on the same examples.
        gap_se: standard error of that, from draws and data together.
    """

    model: str
    T: int
    kind: str
    bits: float
    estimator_se: float
    data_se: float
    reconstruction: float
    latent: float
    prior: float
    forward: float
    vjp: float
    seconds: float
    examples: int
    gap: float
    gap_se: float

    @property
    def title(self) -> str:
        """The model's name for people."""
        return f"DDPM, T = {self.T}" if self.T else _TITLES.get(self.model, self.model)

    @property
    def look(self) -> Look | None:
        """The model's colour and marker; baselines have none."""
        return MODELS.get(self.model)


_TITLES = {
    "uniform": "Uniform",
    "histogram": "Histogram",
    "pixels": "Pixel histogram",
    "ODE": "Probability flow",
}


def scores_of(found: Result) -> list[Score]:
    """The rows of the result ``likelihood``."""
    columns = [found[name].tolist() for name in Score._fields]
    return [Score(*row) for row in zip(*columns, strict=True)]


def the(scores: Sequence[Score], model: str) -> Score:
    """The last score of a model: of the DDPMs, the one with most levels."""
    return [score for score in scores if score.model == model][-1]


def scores(found: Result, *, on: Canvas | None = None, title: str = "") -> Canvas:
    """One row for each model, baselines as lines."""
    rows = scores_of(found)
    shown = [the(rows, model) for model in ("VAE", "DDPM", "VP-SDE")]
    dots = [
        Dot(s.title, s.bits, s.estimator_se, s.data_se, MODELS[s.model], f"{s.bits:.3f} ± {s.data_se:.3f}")
        for s in shown
    ]
    pixels, uniform = the(rows, "pixels").bits, the(rows, "uniform").bits
    low = min(d.value - d.outer for d in dots)
    return plots.dots(
        dots, title=title, marks={f"pixel histogram {pixels:.2f}": pixels, f"uniform {uniform:.2f}": uniform},
        xlabel="bits per pixel of a held-out digit (less is better)", xlim=(low - 0.12, uniform + 1.4),
        size=(5.4, 2.5), on=on,
    )  # fmt: skip


def problem(found: Result) -> Problem:
    """The result ``errors``, in order: one target on one path."""
    return merge([source(found)]).problems[0]


def ranking(found: Result, budget: int, *, on: Canvas | None = None) -> Canvas:
    """All solvers by pathwise error with at most ``budget`` calls, each equation by itself."""
    standing = problem(found)
    count = len(standing.labels)
    return comparison_figures.ranking(standing, budget, looks(standing.labels), count=count, width=5.4, on=on)


def samples(found: Result, *, count: int = 48, on: Canvas | None = None) -> Canvas:
    """Samples of every model beside held-out digits."""
    groups = [str(group) for group in found["group"]]
    images = {group[:1].upper() + group[1:]: found["images"][i, :count, 0] for i, group in enumerate(groups)}
    return plots.gallery(images, on=on)


def bounds(found: Result, *, on: Canvas | None = None) -> Canvas:
    """The DDPM's bound against the number of levels, and how far it is from the VP-SDE's."""
    rows = scores_of(found)
    ladder, sde, pixels = [s for s in rows if s.model == "DDPM"], the(rows, "VP-SDE").bits, the(rows, "pixels").bits
    T, y = np.array([s.T for s in ladder]), np.array([s.bits for s in ladder])
    se = 2 * np.array([s.estimator_se for s in ladder])
    gap, gap_se = np.array([s.gap for s in ladder]), 2 * np.array([s.gap_se for s in ladder])
    marks = {f"VP-SDE {sde:.3f}": sde, f"pixel histogram {pixels:.3f}": pixels}
    common = {"xlabel": "number of levels T", "ticks": (T.tolist(), ())}
    line, falling = Look(GREY, "", (0, (2, 2))), Series(T, gap[-2] * T[-2] / T)
    panels = [
        Panel(
            {"DDPM": Series(T, y, y - se, y + se)}, "The bound falls to the VP-SDE's", log="x", marks=marks,
            ylabel="bits per pixel", look=MODELS, labels="", **common,
        ),
        Panel(
            {"DDPM": Series(T, gap, gap - gap_se, gap + gap_se), "1 / T": falling}, "at the rate 1 / T", log="xy",
            ylabel="bits per pixel above the VP-SDE", look={**MODELS, "1 / T": line}, **common,
        ),
    ]  # fmt: skip
    return plots.lines(panels, size=(11, 3.2), on=on)


def strips(found: Result, *, columns: int = 10, on: Canvas | None = None) -> Canvas:
    """The same noises through every solver, with every budget; solvers of one equation under its exact solution."""
    rows: list[str] = []
    breaks: list[int] = []
    order = strips_order(found)
    blocks: dict[str, list[np.ndarray]] = {f"{budget} calls": [] for budget in found["budget"]}
    notes: dict[str, list[str]] = {title: [] for title in blocks}
    for kind, members in order.items():
        breaks.append(len(rows))
        rows += [f"exact {kind}", *(str(found["solver"][j]) for j in members)]
        for i, title in enumerate(blocks):
            blocks[title] += [found["reference"][list(order).index(kind)], *found["images"][i, members]]
            notes[title] += ["", *(f"{value:.2f}" for value in found["error"][i, members])]
    images = {title: np.stack(block)[:, :columns, 0] for title, block in blocks.items()}
    return plots.strips(images, rows, notes=notes, breaks=breaks, on=on)


def strips_order(found: Result) -> dict[str, list[int]]:
    """For each equation the solvers' places, best first with the smallest budget."""
    ranked = np.argsort(found["error"][0], kind="stable")
    noisy = found["stochastic"].astype(bool)
    return {"ODE": [int(j) for j in ranked if not noisy[j]], "SDE": [int(j) for j in ranked if noisy[j]]}


def errors(found: Result, *, on: Canvas | None = None, panels: slice = slice(None)) -> Canvas:
    """Error against network calls: pathwise for ODE and for SDE solvers, in distribution for all."""
    standing = problem(found)
    return comparison_figures.costs(standing, "nfe", BUDGET, looks(standing.labels), panels=panels, on=on)


def flow(found: Result, *, on: Canvas | None = None, panels: Sequence[int] | None = None) -> Canvas:
    """Density and field at some noise levels, and the lines that samples follow; ``panels`` chooses the levels."""
    reach, keep = float(found.attributes["reach"]), range(len(found["arrows"])) if panels is None else panels
    panels_ = [
        Plane(f"logsnr = {_signed(found['logsnr'][k], 0)}", found["density"][k], (found["at"], found["arrows"][k]))
        for k in keep
    ]
    lines = Plane("From noise to data", found["density"][-1], twins=found["walks"][:, :1], paths=found["lines"])
    return planes([*panels_, lines], reach=reach, on=on)


def film(found: Result, rows: Mapping[str, str], *, backward: bool = False, on: Canvas | None = None) -> Canvas:
    """Frames of the process.

    Args:
        found: the result ``film``.
        rows: name of a row of the result -> what to write beside it; a predicted row ends with "x0".
        backward: from the noise to the data.
        on: draw here in place of a new figure.
    """
    at = {str(name): i for i, name in enumerate(found["row"])}
    direction = slice(None) if backward else slice(None, None, -1)
    logsnr = found["logsnr"][direction]
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-logsnr))), np.sqrt(1 / (1 + np.exp(logsnr)))
    reach = (alpha + 1.5 * sigma)[:, None, None]  # the value that is drawn black: of a noisy state, by its own spread
    drawn = [found["images"][at[name], direction, 0] / (1.0 if name.endswith("x0") else reach) for name in rows]
    columns, breaks = [_signed(value, 1) for value in logsnr], range(2, len(rows), 2)
    return plots.strips({"": np.stack(drawn)}, list(rows.values()), columns=columns, breaks=breaks, on=on)


def training(found: Mapping[str, Result], *, on: Canvas | None = None) -> Canvas:
    """Training and held-out bound against seconds; title -> history, the first in the VP-SDE's colour."""
    grey, panels = Look(GREY, "", (0, (2, 1.2))), []
    for (title, history), model in zip(found.items(), ("VP-SDE", "VAE"), strict=False):
        size = f"{history.attributes['parameters']:,} parameters, {int(history['step'][-1]):,} steps"
        curves_ = {name: Series(history["seconds"], history[name]) for name in ("loss", "held_out")}
        panels.append(
            Panel(
                {"training": curves_["loss"], "held out": curves_["held_out"]},
                f"{title}: {size}",
                "seconds of training",
                "bits per pixel",
                look={"training": grey, "held out": MODELS[model]},
            )
        )
    return plots.lines(panels, size=(11, 3.1), on=on)


def overview(found: Mapping[str, Result]) -> Figure:
    """The whole demo in one picture, for a README."""
    with style():
        figure = Figure((11, 6.7), layout="constrained")
        top, bottom = _parts(figure, 2, 1, height_ratios=[0.92, 1.0])
        one, two, three = _parts(bottom, 1, 3, width_ratios=[1.15, 1.05, 0.95], wspace=0.04)
    samples(found["samples"], count=36, on=top)
    scores(found["likelihood"], title="Bits per pixel, held-out digits", on=one)
    errors(found["errors"], panels=slice(0, 1), on=two)
    flow(found["flow"], panels=(), on=three)
    return figure


def _parts(figure: Canvas, rows: int, columns: int, **settings: Any) -> list[SubFigure]:
    return list(np.ravel(np.asarray(figure.subfigures(rows, columns, **settings), dtype=object)))


def _signed(value: float, digits: int) -> str:
    """A number with its sign, a real minus among them."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if float(value) and any(c in "123456789" for c in text) else text[1:]
