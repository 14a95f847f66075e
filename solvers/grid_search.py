"""The search for a grid: a scan, a descent, and a simplex, each where the others are blind.

The n steps of a grid are n - 1 free numbers, kept as the logarithms theta of the steps' shares of the range of lam,

    lam_(i+1) - lam_i = (lam_N - lam_0) softmax(theta)_i,

so that whatever is tried is a grid. What is made small is mean_b d_b^p over noises b, with d_b the root mean square of
the residuals e = x_N(theta) - x* over the coordinates of a sample.

*A scan.* The landscape has many valleys: random mixtures of the presets, shaken, are tried on few noises.

*Descent.* With the Jacobian J of the residuals and weights W = d^(p - 2), the method of Levenberg and Marquardt,

    (J'WJ + mu diag J'WJ) delta = -J'We,

keeps what improves and shrinks mu, otherwise grows it. J comes from differences, n solves at n budgets: nothing has to
be differentiable, the predictor may be any black box, and ten iterations are enough.

*A simplex.* J follows each sample and does not see those that are about to end in another mode. With few steps their
number is what matters, so there the search goes on without derivatives, by the method of Nelder and Mead, and from many
of the scanned grids: the best ones often lead to one place, and the best place is another.

Reference: Levenberg 1944; Marquardt 1963, doi:10.1137/0111030; Nelder and Mead 1965, doi:10.1093/comjnl/7.4.308.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from solvers.integrate import Solver, integrate
from solvers.noise import BrownianMotion
from solvers.problem import DiffusionProblem

__all__ = ["Part", "Scored", "Search"]

DIFFERENCE = 1e-3  # of theta, that is in the logarithm of a step: small against 1, large against rounding in float32
SAME = 0.1  # in lam: grids whose nodes are all closer than this lie in one valley
FARTHEST = 1.0  # that a step of theta may go: a factor of e in the length of one step


class Part(NamedTuple):
    """Noises, where they lead, and the Brownian motion that goes with them."""

    x: Tensor
    target: Tensor
    noise: BrownianMotion | None


class Scored(NamedTuple):
    """A grid, where it comes from, and what it costs."""

    cost: float
    origin: str
    ts: Tensor


def _cost(scored: Scored) -> float:
    return scored.cost


class Search:
    """Solves on any grid and says how far off the end is."""

    def __init__(self, problem: DiffusionProblem, solver: Solver[Any], steps: int, power: float) -> None:
        self.problem, self.solver, self.steps, self.power, self.solves = problem, solver, steps, power, 0
        path = problem.path
        ends = path.logsnr(torch.tensor([path.t_max, path.t_min], dtype=torch.float64)) / 2
        self.first, self.span = ends[0], ends[1] - ends[0]

    def theta(self, ts: Tensor) -> Tensor:
        """The logarithms of the shares of the steps."""
        return (self.problem.path.logsnr(ts).diff() / (2 * self.span)).log()

    def nodes(self, theta: Tensor) -> Tensor:
        path = self.problem.path
        inside = path.time(2 * (self.first + self.span * theta.softmax(0).cumsum(0)[:-1]))
        ends = torch.tensor([path.t_max, path.t_min], dtype=torch.float64)
        return torch.cat([ends[:1], inside, ends[1:]])

    def residual(self, ts: Tensor, part: Part) -> Tensor:
        """x_N - x*, (B, D) float64; infinite where the grid is none or leads nowhere."""
        self.solves += 1
        try:
            x = integrate(self.solver, self.problem, part.x, ts, noise=part.noise).x
        except (ValueError, FloatingPointError):
            return torch.full((len(part.x), 1), math.inf, dtype=torch.float64)
        return (x - part.target).double().flatten(1).cpu()

    def cost(self, e: Tensor) -> float:
        """Mean over samples of d^p; very large where a sample went nowhere."""
        cost = float(e.square().mean(1).pow(self.power / 2).mean())
        return cost if math.isfinite(cost) else 1e300

    def scan(self, grids: Mapping[str, Tensor], count: int, part: Part, seed: int) -> list[Scored]:
        """The presets and random mixtures of two of them, shaken; the best first."""
        draw = torch.Generator().manual_seed(seed)
        known = torch.stack([self.theta(ts) for ts in grids.values()])
        found = [Scored(self.cost(self.residual(ts, part)), name, ts) for name, ts in grids.items()]
        for _ in range(count):
            a, b = known[torch.randint(len(known), (2,), generator=draw)]
            share, strength = torch.rand(2, generator=draw, dtype=torch.float64)
            shaken = torch.randn(self.steps, generator=draw, dtype=torch.float64) * strength * 2 / self.steps**0.5
            ts = self.nodes(torch.lerp(a, b, share) + shaken)
            found.append(Scored(self.cost(self.residual(ts, part)), "mixture", ts))
        return sorted(found, key=_cost)

    def valleys(self, scanned: Sequence[Scored], part: Part) -> list[Scored]:
        """Where simplices from the grids of a scan arrive, each place once; the best first."""
        ends = [(origin, self.simplex(ts, part)) for _, origin, ts in scanned]
        found: list[Scored] = []
        for end in sorted((Scored(self.cost(self.residual(ts, part)), origin, ts) for origin, ts in ends), key=_cost):
            lam = self.problem.path.logsnr(end.ts) / 2
            if all(float((self.problem.path.logsnr(one.ts) / 2 - lam).abs().max()) > SAME for one in found):
                found.append(end)
        return found

    def descend(self, ts: Tensor, part: Part, iterations: int, accepted: Callable[[Tensor], None]) -> Tensor:
        """Levenberg-Marquardt from one grid, to the end or ``iterations``; tells ``accepted`` every better one."""
        theta, mu = self.theta(ts), 0.1
        e = self.residual(ts, part)
        for _ in range(iterations):
            nudged = theta + DIFFERENCE * torch.eye(len(theta), dtype=torch.float64)
            jacobian = torch.stack([(self.residual(self.nodes(one), part) - e) / DIFFERENCE for one in nudged], -1)
            if not bool(jacobian.isfinite().all()):
                break
            each = e.square().mean(1)
            weights = (each + 1e-6 * each.mean()).pow(self.power / 2 - 1)[:, None]
            scaled = (weights.sqrt()[..., None] * jacobian).flatten(0, 1)
            normal, slope = scaled.T @ scaled, scaled.T @ (weights.sqrt() * e).flatten()
            before = self.cost(e)
            while mu < 1e6:
                # Shares do not change when all of theta moves, so J'WJ is singular: hence the second term of the ridge.
                ridge = mu * (normal.diag() + 1e-3 * normal.diag().mean())
                delta = cast("Any", torch.linalg).solve(normal + ridge.diag(), -slope)
                delta = delta * min(1.0, FARTHEST / max(float(delta.abs().max()), 1e-300))
                tried = self.residual(self.nodes(theta + delta), part)
                if self.cost(tried) < before:
                    break
                mu *= 4
            else:
                break
            theta, e, mu = theta + delta, tried, mu / 4
            accepted(self.nodes(theta))
            if self.cost(e) > (1 - 2e-3) * before:
                break
        return self.nodes(theta)

    def simplex(self, ts: Tensor, part: Part) -> Tensor:
        """Nelder-Mead from one grid."""
        theta = self.theta(ts).numpy()
        free = theta[:-1] - theta[-1]  # shares do not change when all of theta moves

        def cost(free: np.ndarray[Any, Any]) -> float:
            return self.cost(self.residual(self.nodes(torch.tensor([*free, 0.0], dtype=torch.float64)), part))

        around = np.vstack([free, free + 0.2 * np.eye(len(free))])
        options = {"maxfev": 40 * len(free), "initial_simplex": around, "xatol": 1e-3, "fatol": 0.0}
        found = cast("Any", optimize).minimize(cost, free, method="Nelder-Mead", options=options)
        return self.nodes(torch.tensor([*found.x, 0.0], dtype=torch.float64))
