"""The certificate of a solver: what it declares, measured.

A solver that produces finite samples of the right shape may still be wrong; only its *order of convergence* shows
whether its coefficients are the paper's. Everything here compares with an exact answer and needs no Monte Carlo:

order
    The root-mean-square distance, sample by sample, between N steps and the solution of the probability-flow ODE
    (DOP853 in the clock lam, tolerance 1e-13) falls like N^-p. A wrong coefficient lowers p, a wrong limit makes it 0.
weak order
    On data N(m, v) a step is affine in the state and in the noises, so the law of the result is Gaussian and *linear
    algebra*: push a zero, a unit start and a unit impulse in every Brownian increment through the solver as one batch,
    and the result's exact mean and variance are sums of what comes out.
strong order
    With one Brownian path for all grids, the distance to the finest grid falls like N^-p.
contract
    Shape, dtype, seeds, batch independence, counted calls, the interval, the round trip, the global random state.

Grids are as important as problems. On a smooth grid neighbouring steps become equal as N grows, and a multistep method
with wrong weights for unequal steps passes; :func:`uneven` repeats a fixed pattern of unequal steps (ratios up to 4),
which stays as uneven as it was. Problems must be in reach, too: an order is a statement about small steps, and between
logsnr -8 and 8 with moderate curvature 160 steps are small; at the ends of a schedule with logsnr 20 they are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from solvers.combine import OnPath
from solvers.curves import VP_LAM
from solvers.external import ScipyODE
from solvers.grids import Grid, karras, logsnr, uniform
from solvers.integrate import Solver, integrate
from solvers.noise import BrownianMotion, Noise, standard_normal
from solvers.problem import DiffusionProblem, Path, Prediction, expand

__all__ = [
    "CERTIFIED_GRIDS",
    "Certificate",
    "Check",
    "Measured",
    "certify",
    "contract",
    "exact",
    "gaussian",
    "measured_order",
    "strong_order",
    "tolerance_proportional",
    "uneven",
    "weak_order",
]

SLACK = 0.2  # a measured slope may miss the order by this much
ROUNDING = 1e-11  # an error below this may be the reference's


# --- Grids and problems -----------------------------------------------------------------------------------------------


def uneven(path: Path, n: int, seed: int = 0) -> Tensor:
    """Steps in logsnr whose lengths repeat a random pattern of five, neighbours differing by factors up to 4.

    Args:
        path: the Gaussian path.
        n: number of steps; multiples of 5 hold whole patterns.
        seed: of the pattern.
    """
    widths = 4.0 ** -torch.linspace(0, 1, 5, dtype=torch.float64)
    order = standard_normal((5,), seed).argsort()
    parts = torch.cat([torch.zeros(1).double(), widths[order].repeat(n // 5 + 1)[:n].cumsum(0)])
    ends = path.logsnr(torch.tensor([path.t_max, path.t_min], dtype=torch.float64))
    ts = path.time(torch.lerp(ends[0], ends[1], parts / parts[-1]))
    ts[0], ts[-1] = path.t_max, path.t_min
    return ts


CERTIFIED_GRIDS: dict[str, Grid] = {"uniform": uniform, "logsnr": logsnr, "karras": karras, "uneven": uneven}


def gaussian(path: Path, mean: Tensor | float = 0.3, std: Tensor | float = 0.5) -> DiffusionProblem:
    """The exact denoiser for data N(mean, std^2), independent coordinates: affine, elementwise, for any event shape.

    x0 = mean + alpha std^2 / (alpha^2 std^2 + sigma^2) (x - alpha mean),  eps = sigma / (...) (x - alpha mean).
    """

    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = expand(path.alpha(t), x), expand(path.sigma(t), x)
        variance, centred = (alpha * std) ** 2 + sigma**2, x - alpha * mean
        return Prediction(mean + alpha * std**2 / variance * centred, sigma / variance * centred)

    return DiffusionProblem(path, predict)


def exact(problem: DiffusionProblem, x: Tensor) -> Tensor:
    """The solution of the probability-flow ODE from t_max to t_min, to about 1e-12."""
    ts = torch.tensor([problem.t_max, problem.t_min], dtype=torch.float64)
    return integrate(OnPath(ScipyODE("DOP853", rtol=1e-13, atol=1e-13), VP_LAM), problem, x, ts).x


# --- Orders -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Errors on a sequence of ever finer grids.

    Attributes:
        steps: numbers of steps.
        errors: error at each, root mean square.
        limit: what the errors tend to, in units of the last one, where their signs are known; else 0.
    """

    steps: tuple[int, ...]
    errors: tuple[float, ...]
    limit: float = 0.0

    @classmethod
    def signed(cls, steps: Sequence[int], errors: Sequence[Tensor], order: int) -> Measured:
        """From signed errors: a bias of the other sign than the error of discretisation hides in their size.

        A 1% excess of noise makes the error of a method that falls short of noise *smaller*, until it crosses zero.
        The limit is extrapolated in two ways, of which each has its blind spot and the more favourable counts: from the
        last two grids with the declared order (Richardson), which a method that happens to be better here fools, and
        from the last three with the order that they show (Aitken's delta-squared, of vectors), which a transient fools.
        """
        sizes = tuple(_rms(error) for error in errors)
        if sizes[-1] < ROUNDING or len(errors) < 3:
            return cls(tuple(steps), sizes)
        first, second = errors[-2] - errors[-3], errors[-1] - errors[-2]
        shown = float((first * second).sum() / (first * first).sum())  # ratio of neighbouring differences
        ratios = ((steps[-2] / steps[-1]) ** order, shown)
        limits = [_rms(errors[-1] + ratio / (1 - ratio) * second) / sizes[-1] for ratio in ratios]
        return cls(tuple(steps), sizes, min(limits))

    def attains(self, order: float) -> bool:
        """Whether the errors fall at least that fast, and to zero."""
        return self.slope > order - SLACK and self.limit < 0.4

    @property
    def slopes(self) -> tuple[float, ...]:
        """log(error ratio) / log(steps ratio) of neighbouring grids, as far as errors are more than rounding."""
        runs = pairwise(zip(self.steps, self.errors, strict=True))
        return tuple(math.log(e / f) / math.log(m / n) for (n, e), (m, f) in runs if f > ROUNDING)

    @property
    def slope(self) -> float:
        """Slope of the finest pair: the measured order; infinite where there is no error to be seen."""
        return self.slopes[-1] if self.slopes else math.inf

    def __str__(self) -> str:
        tends = f"   tend to {self.limit:.2f} of the last" if self.limit else ""
        return f"slope {self.slope:5.2f}   errors " + " ".join(f"{e:.1e}" for e in self.errors) + tends


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def measured_order(
    solver: Solver[Any],
    problem: DiffusionProblem,
    x: Tensor,
    grid: Grid = uniform,
    *,
    steps: Sequence[int] = (20, 40, 80, 160),
    answer: Tensor | None = None,
) -> Measured:
    """Paired error of a deterministic solver against the exact solution.

    Args:
        solver: the method.
        problem: a smooth problem, in float64.
        x: states at t_max, (B, *event), float64.
        grid: (path, n) -> ts.
        steps: numbers of steps, rising.
        answer: the exact states at t_min where they are known already.
    """
    answer = exact(problem, x) if answer is None else answer
    errors = [_rms(integrate(solver, problem, x, grid(problem.path, n)).x - answer) for n in steps]
    return Measured(tuple(steps), tuple(errors))


class _Impulses:
    """Unit impulses for noise: row 2 + k of the batch sees one standard normal, the k-th elementary increment, as 1.

    Solvers ask for increments over intervals that may repeat or overlap. A first walk records where they begin and end;
    between neighbouring ends lie the *elementary* increments, independent of each other, of which every interval asked
    for is a sum.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.ends: set[float] = set()
        self.cuts: Tensor | None = None

    @staticmethod
    def _rounded(lam: Tensor) -> float:
        return round(float(lam), 9)  # the same node seen through two clocks differs in its last digits

    def cut(self) -> int:
        """End the first walk; returns how many impulses there are."""
        self.cuts = torch.tensor(sorted(self.ends), dtype=torch.float64)
        return max(len(self.cuts) - 1, 0)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        start, end = self._rounded(a), self._rounded(b)
        if self.cuts is None:
            self.ends |= {start, end}
            return torch.zeros(1, self.width, dtype=torch.float64)
        lengths, left = self.cuts.diff(), self.cuts[:-1]
        inside = (left >= min(start, end)) & (left < max(start, end))
        increments = inside * lengths.sqrt() / abs(end - start) ** 0.5 * (1 if end > start else -1)
        return torch.cat([torch.zeros(2, dtype=torch.float64), increments]).unsqueeze(1).expand(-1, self.width)


MEANS = torch.tensor([-0.5, 0.3, 0.8], dtype=torch.float64)
STDS = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
"""Three Gaussians at once: the error of one may change its sign as N grows, and a slope there says nothing."""


def _moments(solver: Solver[Any], path: Path, ts: Tensor) -> tuple[Tensor, Tensor]:
    """Signed errors of mean (in standard deviations) and variance (relative), from the exact law at ts[0]."""
    problem = gaussian(path, MEANS, STDS)
    impulses = _Impulses(len(MEANS))
    integrate(solver, problem, torch.zeros(1, len(MEANS), dtype=torch.float64), ts, noise=impulses)
    start = torch.zeros(2 + impulses.cut(), len(MEANS), dtype=torch.float64)
    start[1] = 1
    out = integrate(solver, problem, start, ts, noise=impulses).x
    offset, gain, responses = out[0], out[1] - out[0], out[2:] - out[0]
    alpha, sigma = path.alpha(ts).unsqueeze(1), path.sigma(ts).unsqueeze(1)
    means, variances = alpha * MEANS, (alpha * STDS) ** 2 + sigma**2
    mean, variance = offset + gain * means[0], gain**2 * variances[0] + responses.square().sum(0)
    return (mean - means[-1]) / variances[-1].sqrt(), variance / variances[-1] - 1


def weak_order(
    solver: Solver[Any], path: Path, grid: Grid = uniform, *, steps: Sequence[int] = (20, 40, 80, 160)
) -> tuple[Measured, Measured]:
    """Exact errors of the result's mean (in standard deviations) and variance (relative) on Gaussian data.

    Args:
        solver: any method with fixed steps, stochastic or not.
        path: the Gaussian path.
        grid: (path, n) -> ts.
        steps: numbers of steps, rising.

    Returns:
        The errors of the mean and of the variance.
    """
    means, variances = zip(*(_moments(solver, path, grid(path, n)) for n in steps), strict=True)
    return Measured.signed(steps, means, solver.order), Measured.signed(steps, variances, solver.order)


def strong_order(
    solver: Solver[Any],
    problem: DiffusionProblem,
    x: Tensor,
    grid: Grid = uniform,
    *,
    steps: Sequence[int] = (20, 40, 80),
    finest: int = 1280,
    seed: int = 0,
    noise: Callable[[Tensor, int], Noise] = lambda x, seed: BrownianMotion(x, seed),
) -> Measured:
    """Paired error of a stochastic solver against its own finest grid on the same Brownian path."""

    def run(n: int) -> Tensor:
        return integrate(solver, problem, x, grid(problem.path, n), noise=noise(x, seed)).x

    answer = run(finest)
    return Measured(tuple(steps), tuple(_rms(run(n) - answer) for n in steps))


def tolerance_proportional(
    solver: Solver[Any],
    problem: DiffusionProblem,
    x: Tensor,
    *,
    tols: Sequence[float] = (1e-3, 1e-5, 1e-7),
    answer: Tensor | None = None,
) -> dict[float, float]:
    """Error of a method with its own step control at each tolerance, {tol: root-mean-square error}."""
    answer = exact(problem, x) if answer is None else answer
    ts = torch.tensor([problem.t_max, problem.t_min], dtype=torch.float64)
    return {tol: _rms(integrate(solver.with_tolerance(tol), problem, x, ts).x - answer) for tol in tols}


# --- The contract -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One line of a certificate: what was looked at, whether it holds, what was seen."""

    what: str
    passed: bool
    seen: str

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.what:<44} {self.seen}"


def contract(solver: Solver[Any], path: Path, *, steps: int = 10, event: Sequence[int] = (2, 4, 4)) -> list[Check]:
    """What every solver owes its caller, checked on Gaussian data, whose exact denoiser works element by element.

    Args:
        solver: the method.
        path: a Gaussian path.
        steps: of the grid.
        event: shape of a sample besides vectors (2,).
    """
    problem, ts = gaussian(path), logsnr(path, steps)
    times: list[float] = []

    def run(x: Tensor, ts: Tensor = ts, seed: int = 5, samples: Sequence[int] | None = None) -> Any:
        noise = BrownianMotion(x, seed, samples=samples)
        return integrate(solver, problem.calling(_noting(times)), x, ts, noise=noise)

    checks: list[Check] = []
    before = torch.random.get_rng_state()
    images, vectors = (
        _scaled(path, standard_normal((5, *shape), 3, dtype=torch.float64)) for shape in (tuple(event), (2,))
    )

    kept = [
        (tuple(out.shape) == tuple(x.shape) and out.dtype == x.dtype and bool(out.isfinite().all()))
        for x in (images, vectors, images.float(), vectors.float())
        for out in (run(x).x,)
    ]
    checks.append(Check("shape and dtype of the state are kept", all(kept), "(B, C, H, W), (B, 2); float32, float64"))

    done = run(images.float())
    checks.append(Check("same seed, same bits", torch.equal(done.x, run(images.float()).x), f"seed {done.seed}"))
    if solver.stochastic:
        checks.append(Check("another seed, another sample", not torch.equal(done.x, run(images.float(), seed=6).x), ""))

    fixed = solver.nfe_per_step > 0
    alone = run(images[3:4].float(), samples=[3]).x
    if fixed:
        checks.append(Check("a sample does not see its batch", torch.equal(done.x[3:4], alone), "bit for bit"))
        counts = [integrate_count(solver, problem, vectors, path, n) for n in (1, 2, steps)]
        declared = [solver.nfe(n) for n in (1, 2, steps)]
        checks.append(
            Check("counted calls are the declared ones", counts == declared, f"{counts} in 1, 2, {steps} steps")
        )
    else:
        gap = _rms(done.x[3:4] - alone)
        checks.append(Check("a sample hardly sees its batch", gap < 1e-3, f"{gap:.1e}: one step size for the batch"))
        checks.append(Check("calls are counted", done.nfe > 0, f"{done.nfe} over {steps} intervals"))

    if not solver.stochastic:
        there = [run(run(vectors, logsnr(path, n)).x, logsnr(path, n).flip(0)).x for n in (steps * 4, steps * 8)]
        errors = [_rms(back - vectors) / _rms(vectors) for back in there]
        fell = errors[1] < 0.75 * errors[0] or errors[1] < 1e-4
        checks.append(Check("t -> s -> t comes back", fell, f"{errors[0]:.1e}, {errors[1]:.1e} with twice the steps"))

    inside = path.t_min <= min(times) and max(times) <= path.t_max
    checks.append(
        Check("nothing is asked outside the path's range", inside, f"t in [{min(times):.3g}, {max(times):.3g}]")
    )
    after = torch.random.get_rng_state()
    checks.append(Check("the global random state is untouched", torch.equal(before, after), ""))
    return checks


def _noting(times: list[float]) -> Callable[[Any], Any]:
    def wrap(predict: Any) -> Any:
        def call(x: Tensor, t: Tensor) -> Prediction:
            times.extend(map(float, t.reshape(-1)))
            return predict(x, t)

        return call

    return wrap


def _scaled(path: Path, eps: Tensor) -> Tensor:
    return float(path.sigma(torch.tensor(path.t_max, dtype=torch.float64))) * eps


def integrate_count(solver: Solver[Any], problem: DiffusionProblem, x: Tensor, path: Path, steps: int) -> int:
    """Calls of ``predict`` that were really made in ``steps`` steps."""
    return integrate(solver, problem, x, logsnr(path, steps), noise=BrownianMotion(x, 0)).nfe


# --- The certificate --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificate:
    """All checks of one solver; printed line by line.

    Attributes:
        solver: what was certified.
        checks: the lines.
    """

    solver: Solver[Any]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        order = (
            f"order {self.solver.order}"
            if self.solver.order
            else "no order"
            if self.solver.nfe_per_step
            else "adaptive"
        )
        verdict = "holds what it declares" if self.passed else "DOES NOT HOLD WHAT IT DECLARES"
        return "\n".join([f"{self.solver} ({order}) {verdict}", *(f"  {check}" for check in self.checks)])


def certify(
    solver: Solver[Any],
    problems: Mapping[str, DiffusionProblem],
    *,
    grids: Sequence[str] = ("uniform", "uneven"),
    steps: Sequence[int] = (20, 40, 80, 160),
    batch: int = 16,
    event: Sequence[int] = (2,),
    answers: Mapping[str, Tensor] | None = None,
) -> Certificate:
    """Measure everything a solver declares.

    The order must be reached, within 0.2, on every problem and grid; and on at least one it must not be exceeded, or it
    is declared too low.

    Args:
        solver: the method.
        problems: smooth problems by name; their paths serve for the weak order and the contract as well.
        grids: names in ``CERTIFIED_GRIDS``.
        steps: numbers of steps, rising.
        batch: samples that are followed.
        event: shape of a sample of these problems.
        answers: exact solutions from :func:`starts`, where they are known already.
    """
    checks: list[Check] = []
    slopes: list[float] = []
    if solver.order == 0 and (solver.nfe_per_step > 0 or solver.stochastic):
        # It claims no order and follows no tolerance: a corrector that goes on at a fixed rate, or a published method
        # that has a bias. What it promises is the contract.
        return Certificate(solver, tuple(contract(solver, next(iter(problems.values())).path)))

    def judge(what: str, measured: Measured, order: float) -> None:
        slopes.append(measured.slope)
        checks.append(Check(what, measured.attains(order), str(measured)))

    for name, problem in problems.items():
        x = starts(problem, batch, event)
        if solver.order == 0:
            errors = tolerance_proportional(solver, problem, x, answer=(answers or {}).get(name))
            holds = all(error < 100 * tol for tol, error in errors.items())
            seen = ", ".join(f"{error:.1e} at {tol:.0e}" for tol, error in errors.items())
            checks.append(Check(f"error follows the tolerance on {name}", holds, seen))
            continue
        answer = None if solver.stochastic else (answers or {}).get(name)
        answer = exact(problem, x) if answer is None and not solver.stochastic else answer
        for grid in grids:
            where, make = f"{name}, {grid} grid", CERTIFIED_GRIDS[grid]
            if solver.stochastic:
                mean, variance = weak_order(solver, problem.path, make, steps=steps)
                judge(f"weak order {solver.order} of the mean, {where}", mean, solver.order)
                judge(f"weak order {solver.order} of the variance, {where}", variance, solver.order)
            else:
                judge(
                    f"order {solver.order}, {where}",
                    measured_order(solver, problem, x, make, steps=steps, answer=answer),
                    solver.order,
                )
    if slopes:
        least = min(slopes)
        checks.append(
            Check("the order is not declared too low", least < solver.order + SLACK, f"least slope {least:.2f}")
        )
    if solver.stochastic:
        linear = gaussian(next(iter(problems.values())).path)
        # One sample of many coordinates, each with its own noise: an average over many paths.
        strong = strong_order(solver, linear, starts(linear, 1, (512,)))
        what = f"strong order {solver.strong_order:g} on one Brownian path"
        checks.append(Check(what, strong.attains(solver.strong_order), str(strong)))
    checks += contract(solver, next(iter(problems.values())).path)
    return Certificate(solver, tuple(checks))


def starts(problem: DiffusionProblem, batch: int = 16, event: Sequence[int] = (2,)) -> Tensor:
    """The states at t_max from which certificates are measured, float64."""
    return _scaled(problem.path, standard_normal((batch, *event), 1, dtype=torch.float64))
