"""What a log-density by the ODE costs, and how noisy its trace is: ``python -m benchmarks.likelihood``.

**Accuracy per cost.** On exact mixtures of Gaussians in 2, 16 and 64 dimensions (with a trace that is exact, too) every
method is run on a ladder of tolerances, or of steps, and the cheapest rung is taken from which on all errors stay below
1e-3 nats per dimension: once the mean error over the batch, once the worst. Ours choose steps for every sample; the
peers are called as their users call them, the whole batch as one system: torchdiffeq's dopri5 with a tuple of states
and log-densities, scipy's RK45 on all numbers in one vector. They integrate in the path's own time, and once more where
ours do, which tells what is due to the variable and what to the coupling.

**In which variable** an adaptive solve is cheapest, at equal tolerance, on four paths.

**Noise of Hutchinson's trace** at equal network calls and equal probes, on a mixture in 64 dimensions that is fitted to
handwritten digits, and with ``--run RUN`` on a trained network and its held-out data.

    python -m benchmarks.likelihood                   # ten minutes of one core
    python -m benchmarks.likelihood --quick           # not in 64 dimensions
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.bound_variance import mixture
from sdegen.building import restore
from sdegen.likelihood import Hutchinson, log_density, ode_likelihood
from sdegen.likelihood.control import LinearGaussian
from sdegen.likelihood.log_density import VARIABLES, Route
from sdegen.likelihood.trace import Field, Trace, Walk
from sdegen.models import GaussianDiffusion
from sdegen.oracles import MixtureOracle, oracle
from sdegen.paths import VE, VP, Flow, LinearBeta, LinearLogSNR
from solvers import DiffusionProblem, Path, expand, standard_normal

CASES = {"mixture2d": 64, "mixture16": 64, "mixture64": 32}
"""Oracles, and how many samples are in a batch."""
GOAL = 1e-3
"""Nats per dimension."""
TOLERANCES = [10 ** (-k / 2) for k in range(2, 15)]  # 0.1 to 1e-7
PATHS: dict[str, Path] = {
    "VP, linear beta": VP(LinearBeta(), t_min=1e-3),
    "VP, linear logsnr": VP(LinearLogSNR(8, -8)),
    "straight line": Flow(t_min=0.002, t_max=0.998),
    "VE": VE(0.02, 30),
}


@dataclass(frozen=True)
class Known(Trace):
    """The trace of an oracle's Jacobian, from its posterior covariance: exact, and cheap in 64 dimensions.

    d eps / dz = (1 - (alpha / sigma)^2 Cov[x0 | z]) / sigma.
    """

    truth: MixtureOracle
    exact = True

    def vjps(self, dims: int) -> int:
        return dims

    def start(self, z: Tensor, path: Path, samples: Sequence[int], *, fixed_steps: bool) -> Walk:
        return _Known(self.truth, path)

    def at(self, z: Tensor, path: Path, t: Tensor) -> Tensor:
        """(B,)."""
        alpha, sigma = path.alpha(t), path.sigma(t)
        cov = self.truth.posterior_cov(z, path, t).diagonal(dim1=1, dim2=2).sum(1)
        return (z[0].numel() - (alpha / sigma) ** 2 * cov) / sigma


class _Known(Walk):
    columns = 1

    def __init__(self, truth: MixtureOracle, path: Path) -> None:
        self.trace, self.path = Known(truth), path

    def __call__(self, field: Field, x: Tensor, t: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        return field(x), self.trace.at(x, self.path, t)[:, None]

    def read(self, integrals: Tensor) -> tuple[Tensor, Tensor]:
        return integrals[:, 0], torch.zeros_like(integrals[:, 0])


class Case(NamedTuple):
    """States at the clean end of a path, and their log-densities."""

    truth: MixtureOracle
    path: Path
    z: Tensor
    exact: Tensor

    @classmethod
    def of(cls, truth: MixtureOracle, path: Path, n: int) -> Case:
        t = torch.tensor(path.t_min, dtype=torch.float64)
        x = truth.sample(n, seed=2)
        z = path.alpha(t) * x + path.sigma(t) * standard_normal(x.shape, 3, dtype=torch.float64)
        return cls(truth, path, z, truth.log_prob_t(z, path, t))

    @property
    def problem(self) -> DiffusionProblem:
        return self.truth.problem(self.path)

    def error(self, end: Tensor, log_det: Tensor) -> Tensor:
        """Nats per dimension, with the true density at the noisy end, (B,)."""
        t = torch.tensor(self.path.t_max, dtype=torch.float64)
        return (self.truth.log_prob_t(end, self.path, t) + log_det - self.exact).abs() / self.z[0].numel()


class Outcome(NamedTuple):
    """Errors in nats per dimension and network calls of the samples of a batch."""

    error: Tensor
    calls: Tensor


Method = Callable[[Case, float], Outcome]
"""(case, tolerance) -> outcome."""


# --- methods ----------------------------------------------------------------------------------------------------------


def ours(case: Case, tol: float, **settings: Any) -> Outcome:
    """Every sample its own steps, who has arrived leaves."""
    problem = case.problem
    found = log_density(problem, case.z, trace=Known(case.truth), tol=tol, select=lambda rows: problem, **settings)
    assert found.spent is not None
    return Outcome(case.error(found.z, found.log_det), found.spent.double())


def small_steps(case: Case, tol: float) -> Outcome:
    """With the bound on steps that other variables need."""
    return ours(case, tol, solver="dopri54")


def fixed(case: Case, tol: float) -> Outcome:
    """RK4 on the default grid; the rungs are numbers of steps, 4 calls each."""
    steps = 4 + 2 * TOLERANCES.index(tol)
    found = log_density(case.problem, case.z, trace=Known(case.truth), steps=steps)
    return Outcome(case.error(found.z, found.log_det), torch.full_like(case.exact, 4.0 * steps))


def coupled(case: Case, tol: float, library: str, variable: str) -> Outcome:
    """The batch as one system, as the library's users call it."""
    there = Route.of(case.path, Known(case.truth), variable=variable).path
    predict = case.problem.predict if there is case.path else case.problem.rescaled(there).predict
    here, ends = (torch.tensor([p.t_min, p.t_max], dtype=torch.float64) for p in (case.path, there))
    scales = case.path.alpha(here) / there.alpha(ends)
    trace, dims, calls = Known(case.truth), case.z[0].numel(), 0

    def velocity(time: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        x, t = state[0], time.clamp(float(ends[0]), float(ends[1]))
        f, c = there.f(t), there.g2(t) / (2 * there.sigma(t))
        return expand(f, x) * x + expand(c, x) * predict(x, t).eps, dims * f + c * trace.at(x, there, t)

    start = (case.z / scales[0], torch.zeros_like(case.exact))
    if library == "torchdiffeq":
        done = importlib.import_module("torchdiffeq").odeint(velocity, start, ends, rtol=tol, atol=tol, method="dopri5")
        x, log_det = done[0][-1], done[1][-1]
    else:
        size = case.z.numel()

        def flat(time: float, y: Any) -> Any:
            state = torch.as_tensor(y)
            parts = state[:size].reshape(case.z.shape), state[size:]
            v = velocity(torch.tensor(time, dtype=torch.float64), parts)
            return torch.cat([v[0].flatten(), v[1]]).numpy()

        begin = torch.cat([start[0].flatten(), start[1]]).numpy()
        span = (float(ends[0]), float(ends[1]))
        done = importlib.import_module("scipy.integrate").solve_ivp(flat, span, begin, rtol=tol, atol=tol)
        y = torch.as_tensor(done.y[:, -1])
        x, log_det = y[:size].reshape(case.z.shape), y[size:]
    log_det = log_det + dims * (scales[1] / scales[0]).log()
    return Outcome(case.error(scales[1] * x, log_det), torch.full_like(case.exact, float(calls)))


METHODS: dict[str, Method] = {
    "ours: own steps, flow time": ours,
    "ours: the same, no step over 1/8 of the range": small_steps,
    "ours: RK4, fixed steps, flow time": fixed,
    "torchdiffeq dopri5, t": lambda case, tol: coupled(case, tol, "torchdiffeq", "t"),
    "torchdiffeq dopri5, flow time": lambda case, tol: coupled(case, tol, "torchdiffeq", "flow"),
    "scipy RK45, t": lambda case, tol: coupled(case, tol, "scipy", "t"),
    "scipy RK45, flow time": lambda case, tol: coupled(case, tol, "scipy", "flow"),
}


def cheapest(ladder: Sequence[Outcome], judge: Callable[[Tensor], Tensor]) -> int | None:
    """The first rung from which on the judged error stays below the goal."""
    fine = [float(judge(outcome.error)) <= GOAL for outcome in ladder]
    return next((i for i in range(len(fine)) if all(fine[i:])), None)


def accuracy(names: Iterable[str]) -> None:
    """Network calls to the goal."""
    print(f"\nNetwork calls to {GOAL:g} nats per dimension, VP path\n")
    print(
        "| case | method | to a mean error of 1e-3 | to a worst error of 1e-3 | tolerance | worst / mean error there |"
    )
    print("|---|---|---:|---:|---:|---:|")
    for name in names:
        case = Case.of(_mixture(name), VP(), CASES[name])
        for method, run in METHODS.items():
            ladder = [run(case, tol) for tol in TOLERANCES]
            mean, worst = (cheapest(ladder, judge) for judge in (torch.mean, torch.max))
            if mean is None or worst is None:
                print(f"| {name} | {method} | not reached | | | |")
                continue
            rung = "-" if run is fixed else f"{TOLERANCES[worst]:.0e}"
            error = ladder[worst].error
            print(
                f"| {name} | {method} | {_calls(ladder[mean])} | {_calls(ladder[worst])} | {rung} | "
                f"{float(error.max() / error.mean()):.0f} |"
            )


def _calls(outcome: Outcome) -> str:
    """The mean, and the largest where samples differ."""
    mean, most = float(outcome.calls.mean()), float(outcome.calls.max())
    return f"{mean:.0f}" if mean == most else f"{mean:.0f} (worst {most:.0f})"


def variables(names: Iterable[str], tol: float = 1e-4) -> None:
    """Calls and errors at one tolerance."""
    print(
        f"\nEach sample its own steps, tolerance {tol:g}: mean calls, and mean and worst error in nats per dimension\n"
    )
    print("| case | path | " + " | ".join(VARIABLES) + " |")
    print("|---|---|" + "---|" * len(VARIABLES))
    for name in names:
        for title, path in PATHS.items():
            case = Case.of(_mixture(name), path, 16)
            cells = []
            for variable in VARIABLES:
                found = ours(case, tol, variable=variable)
                cells.append(f"{float(found.calls.mean()):.0f}: {found.error.mean():.0e}, {found.error.max():.0e}")
            print(f"| {name} | {title} | " + " | ".join(cells) + " |")


def _mixture(name: str) -> MixtureOracle:
    found = oracle(name)
    assert isinstance(found, MixtureOracle)
    return found


# --- noise of the trace -----------------------------------------------------------------------------------------------


def schemes(control: LinearGaussian) -> dict[str, tuple[Hutchinson, dict[str, Any]]]:
    """Name -> trace and settings; all take close to 96 calls and one product for each."""
    one = Hutchinson()
    stays, steps = replace(one, redraw=False), {"solver": "rk4", "steps": 24}
    return {
        "a probe that stays, RK4": (stays, steps),
        "a probe that stays, own steps (tolerance 1e-5)": (one, {"tol": 1e-5}),
        "a probe that stays, own steps, control": (replace(one, control=control), {"tol": 1e-5}),
        "held for a step, RK4": (replace(one, hold=4), steps),
        "held for a step, control": (replace(one, hold=4, control=control), steps),
        "fresh at every evaluation, RK4": (one, steps),
        "fresh, control (the default)": (replace(one, control=control), steps),
    }


def noise(truth: MixtureOracle, images: int, repetitions: int) -> None:
    """Standard deviation of the log-density of one image over probes."""
    path = VP(LinearLogSNR(7.88, -5))
    case = Case.of(truth, path, images)
    dims, rows = case.z[0].numel(), case.z.repeat_interleave(repetitions, 0)
    control = LinearGaussian.fit(truth.sample(1437, seed=9))
    print(f"\nHutchinson's trace on a mixture fitted to digits, {dims} dimensions, one probe, {images} images\n")
    print("| | calls | std of one image, nats | bits/dim | times less |")
    print("|---|---:|---:|---:|---:|")
    base = 0.0
    for name, (trace, settings) in schemes(control).items():
        found = log_density(truth.problem(path), rows, trace=trace, **settings)
        std = math.sqrt(float(found.log_prob.reshape(images, repetitions).var(1).mean()))
        base = base or std
        calls = found.forward if found.spent is None else float(found.spent.double().mean())
        print(f"| {name} | {calls:.0f} | {std:.2f} | {std / dims / math.log(2):.4f} | {base / std:.1f} |")


def network(folder: str, images: int) -> None:
    """The same on a trained network: z_0 is held, so that the spread is that of the probes."""
    data, model = restore(folder)
    if not isinstance(model, GaussianDiffusion):
        raise SystemExit(f"{folder} holds no diffusion")
    x = data.test[:images]
    control = LinearGaussian.fit(data.train)
    with torch.no_grad():
        z = model.encode(x).bottom.sample(standard_normal(x.shape, 0))
    print(f"\nThe same on {folder}, {images} held-out images, eight probes side by side\n")
    print("| | calls | std of one image and probe, nats | bits/dim | times less |")
    print("|---|---:|---:|---:|---:|")
    base = 0.0
    for name, (trace, settings) in schemes(control).items():
        found = log_density(
            model.problem(), z, trace=replace(trace, probes=8), select=lambda rows: model.problem(), **settings
        )
        std = math.sqrt(8 * float(found.trace_variance.mean()))
        base = base or std
        print(f"| {name} | {found.forward:.0f} | {std:.2f} | {std / model.dims / math.log(2):.4f} | {base / std:.1f} |")
    report = ode_likelihood(model, x)
    print(f"\n{report}")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="not in 64 dimensions")
    parser.add_argument("--run", help="a trained diffusion of grey levels")
    parser.add_argument("--images", type=int, default=16, help="whose noise is measured")
    parser.add_argument("--repetitions", type=int, default=64, help="probes of each")
    chosen = parser.parse_args(words)
    torch.set_num_threads(1)
    began = time.perf_counter()
    names = list(CASES)[: 2 if chosen.quick else None]
    accuracy(names)
    variables(names)
    if not chosen.quick:
        noise(mixture(), chosen.images, chosen.repetitions)
    if chosen.run:
        network(chosen.run, chosen.images)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
