"""Combinators: solvers made of solvers.

What code bases hide in flags (start with another method, end with another method, integrate in another variable) is
here a solver around a solver, so that it shows in the name of the run and can be measured like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from solvers.curves import Coordinates, Curve, OwnClock
from solvers.integrate import Solver
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, Nodes, Passage, Prediction, mix

__all__ = ["FinalStep", "InScaling", "OnPath", "Warmup"]


@dataclass(frozen=True)
class Warmup(Solver[tuple[int, Any, Any]]):
    """The first ``steps`` steps are taken by ``start``, the others by ``solver``.

    A multistep solver is given the predictions that ``start`` made at the beginning of its steps, at no extra cost. One
    step of a method of order q has an error of order q + 1, so the order of the whole is min(solver's, start's + 1): a
    third-order method that starts with Euler is of second order.

    Args:
        start: solver of the first steps.
        solver: solver of the others.
        steps: how many steps ``start`` takes.
    """

    start: Solver[Any]
    solver: Solver[Any]
    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"a warm-up has at least one step, got {self.steps}")
        self.declare(
            order=min(self.solver.order, self.start.order + 1),
            nfe_per_step=self.solver.nfe_per_step,
            stochastic=self.start.stochastic or self.solver.stochastic,
            invariant=self.start.invariant and self.solver.invariant,
            combines=self.start.combines and self.solver.combines,
            reference=self.solver.reference,
            grid=self.solver.grid,
        )

    def init(self, problem: Any, x: Tensor, ts: Tensor) -> tuple[int, Any, Any]:
        return 0, self.start.init(problem, x, ts), self.solver.init(problem, x, ts)

    def step(
        self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: tuple[int, Any, Any], noise: Noise
    ) -> tuple[Tensor, tuple[int, Any, Any]]:
        taken, first, then = state
        if taken >= self.steps:
            x, then = self.solver.step(problem, x, t, s, then, noise)
            return x, (taken, first, then)
        seen: list[Any] = []  # every method looks at (x, t) first

        def watched(function: Any) -> Any:
            def call(x: Tensor, t: Tensor) -> Any:
                seen.append(function(x, t))
                return seen[-1]

            return call

        x, first = self.start.step(problem.calling(watched), x, t, s, first, noise)
        if isinstance(seen[0], Prediction):
            then = self.solver.observe(then, problem.path.logsnr(t) / 2, seen[0])
        return x, (taken + 1, first, then)

    def nfe(self, steps: int) -> int:
        return self.start.nfe(min(steps, self.steps)) + self.solver.nfe(max(steps - self.steps, 0))


@dataclass(frozen=True)
class FinalStep(Solver[tuple[float, Any]]):
    """All steps by ``solver``, the last one by ``last``: no noise at the end, or one call fewer.

    Its order is min(solver's, last's + 1): one step of lower order costs one order.

    Args:
        solver: solver of all steps but one.
        last: one-step solver of the last step.
    """

    solver: Solver[Any]
    last: Solver[Any]

    def __post_init__(self) -> None:
        self.declare(
            order=min(self.solver.order, self.last.order + 1),
            nfe_per_step=self.solver.nfe_per_step,
            stochastic=self.solver.stochastic or self.last.stochastic,
            start_order=self.solver.start_order,
            invariant=self.solver.invariant and self.last.invariant,
            reference=self.solver.reference,
            grid=self.solver.grid,
        )

    def init(self, problem: Any, x: Tensor, ts: Tensor) -> tuple[float, Any]:
        return float(ts[-1]), self.solver.init(problem, x, ts)

    def step(
        self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: tuple[float, Any], noise: Noise
    ) -> tuple[Tensor, tuple[float, Any]]:
        end, inner = state
        if float(s) == end:
            return self.last.step(problem, x, t, s, self.last.init(problem, x, torch.stack([t, s])), noise)[0], state
        x, inner = self.solver.step(problem, x, t, s, inner, noise)
        return x, (end, inner)

    def nfe(self, steps: int) -> int:
        return self.solver.nfe(steps - 1) + self.last.nfe(1)


@dataclass(frozen=True)
class OnPath(Solver[tuple[Passage, Any]]):
    """Any solver, run on another curve and in another clock.

    x' = (alpha' / alpha) x at equal logsnr, a step of ``solver`` on the other path, and back. The grid is the
    problem's: its nodes are carried over by their logsnr. ``OnPath(Heun(), EDM)`` is the deterministic EDM sampler. A
    method that ``combines`` is handed x itself and has the factor in its coefficients.

    Args:
        solver: the method.
        path: where it works, for example ``EDM``, ``FLOW`` or ``VP_LAM``.
        grid: grid that ``solve`` takes when none is given; the method's own where empty.
    """

    solver: Solver[Any]
    path: Coordinates
    grid: str = ""

    def __post_init__(self) -> None:
        self.declare(**_facts(self.solver), grid=self.grid or self.solver.grid, invariant=True)

    def init(self, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> tuple[Passage, Any]:
        here, there = problem.path, self.path.over(problem.path)
        passage = here.to(there) if isinstance(here, Nodes) else Passage(here, there)
        return passage, self.solver.init(problem.through(passage).scaled(), x, passage.forth(ts))

    def observe(self, state: tuple[Passage, Any], lam: Tensor, prediction: Prediction) -> tuple[Passage, Any]:
        return state[0], self.solver.observe(state[1], lam, prediction)

    def step(
        self,
        problem: DiffusionProblem,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        state: tuple[Passage, Any],
        noise: Noise,
    ) -> tuple[Tensor, tuple[Passage, Any]]:
        passage, inner = state
        u, v, seen = passage.forth(t), passage.forth(s), problem.through(passage)
        if self.solver.combines:
            x, inner = self.solver.step(seen, x, u, v, inner, noise)
        else:
            x, inner = self.solver.step(seen.scaled(), mix(*seen.terms(x, u)), u, v, inner, noise)
            x = seen.state(v, (1.0, ((1.0, x),)))
        return x, (passage, inner)

    def spent(self, state: tuple[Passage, Any]) -> Tensor | None:
        return self.solver.spent(state[1])

    def with_tolerance(self, tol: float) -> Solver[Any]:
        return replace(self, solver=self.solver.with_tolerance(tol))

    def nfe(self, steps: int) -> int:
        return self.solver.nfe(steps)


@dataclass(frozen=True)
class InScaling(Solver[Any]):
    """Any solver on another curve, in the problem's own clock.

    Args:
        solver: the method.
        curve: the curve whose scaling of the state is used: ``Circle()`` VP, ``Ray()`` VE, ``Chord()`` flow.
    """

    solver: Solver[Any]
    curve: Curve

    def __post_init__(self) -> None:
        self.declare(**_facts(self.solver), grid=self.solver.grid)

    def _there(self, problem: DiffusionProblem) -> OnPath:
        return OnPath(self.solver, Coordinates(self.curve, OwnClock(problem.path)))

    def init(self, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> Any:
        return self._there(problem).init(problem, x, ts)

    def observe(self, state: Any, lam: Tensor, prediction: Prediction) -> Any:
        return state[0], self.solver.observe(state[1], lam, prediction)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise
    ) -> tuple[Tensor, Any]:
        return self._there(problem).step(problem, x, t, s, state, noise)

    def spent(self, state: Any) -> Tensor | None:
        return self.solver.spent(state[1])

    def with_tolerance(self, tol: float) -> Solver[Any]:
        return replace(self, solver=self.solver.with_tolerance(tol))

    def nfe(self, steps: int) -> int:
        return self.solver.nfe(steps)


def _facts(solver: Solver[Any]) -> dict[str, Any]:
    names = ("order", "nfe_per_step", "stochastic", "strong_order", "start_order", "linear", "reference")
    return {name: getattr(solver, name) for name in names}
