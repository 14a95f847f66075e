"""Where a solver should have ended: converged solutions along the same noise.

With ``y = x / alpha``, ``lam = logsnr / 2`` and r = 1 + eta^2 every equation of the reverse family reads

    dy = -r (y - x0) dlam + sqrt(2) eta exp(-lam) dW(lam).

*The ODE* (eta = 0) is solved by an eighth-order Runge-Kutta method at tiny tolerance.

*The SDE* is walked in small steps along the Brownian motion that the solver under test sees: the linear part exactly,
x0 continued as a straight line through its last two values,

    y_b = e^(-rh) y_a + (1 - e^(-rh)) x0_a + (h - (1 - e^(-rh)) / r) x0'_a + e^(-lam_b) sqrt(1 - e^(-2 eta^2 h)) z.

Between two nodes nothing is known of W, so that this, like every method that is told increments only, is of strong
order 1; the line makes its constant three times smaller than that of x0 held constant.

*An equation of its own* (a solver with noise that does not say its ``eta``: churn, restarts, correctors) has for a
reference the solver itself on a fine grid.

Each reference is computed a second time, less accurately: with half of the steps, or a hundred times the tolerance. How
far the two are apart bounds the reference's error, and goes into the table.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path as File
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from sdegen import results
from sdegen.comparison.code import mark
from sdegen.comparison.distances import Cloud
from sdegen.comparison.settings import Cell, Comparison
from sdegen.comparison.targets import Target, find_target, source
from sdegen.files import DamagedFile, locked
from sdegen.results import Result
from solvers import GRIDS, BrownianMotion, DiffusionProblem, FinalStep, InScaling, Noise, OnPath, Solver, Warmup, solve
from solvers.problem import Path

__all__ = ["LazyBrownianMotion", "Reference", "Truths", "equation", "exact_ode", "exact_sde", "noise_of"]

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-7}
"""Of the converged ODE, by the dtype of the state: a float32 network does not resolve more."""

FRESH = 1 << 32
"""Seeds from here on are those of clouds and exact samples, which share nothing with the noises of the paths."""


# --- Which equation ---------------------------------------------------------------------------------------------------


def noise_of(solver: Solver[Any]) -> float | None:
    """eta of the equation that a solver converges to on a Brownian path; None where it is not known.

    A solver that draws noise says it by an attribute ``eta`` (or ``tau``); what wraps a solver without changing its
    equation is looked into.
    """
    if not solver.stochastic:
        return 0.0
    while isinstance(solver, (OnPath, InScaling, Warmup, FinalStep)):
        solver = solver.solver
    eta: Any = getattr(solver, "eta", getattr(solver, "tau", None))
    return float(eta) if solver.strong_order > 0 and isinstance(eta, (int, float)) else None


def equation(solver: Solver[Any]) -> str:
    """The equation in a word: "ODE", "SDE", "SDE 0.5" with its eta, "own", or "none" where there is no limit."""
    eta = noise_of(solver)
    if eta is None:
        return "own" if solver.order and solver.strong_order > 0 else "none"
    return "ODE" if eta == 0 else "SDE" if eta == 1 else f"SDE {eta:g}"


# --- The two equations ------------------------------------------------------------------------------------------------


def exact_ode(problem: DiffusionProblem, x: Tensor, tol: float = 1e-11) -> Tensor:
    """Where the probability-flow ODE takes ``x`` from t_max to t_min, by an eighth-order method at tiny tolerance.

    dy/dlam = x0(alpha y, t(lam)) - y, with y = x / alpha.

    Args:
        problem: a problem, best in float64.
        x: noise at t_max, (B, *event).
        tol: relative and absolute tolerance.

    Returns:
        The state at t_min, (B, *event), in the dtype of ``x``.

    Reference: Hairer, Norsett and Wanner 1993, section II.10 (DOP853).
    """
    path, like = problem.path, x.double()
    ends = torch.tensor([problem.t_max, problem.t_min], dtype=torch.float64)
    start, stop = path.alpha(ends).tolist()

    def state(y: np.ndarray) -> Tensor:
        return torch.from_numpy(y).reshape(x.shape).to(like)

    def slope(lam: float, y: np.ndarray) -> np.ndarray:
        t = path.time(torch.tensor(2 * lam, dtype=torch.float64)).clamp(problem.t_min, problem.t_max)
        x0 = problem.predict(float(path.alpha(t)) * state(y), t).x0
        return (x0 - state(y)).flatten().cpu().numpy()

    span = (0.5 * path.logsnr(ends)).tolist()
    done = solve_ivp(slope, span, (like / start).flatten().cpu().numpy(), method="DOP853", rtol=tol, atol=tol)
    if not done.success:
        raise ValueError(f"the exact solution of the ODE was not found: {done.message}")
    return (stop * state(done.y[:, -1])).to(x)


def exact_sde(problem: DiffusionProblem, x: Tensor, noise: Noise, *, eta: float = 1.0, steps: int = 2048) -> Tensor:
    """Where the reverse SDE takes ``x`` along a given Brownian motion; see the module's text.

    Args:
        problem: a problem.
        x: noise at t_max, (B, *event).
        noise: the Brownian motion that the solver under test is given.
        eta: member of the reverse family.
        steps: of the grid, equal in lam.

    Returns:
        The state at t_min, (B, *event).
    """
    walk = _Walk(problem, x, eta)
    for a, b in zip((lam := _clock(problem, steps))[:-1], lam[1:], strict=True):
        walk.go(a, b, noise(a, b))
    return walk.x


def _sde_twice(problem: DiffusionProblem, x: Tensor, noise: Noise, eta: float, steps: int) -> tuple[Tensor, Tensor]:
    """The solution with ``steps`` steps and with half of them, side by side along one Brownian motion."""
    fine, coarse, lam = _Walk(problem, x, eta), _Walk(problem, x, eta), _clock(problem, steps)
    for a, b, c in zip(lam[:-2:2], lam[1:-1:2], lam[2::2], strict=True):
        first, second = noise(a, b), noise(b, c)
        fine.go(a, b, first)
        fine.go(b, c, second)
        coarse.go(a, c, ((b - a).sqrt() * first + (c - b).sqrt() * second) / (c - a).sqrt())
    return fine.x, coarse.x


def _clock(problem: DiffusionProblem, steps: int) -> tuple[Tensor, ...]:
    return (0.5 * problem.path.logsnr(GRIDS["logsnr"](problem.path, steps))).unbind()


class _Walk:
    """The state on its way, with the last prediction."""

    def __init__(self, problem: DiffusionProblem, x: Tensor, eta: float) -> None:
        self.problem, self.x, self.eta = problem, x, eta
        self.before: tuple[Tensor, Tensor] | None = None  # lam and x0

    def go(self, a: Tensor, b: Tensor, z: Tensor) -> None:
        path, rate, h = self.problem.path, 1 + self.eta**2, b - a
        t, s = (path.time(2 * lam).clamp(path.t_min, path.t_max) for lam in (a, b))
        x0 = self.problem.predict(self.x, t).x0
        gain = -torch.expm1(-rate * h)
        y = float((1 - gain) / path.alpha(t)) * self.x + float(gain) * x0
        if self.before is not None:
            y = y + float((h - gain / rate) / (a - self.before[0])) * (x0 - self.before[1])
        # The noise gathered in a step: INT 2 eta^2 exp(-2 lam) exp(-2 rate (b - lam)) dlam with rate - 1 = eta^2.
        spread = torch.exp(-b) * (-torch.expm1(-2 * self.eta**2 * h)).sqrt()
        self.x = float(path.alpha(s)) * (y + float(spread) * z)
        self.before = (a, x0)


class LazyBrownianMotion:
    """A Brownian motion that is drawn where somebody looks: exact, and cheap for ten thousand samples.

    A new point beyond the known ones gets an independent increment, one between two of them the Brownian bridge. Its
    draws depend on the order of the questions, so that two grids do not see the same path: for that, and for samples
    that do not depend on their batch, there is :class:`solvers.BrownianMotion`.

    Args:
        like: state whose shape, dtype and device the noise has.
        seed: of the draws.
    """

    def __init__(self, like: Tensor, seed: int) -> None:
        self.like, self.seed = like, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.places: list[float] = []
        self.values: list[Tensor] = []

    def _at(self, lam: float) -> Tensor:
        i = bisect.bisect_left(self.places, lam)
        if i < len(self.places) and self.places[i] == lam:
            return self.values[i]
        z = torch.randn(self.like.shape, generator=self.generator, dtype=self.like.dtype).to(self.like)
        if not self.places:
            value = torch.zeros_like(z)
        elif i == 0:
            value = self.values[0] + math.sqrt(self.places[0] - lam) * z
        elif i == len(self.places):
            value = self.values[-1] + math.sqrt(lam - self.places[-1]) * z
        else:
            left, right = self.places[i - 1 : i + 1]
            share = (lam - left) / (right - left)
            mean = torch.lerp(self.values[i - 1], self.values[i], share)
            value = mean + math.sqrt((lam - left) * (1 - share)) * z
        self.places.insert(i, lam)
        self.values.insert(i, value)
        return value

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """(W(b) - W(a)) / sqrt|b - a|."""
        start, end = float(a), float(b)
        before = self._at(start)
        return (self._at(end) - before) / math.sqrt(abs(end - start))


# --- All of them ------------------------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """A converged solution.

    Attributes:
        x: states at t_min, (B, *event).
        error: how far it is from a less accurate one, root mean square.
        median: the same, median over noises of the root mean square over coordinates.
    """

    x: Tensor
    error: float
    median: float


class Truths:
    """What the cells of a comparison are measured against, each computed once.

    Args:
        settings: the comparison.
        known: targets that are no names but objects.
        folder: where converged solutions are kept; only in memory where None.
    """

    def __init__(
        self, settings: Comparison, known: Mapping[str, Any] | None = None, folder: File | None = None
    ) -> None:
        self.settings, self.folder = settings, folder
        self.targets = {name: find_target(name, known, settings.device) for name in settings.targets}
        self._memory: dict[str, Any] = {}
        for target in self.targets.values():
            for path in settings.paths:
                target.path(path)

    def problem(self, cell: Cell) -> tuple[Target, Path]:
        """The target of a cell, and the path it is seen on."""
        target = self.targets[cell.target]
        return target, self._once(f"path {cell.target} {cell.path}", lambda: target.path(cell.path))

    def code(self, cell: Cell) -> str:
        """The mark of the code that a cell is measured by."""
        return mark(networks=self.targets[cell.target].truth is None)

    def start(self, cell: Cell) -> Tensor:
        """The noises that all solvers start from, (samples, *event)."""
        target, path = self.problem(cell)
        s = self.settings
        return self._once(
            f"start {cell.target} {cell.path} {cell.seed}", lambda: target.start(path, s.samples, cell.seed, s.device)
        )

    def wanted(self, cell: Cell) -> str | None:
        """What the converged solution of a cell depends on; None where its solver converges to nothing."""
        target, path = self.problem(cell)
        solver, what = cell.method, equation(cell.method)
        if what == "none" or (what == "own" and not solver.nfe_per_step):
            return None
        whose = f" {cell.solver} {source(cell.solver)} {solver!r} {cell.grid}" if what == "own" else ""
        s = self.settings
        return (
            f"{what}{whose}; {target.name} {target.mark} {path!r}; seed {cell.seed}, {s.samples} samples, "
            f"{s.reference_steps} steps, {s.device}; code {self.code(cell)}"
        )

    @torch.no_grad()
    def reference(self, cell: Cell) -> Reference | None:
        """Where the noises of a cell lead; None where its solver converges to nothing."""
        name = self.wanted(cell)
        return None if name is None else self._once(name, lambda: self._kept(name, lambda: self._solved(cell)))

    def cloud(self, cell: Cell) -> Cloud | None:
        """Exact samples at t_min to compare many endpoints with; None where the truth is unknown."""
        target, path = self.problem(cell)
        s = self.settings
        if target.truth is None or not s.cloud:
            return None
        truth, method = target.truth, cell.method
        # Where every sample has steps and noise of its own, a sample takes a hundred times as long.
        count = s.cloud if method.nfe_per_step or not method.stochastic else max(2, s.cloud // 10)
        return self._once(
            f"cloud {cell.target} {cell.path} {cell.seed} {count}",
            lambda: Cloud(truth, path, count, s.transport, FRESH + 1000 * cell.seed),
        )

    def _solved(self, cell: Cell) -> Reference:
        target, path = self.problem(cell)
        solver, x, steps = cell.method, self.start(cell), self.settings.reference_steps
        eta = noise_of(solver)
        if eta == 0:
            tol = TOLERANCE.get(target.dtype, 1e-7)
            problem = target.exact(path)
            fine, coarse = (exact_ode(problem, x.double(), each) for each in (tol, 100 * tol))
        elif eta is not None:
            fine, coarse = _sde_twice(target.ask(path), x, BrownianMotion(x, cell.seed), eta, steps)
        else:
            grid = None if cell.grid == "own" else cell.grid
            fine, coarse = (
                solve(target.ask(path), x, solver=solver, steps=n, grid=grid, noise=BrownianMotion(x, cell.seed)).x
                for n in (steps // 2, steps // 4)
            )
        each = (fine - coarse).double().square().flatten(1).mean(1)
        return Reference(fine, float(each.mean().sqrt()), float(each.quantile(0.5).sqrt()))

    def solved(self, name: str) -> bool:
        """Whether somebody has put a converged solution into the folder."""
        return self.folder is not None and self._file(self.folder, name).exists()

    @staticmethod
    def _file(folder: File, name: str) -> File:
        what, short = name.partition(";")[0].split()[0], hashlib.sha256(name.encode()).hexdigest()[:16]
        return folder / f"{what}-{short}.h5"

    def _kept(self, name: str, solved: Callable[[], Reference]) -> Reference:
        """From the folder, if it is there; else computed by the first process that comes, and put there."""
        if self.folder is None:
            return solved()
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(self.folder, name)
        with locked(file.with_suffix(".work"), wait=math.inf):
            if file.exists():
                try:
                    found = results.read(file, "reference")
                    x = torch.from_numpy(found["x"]).to(self.settings.device)
                    return Reference(x, *(float(found.attributes[name]) for name in ("error", "median")))
                except DamagedFile:
                    file.unlink()
            made = solved()
            axes = ("noise", *(f"axis{i}" for i in range(1, made.x.ndim)))
            about = {"what": name, "error": made.error, "median": made.median}
            results.write(file, "reference", Result({"x": (axes, made.x.cpu().numpy())}, about))
            return made

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._memory:
            self._memory[name] = make()
        return self._memory[name]

    @cached_property
    def about(self) -> str:
        """The targets in words, as JSON."""
        return json.dumps({name: target.about for name, target in self.targets.items()})
