"""Solvers for diffusion problems: a function, a path, a grid, and methods whose order is measured.

    from solvers import DiffusionProblem, prior, solve

    problem = DiffusionProblem(path, predict)                    # predict(x, t) -> Prediction(x0, eps)
    x = prior(path, (64, 2), seed=0)
    solve(problem, x, solver="heun", steps=20).x

Nothing here knows a network, a data set or an experiment.
"""

from __future__ import annotations

from typing import Any

from solvers.grids import GRIDS, Grid, check_grid
from solvers.integrate import Solver, Trajectory, integrate
from solvers.noise import BrownianMotion, Noise, standard_normal
from solvers.problem import ODE, SDE, DiffusionProblem, Path, Prediction, expand
from solvers.solve import prior, resolve, solve

__all__ = [
    "GRIDS",
    "ODE",
    "SDE",
    "SOLVERS",
    "BrownianMotion",
    "DiffusionProblem",
    "Grid",
    "Noise",
    "Path",
    "Prediction",
    "Solver",
    "Trajectory",
    "check_grid",
    "expand",
    "integrate",
    "prior",
    "resolve",
    "solve",
    "standard_normal",
]

SOLVERS: dict[str, Solver[Any]] = {}
