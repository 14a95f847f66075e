"""Which time grid for which solver? And how much is a grid worth that was fitted to the problem?

Every solver on every grid, over exact mixtures, Gaussian paths and budgets, from the same noises. The error on a grid,
the mean over noises of the distance from the exact end, is divided by that on the best of the grids, and geometric
means are taken: 1 would be the best grid everywhere. The first picture says which grid suits which solver (a ring marks
the one that ``solve`` takes when none is asked for), the second which grid carries from path to path: a grid that is
good in the time of one path may be a bad one in that of another, and one that is said in terms of logsnr is not.

The column *fitted* is :func:`solvers.optimize_grid` on the first path, judged on noises that had no part in the
fitting, over the best preset there: below 1 it gains.

    python -m experiments.time_grids
    python -m experiments.time_grids --solvers heun,dpmpp_2m --targets ring --out runs/mine

Reference: Sabour et al. 2024, arXiv:2404.14507 (grids that are optimised).
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from experiments.command import command
from sdegen import results
from sdegen.comparison.truth import exact_ode
from sdegen.oracles import ORACLES
from sdegen.paths import PATHS
from sdegen.provenance import provenance
from sdegen.results import Result
from sdegen.style import INK, PAPER, save, styled
from solvers import GRIDS, SOLVERS, DiffusionProblem, integrate, optimize_grid, prior
from solvers.optimize import distances
from solvers.solve import find, steps_within

__all__ = ["Config", "run"]

FIT = 4  # times as many noises are given to the fit as to the measurement: half of them fit, a quarter chooses


@dataclass(frozen=True)
class Config:
    """The experiment.

    Args:
        solvers: with fixed steps and without noise, by name.
        grids: by name.
        targets: oracles by name.
        paths: Gaussian paths by name; grids are fitted on the first.
        budgets: network calls.
        samples: noises.
        seed: of the noises.
        out: folder for results.h5, time_grids.csv and time_grids.svg.
    """

    solvers: tuple[str, ...] = (
        *("ddim", "heun", "rk4", "dpm_3s", "ab_2", "vab_3_euler"),
        *("dpmpp_2m", "dpmpp_3m", "exp_adams_3", "exp_adams_4", "unipc_2", "ipndm"),
    )
    grids: tuple[str, ...] = ("uniform", "quadratic", "logsnr", "karras", "flow", "sqrt_flow", "vp_quadratic")
    targets: tuple[str, ...] = ("mixture2d", "mixture16")
    paths: tuple[str, ...] = ("vp-linear", "vp-cosine", "flow", "ve")
    budgets: tuple[int, ...] = (10, 20)
    samples: int = 128
    seed: int = 0
    out: Path = Path("runs/time_grids")

    def __post_init__(self) -> None:
        for names, known, kind in (
            (self.solvers, SOLVERS, "solver"), (self.grids, GRIDS, "grid"),
            (self.targets, ORACLES, "oracle"), (self.paths, PATHS, "path"),
        ):  # fmt: skip
            if not names:
                raise ValueError(f"the experiment needs at least one {kind}")
            for name in names:
                find(name, known, kind)
        for name in self.solvers:
            if SOLVERS[name].stochastic or SOLVERS[name].nfe_per_step == 0:
                raise ValueError(f"{name} draws noise or chooses its own steps: this is about solvers of a given grid")
            if not self.budgets or SOLVERS[name].nfe(1) > min(self.budgets):
                raise ValueError(f"{name} needs at least {SOLVERS[name].nfe(1)} calls, budgets are {self.budgets}")
        if self.samples < 4:
            raise ValueError(f"an error needs at least 4 noises, got {self.samples}")


def run(config: Config | None = None) -> Path:
    """Measure, write, and draw.

    Args:
        config: the default where None.

    Returns:
        Path of ``results.h5``.
    """
    config = config or Config()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    bar = tqdm(total=len(config.targets) * len(config.paths) * len(config.solvers), disable=None)
    for target, place in product(config.targets, config.paths):
        path = PATHS[place]()
        problem = ORACLES[target]().problem(path)
        noises = FIT * config.samples if place == config.paths[0] else config.samples
        x = prior(path, (noises, *ORACLES[target]().event_shape), config.seed, dtype=torch.float64)
        truth = exact_ode(problem, x)
        for name in config.solvers:
            where = {"target": target, "path": place, "solver": name}
            for budget in config.budgets:
                found = _on_presets(config, problem, x[: config.samples], truth[: config.samples], name, budget)
                if len(x) > config.samples:
                    fitted = optimize_grid(
                        problem, name, budget, x=x, target=truth, presets=config.grids, starts=1, iterations=8
                    )
                    found["fitted"] = min(found.values()) / fitted.gain
                rows += [{**where, "budget": budget, "grid": grid, "error": e} for grid, e in found.items()]
            bar.set_postfix_str(f"{target}, {place}, {name}")
            bar.update()
    bar.close()
    found = _result(config, rows)
    config.out.mkdir(parents=True, exist_ok=True)
    results.write(config.out / "results.h5", "time_grids", found)
    results.write_csv(config.out / "time_grids.csv", rows)
    save(figure(found), config.out / "time_grids.svg")
    print(told(found))
    return config.out / "results.h5"


def _on_presets(
    config: Config, problem: DiffusionProblem, x: torch.Tensor, truth: torch.Tensor, name: str, budget: int
) -> dict[str, float]:
    """Mean distance from the exact end on every grid."""
    solver = SOLVERS[name]
    steps = steps_within(solver, budget)
    with torch.no_grad():
        ends = {grid: integrate(solver, problem, x, GRIDS[grid](problem.path, steps)).x for grid in config.grids}
    return {grid: float(distances(end, truth).mean()) for grid, end in ends.items()}


def _result(config: Config, rows: list[dict[str, Any]]) -> Result:
    axes: dict[str, tuple[Any, ...]] = {
        "target": config.targets, "path": config.paths, "solver": config.solvers, "budget": config.budgets,
        "grid": (*config.grids, "fitted"),
    }  # fmt: skip
    error = np.full([len(values) for values in axes.values()], np.nan)
    for row in rows:
        error[tuple(values.index(row[axis]) for axis, values in axes.items())] = row["error"]
    arrays: dict[str, Any] = {name: ((name,), np.array(values)) for name, values in axes.items()}
    arrays["default"] = (("solver",), np.array([SOLVERS[name].grid for name in config.solvers]))
    arrays["error"] = (tuple(axes), error, {"unit": "data", "quantity": "mean distance, pathwise"})
    return Result(arrays, {**asdict(config), "out": str(config.out), **provenance()})


def losses(found: Result) -> np.ndarray:
    """Log of the error over that on the best preset, (target, path, solver, budget, grid)."""
    error = found["error"]
    return np.log(error / error[..., :-1].min(-1, keepdims=True))


def told(found: Result) -> str:
    """The best grid of every solver, in words."""
    mean = np.exp(losses(found)[..., :-1].mean((0, 1, 3)))
    fitted = np.exp(losses(found)[:, 0, :, :, -1].mean((0, 2)))
    lines = []
    for name, row, gain, default in zip(found["solver"], mean, fitted, found["default"], strict=True):
        best = row.argmin()
        own = list(found["grid"]).index(default) if default in found["grid"] else None
        said = "" if own is None or own == best else f", {default} (the default) {row[own]:.2f}"
        lines.append(f"{name:12} {found['grid'][best]} {row[best]:.2f}{said}; fitted {gain:.2f} of the best preset")
    return "\n".join(lines)


@styled
def figure(found: Result) -> Figure:
    """Geometric means: solver by grid, and path by grid."""
    loss, grids = losses(found), [str(name) for name in found["grid"]]
    by_solver = loss.mean((0, 1, 3))
    by_solver[:, -1] = loss[:, 0, :, :, -1].mean((0, 2))  # fitted on the first path only
    drawn = Figure((8.2, 0.31 * (len(by_solver) + len(found["path"])) + 2.1))
    top, low = drawn.subplots(2, 1, height_ratios=[len(by_solver), len(found["path"])])
    _map(top, np.exp(by_solver), [str(name) for name in found["solver"]], grids, "Which grid suits which solver")
    for i, default in enumerate(map(str, found["default"])):
        if default in grids:
            top.plot(grids.index(default) + 0.38, i - 0.28, "o", mfc="none", mec=INK, ms=4, mew=0.9)
    _map(low, np.exp(loss[..., :-1].mean((0, 2, 3))), [str(p) for p in found["path"]], grids[:-1], "Which carries over")
    low.set_xlim(-0.5, len(grids) - 0.5)
    return drawn


def _map(axes: Axes, values: np.ndarray, rows: list[str], columns: list[str], title: str) -> None:
    """Numbers in boxes, darker for worse, the best preset in bold."""
    presets = [name for name in columns if name != "fitted"]
    axes.imshow(values, norm=LogNorm(1, 30), cmap="Greys", aspect="auto", alpha=0.85)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            text = f"{value:.2f}" if value < 9.95 else f"{value:.0f}"
            dark, best = math.log(value) > 0.55 * math.log(30), value <= np.nanmin(row[: len(presets)])
            weight: Any = "bold" if best else "normal"
            axes.text(j, i, text, ha="center", va="center", size=8, color=PAPER if dark else INK, weight=weight)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.set_title(f"{title}: error over that on the best preset")


main = command(run, Config, __doc__, "--solvers heun,dpmpp_2m --targets ring --out runs/mine")

if __name__ == "__main__":
    sys.exit(main())
