"""Which grid to take when nobody says: ``python -m benchmarks.grids``.

Over four paths, two exact mixtures and three budgets, every solver's error on a grid is divided by its error on the
best of the grids, and the geometric mean is printed: 1 would be the best grid everywhere. The first table says which
grid carries from path to path, the second which one suits which solver; :attr:`solvers.Solver.grid` follows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from sdegen.oracles import oracle
from sdegen.paths import VE, VP, Cosine, Flow, GaussianPath
from solvers import GRIDS, SOLVERS, integrate, prior
from solvers.certify import exact
from solvers.solve import steps_within

PATHS = {"VP linear": VP(), "VP cosine": VP(Cosine()), "straight line": Flow(), "VE": VE()}
CASES = {"mixture2d": 32, "mixture16": 16}
BUDGETS = (10, 20, 50)
NAMES = ("uniform", "quadratic", "logsnr", "karras", "flow", "sqrt_flow", "vp_quadratic")
METHODS = (
    *("ddim", "heun", "rk4", "dpm_3s", "ab_2", "vab_3_euler"),
    *("dpmpp_2m", "dpmpp_3m", "exp_adams_3", "exp_adams_4", "unipc_2", "ipndm"),
)


class Cell(NamedTuple):
    """How much is lost on a grid: log of the error over that on the best grid."""

    path: str
    method: str
    grid: str
    loss: float


def cells(place: str, path: GaussianPath) -> Iterable[Cell]:
    """Every solver on every grid of one path."""
    for case, count in CASES.items():
        model = oracle(case)
        problem = model.problem(path)
        x = prior(path, (count, *model.event_shape), seed=0, dtype=torch.float64)
        truth = exact(problem, x)
        for budget in BUDGETS:
            for method in METHODS:
                solver = SOLVERS[method]
                steps = steps_within(solver, budget)
                found = {
                    name: (integrate(solver, problem, x, GRIDS[name](path, steps)).x - truth).square().mean().sqrt()
                    for name in NAMES
                }
                best = min(map(float, found.values()))
                yield from (Cell(place, method, name, math.log(float(error) / best)) for name, error in found.items())


def table(title: str, rows: Iterable[str], column: str, columns: Iterable[str], found: list[Cell]) -> None:
    """Geometric means by grid and by one other thing, as Markdown."""
    columns = list(columns)
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for row in rows:
        losses = (
            [
                cell.loss
                for cell in found
                if row in (cell.grid, cell.method) and name in (cell.grid, getattr(cell, column))
            ]
            for name in columns
        )
        print(f"| `{row}` | {' | '.join(f'{math.exp(sum(loss) / len(loss)):.2f}' for loss in losses)} |")


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    found = [cell for place, path in PATHS.items() for cell in cells(place, path)]
    table("grid", NAMES, "path", PATHS, found)
    table("solver", METHODS, "grid", NAMES, found)


if __name__ == "__main__":
    main()
