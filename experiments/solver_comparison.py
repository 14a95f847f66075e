"""Which solver, at which cost, and does the answer carry over from one kind of data to another?

Exact mixtures of very different shape: four blobs in the plane, a ring, a grid, a closed curve in 16 dimensions, sheets
in 16 and in 64. Every solver of a selection has every budget of network calls on each of them, from the same noises and
along the same Brownian motion. The error of a solver (the median over noises, which the few that end in another mode do
not rule) is divided by the smallest error that anybody of its equation reaches with that budget, and geometric means
are taken over the data: 1 would be the best one everywhere.

    python -m experiments.solver_comparison
    python -m experiments.solver_comparison --targets ring --solvers heun,unipc_2 --out runs/mine

The folder is that of a sweep: it goes on where it was stopped, and the page is that of ``sdegen report``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from tqdm import tqdm

from experiments.command import command
from sdegen import comparison_page
from sdegen.comparison import Comparison, sweep
from sdegen.provenance import cpus
from sdegen.standings import Problem
from sdegen.style import INK, PAPER, save, styled
from sdegen.sweeps import gather
from sdegen.tables import aligned

__all__ = ["Config", "run"]

MEASURE = "error_median"


@dataclass(frozen=True)
class Config:
    """The experiment.

    Args:
        solvers: names or patterns.
        targets: oracles by name.
        budgets: network calls.
        shown: the budget of the picture, one of them.
        samples: noises.
        cloud: endpoints that are compared with exact samples.
        reference_steps: of the converged SDE.
        seed: of noises, Brownian motion and data.
        workers: processes; 0 for one for each core.
        out: folder for results.h5, results.csv, solver_comparison.svg and report.html.
    """

    solvers: tuple[str, ...] = (
        *("ddim", "euler", "heun", "edm_heun", "rk4", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "exp_adams_3", "exp_adams_4"),
        *("unipc_2", "deis_tab3", "ipndm", "lms_4", "vab_3_euler", "vab_4_euler"),
        *("ancestral", "euler_maruyama", "sde_heun_lam", "sde_dpmpp_2m", "sde_adams_3", "sa_solver", "sra1"),
    )
    targets: tuple[str, ...] = ("mixture2d", "ring", "grid", "curve16", "mixture16", "mixture64")
    budgets: tuple[int, ...] = (5, 10, 20, 50)
    shown: int = 10
    samples: int = 64
    cloud: int = 500
    reference_steps: int = 1024
    seed: int = 0
    workers: int = 0
    out: Path = Path("runs/solver_comparison")

    def __post_init__(self) -> None:
        if self.shown not in self.budgets:
            raise ValueError(f"the picture shows one of the budgets {self.budgets}, not {self.shown}")

    @property
    def comparison(self) -> Comparison:
        """What is measured."""
        return Comparison(
            self.targets, self.solvers, self.budgets, (), seeds=(self.seed,), samples=self.samples, cloud=self.cloud,
            transport=0, reference_steps=self.reference_steps,
        )  # fmt: skip


def run(config: Config | None = None) -> Path:
    """Measure, write, and draw.

    Args:
        config: the default where None.

    Returns:
        Path of ``results.h5``.
    """
    config = config or Config()
    with tqdm(total=1.0, disable=None, bar_format="{percentage:3.0f}% |{bar:24}| {remaining} left{postfix}") as bar:

        def advance(what: str, share: float) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update(share - bar.n)

        workers = config.workers or cpus()
        file = sweep(config.comparison, config.out, workers=workers, progress=advance)
    found = gather([file])
    comparison_page.build(found, config.out / "report.html")
    problems = [problem for problem in found.problems if problem.target in config.targets]
    save(figure(problems, config.shown), config.out / "solver_comparison.svg")
    print(told(problems))
    return file


def losses(problems: Sequence[Problem], budget: int, *, stochastic: bool) -> dict[str, np.ndarray]:
    """Log of every solver's error over the smallest one of its equation, problem by problem; the best on average first.

    A solver that cannot spend the budget on every problem is left out.
    """
    found: dict[str, list[float]] = {}
    for problem in problems:
        ranked = problem.ranked(budget, MEASURE, stochastic=stochastic)
        for row in ranked:
            found.setdefault(row.label, []).append(math.log(row[MEASURE].value / ranked[0][MEASURE].value))
    whole = {label: np.array(values) for label, values in found.items() if len(values) == len(problems)}
    return dict(sorted(whole.items(), key=lambda item: float(item[1].mean())))


def told(problems: Sequence[Problem]) -> str:
    """For every budget and equation the three that lose least on average."""
    rows: list[tuple[str, ...]] = [("calls", "equation", "best on average", "second", "third")]
    for budget in problems[0].budgets:
        for stochastic, equation in ((False, "ODE"), (True, "SDE")):
            best = list(losses(problems, budget, stochastic=stochastic).items())[:3]
            words = [f"{label} {math.exp(loss.mean()):.2f}" for label, loss in best]
            if words:
                rows.append((str(budget), equation, *words, *[""] * (3 - len(words))))
    return aligned(rows, right=[0])


@styled
def figure(problems: Sequence[Problem], budget: int) -> Figure:
    """What each solver loses on each kind of data: the ODE's solvers, and the SDE's."""
    blocks = {
        equation: loss
        for stochastic, equation in ((False, "ODE"), (True, "SDE"))
        if (loss := losses(problems, budget, stochastic=stochastic))
    }
    drawn = Figure((8.4, 0.27 * sum(map(len, blocks.values())) + 0.8 * len(blocks) + 0.3))
    axes = drawn.subplots(len(blocks), 1, squeeze=False, height_ratios=[len(loss) for loss in blocks.values()])[:, 0]
    columns = [*(problem.target for problem in problems), "all"]
    for axis, (equation, loss) in zip(axes, blocks.items(), strict=True):
        values = np.exp(np.array([[*row, row.mean()] for row in loss.values()]))
        _map(axis, values, list(loss), columns)
        axis.set_title(f"{equation} solvers with {budget} calls: median error over the smallest of all")
    return drawn


def _map(axes: Axes, values: np.ndarray, rows: list[str], columns: list[str]) -> None:
    """Numbers in boxes, darker for worse; the best of each column in bold."""
    axes.imshow(values, norm=LogNorm(1, 30), cmap="Greys", aspect="auto", alpha=0.85)
    for (i, j), value in np.ndenumerate(values):
        text = f"{value:.2f}" if value < 9.95 else f"{value:.0f}"
        dark, best = math.log(value) > 0.55 * math.log(30), value <= values[:, j].min()
        weight = "bold" if best else "normal"
        axes.text(j, i, text, ha="center", va="center", size=8, color=PAPER if dark else INK, weight=weight)
    axes.axvline(len(columns) - 1.5, color=PAPER, lw=4)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)


main = command(run, Config, __doc__, "--targets ring --solvers heun,unipc_2 --out runs/mine")

if __name__ == "__main__":
    sys.exit(main())
