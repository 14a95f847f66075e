"""The grid for this problem, this solver and this budget, found by measuring.

Where the nodes of n steps lie is n - 1 numbers, and how well they lie is one: the distance of the states at the end
from those of the problem's own fine solution, from the same noises. A least-squares problem, and a small one,

    minimise |e(theta)|^2,    e = x_N(theta) - x*,    lam_(i+1) - lam_i = (lam_N - lam_0) softmax(theta)_i,

so the method for it is that of Levenberg and Marquardt: with the Jacobian J of e, step by

    (J'J + mu diag J'J) delta = -J'e,

keep what improves and shrink mu, otherwise grow it. J comes from differences, n solves at n budgets: nothing has to be
differentiable, the predictor may be any black box, no activations are kept, and ten iterations are enough, where a
descent along gradients takes hundreds.

Three sets of noises keep it honest. The grid is fitted to the first half of ``x``; of everything seen on the way, and
of all the presets, the best on the next quarter is returned, so it is never worse than a preset *there*; what is
reported was measured on the last quarter, which had no say in anything, and the gain is over the preset that is best on
*it*.

Reference: Levenberg 1944; Marquardt 1963, doi:10.1137/0111030. Grids against a fine solution: Sabour et al. 2024,
arXiv:2404.14507; Xue et al. 2024, arXiv:2402.17376; Watson et al. 2021, arXiv:2106.03802.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from solvers.grids import GRIDS, Grid, through
from solvers.integrate import Solver, integrate
from solvers.names import find, resolve
from solvers.noise import BrownianMotion
from solvers.problem import DiffusionProblem, Path
from solvers.solve import steps_within

__all__ = ["PRESETS", "OptimizedGrid", "optimize_grid"]

PRESETS = ("uniform", "quadratic", "logsnr", "karras", "flow", "sqrt_flow", "vp_quadratic", "beta")
"""Names in ``GRIDS`` that an optimised grid has to beat."""

DIFFERENCE = 1e-3  # of theta, that is in the logarithm of a step: small against 1, large against rounding in float32
FARTHEST = 1.0  # that a step of theta may go: a factor of e in the length of one step


@dataclass(frozen=True)
class OptimizedGrid:
    """A grid, and how good it is on noises that had no part in finding it.

    It is itself a grid for ``solve(..., grid=found)``: with its own number of steps the nodes found, and with another
    one those in between (:func:`solvers.grids.through`).

    Attributes:
        ts: the nodes, float64 (N + 1,).
        levels: their noise levels sigma / alpha, (N + 1,).
        solver: for which it was found.
        origin: name of the preset it was fitted from; ``fitted`` is False where the preset itself was best.
        fitted: whether anything better than the presets was found.
        error: held-out root mean square distance from the fine solution, in units of the state.
        median: median over held-out samples of each sample's root mean square distance.
        presets: held-out root mean square distance of every preset.
        preset_medians: the same of medians.
        solves: how many times a batch was solved.
    """

    ts: Tensor
    levels: Tensor
    solver: Solver[Any]
    origin: str
    fitted: bool
    error: float
    median: float
    presets: Mapping[str, float]
    preset_medians: Mapping[str, float]
    solves: int

    @property
    def steps(self) -> int:
        return len(self.ts) - 1

    @property
    def gain(self) -> float:
        """Error of the preset that is best on the held-out noises over ours; above 1 is better."""
        return min(self.presets.values()) / self.error

    @property
    def median_gain(self) -> float:
        """The gain in medians, which the few samples that end in another mode do not rule."""
        return min(self.preset_medians.values()) / self.median

    def __call__(self, path: Path, n: int) -> Tensor:
        return through(self.levels)(path, n)

    def __str__(self) -> str:
        best = min(self.presets, key=self.presets.__getitem__)
        return (
            f"{self.solver}, {self.steps} steps: held-out error {self.error:.3g} against {self.presets[best]:.3g} of "
            f"{best}, gain {self.gain:.2f} (in medians {self.median_gain:.2f}), fitted from {self.origin}"
        )


class _Part(NamedTuple):
    """Noises, where they lead, and the Brownian motion that goes with them."""

    x: Tensor
    target: Tensor
    noise: BrownianMotion | None


class _Bench:
    """Solves on any grid and says how far off the end is."""

    def __init__(self, problem: DiffusionProblem, solver: Solver[Any], steps: int) -> None:
        self.problem, self.solver, self.steps, self.solves = problem, solver, steps, 0
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

    def residual(self, ts: Tensor, part: _Part) -> Tensor:
        """x_N - x*, (B, D) float64; infinite where the grid is none or leads nowhere."""
        self.solves += 1
        try:
            x = integrate(self.solver, self.problem, part.x, ts, noise=part.noise).x
        except (ValueError, FloatingPointError):
            return torch.full((len(part.x), 1), math.inf, dtype=torch.float64)
        return (x - part.target).double().flatten(1).cpu()

    def error(self, ts: Tensor, part: _Part) -> float:
        return _rms(self.residual(ts, part))

    def descend(
        self, ts: Tensor, part: _Part, iterations: int, robust: bool, accepted: Callable[[Tensor], None]
    ) -> None:
        """Levenberg-Marquardt from one grid; every improvement is handed to ``accepted``.

        Args:
            ts: where to begin.
            part: noises to fit to.
            iterations: at most.
            robust: count a sample's squared distance e^2 as m^2 log(1 + e^2 / m^2), with m their median at the start of
                the iteration, so that the few samples that end in another mode do not decide where the nodes lie.
            accepted: told every better grid.
        """
        theta, mu = self.theta(ts), 0.1
        e = self.residual(ts, part)
        for _ in range(iterations):
            nudged = theta + DIFFERENCE * torch.eye(len(theta), dtype=torch.float64)
            jacobian = torch.stack([(self.residual(self.nodes(one), part) - e) / DIFFERENCE for one in nudged], -1)
            if not bool(jacobian.isfinite().all()):
                return
            middle = _each(e).median() if robust else torch.tensor(math.inf)
            weights = (1 / (1 + _each(e) / middle))[:, None]
            scaled = (weights.sqrt()[..., None] * jacobian).flatten(0, 1)
            normal, slope = scaled.T @ scaled, scaled.T @ (weights.sqrt() * e).flatten()
            before = _cost(e, middle)
            while mu < 1e6:
                # Shares do not change when all of theta moves, so J'J is singular: hence the second term of the ridge.
                ridge = mu * (normal.diag() + 1e-3 * normal.diag().mean())
                delta = cast("Any", torch.linalg).solve(normal + ridge.diag(), -slope)
                delta = delta * min(1.0, FARTHEST / max(float(delta.abs().max()), 1e-300))
                tried = self.residual(self.nodes(theta + delta), part)
                if _cost(tried, middle) < before:
                    break
                mu *= 4
            else:
                return
            theta, e, mu = theta + delta, tried, mu / 4
            accepted(self.nodes(theta))
            if _cost(e, middle) > (1 - 2e-3) * before:
                return


def _each(e: Tensor) -> Tensor:
    """Mean square of each sample, (B,)."""
    return e.square().mean(1)


def _cost(e: Tensor, middle: Tensor) -> float:
    """Mean over samples of m^2 log(1 + e^2 / m^2), which is that of e^2 for infinite m."""
    each = _each(e)
    return float((each if middle.isinf() else middle * (each / middle).log1p()).mean())


def _rms(e: Tensor) -> float:
    return float(e.square().mean().sqrt())


def _median(e: Tensor) -> float:
    return float(e.square().mean(1).sqrt().median())


def optimize_grid(
    problem: DiffusionProblem,
    solver: str | Solver[Any],
    nfe: int,
    *,
    x: Tensor,
    seed: int = 0,
    target: Tensor | None = None,
    fine: int = 200,
    presets: Sequence[str] | Mapping[str, Grid] = PRESETS,
    starts: int = 2,
    iterations: int = 15,
) -> OptimizedGrid:
    """Find the grid on which a solver is most accurate with a budget, and report the gain over the presets.

    Costs up to ``2 * starts * iterations * (steps + 3)`` solves of half of ``x``.

    Args:
        problem: what is solved; ``predict`` may be anything, no gradients are taken.
        solver: a name in ``SOLVERS`` or a :class:`Solver` with fixed steps.
        nfe: budget of calls of ``predict``.
        x: states at ``t_max``, (B, *event), such as those of :func:`solvers.prior`: half to fit, a quarter to choose, a
            quarter to report. The more coordinates the state has, the fewer are needed.
        seed: of the Brownian motion of a stochastic solver, whose error is then that on one path (its strong error).
        target: where ``x`` leads, (B, *event), if it is known; otherwise it is computed in ``fine`` steps, by the
            solver itself if it is stochastic and by exponential Adams of order 4 if not.
        fine: steps of that fine solution.
        presets: grids to start from and to beat: names in ``GRIDS``, or functions by name.
        starts: from how many of them, the best first, the search begins.
        iterations: of each search, at most.

    Returns:
        An :class:`OptimizedGrid`.

    Raises:
        ValueError: too few samples, too small a budget, a solver that controls its own steps.
    """
    method = resolve(solver)
    steps = steps_within(method, nfe)
    if len(x) < 4:
        raise ValueError(f"to fit, to choose and to report take at least 4 samples, got {len(x)}")
    if target is not None and target.shape != x.shape:
        raise ValueError(f"target has the shape of x, {tuple(x.shape)}, got {tuple(target.shape)}")
    makers = presets if isinstance(presets, Mapping) else {name: find(name, GRIDS, "grid") for name in presets}
    if not makers:
        raise ValueError("give at least one preset, to start from")
    with torch.no_grad():
        bench = _Bench(problem, method, steps)
        cuts = [0, len(x) // 2, 3 * len(x) // 4, len(x)]
        parts: list[_Part] = []
        for a, b in pairwise(cuts):
            noise = BrownianMotion(x[a:b], seed, samples=range(a, b)) if method.stochastic else None
            end = _fine(problem, method, x[a:b], noise, fine) if target is None else target[a:b]
            parts.append(_Part(x[a:b], end, noise))
        fit, choose, report = parts

        grids = {name: make(problem.path, steps) for name, make in makers.items()}
        scores = {name: bench.error(ts, choose) for name, ts in grids.items()}
        ranked = sorted(scores, key=scores.__getitem__)
        best, origin, fitted = grids[ranked[0]], ranked[0], False
        least = scores[ranked[0]]
        for name in ranked[: starts if steps > 1 else 0]:
            seen: list[Tensor] = []
            for robust in (False, True):
                bench.descend(grids[name], fit, iterations, robust, seen.append)
            for ts in seen:
                score = bench.error(ts, choose)
                if score < least:
                    best, origin, fitted, least = ts, name, True, score

        rest = {name: bench.residual(ts, report) for name, ts in grids.items()}
        ours = bench.residual(best, report)
    return OptimizedGrid(
        ts=best,
        levels=(-problem.path.logsnr(best) / 2).exp(),
        solver=method,
        origin=origin,
        fitted=fitted,
        error=_rms(ours),
        median=_median(ours),
        presets={name: _rms(e) for name, e in rest.items()},
        preset_medians={name: _median(e) for name, e in rest.items()},
        solves=bench.solves,
    )


def _fine(
    problem: DiffusionProblem, solver: Solver[Any], x: Tensor, noise: BrownianMotion | None, steps: int
) -> Tensor:
    method = solver if solver.stochastic else resolve("exp_adams_4")
    return integrate(method, problem, x, GRIDS["logsnr"](problem.path, steps), noise=noise).x
