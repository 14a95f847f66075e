"""What people call: ``solve(problem, x, solver="heun", steps=20)``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from solvers.grids import GRIDS, Grid
from solvers.integrate import Solver, Trajectory, integrate
from solvers.names import find, resolve
from solvers.noise import BrownianMotion, Noise, fresh_seed, standard_normal
from solvers.problem import DiffusionProblem, Path, Problem

__all__ = ["find", "prior", "resolve", "solve", "steps_within"]


def _whole(what: str, number: int | None) -> int | None:
    """A whole number, of whatever kind, as ``int``."""
    if number is None:
        return None
    try:
        return operator.index(number)
    except TypeError:
        raise TypeError(f"{what} is a whole number, got {number!r}") from None


def _grid(grid: str | Grid) -> Grid:
    return find(grid, GRIDS, "grid") if isinstance(grid, str) else grid


def prior(
    path: Path,
    shape: Sequence[int],
    seed: int,
    *,
    samples: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The noise a sampler starts from, sigma(t_max) eps, shape ``shape``; sample i depends on (seed, i) alone."""
    sigma = float(path.sigma(torch.tensor(path.t_max, dtype=torch.float64)))
    return sigma * standard_normal(shape, seed, samples=samples, dtype=dtype, device=device)


def steps_within(solver: Solver[Any], nfe: int) -> int:
    """The largest number of steps whose calls of ``predict`` fit into a budget.

    Raises:
        ValueError: not even one step fits, or the solver controls its own steps.
    """
    if solver.nfe_per_step == 0:
        raise ValueError(f"{solver} controls its own steps: give tol=..., not nfe or steps")
    fitting = [n for n in range(1, max(nfe, 0) + 1) if solver.nfe(n) <= nfe]
    if not fitting:
        raise ValueError(f"{solver} needs at least {solver.nfe(1)} evaluations, the budget is nfe={nfe}")
    return fitting[-1]


def solve(
    problem: Problem,
    x: Tensor,
    *,
    solver: str | Solver[Any],
    steps: int | None = None,
    nfe: int | None = None,
    ts: Tensor | None = None,
    tol: float | None = None,
    grid: str | Grid | None = None,
    seed: int | None = None,
    first: int = 0,
    noise: Noise | None = None,
    save: Literal["last", "all"] = "last",
    end: Literal["stop", "denoise"] = "stop",
    encode: bool = False,
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Trajectory:
    """Carry ``x`` from noise to data (or back) with the solver and the budget of your choice.

    Give one of ``steps``, ``nfe``, ``ts`` and ``tol``.

    Args:
        problem: a :class:`DiffusionProblem`, or an :class:`ODE` for the solvers that need a velocity only.
        x: state at the start of the grid, (B, *event).
        solver: a :class:`Solver`, or its name (:mod:`solvers.names`): in ``SOLVERS``, of an installed package,
            "package.module:Class" or "file.py:Class".
        steps: number of steps of ``grid``.
        nfe: budget of network calls; the most steps that fit are taken, and ``Trajectory.nfe`` says what was spent.
        ts: the grid itself, (N + 1,), float64; a rising one encodes.
        tol: relative and absolute tolerance of a solver that controls its own steps.
        grid: a name in ``GRIDS`` or a function (path, n) -> ts; the solver's own default where None.
        seed: seed of the noise of a stochastic solver; without one a fresh seed is drawn and reported.
        first: number of the first sample of the batch; sample i draws the noise of number ``first + i``, so that a
            large batch may be solved in pieces.
        noise: Brownian increments in place of the seeded ones.
        save: "all" keeps every state of the trajectory.
        end: "stop" returns the state at the end of the grid, "denoise" the data predicted there (one more call).
        encode: walk the reversed grid, from data to noise.
        callback: ``callback(i, t, x)`` after every step.

    Returns:
        A :class:`Trajectory`: final state, grid and its name, counted calls, seed.

    Raises:
        ValueError: an unknown name, an impossible budget, a bad grid.
    """
    method = resolve(solver)
    named: str | None = None
    steps, nfe, seed = _whole("steps", steps), _whole("nfe", nfe), _whole("seed", seed)
    if sum(budget is not None for budget in (steps, nfe, ts, tol)) != 1:
        raise ValueError("give exactly one of steps, nfe, ts and tol")
    if ts is not None and grid is not None:
        raise ValueError("ts is the grid itself: leave out grid, or give steps in place of ts")
    if ts is not None and encode and ts[0] > ts[-1]:
        raise ValueError(
            f"encode walks from data to noise, and ts falls from {ts[0]:.6g} to {ts[-1]:.6g}: give ts.flip(0)"
        )
    if tol is not None:
        if not tol > 0:
            raise ValueError(f"tol is positive, got {tol}")
        method, steps = method.with_tolerance(tol), 1
    if nfe is not None:
        steps = steps_within(method, nfe - (end == "denoise"))
    if ts is None:
        if steps is None or steps < 1:
            raise ValueError(f"the number of steps is at least 1, got {steps}")
        grid = grid or (method.grid if isinstance(problem, DiffusionProblem) else "uniform")
        if tol is None:  # else there is nothing but the ends
            named = grid if isinstance(grid, str) else getattr(grid, "__name__", type(grid).__name__)
        make = _grid(grid)
        try:  # an ODE has a range and no schedule: the grids in t need nothing else
            ts = make(problem.path if isinstance(problem, DiffusionProblem) else cast("Path", problem), steps)
        except AttributeError:
            if isinstance(problem, DiffusionProblem):
                raise
            raise ValueError(f"an ODE has no noise levels: the grid {named} needs a path, uniform needs none") from None
        ts = ts.flip(0) if encode else ts
    if noise is None and method.stochastic:
        noise = BrownianMotion(x, fresh_seed() if seed is None else seed, samples=range(first, first + len(x)))
    done = integrate(method, problem, x, ts, noise=noise, save=save, end=end, callback=callback)
    return replace(done, grid=named)
