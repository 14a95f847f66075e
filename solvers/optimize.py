"""The grid for this problem, this solver and this budget, found by measuring.

Where the nodes of n steps lie is n - 1 numbers, and how well they lie is one: how far the states at the end are from
those of the problem's own fine solution, from the same noises. With d_b the root mean square distance of sample b over
its coordinates,

    minimise mean_b d_b(theta)^p,    d_b^2 = mean |x_N(theta) - x*|^2,    lam_(i+1) - lam_i ~ softmax(theta)_i.

p = 1 is the mean distance, what the theory of pathwise (strong) convergence bounds, and p = 2 the root mean square. The
two part where the data have modes: a few noises start near the border between two of them, and at few calls they end in
the other one, which is a distance of order one whatever the others do. In the root mean square these few are all there
is, and which of them switch is all that a fit learns; in the mean they count for what they are. How the minimum is
found is told in :mod:`solvers.grid_search`.

Three sets of noises keep it honest. The grid is fitted to the first half of ``x``; of everything seen on the way, and
of all the presets, the best on the next quarter is returned, so it is never worse than a preset *there*; what is
reported was measured on the last quarter, which had no say in anything, and the gain is over the preset that is best on
*it*, with the interval that the choice of these noises leaves open.

Reference: Sabour et al. 2024, arXiv:2404.14507; Xue et al. 2024, arXiv:2402.17376; Watson et al. 2021,
arXiv:2106.03802 (grids against a fine solution, by gradients and by dynamic programming).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from solvers.grid_search import Part, Search
from solvers.grids import GRIDS, Grid, through
from solvers.integrate import Solver, integrate
from solvers.names import find, resolve
from solvers.noise import BrownianMotion
from solvers.problem import DiffusionProblem, Path
from solvers.solve import steps_within

__all__ = ["MEASURES", "PRESETS", "OptimizedGrid", "distances", "gain_interval", "optimize_grid"]

PRESETS = ("uniform", "quadratic", "logsnr", "karras", "flow", "sqrt_flow", "vp_quadratic", "beta")
"""Names in ``GRIDS`` that an optimised grid has to beat."""

MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda d: d.mean(-1),
    "rms": lambda d: d.square().mean(-1).sqrt(),
    "median": lambda d: d.median(-1).values,
}
"""What one number is made of the samples' distances (..., B)."""

POWERS = {"mean": 1.0, "rms": 2.0}  # those that a grid can be fitted to
FEW = 5  # steps, up to which the search goes on without derivatives
VALLEYS = 5  # times as many scanned grids are followed then, on few noises, as are fitted on all
SCANNED = 32  # noises at least that the scan and the first descent see, or one in eight


def distances(x: Tensor, target: Tensor) -> Tensor:
    """Root mean square over the coordinates of each sample, (B,) float64 on the CPU."""
    return (x - target).double().flatten(1).square().mean(1).sqrt().cpu()


def gain_interval(
    ours: Tensor, theirs: Tensor, measure: str = "mean", *, level: float = 0.9, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Interval of the ratio of two errors over what other noises might have been (bootstrap, both on the same noises).

    It knows of rare samples that end in another mode only if there are some among these: of 1000 noises, not of 20.

    Args:
        ours: distances, (B,).
        theirs: distances from the same noises, (B,).
        measure: "mean", "rms" or "median".
        level: share of the draws that the interval holds.
        draws: of B samples with repetition.
        seed: of the draws.

    Returns:
        Lower and upper end of the ratio theirs over ours.

    Reference: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 13.3 (percentiles).
    """
    generator, value = torch.Generator().manual_seed(seed), find(measure, MEASURES, "measure")
    ratios: list[Tensor] = []
    for _ in range(draws):
        rows = torch.randint(len(ours), (len(ours),), generator=generator)
        ratios.append(value(theirs[rows]) / value(ours[rows]))
    low, high = torch.stack(ratios).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
    return float(low), float(high)


@dataclass(frozen=True)
class OptimizedGrid:
    """A grid, and how good it is on noises that had no part in finding it.

    It is itself a grid for ``solve(..., grid=found)``: with its own number of steps the nodes found, and with another
    one those in between (:func:`solvers.grids.through`).

    Attributes:
        ts: the nodes, float64 (N + 1,).
        levels: their noise levels sigma / alpha, (N + 1,).
        solver: for which it was found.
        measure: of the error that was fitted, "mean" or "rms".
        origin: name of the preset it was fitted from, or "mixture" for one of several; ``fitted`` is False where the
            preset itself was best.
        fitted: whether anything better than the presets was found.
        distances: held-out root mean square distance of each sample from the fine solution, (B,), in units of the
            state.
        preset_distances: the same on every preset.
        solves: how many times a batch was solved.
    """

    ts: Tensor
    levels: Tensor
    solver: Solver[Any]
    measure: str
    origin: str
    fitted: bool
    distances: Tensor
    preset_distances: Mapping[str, Tensor]
    solves: int

    @property
    def steps(self) -> int:
        return len(self.ts) - 1

    @property
    def error(self) -> float:
        """Held-out error in the measure that was fitted."""
        return float(MEASURES[self.measure](self.distances))

    @property
    def presets(self) -> dict[str, float]:
        """Held-out error of every preset in the measure that was fitted."""
        return {name: float(MEASURES[self.measure](d)) for name, d in self.preset_distances.items()}

    @property
    def gain(self) -> float:
        """Error of the preset that is best on the held-out noises over ours; above 1 is better."""
        return self.gain_in(self.measure)

    def gain_in(self, measure: str) -> float:
        """The gain in another measure, over the preset that is best in that one: "mean", "rms" or "median"."""
        value = find(measure, MEASURES, "measure")
        return float(min(value(d) for d in self.preset_distances.values()) / value(self.distances))

    @property
    def interval(self) -> tuple[float, float]:
        """90 % of what the gain would be on other held-out noises; see :func:`gain_interval`."""
        best = min(self.presets, key=self.presets.__getitem__)
        return gain_interval(self.distances, self.preset_distances[best], self.measure)

    def __call__(self, path: Path, n: int) -> Tensor:
        return through(self.levels)(path, n)

    def __str__(self) -> str:
        best = min(self.presets, key=self.presets.__getitem__)
        low, high = self.interval
        others = ", ".join(f"{name} {self.gain_in(name):.2f}" for name in MEASURES if name != self.measure)
        return (
            f"{self.solver!r}, {self.steps} steps: held-out {self.measure} error {self.error:.3g} against "
            f"{self.presets[best]:.3g} of {best}, gain {self.gain:.2f} ({low:.2f} to {high:.2f}; {others}), "
            f"fitted from {self.origin}"
        )


def optimize_grid(
    problem: DiffusionProblem,
    solver: str | Solver[Any],
    nfe: int,
    *,
    x: Tensor,
    seed: int = 0,
    target: Tensor | None = None,
    fine: int = 200,
    measure: Literal["mean", "rms"] = "mean",
    presets: Sequence[str] | Mapping[str, Grid] = PRESETS,
    candidates: int = 100,
    starts: int = 2,
    iterations: int = 15,
) -> OptimizedGrid:
    """Find the grid on which a solver is most accurate with a budget, and report the gain over the presets.

    Costs up to ``starts * iterations * (steps + 3)`` solves of half of ``x``, about as many of an eighth of it, and the
    scan. ``print(found)`` says what was gained.

    Args:
        problem: what is solved; ``predict`` may be anything, no gradients are taken.
        solver: a name in ``SOLVERS`` or a :class:`Solver` with fixed steps.
        nfe: budget of calls of ``predict``.
        x: states at ``t_max``, (B, *event), such as those of :func:`solvers.prior`: half to fit, a quarter to choose, a
            quarter to report. The fewer the calls, the more are needed: at five of them, with several modes, 1000.
        seed: of the random candidates, and of the Brownian motion of a stochastic solver, whose error is then that on
            one path (its strong error).
        target: where ``x`` leads, (B, *event), if it is known; otherwise it is computed in ``fine`` steps, by the
            solver itself if it is stochastic and by exponential Adams of order 4 if not.
        fine: steps of that fine solution.
        measure: what is made small, and reported: "mean" of the samples' distances, or their "rms".
        presets: grids to start from and to beat: names in ``GRIDS``, or functions by name.
        candidates: random grids that are scanned besides the presets.
        starts: from how many of all these, the best first, the search begins.
        iterations: of each descent, at most; 0 leaves the presets.

    Returns:
        An :class:`OptimizedGrid`.

    Raises:
        ValueError: too few samples, too small a budget, a solver that controls its own steps, an unknown measure.
    """
    method = resolve(solver)
    steps = steps_within(method, nfe)
    power = find(measure, POWERS, "measure to fit")
    if len(x) < 4:
        raise ValueError(f"to fit, to choose and to report take at least 4 samples, got {len(x)}")
    if target is not None and target.shape != x.shape:
        raise ValueError(f"target has the shape of x, {tuple(x.shape)}, got {tuple(target.shape)}")
    makers = presets if isinstance(presets, Mapping) else {name: find(name, GRIDS, "grid") for name in presets}
    if not makers:
        raise ValueError("give at least one preset, to start from")
    with torch.no_grad():
        search = Search(problem, method, steps, power)
        half, last = len(x) // 2, 3 * len(x) // 4
        if target is None:
            target = _fine(problem, method, x, _brownian(method, x, seed, 0, len(x)), fine)
        few, fit, choose, report = (
            Part(x[a:b], target[a:b], _brownian(method, x, seed, a, b))
            for a, b in [(0, min(half, max(SCANNED, half // 8))), (0, half), (half, last), (last, len(x))]
        )

        grids = {name: make(problem.path, steps) for name, make in makers.items()}
        found = list(grids.items())
        if steps > 1 and iterations > 0:
            begun = search.scan(grids, candidates, few, seed)
            if steps <= FEW:
                begun = search.valleys(begun[: VALLEYS * starts], few)
            for _, origin, ts in begun[:starts]:
                seen: list[Tensor] = []
                if steps > FEW:
                    ts = search.descend(ts, few, iterations, seen.append)
                ts = search.descend(ts, fit, iterations, seen.append)
                if steps <= FEW:
                    seen.append(search.simplex(ts, fit))
                found += [(origin, ts) for ts in seen]
        scores = [search.cost(search.residual(ts, choose)) for _, ts in found]
        index = min(range(len(found)), key=scores.__getitem__)
        origin, best = found[index]

        rest = {name: search.residual(ts, report) for name, ts in grids.items()}
        ours = search.residual(best, report)
    return OptimizedGrid(
        ts=best,
        levels=(-problem.path.logsnr(best) / 2).exp(),
        solver=method,
        measure=measure,
        origin=origin,
        fitted=index >= len(grids),
        distances=ours.square().mean(1).sqrt(),
        preset_distances={name: e.square().mean(1).sqrt() for name, e in rest.items()},
        solves=search.solves,
    )


def _brownian(solver: Solver[Any], x: Tensor, seed: int, a: int, b: int) -> BrownianMotion | None:
    """That of samples a to b, if the solver draws noise."""
    return BrownianMotion(x[a:b], seed, samples=range(a, b)) if solver.stochastic else None


def _fine(
    problem: DiffusionProblem, solver: Solver[Any], x: Tensor, noise: BrownianMotion | None, steps: int
) -> Tensor:
    method = solver if solver.stochastic else resolve("exp_adams_4")
    return integrate(method, problem, x, GRIDS["logsnr"](problem.path, steps), noise=noise).x
