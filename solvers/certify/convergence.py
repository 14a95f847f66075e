"""Orders, measured: refine until the slope has settled, and judge only then.

The error of a method of order p is C N^-p plus higher powers. Few steps show the higher powers, and how many are few
depends on the method, the path and the grid: a grid that is uniform in flow time asks for a thousand steps of a method
that works in sigma / alpha, where forty are plenty for one that works in lam. So N doubles until two neighbouring
slopes agree. What is still below the declared order then is given more steps, up to a limit, and then it fails.

Errors have a sign, and a bias may hide behind an error of discretisation of the other sign: one per cent too much noise
makes the error of a method that falls short of noise *smaller*, until it crosses zero. :class:`Measured` therefore says
what the errors tend to. With the declared order the limit is extrapolated from the last two grids (Richardson),

    L_k = (2^p e_k - e_(k-1)) / (2^p - 1),

off by O(N^-(p+1)), and so is the difference of two neighbouring extrapolations, which is larger by the factor
2^(p+1) - 1: the difference *bounds* what the limit may be mistaken by, and a limit beyond it is no artefact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from solvers.certify.problems import exact
from solvers.grids import Grid, uniform
from solvers.integrate import Solver, integrate
from solvers.noise import BrownianMotion, Noise
from solvers.problem import DiffusionProblem

__all__ = ["SLACK", "Measured", "measured_order", "refined", "rms", "strong_order", "tolerance_proportional"]

SLACK = 0.2  # a measured slope may miss the order by this much
STEADY = 0.1  # and two slopes that differ by less have settled
ROUNDING = 1e-12  # an error below this may be the reference's
RESOLVED = 2e-3  # a limit below this share of the standard deviation, or of the variance, is taken for zero
FIRST, ENOUGH, MOST = 20, 160, 2560  # steps: of the coarsest grid; where slopes that are high enough may stop; at most


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.double().square().mean().sqrt())


@dataclass(frozen=True)
class Measured:
    """Errors on a sequence of ever finer grids.

    Attributes:
        steps: numbers of steps.
        errors: error at each, root mean square.
        limit: what the errors tend to, extrapolated with the declared order, where their signs are known.
        bound: how far that may be wrong.
        rounding: errors below this say nothing.
    """

    steps: tuple[int, ...]
    errors: tuple[float, ...]
    limit: float = 0.0
    bound: float = 0.0
    rounding: float = ROUNDING

    @classmethod
    def of(cls, steps: Sequence[int], errors: Sequence[Tensor], order: float) -> Measured:
        """From signed errors, with their limit where there are three grids that double and an error to be seen."""
        sizes = tuple(map(rms, errors))
        if len(errors) < 3 or sizes[-1] < ROUNDING:
            return cls(tuple(steps), sizes)
        extrapolated = [
            finer + (finer - coarser) / ((n / m) ** order - 1)
            for (m, coarser), (n, finer) in pairwise(list(zip(steps, errors, strict=True))[-3:])
        ]
        return cls(tuple(steps), sizes, rms(extrapolated[-1]), rms(extrapolated[-1] - extrapolated[-2]))

    @property
    def slopes(self) -> tuple[float, ...]:
        """log(error ratio) / log(steps ratio) of neighbouring grids, as far as errors are more than rounding."""
        runs = pairwise(zip(self.steps, self.errors, strict=True))
        return tuple(math.log(e / f) / math.log(m / n) for (n, e), (m, f) in runs if f > self.rounding)

    @property
    def slope(self) -> float:
        """Slope of the finest pair: the measured order; infinite where there is no error to be seen."""
        return self.slopes[-1] if self.slopes else math.inf

    @property
    def trend(self) -> float:
        """What the slope goes to, if what it is off by halves when N doubles."""
        return 2 * self.slope - self.slopes[-2] if len(self.slopes) > 1 else self.slope

    @property
    def settled(self) -> bool:
        """Whether the last two slopes agree."""
        return len(self.slopes) > 1 and abs(self.slopes[-1] - self.slopes[-2]) < STEADY

    @property
    def vanishes(self) -> bool:
        """Whether the errors tend to zero, as far as can be told."""
        return self.limit <= max(self.bound, RESOLVED)

    def attains(self, order: float) -> bool:
        """Whether the errors fall at least that fast, and to zero.

        Where they reach rounding before their slope has settled, its trend counts.
        """
        slope = max(self.slope, self.trend) if self.errors[-1] < self.rounding else self.slope
        return slope > order - SLACK and self.vanishes

    def __str__(self) -> str:
        if not self.slopes:
            return f"exact: {self.errors[-1]:.0e}"
        shown = self.errors[-4:]
        text = f"slope {self.slope:5.2f}   " + " ".join(f"{e:.1e}" for e in shown)
        text += f" at {self.steps[-len(shown)]}..{self.steps[-1]} steps"
        return text if self.vanishes else f"{text}, tending to {self.limit:.1e}"


def refined(
    error: Callable[[int], Tensor],
    order: float,
    *,
    first: int = FIRST,
    enough: int = ENOUGH,
    most: int = MOST,
) -> Measured:
    """Double the number of steps until the slope has settled.

    Args:
        error: signed errors with so many steps.
        order: declared; slopes below it are given more steps.
        first: steps of the coarsest grid.
        enough: steps at which slopes that are high enough need not settle (the errors of two orders still meet).
        most: steps at which measuring ends in any case.
    """
    steps: list[int] = []
    errors: list[Tensor] = []
    n = first
    while True:
        steps.append(n)
        errors.append(error(n))
        measured = Measured.of(steps, errors, order)
        reached = len(steps) > 2 and min(measured.slopes[-2:], default=math.inf) > order - SLACK
        there = measured.settled and measured.slope < order + SLACK
        if measured.errors[-1] < ROUNDING or (reached and measured.bound < 0.01 and (there or n >= enough)):
            return measured
        if 2 * n > most or not measured.errors[-1] < 1e3 * (1 + measured.errors[0]):
            return measured
        n *= 2


def measured_order(
    solver: Solver[Any],
    problem: DiffusionProblem,
    x: Tensor,
    grid: Grid = uniform,
    *,
    steps: Sequence[int] | None = None,
    most: int = MOST,
    answer: Tensor | None = None,
) -> Measured:
    """Paired error of a deterministic solver against the exact solution.

    Args:
        solver: the method.
        problem: a smooth problem, in float64.
        x: states at t_max, (B, *event), float64.
        grid: (path, n) -> ts.
        steps: numbers of steps, rising; refined until the slope has settled where None.
        most: steps at which refining ends in any case.
        answer: the exact states at t_min where they are known already.
    """
    truth = exact(problem, x) if answer is None else answer

    def error(n: int) -> Tensor:
        return integrate(solver, problem, x, grid(problem.path, n)).x - truth

    if steps is None:
        return refined(error, solver.order, most=most)
    return Measured.of(steps, [error(n) for n in steps], solver.order)


def strong_order(
    solver: Solver[Any],
    problem: DiffusionProblem,
    x: Tensor,
    grid: Grid = uniform,
    *,
    steps: Sequence[int] = (20, 40, 80),
    seed: int = 0,
    noise: Callable[[Tensor, int], Noise] = lambda x, seed: BrownianMotion(x, seed),
) -> Measured:
    """Paired distance of neighbouring grids, N against 2N steps, on the same Brownian path.

    For an error of C N^-p it is (1 - 2^-p) C N^-p: the same slope, without a grid so fine that it could pass for exact.
    """

    def run(n: int) -> Tensor:
        return integrate(solver, problem, x, grid(problem.path, n), noise=noise(x, seed)).x

    runs = {n: run(n) for n in {*steps, *(2 * n for n in steps)}}
    return Measured(tuple(steps), tuple(rms(runs[n] - runs[2 * n]) for n in steps))


def tolerance_proportional(
    solver: Solver[Any],
    problem: DiffusionProblem,
    x: Tensor,
    *,
    tols: Sequence[float] = (1e-2, 1e-4, 1e-6),
    answer: Tensor | None = None,
) -> dict[float, float]:
    """Error of a method with its own step control at each tolerance, {tol: root-mean-square error}."""
    answer = exact(problem, x) if answer is None else answer
    ts = torch.tensor([problem.t_max, problem.t_min], dtype=torch.float64)
    return {tol: rms(integrate(solver.with_tolerance(tol), problem, x, ts).x - answer) for tol in tols}
