"""Noise put back between the steps of an ODE solver: churn, and restarts.

The probability-flow ODE carries the marginals from one noise level to another, and so does adding noise. Any sequence
of the two that ends at the data therefore samples from the right law, whatever is added where: the reverse SDE is the
limit in which both happen in every infinitesimal step. *Churn* goes back a little before every step, *restart* goes
back far, a few times.

Both are exact in law but for the errors of the ODE solver, so their weak order is the solver's, be it 4: no stochastic
integral is approximated. That holds as long as the added noise has unit variance: inflating it (``s_noise`` > 1, to
make up for the detail that networks lose) leaves an error that no number of steps removes.

*Variance after 20 steps*: see :mod:`solvers.ancestral`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from solvers.integrate import Solver
from solvers.noise import Noise, elsewhere
from solvers.problem import DiffusionProblem, Prediction, mix

__all__ = ["Churn", "Restart", "RestartInterval", "inside"]


def _noised(problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, z: Tensor, s_noise: float = 1.0) -> Tensor:
    """A state at t brought up to the noise level of s > t: (alpha_s / alpha_t) x + sigma_s sqrt(1 - e^(-2 |h|)) z."""
    path = problem.path
    fresh = -torch.expm1(path.logsnr(s) - path.logsnr(t))
    return mix((path.alpha(s) / path.alpha(t), x), (s_noise * path.sigma(s) * fresh.sqrt(), z))


def inside(solver: Solver[Any]) -> Iterator[Solver[Any]]:
    """A method and all those that it is made of."""
    yield solver
    for field in fields(cast("Any", solver)) if is_dataclass(solver) else ():
        if isinstance(part := getattr(solver, field.name), Solver):
            yield from inside(cast("Solver[Any]", part))


def _check_deterministic(solver: Solver[Any]) -> None:
    if solver.stochastic:
        raise ValueError(f"{solver} draws noise of its own: churn and restarts are for ODE solvers")


@dataclass(frozen=True)
class Churn(Solver[tuple[int, Any]]):
    """EDM's stochastic sampler, on any ODE solver: raise the noise level by a factor 1 + gamma, then take the step.

    gamma = min(s_churn / N, sqrt(2) - 1) where s_min <= sh_t <= s_max, else 0,        sh = sigma / alpha,
    sh'   = (1 + gamma) sh_t,        x' = (alpha' / alpha_t) x_t + s_noise alpha' sqrt(sh'^2 - sh_t^2) z,
    x_s   = a step of ``solver`` from (x', t') to s.

    ``Churn(OnPath(Heun(), EDM))`` is the paper's. z is the Brownian increment over the step, so that one seed gives one
    sample on ever finer grids. Where t' would lie beyond t_max, noise is added up to t_max only: nothing is known of a
    predictor there.

    Weak order that of ``solver`` with s_noise = 1, evaluations per step those of ``solver``, noise white (none for
    s_churn = 0). With another s_noise there is none (0): the variance of the result stays wrong. A multistep method
    takes differences of predictions between which noise was added, and is of weak order 1. Variance after 20 steps:
    +11 % with EDM's Heun (+4.5 % without churn).

    Args:
        solver: any deterministic solver.
        s_churn: amount of noise, >= 0, over the whole grid. With fewer than 2.4 s_churn steps gamma is at its bound,
            and until then more steps do not mean smaller ones.
        s_min: least sigma / alpha at which noise is added.
        s_max: largest.
        s_noise: factor on the standard deviation of the added noise.

    Reference: Karras et al. 2022, arXiv:2206.00364, algorithm 2.
    """

    solver: Solver[Any]
    s_churn: float = 10.0
    s_min: float = 0.0
    s_max: float = 1e9
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        _check_deterministic(self.solver)
        if not (self.s_churn >= 0 and 0 <= self.s_min <= self.s_max and self.s_noise >= 0):
            raise ValueError(f"churn needs s_churn >= 0, 0 <= s_min <= s_max and s_noise >= 0, got {self}")
        noisy, order = self.s_churn > 0, self.solver.order
        if noisy and any(part.start_order is not None for part in inside(self.solver)):  # it has a memory
            order = min(order, 1)
        self.declare(
            order=0 if noisy and self.s_noise != 1 else order,
            nfe_per_step=self.solver.nfe_per_step,
            start_order=self.solver.start_order,
            invariant=self.solver.invariant,
            stochastic=noisy,
            reference="Karras et al. 2022, arXiv:2206.00364, algorithm 2",
            grid=self.solver.grid,
        )

    def init(self, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> tuple[int, Any]:
        return len(ts) - 1, self.solver.init(problem, x, ts)

    def observe(self, state: tuple[int, Any], lam: Tensor, prediction: Prediction) -> tuple[int, Any]:
        return state[0], self.solver.observe(state[1], lam, prediction)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: tuple[int, Any], noise: Noise
    ) -> tuple[Tensor, tuple[int, Any]]:
        path, (n, inner) = problem.path, state
        gamma = min(self.s_churn / n, 2**0.5 - 1) if self.s_min <= self._level(problem, t) <= self.s_max else 0.0
        if gamma > 0 and float(t) < path.t_max:
            higher = path.time(path.logsnr(t) - 2 * math.log1p(gamma)).clamp(max=path.t_max)
            x = _noised(problem, x, t, higher, noise(path.logsnr(t) / 2, path.logsnr(s) / 2), self.s_noise)
            t = higher
        x, inner = self.solver.step(problem, x, t, s, inner, noise)
        return x, (n, inner)

    @staticmethod
    def _level(problem: DiffusionProblem, t: Tensor) -> float:
        return float((-0.5 * problem.path.logsnr(t)).exp())

    def nfe(self, steps: int) -> int:
        return self.solver.nfe(steps)


@dataclass(frozen=True)
class RestartInterval:
    """Where to restart.

    Args:
        low: sigma / alpha from which to go back up, inside the grid's range.
        high: sigma / alpha to go up to, > low, inside the grid's range.
        repeats: K, how many times, >= 1.
        share: steps of every way back down, as a share of the grid's (the paper's N_restart / N_main), rounded up.
    """

    low: float
    high: float
    repeats: int = 1
    share: float = 0.25

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high and self.repeats >= 1 and self.share > 0):
            raise ValueError(f"a restart needs 0 < low < high, repeats >= 1 and share > 0, got {self}")

    def steps(self, n: int) -> int:
        """Steps of one way back down, when the grid has n."""
        return math.ceil(self.share * n - 1e-9)


class Redo(NamedTuple):
    """A restart on a given grid.

    Attributes:
        lam: logsnr / 2 at which it happens.
        nodes: times of the way down, from ``high`` to ``low``.
        places: one for each repetition, where its noise is taken from (:func:`solvers.noise.elsewhere`).
    """

    lam: float
    nodes: tuple[Tensor, ...]
    places: range


Plan = tuple[Redo, ...]


@dataclass(frozen=True)
class Restart(Solver[tuple[Plan, Any]]):
    """Restart sampling: walk down with an ODE solver, and at a few levels go back up and walk down once more.

    At sh = low, K times:  x' = (alpha' / alpha) x + alpha' sqrt(high^2 - low^2) z,  then down to low again in steps of
    equal sh^(1/7),        sh = sigma / alpha.

    A step of the grid that passes ``low`` is taken in two parts (the paper moves ``low`` to the nearest node), so that
    the interval is the same on every grid and the solver converges, sample by sample, with its full order.

    Weak and strong order those of ``solver``, noise white; for every interval one step more and K times its share of
    steps, at the evaluations of ``solver``. What earlier errors put into a sample shrinks, at every restart, by as much
    as the ODE contracts from high to low: Variance after 20 steps +1.8 % with EDM's Heun (+4.5 % without).

    Args:
        solver: deterministic solver of all ways down.
        intervals: where to restart.

    Reference: Xu et al. 2023, arXiv:2306.14878.
    """

    solver: Solver[Any]
    intervals: tuple[RestartInterval, ...] = (RestartInterval(0.06, 0.3, repeats=4),)

    def __post_init__(self) -> None:
        _check_deterministic(self.solver)
        self.declare(
            order=self.solver.order,
            strong_order=float(self.solver.order),
            nfe_per_step=self.solver.nfe_per_step,
            start_order=self.solver.start_order,
            invariant=self.solver.invariant,
            stochastic=bool(self.intervals),
            reference="Xu et al. 2023, arXiv:2306.14878",
            grid=self.solver.grid,
        )

    def init(self, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> tuple[Plan, Any]:
        path = problem.path
        start, end = map(float, (-0.5 * path.logsnr(ts[[0, -1]])).exp())
        plan: list[Redo] = []
        place = 1
        for interval in sorted(self.intervals, key=lambda interval: -interval.low):
            if not end < interval.low < interval.high <= start:
                raise ValueError(f"{interval} does not lie on the way down from {start:.3g} to {end:.3g}")
            ends = torch.tensor([interval.high, interval.low], dtype=torch.float64) ** (1 / 7)
            steps = torch.linspace(0, 1, interval.steps(len(ts) - 1) + 1, dtype=torch.float64)
            nodes = path.time(-14 * torch.lerp(ends[0], ends[1], steps).log()).unbind()
            plan.append(Redo(-math.log(interval.low), nodes, range(place, place + interval.repeats)))
            place += interval.repeats
        return tuple(plan), self.solver.init(problem, x, ts)

    def observe(self, state: tuple[Plan, Any], lam: Tensor, prediction: Prediction) -> tuple[Plan, Any]:
        return state[0], self.solver.observe(state[1], lam, prediction)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: tuple[Plan, Any], noise: Noise
    ) -> tuple[Tensor, tuple[Plan, Any]]:
        path, (plan, inner) = problem.path, state
        lam_t, lam_s = float(path.logsnr(t)) / 2, float(path.logsnr(s)) / 2
        for redo in plan:
            if not lam_t + 1e-9 < redo.lam < lam_s + 1e-9:
                continue
            high, low = redo.nodes[0], redo.nodes[-1]
            x, inner = self.solver.step(problem, x, t, low, inner, noise)
            for place in redo.places:
                z = elsewhere(noise, place)(path.logsnr(low) / 2, path.logsnr(high) / 2)
                x = _noised(problem, x, low, high, z)
                # What a multistep solver remembers of the way before would not fit the state that is now there.
                again = problem.at(redo.nodes)
                inner = self.solver.init(again, x, torch.stack(redo.nodes))
                for u, v in pairwise(redo.nodes):
                    x, inner = self.solver.step(again, x, u, v, inner, noise)
            t = low
        if abs(float(path.logsnr(t)) / 2 - lam_s) > 1e-9:
            x, inner = self.solver.step(problem, x, t, s, inner, noise)
        return x, (plan, inner)

    def nfe(self, steps: int) -> int:
        """Calls of ``predict``, if no ``low`` is a node of the grid."""
        again = sum(interval.repeats * self.solver.nfe(interval.steps(steps)) for interval in self.intervals)
        return self.solver.nfe(steps + len(self.intervals)) + again
