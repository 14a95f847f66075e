"""Which solver, at which cost? Solvers measured where the truth is known.

On an oracle both equations have a solution that can be computed as accurately as one likes: the probability-flow ODE by
a high-order method at tiny tolerance, the reverse SDE on a very fine grid with the *same Brownian motion* that the
solver sees. With ``y = x / alpha`` and ``lam = logsnr / 2`` both read

    dy = -(1 + eta^2) (y - x0) dlam + sqrt(2) eta exp(-lam) dW(lam),

which no solver under test is asked for. Two numbers then say how good a solver is with a budget of network calls:

*Pathwise error*: root mean square distance between where the solver took a noise and where its equation takes it. It
has no floor but the reference's own accuracy, and separates solvers long after all pictures look alike.

*Distribution distance*: sliced Wasserstein-2 between many endpoints and exact samples. It is what users care about, it
is the only number that compares ODE with SDE solvers, and it cannot be read below the distance of two exact samples of
the same size. That floor is measured and reported with it.

Reference: Bonneel et al. 2015, doi:10.1007/s10851-014-0506-3 (sliced Wasserstein distance).
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from sdegen.oracles import ORACLES, oracle
from sdegen.paths import PATHS
from sdegen.results import Result
from solvers import (
    GRIDS,
    SOLVERS,
    BrownianMotion,
    DiffusionProblem,
    Noise,
    Solver,
    integrate,
    prior,
    resolve,
    solve,
    standard_normal,
)
from solvers.solve import find

__all__ = [
    "Comparison",
    "LazyBrownianMotion",
    "best",
    "compare",
    "curves",
    "exact_ode",
    "exact_sde",
    "sliced_wasserstein",
]


@dataclass(frozen=True)
class Comparison:
    """What is compared on what.

    Args:
        oracle: a name in ``ORACLES``.
        path: a name in ``PATHS``.
        solvers: names in ``SOLVERS`` or "package.module:Class"; all of ``SOLVERS`` when empty.
        budgets: network calls that a fixed-step solver may spend.
        tols: tolerances of the solvers that control their own steps.
        samples: noises of the pathwise error.
        cloud: endpoints of the distribution distance; 0 leaves it out.
        reference_steps: steps of the reference solution of the SDE.
        seed: of noises, data and projections.
    """

    oracle: str = "mixture2d"
    path: str = "vp-linear"
    solvers: tuple[str, ...] = ()
    budgets: tuple[int, ...] = (5, 10, 20, 50, 100)
    tols: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    samples: int = 256
    cloud: int = 5_000
    reference_steps: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        find(self.oracle, ORACLES, "oracle")
        find(self.path, PATHS, "path")
        for name in self.solvers:
            resolve(name)
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(f"budgets are positive numbers of network calls, got {self.budgets}")
        if self.samples < 2 or (self.cloud and self.cloud < 2):
            raise ValueError(f"errors need at least 2 samples, got samples={self.samples} and cloud={self.cloud}")

    @property
    def names(self) -> tuple[str, ...]:
        """The solvers, spelled out."""
        return self.solvers or tuple(SOLVERS)


@dataclass(frozen=True)
class _Try:
    """One cell: a solver with one budget or one tolerance."""

    name: str
    nfe: int | None = None
    tol: float | None = None

    @property
    def budget(self) -> dict[str, Any]:
        """As :func:`solvers.solve` wants it."""
        return {"nfe": self.nfe} if self.nfe else {"tol": self.tol}


def compare(settings: Comparison, progress: Callable[[str, float], None] = lambda what, share: None) -> Result:
    """Measure every solver with every budget.

    Args:
        settings: what to measure.
        progress: called with a name and the share done, after each cell.

    Returns:
        A :class:`Result` over the axis ``cell`` (one solver with one budget) with solver, stochastic, order, budget or
        tol, nfe (counted), error and its standard error (pathwise, in units of the data), distance (sliced W2) and
        seconds; and ``floor`` (mean, low, high), the distance of two exact samples of the same size.
    """
    truth, path = oracle(settings.oracle), PATHS[settings.path]()
    problem = truth.problem(path)
    x = prior(path, (settings.samples, *truth.event_shape), settings.seed, dtype=torch.float64)
    tries = list(_tries(settings))
    references: dict[float, Tensor] = {}
    for eta in sorted({_eta(resolve(t.name)) for t in tries}):
        progress("the exact solution" if eta == 0 else "the exact solution with noise", 0.0)
        references[eta] = (
            exact_ode(problem, x)
            if eta == 0
            else exact_sde(problem, x, BrownianMotion(x, settings.seed), eta=eta, steps=settings.reference_steps)
        )

    cloud, target, floor = None, None, (math.nan,) * 3
    if settings.cloud:
        exact = _exact_samples(settings, 4)
        target, pairs = exact[0], [sliced_wasserstein(exact[0], other) for other in exact[1:]]
        pairs += [sliced_wasserstein(exact[1], exact[2]), sliced_wasserstein(exact[2], exact[3])]
        floor = (float(np.mean(pairs)), min(pairs), max(pairs))
        cloud = prior(path, (settings.cloud, *truth.event_shape), settings.seed + 1, dtype=torch.float64)

    rows: list[dict[str, float | str | bool | int]] = []
    for i, cell in enumerate(tries):
        method, budget = resolve(cell.name), cell.budget
        noise = BrownianMotion(x, settings.seed) if method.stochastic else None
        begin = time.perf_counter()
        found = solve(problem, x, solver=method, noise=noise, **budget)
        seconds = time.perf_counter() - begin
        square = (found.x - references[_eta(method)]).flatten(1).square().sum(1)
        error = float(square.mean().sqrt())
        distance = math.nan
        if cloud is not None and target is not None:
            fresh = LazyBrownianMotion(cloud, settings.seed) if method.stochastic else None
            distance = sliced_wasserstein(solve(problem, cloud, solver=method, noise=fresh, **budget).x, target)
        rows.append({
            "solver": cell.name, "stochastic": method.stochastic, "order": method.order,
            "budget": cell.nfe or 0, "tol": cell.tol or math.nan, "nfe": found.nfe,
            # The delta method: the error is the root of a mean.
            "error": error, "error_se": float(square.std()) / len(square) ** 0.5 / (2 * max(error, 1e-300)),
            "distance": distance, "seconds": seconds,
        })  # fmt: skip
        progress(cell.name, (i + 1) / len(tries))
    arrays = {key: (("cell",), np.array([row[key] for row in rows])) for key in rows[0]}
    arrays |= {
        "quantile": (("quantile",), np.array(["mean", "low", "high"])),
        "floor": (("quantile",), np.array(floor)),
    }
    about = {"solvers": list(settings.names), "truth": repr(truth), "path_repr": repr(path)}
    return Result(arrays, asdict(settings) | about)


def _tries(settings: Comparison) -> Iterator[_Try]:
    for name in settings.names:
        method = resolve(name)
        if method.nfe_per_step == 0:
            yield from (_Try(name, tol=tol) for tol in settings.tols)
        else:
            yield from (_Try(name, nfe=nfe) for nfe in settings.budgets if method.nfe(1) <= nfe)


def _eta(method: Solver) -> float:
    """Which member of the reverse family a solver converges to."""
    return float(getattr(method, "eta", 1.0)) if method.stochastic else 0.0


def _lam(problem: DiffusionProblem) -> tuple[float, float]:
    ends = torch.tensor([problem.t_max, problem.t_min], dtype=torch.float64)
    start, end = (0.5 * problem.path.logsnr(ends)).tolist()
    return start, end


def exact_ode(problem: DiffusionProblem, x: Tensor, tol: float = 1e-11) -> Tensor:
    """Where the probability-flow ODE takes ``x`` from t_max to t_min, by an eighth-order method at tiny tolerance.

    dy/dlam = x0(alpha y, t(lam)) - y, with y = x / alpha.

    Args:
        problem: an oracle's problem.
        x: noise at t_max, (B, *event), float64.
        tol: relative and absolute tolerance.

    Returns:
        The state at t_min, (B, *event).

    Reference: Hairer, Norsett and Wanner 1993, section II.10 (DOP853).
    """
    path, ends = problem.path, _lam(problem)

    def slope(lam: float, y: np.ndarray) -> np.ndarray:
        t = path.time(torch.tensor(2 * lam, dtype=torch.float64)).clamp(problem.t_min, problem.t_max)
        state = torch.from_numpy(y).reshape(x.shape)
        return (problem.predict(path.alpha(t) * state, t).x0 - state).flatten().numpy()

    start, stop = (path.alpha(torch.tensor(t, dtype=torch.float64)) for t in (problem.t_max, problem.t_min))
    y = solve_ivp(slope, ends, (x / start).flatten().numpy(), method="DOP853", rtol=tol, atol=tol).y[:, -1]
    return torch.from_numpy(y).reshape(x.shape) * stop


def exact_sde(problem: DiffusionProblem, x: Tensor, noise: Noise, *, eta: float = 1.0, steps: int = 1024) -> Tensor:
    """Where the reverse SDE takes ``x`` along a given Brownian motion: the exponential Euler method on a fine grid.

    y_b = y_a + (1 - exp(-(1 + eta^2) h)) (x0 - y_a) + exp(-lam_b) sqrt(1 - exp(-2 eta^2 h)) dW / sqrt(h)

    Args:
        problem: an oracle's problem.
        x: noise at t_max, (B, *event).
        noise: the Brownian motion that the solver under test is given.
        eta: member of the reverse family.
        steps: of the grid, equal in lam.

    Returns:
        The state at t_min, (B, *event). Strong order 1: with n times the steps of a first-order solver its error is
        about n times smaller than the solver's.
    """
    return integrate(_ExponentialEuler(eta), problem, x, GRIDS["logsnr"](problem.path, steps), noise=noise).x


@dataclass(frozen=True)
class _ExponentialEuler(Solver[None]):
    eta: float = 1.0
    order: int = 1
    nfe_per_step: int = 1
    stochastic: bool = True

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        a, b = 0.5 * path.logsnr(t), 0.5 * path.logsnr(s)
        rate, h = 1 + self.eta**2, b - a
        x0 = problem.predict(x, t).x0
        y = torch.exp(-rate * h) / path.alpha(t) * x - torch.expm1(-rate * h) * x0
        # The noise gathered in a step: INT 2 eta^2 exp(-2 lam) exp(-2 rate (b - lam)) dlam with rate - 1 = eta^2.
        variance = torch.exp(-2 * b) * -torch.expm1(-2 * self.eta**2 * h)
        return path.alpha(s) * (y + variance.sqrt() * noise(a, b)), None


class LazyBrownianMotion:
    """A Brownian motion that is drawn where somebody looks: exact, and cheap for ten thousand samples.

    A new point beyond the known ones gets an independent increment, one between two of them the Brownian bridge. Its
    draws depend on the order of the questions, so that two grids do not see the same path: for that, and for samples
    that do not depend on their batch, there is :class:`solvers.BrownianMotion`.

    Args:
        like: state whose shape and dtype the noise has.
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
        z = torch.randn(self.like.shape, generator=self.generator, dtype=self.like.dtype)
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


def _exact_samples(settings: Comparison, count: int) -> list[Tensor]:
    """Samples of the exact law at t_min, where solvers stop."""
    truth, path = oracle(settings.oracle), PATHS[settings.path]()
    n, out = settings.cloud, []
    for i in range(count):
        seed = settings.seed + 100 + i
        mean, std = path.marginal(truth.sample(n, seed), torch.tensor(path.t_min, dtype=torch.float64))
        out.append(mean + std * standard_normal(mean.shape, seed + 1000, dtype=torch.float64))
    return out


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 64, seed: int = 0) -> float:
    """Root mean square, over directions, of the one-dimensional Wasserstein-2 distance of projected samples.

    Args:
        x: (N, *event).
        y: (N, *event), as many.
        projections: number of directions, the same for equal ``seed``.
        seed: of the directions.

    >>> x = torch.zeros(100, 2)
    >>> round(sliced_wasserstein(x, x + torch.tensor([1.0, 0.0])), 1)  # 1 / sqrt(2), the mean over directions
    0.7
    """
    if x.shape != y.shape:
        raise ValueError(f"needs as many samples of one as of the other, got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.double().flatten(1), y.double().flatten(1)
    directions = standard_normal((projections, x.shape[1]), seed, dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)
    a, b = ((z @ directions.T).sort(dim=0).values for z in (x, y))
    return float((a - b).square().mean().sqrt())


def best(result: Result, budget: int, measure: str = "error") -> list[tuple[str, float]]:
    """Solvers from best to worst among those that spent at most ``budget`` calls, each with its best cell.

    Args:
        result: of :func:`compare`.
        budget: network calls.
        measure: "error" or "distance".
    """
    found: dict[str, float] = {}
    for name, nfe, value in zip(result["solver"], result["nfe"], result[measure], strict=True):
        if nfe <= budget and np.isfinite(value):
            found[str(name)] = min(float(value), found.get(str(name), math.inf))
    return sorted(found.items(), key=lambda item: item[1])


def curves(result: Result, names: Sequence[str], measure: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """NFE and a measure for each solver, in order of NFE; of several cells with one NFE, the best."""
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    for name, nfe, value in zip(result["solver"], result["nfe"], result[measure], strict=True):
        if name in found:
            cells = found[name]
            cells[int(nfe)] = min(float(value), cells.get(int(nfe), math.inf))
    return {
        name: (np.array(sorted(cells)), np.array([cells[n] for n in sorted(cells)])) for name, cells in found.items()
    }
