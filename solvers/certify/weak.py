"""Weak order and the amount of noise, exactly: linear algebra in place of Monte Carlo.

On data N(m, v) a step is affine in the state and in the noises, so the law of the result is Gaussian and three numbers
say all: push a zero, a unit start and a unit impulse in every increment of the Brownian motion through the solver, as
one batch, and read off

    mean = offset + gain m_T,        variance = gain^2 v_T + SUM_jk r_j r_k cov(j, k),

with r the responses to the impulses and cov the covariance of the increments, which is not the identity where intervals
that a solver asked for overlap.

:func:`weak_order` looks at the errors of both on ever finer grids. :func:`noise_scale` asks a sharper question, about a
handful of steps alone: a drift that contracts by ``gain`` needs noise of variance v_s - gain^2 v_t, or the marginal
law would not be kept, and in the limit of short steps a consistent method has exactly that. The ratio of what it needs
to what it has is 1 + O(h), extrapolates to six digits, and knows neither the method's eta nor its order: one per cent
too much noise is a ratio of 1 / 1.0201, whatever the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.certify.convergence import MOST, Measured, refined, rms
from solvers.certify.problems import MEANS, STDS, gaussian
from solvers.grids import Grid, uniform
from solvers.integrate import Solver, integrate
from solvers.problem import Path

__all__ = ["Law", "NoiseScale", "law", "noise_scale", "weak_order"]


class _Full(Exception):
    """More increments were asked for than there are impulses."""


class _Impulses:
    """Unit impulses in place of noise: row 2 + k of the batch sees the k-th increment that was asked for as 1."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.asked: dict[tuple[float, float], int] = {}

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        start, end = round(float(a), 9), round(float(b), 9)  # one node through two clocks differs in its last digits
        row = self.asked.setdefault((min(start, end), max(start, end)), len(self.asked))
        if row >= self.rows:
            raise _Full
        impulse = torch.zeros(2 + self.rows, len(MEANS), dtype=torch.float64)
        impulse[2 + row] = 1.0 if start < end else -1.0
        return impulse

    def variance(self, responses: Tensor) -> Tensor:
        """Of SUM_j r_j w_j, with the responses r (n, 3) to the normalised increments w.

        It is INT F(u)^2 du with F(u) the sum of r_j / sqrt(length_j) over the intervals j that hold u.
        """
        if not self.asked:
            return torch.zeros(len(MEANS), dtype=torch.float64)
        intervals = torch.tensor(list(self.asked), dtype=torch.float64)
        cuts = torch.tensor(sorted({end for interval in self.asked for end in interval}), dtype=torch.float64)
        density = responses / intervals.diff(dim=1).sqrt()
        jumps = torch.zeros(len(cuts), len(MEANS), dtype=torch.float64)
        jumps.index_add_(0, torch.searchsorted(cuts, intervals[:, 0].contiguous()), density)
        jumps.index_add_(0, torch.searchsorted(cuts, intervals[:, 1].contiguous()), -density)
        return (cuts.diff().unsqueeze(1) * jumps.cumsum(0)[:-1].square()).sum(0)


class Law(NamedTuple):
    """How a solve maps Gaussian data: x_s = offset + gain x_t + N(0, noise), each coordinate on its own.

    Attributes:
        offset: (3,).
        gain: (3,).
        noise: variance of what the increments add, (3,).
        draws: how many increments were asked for.
    """

    offset: Tensor
    gain: Tensor
    noise: Tensor
    draws: int


def law(solver: Solver[Any], path: Path, ts: Tensor, *, draws: int = 16) -> Law:
    """The law of a solve on data N(MEANS, STDS^2), exactly.

    Args:
        solver: a method that is linear, with fixed steps.
        path: the Gaussian path.
        ts: the grid.
        draws: how many increments to expect; it is found out if they are more.
    """
    problem = gaussian(path, MEANS, STDS)
    while True:
        impulses = _Impulses(draws)
        start = torch.zeros(2 + draws, len(MEANS), dtype=torch.float64)
        start[1] = 1.0
        try:
            out = integrate(solver, problem, start, ts, noise=impulses).x
            break
        except _Full:
            draws *= 3
    found = len(impulses.asked)
    return Law(out[0], out[1] - out[0], impulses.variance(out[2 : 2 + found] - out[0]), found)


def _marginals(path: Path, ts: Tensor) -> tuple[Tensor, Tensor]:
    """Exact means and variances at both ends of a grid, (2, 3) each."""
    ends = ts[[0, -1]]
    alpha, sigma = path.alpha(ends).unsqueeze(1), path.sigma(ends).unsqueeze(1)
    return alpha * MEANS, (alpha * STDS) ** 2 + sigma**2


def weak_order(
    solver: Solver[Any],
    path: Path,
    grid: Grid = uniform,
    *,
    steps: Sequence[int] | None = None,
    most: int = MOST,
) -> tuple[Measured, Measured]:
    """Exact errors of the result's mean (in standard deviations) and variance (relative) on Gaussian data.

    Args:
        solver: any linear method with fixed steps, stochastic or not.
        path: the Gaussian path.
        grid: (path, n) -> ts.
        steps: numbers of steps, rising; refined until the slopes have settled where None.
        most: steps at which refining ends in any case.

    Returns:
        The errors of the mean and of the variance.
    """
    seen: dict[int, Tensor] = {}
    draws = 1.0  # in a step

    def errors(n: int) -> Tensor:
        nonlocal draws
        if n not in seen:
            ts = grid(path, n)
            found = law(solver, path, ts, draws=8 + int(draws * n))
            draws = found.draws / n
            means, variances = _marginals(path, ts)
            mean, variance = found.offset + found.gain * means[0], found.gain**2 * variances[0] + found.noise
            seen[n] = torch.stack([(mean - means[-1]) / variances[-1].sqrt(), variance / variances[-1] - 1])
        return seen[n]

    def measured(which: int) -> Measured:
        if steps is None:
            return refined(lambda n: errors(n)[which], solver.order, most=most)
        return Measured.of(steps, [errors(n)[which] for n in steps], solver.order)

    return measured(0), measured(1)


class NoiseScale(NamedTuple):
    """How much noise a method adds, over what its own drift needs, in the limit of short steps.

    Attributes:
        lam: logsnr / 2 where it was looked at.
        scale: ratio of standard deviations; 1 keeps the marginal law, infinite where the drift needs no noise at all.
        bound: how far it may be wrong.
    """

    lam: float
    scale: float
    bound: float

    @property
    def right(self) -> bool:
        return abs(self.scale - 1) <= max(2 * self.bound, 1e-4)

    def __str__(self) -> str:
        excess = 100 * (self.scale - 1)
        much = "right" if self.right else f"{abs(excess):.2g} % too {'much' if excess > 0 else 'little'}"
        return f"{self.scale:.5f} +- {self.bound:.0e} at logsnr {2 * self.lam:.1f}: {much}"


PATTERN = torch.tensor([0.0, 1.0, 1.7, 2.9, 3.5], dtype=torch.float64)  # four uneven steps


def noise_scale(solver: Solver[Any], path: Path) -> list[NoiseScale]:
    """The noise of four short steps over what they need, extrapolated to steps of no length.

    Where the noise is not proportional to the step (restarts, churn with few steps) the question has no answer, and
    where there is none (a window of noise) it is not asked.

    Args:
        solver: any linear method with fixed steps.
        path: the Gaussian path; three places on it are looked at.
    """
    ends = path.logsnr(torch.tensor([path.t_max, path.t_min], dtype=torch.float64)) / 2

    def share(lam: Tensor, h: float) -> tuple[Tensor, Tensor]:
        """(noise that is needed / noise that is there, noise that is there / h)."""
        ts = path.time(2 * (lam + h * PATTERN))
        found = law(solver, path, ts)
        _, variances = _marginals(path, ts)
        return (variances[1] - found.gain**2 * variances[0]) / found.noise, found.noise / h

    scales: list[NoiseScale] = []
    try:
        law(solver, path, path.time(2 * (ends.mean() + PATTERN / 32)))
    except ValueError:  # it has no short solves: a restart needs its interval on the way
        return []
    for lam in torch.lerp(ends[0], ends[1], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).unbind():
        shares: list[Tensor] = []
        sizes: list[Tensor] = []
        for k in range(5, 12):
            part, size = share(lam, 2.0**-k)
            shares.append(part)
            sizes.append(size)
            if float(size.min()) <= 1e-12 or not bool(part.isfinite().all()):
                break
            if len(shares) < 3:
                continue
            if rms(sizes[-1] / sizes[-2] - 1) > 0.1:  # not proportional to the step
                break
            first = [2 * fine - coarse for coarse, fine in pairwise(shares[-3:])]
            second = (4 * first[1] - first[0]) / 3
            bound = (second - first[1]).abs()
            if float(bound.max()) < 1e-4 or k == 11:
                worst = int(((second - 1).abs() - bound).argmax())
                needed = float(second[worst])
                scale = needed**-0.5 if needed > 1e-3 else math.inf
                scales.append(NoiseScale(float(lam), scale, float(bound[worst]) / 2))
                break
    return scales
