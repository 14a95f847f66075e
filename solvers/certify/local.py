"""Local order: a handful of short steps in the middle of the path, where nothing is small by accident.

A global order is seen where steps are small *and* where the solution bends; at the noise end it hardly does, so a
method that begins with Euler's step may show its own order for as long as anybody refines. Here the steps are as short
as we like and the solution bends, so what is measured is the order of the formulas themselves:

with exact history
    The steps of interest stand between steps that grow from nothing and shrink to nothing, each twice its neighbour, so
    that neither the first step nor the last (which some correctors leave uncorrected) weighs. The error left is that of
    the method's own steps, h^(p + 1).
from a cold start
    The solve begins with the steps of interest. Their error is h^(q + 1), where q is the order of the first step; the
    whole is then formally of order min(p, q + 1).

On Gaussian data the probability-flow ODE is solved exactly by x = alpha m + c sqrt(alpha^2 v + sigma^2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from solvers.certify.convergence import Measured, rms
from solvers.certify.problems import MEANS, STDS, gaussian
from solvers.grids import Grid
from solvers.integrate import Solver, integrate
from solvers.problem import Path

__all__ = ["graded", "local_order"]

STEPS = torch.tensor([1.0, 0.6, 1.3, 0.8, 1.1], dtype=torch.float64)
GRADED = 2.0 ** -torch.arange(14, 0, -1, dtype=torch.float64)
SHARES = torch.tensor([[1.0], [-0.6]], dtype=torch.float64)  # where the two samples are, in standard deviations
FLOOR = 1e-14


def graded(grid: Grid) -> Grid:
    """The same grid with its first step cut into pieces that grow from next to nothing: a start that does not weigh."""

    def make(path: Path, n: int) -> Tensor:
        ts = grid(path, n)
        return torch.cat([ts[:1], torch.lerp(ts[0], ts[1], GRADED), ts[1:]])

    return make


def local_order(solver: Solver[Any], path: Path, *, warm: bool) -> Measured:
    """Error of five steps of length about h in lam, for h = 1/2, 1/4, ...: N is 1 / h.

    Args:
        solver: a deterministic method with fixed steps.
        path: the Gaussian path.
        warm: with exact history, else from a cold start.
    """
    problem = gaussian(path, MEANS, STDS)
    ends = path.logsnr(torch.tensor([path.t_max, path.t_min], dtype=torch.float64)) / 2
    centre = torch.lerp(ends[0], ends[1], 0.45)  # where no method's leading error changes its sign
    lengths = torch.cat([GRADED, STEPS, GRADED.flip(0)] if warm else [STEPS, GRADED.flip(0)])
    places = torch.cat([torch.zeros(1, dtype=torch.float64), lengths.cumsum(0)])

    def on_the_curve(t: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t)
        return alpha * MEANS + SHARES * ((alpha * STDS) ** 2 + sigma**2).sqrt()

    steps: list[int] = []
    errors: list[Tensor] = []
    for n in (2, 4, 8, 16, 32, 64):
        ts = path.time(2 * (centre + places / n))
        error = integrate(solver, problem, on_the_curve(ts[0]), ts).x - on_the_curve(ts[-1])
        if float(error.abs().max()) < FLOOR:
            break
        steps.append(n)
        errors.append(error)
    return Measured(tuple(steps), tuple(map(rms, errors)), rounding=FLOOR)
