"""How close to the exact solution a budget gets: every deterministic solver of ours, and others', in one run.

The data are mixtures of Gaussians in 2, 16 and 64 dimensions on the VP path, so the prediction is exact and so is, to
1e-12, the solution of the probability-flow ODE. Everybody starts from the same noises in float64, goes from t_max to
t_min, and is charged for every call of the predictor; the distance of a sample is its root mean square distance from
the exact end. Errors are means of distances over samples, what strong convergence is about. Their root mean squares and
medians are shown beside: at few calls one noise in a hundred ends in another mode, and those alone make the former,
which with so few of them is known to a factor of two, while the latter does not see them.

    python -m benchmarks.solvers                 # seven minutes of one core
    python -m benchmarks.solvers --quick         # not in 64 dimensions, up to 20 calls
    python -m benchmarks.solvers --measure rms   # grids fitted to the root mean square
    python -m benchmarks.solvers --check         # exit code 1 unless the goals are met

The peers play at home: k-diffusion's functions and azula's samplers are given all the grids that ours are given (with
azula's samplers on our path), and diffusers' schedulers, driven at their exact noise levels, a table of betas that
begins and ends where the path does and every spacing of noise levels they offer. Their last step, to the data itself,
is left out and not charged for. Optimised grids are fitted and chosen on some noises and measured on others, against
the best of all our solvers on all presets there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import math
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.overhead import _sampling as k_diffusion_sampling
from sdegen.oracles import oracle
from sdegen.paths import VP
from solvers import GRIDS, SOLVERS, DiffusionProblem, Prediction, integrate, optimize_grid, prior
from solvers.certify import exact
from solvers.optimize import MEASURES, distances, gain_interval
from solvers.solve import steps_within

NOISES = {5: 1024, 10: 512, 20: 256, 50: 128, 100: 64}
"""How many noises for each budget: the fewer calls, the more of the error is a matter of a few of them."""
CASES = ("mixture2d", "mixture16", "mixture64")
PRESETS = ("uniform", "quadratic", "sqrt_flow", "logsnr", "karras", "flow")
CONTENDERS = {
    5: ("gradient_estimation", "unipc_1_bh1"),
    10: ("gradient_estimation", "ipndm"),
    20: ("ipndm", "unipc_3"),
}
"""Solvers for which a grid is fitted, by budget."""
GAIN = 1.5
"""The goal for optimised grids."""
FITTED, HELD_OUT = 40960, 20480
"""Noises times budget that a grid is found on, and measured on."""
RIVALS = 10
"""So many of our solvers on presets, the best in the tables, are measured on the held-out noises too."""


class Case(NamedTuple):
    """A problem, noises, and where they lead."""

    name: str
    problem: DiffusionProblem
    x: Tensor
    truth: Tensor


Run = Callable[[DiffusionProblem, Tensor, int], Tensor]
"""(problem, x, budget) -> x at t_min; ValueError where the budget is too small."""


class Entry(NamedTuple):
    whose: str
    method: str
    grid: str
    run: Run


class Result(NamedTuple):
    case: str
    budget: int
    entry: Entry
    errors: dict[str, float]

    @property
    def label(self) -> str:
        whose = "" if self.entry.whose == "ours" else f"{self.entry.whose} "
        return f"{whose}{self.entry.method}, {self.entry.grid}"


def case(name: str, count: int, seed: int = 0) -> Case:
    model = oracle(name)
    problem = model.problem(VP())
    x = prior(problem.path, (count, *model.event_shape), seed=seed, dtype=torch.float64)
    return Case(name, problem, x, exact(problem, x))


def first(given: Case, count: int) -> Case:
    """The same with the first noises only."""
    return given._replace(x=given.x[:count], truth=given.truth[:count])


def attempt(entry: Entry, given: Case, budget: int) -> Result | None:
    """Run, count, measure; None where the budget is too small for it."""
    calls = 0

    def counting(predict: Any) -> Any:
        def counted(x: Tensor, t: Tensor) -> Prediction:
            nonlocal calls
            calls += 1
            return predict(x, t)

        return counted

    try:
        x = entry.run(given.problem.calling(counting), given.x, budget)
    except (ValueError, FloatingPointError):
        return None
    if calls > budget:
        raise RuntimeError(f"{entry.whose} {entry.method} spent {calls} of {budget}")
    apart = distances(x, given.truth)
    return Result(given.name, budget, entry, {name: float(value(apart)) for name, value in MEASURES.items()})


# --- Contestants ------------------------------------------------------------------------------------------------------


def ours(presets: Iterable[str]) -> Iterator[Entry]:
    """Every deterministic solver with fixed steps."""
    for name, solver in SOLVERS.items():
        if solver.stochastic or not solver.nfe_per_step:
            continue
        for grid in presets:

            def run(problem: DiffusionProblem, x: Tensor, budget: int, s: Any = solver, g: str = grid) -> Tensor:
                return integrate(s, problem, x, GRIDS[g](problem.path, steps_within(s, budget))).x

            yield Entry("ours", name, grid, run)


def k_diffusion(presets: Iterable[str]) -> Iterator[Entry]:
    """Its functions, with x / alpha for a state and noise levels for times."""
    library = k_diffusion_sampling()
    silent: dict[str, Any] = {"eta": 0.0, "noise_sampler": lambda a, b: 0.0}
    for method, per_step, options in [
        *(("euler", 1, {}), ("heun", 2, {}), ("dpm_2", 2, {}), ("lms", 1, {}), ("dpmpp_2m", 1, {})),
        *(("dpmpp_2m_sde", 1, silent), ("dpmpp_2m_sde", 1, silent | {"solver_type": "heun"})),
        ("dpmpp_3m_sde", 1, silent),
    ]:
        function = getattr(library, f"sample_{method}")
        label = method + ("_heun" if options.get("solver_type") == "heun" else "")
        for grid in presets:

            def run(
                problem: DiffusionProblem,
                x: Tensor,
                budget: int,
                f: Any = function,
                n: int = per_step,
                o: Any = options,
                g: str = grid,
            ) -> Tensor:
                if budget < n:
                    raise ValueError("too small")
                path = problem.path
                ts = GRIDS[g](path, budget // n)

                def model(y: Tensor, sigma: Tensor) -> Tensor:
                    t = path.time(-2 * sigma[0].log()).clamp(path.t_min, path.t_max)
                    return problem.predict(path.alpha(t) * y, t).x0

                y = f(model, x / path.alpha(ts[0]), (-path.logsnr(ts) / 2).exp(), disable=True, **o)
                return y * path.alpha(ts[-1])

            yield Entry("k-diffusion", label, grid, run)


def azula(presets: Iterable[str]) -> Iterator[Entry]:
    """Its samplers on our path, with our nodes for their times."""
    denoise, sample = (importlib.import_module(f"azula.{name}") for name in ("denoise", "sample"))

    def asking(problem: DiffusionProblem) -> Any:
        class Asked(denoise.Denoiser):
            def __init__(self) -> None:
                super().__init__()
                self.schedule = lambda t: (problem.path.alpha(t), problem.path.sigma(t))

            def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> Any:
                return denoise.DiracPosterior(mean=problem.predict(x_t, t).x0)

        return Asked()

    for kind, per_step, options in [
        *(("DDIM", 1, {}), ("Heun", 2, {}), ("zAB", 1, {"order": 3}), ("zEAB", 1, {"order": 3})),
        *(("vAB", 1, {"order": order}) for order in (2, 3, 4)),
        *(("xEAB", 1, {"order": order}) for order in (2, 3, 4)),
    ]:
        for grid in presets:

            def run(
                problem: DiffusionProblem,
                x: Tensor,
                budget: int,
                k: str = kind,
                n: int = per_step,
                o: Any = options,
                g: str = grid,
            ) -> Tensor:
                if budget < n:
                    raise ValueError("too small")
                ts = GRIDS[g](problem.path, budget // n)
                sampler = type("Here", (getattr(sample, f"{k}Sampler"),), {"timesteps": ts})
                return sampler(asking(problem), steps=budget // n, silent=True, **o)(x)

            yield Entry("azula", kind + "".join(str(order) for order in options.values()), grid, run)


def diffusers(presets: Iterable[str]) -> Iterator[Entry]:
    """Its schedulers, with its own spacings of noise levels."""
    warnings.simplefilter("ignore")
    library = importlib.import_module("diffusers")
    steady = {"lower_order_final": False}
    for label, kind, per_step, options in [
        ("Euler", "EulerDiscrete", 1, {}),
        ("Heun", "HeunDiscrete", 2, {}),
        ("LMS", "LMSDiscrete", 1, {}),
        ("DPM++2M", "DPMSolverMultistep", 1, steady),
        ("DPM++2M heun", "DPMSolverMultistep", 1, steady | {"solver_type": "heun"}),
        ("DPM++3M", "DPMSolverMultistep", 1, steady | {"solver_order": 3}),
        ("DEIS2", "DEISMultistep", 1, steady | {"solver_order": 2}),
        ("DEIS3", "DEISMultistep", 1, steady | {"solver_order": 3}),
        ("UniPC2", "UniPCMultistep", 1, steady | {"solver_order": 2}),
        ("UniPC3", "UniPCMultistep", 1, steady | {"solver_order": 3}),
    ]:
        for spacing in ("linspace", "karras", "exponential", "beta"):

            def run(
                problem: DiffusionProblem,
                x: Tensor,
                budget: int,
                k: str = kind,
                n: int = per_step,
                o: Any = options,
                s: str = spacing,
            ) -> Tensor:
                if budget < n:
                    raise ValueError("too small")
                chosen = {} if s == "linspace" else {f"use_{s}_sigmas": True}
                make = getattr(library, f"{k}Scheduler")
                kept = problem.path.alpha(
                    torch.linspace(problem.path.t_min, problem.path.t_max, 1000, dtype=torch.float64)
                ).square()
                betas = 1 - torch.cat([kept[:1], kept[1:] / kept[:-1]])
                scheduler = make(trained_betas=betas.numpy(), timestep_spacing="linspace", **o, **chosen)
                scheduler.alphas_cumprod = kept
                return _drive(scheduler, budget // n, n, problem, x)

            yield Entry("diffusers", label, spacing, run)


def _drive(scheduler: Any, steps: int, per_step: int, problem: DiffusionProblem, x: Tensor) -> Tensor:
    """Its usual loop, asking at its exact noise levels, up to the cleanest of them."""
    path = problem.path
    scheduler.set_timesteps(steps + 1)
    scaled = float(scheduler.init_noise_sigma) != 1.0  # it works on y = x / alpha

    def time_of(i: int) -> Tensor:
        return path.time(-2 * scheduler.sigmas[i].double().log()).clamp(path.t_min, path.t_max)

    y = x / path.alpha(time_of(0)) if scaled else x
    # The last of its steps would go to the data; in a method of two stages it is one evaluation.
    last = len(scheduler.timesteps) - 1
    for i, label in enumerate(scheduler.timesteps[:last]):
        t = time_of(i)
        eps = problem.predict(y * path.alpha(t) if scaled else y, t).eps
        scheduler.scale_model_input(y, label)  # some insist
        y = scheduler.step(eps, label, y).prev_sample
    return y * path.alpha(time_of(last)) if scaled else y


PEERS = (k_diffusion, azula, diffusers)


# --- Tables -----------------------------------------------------------------------------------------------------------


def sweep(entries: Sequence[Entry], cases: Sequence[Case], budgets: Sequence[int]) -> list[Result]:
    """Everybody on everything, without what failed."""
    given = [(first(each, NOISES[budget]), budget) for each in cases for budget in budgets]
    tried = (attempt(entry, each, budget) for each, budget in given for entry in entries)
    return [result for result in tried if result is not None and math.isfinite(result.errors["rms"])]


def best(results: Iterable[Result], by: str = "mean") -> Result:
    return min(results, key=lambda result: result.errors[by])


def compare(results: Sequence[Result], cases: Sequence[Case], budgets: Sequence[int]) -> dict[str, int]:
    """Our best against theirs; how often ours is worse by more than 1%, in every measure."""
    worse = dict.fromkeys(MEASURES, 0)
    for by in MEASURES:
        print(f"\n{by} of the distances at the data: our best, the peers' best")
        for given in cases:
            for budget in budgets:
                here = [r for r in results if (r.case, r.budget) == (given.name, budget)]
                mine = best((r for r in here if r.entry.whose == "ours"), by)
                others = [r for r in here if r.entry.whose != "ours"]
                line = f"{given.name:<10}{budget:>4}  {mine.errors[by]:9.2e}  {mine.label:<32}"
                if others:
                    theirs = best(others, by)
                    ratio = theirs.errors[by] / mine.errors[by]
                    worse[by] += ratio < 0.99
                    line += f"{theirs.errors[by]:9.2e}  {theirs.label:<36}{ratio:6.2f}x"
                print(line)
    return worse


def optimized(results: Sequence[Result], name: str, measure: Any) -> list[dict[str, float]]:
    """Fit grids for some of our solvers: the gains of the best of them over the best of all ours on all presets.

    Which is the best of them was decided where they were found; the gains are measured on noises of another seed, and
    so are the rivals.
    """
    everywhere, gains = case(name, HELD_OUT // min(CONTENDERS), seed=2), list[dict[str, float]]()
    for budget, contenders in CONTENDERS.items():
        held_out = first(everywhere, HELD_OUT // budget)
        problem, shape = held_out.problem, (FITTED // budget, *held_out.x.shape[1:])
        x = prior(problem.path, shape, seed=1, dtype=torch.float64)
        # Four nodes are free: there is time to look everywhere.
        wide: dict[str, Any] = {"candidates": 300} if budget == 5 else {}
        found = {
            each: optimize_grid(problem, each, budget, x=x, measure=measure, iterations=10, **wide)
            for each in contenders
        }
        chosen = min(found, key=lambda each: found[each].error)

        def apart(run: Run, given: Case = held_out, budget: int = budget) -> Tensor:
            return distances(run(given.problem, given.x, budget), given.truth)

        fitted = found[chosen]
        ours = apart(lambda problem, x, _, fitted=fitted: integrate(fitted.solver, problem, x, fitted.ts).x)
        here = [r for r in results if (r.case, r.budget, r.entry.whose) == (name, budget, "ours")]
        good = {r.label: r.entry for by in MEASURES for r in sorted(here, key=lambda r: r.errors[by])[:RIVALS]}
        rivals = {label: apart(entry.run) for label, entry in good.items()}
        gain = {by: float(min(map(value, rivals.values())) / value(ours)) for by, value in MEASURES.items()}
        gains.append(gain)
        value = MEASURES[measure]
        rival = min(rivals, key=lambda label: float(value(rivals[label])))
        low, high = gain_interval(ours, rivals[rival], measure)
        own = "  ".join(f"{each} {grid.gain:.2f}" for each, grid in found.items())
        print(
            f"{name:<10}{budget:>4}  {float(value(ours)):9.2e}  {chosen:<20}{float(value(rivals[rival])):9.2e}  "
            f"{rival:<24}{gain[measure]:6.2f}x ({low:.2f} to {high:.2f})  "
            + "  ".join(f"{by} {ratio:.2f}" for by, ratio in gain.items() if by != measure)
            + f"  own: {own}"
        )
    return gains


def defaults(results: Sequence[Result]) -> None:
    """How much each of our solvers loses on each grid against its best one: a geometric mean over cases and budgets."""
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    groups: dict[tuple[str, str, int], list[Result]] = defaultdict(list)
    for r in results:
        if r.entry.whose == "ours":
            groups[r.entry.method, r.case, r.budget].append(r)
    for (method, _, _), group in groups.items():
        least = best(group).errors["mean"]
        for r in group:
            cells[method][r.entry.grid].append(math.log(r.errors["mean"] / least))
    print("\nmean distance on a grid over that on the best of these grids, geometric mean over cases and budgets")
    names = sorted({grid for row in cells.values() for grid in row})
    print(f"{'':<22}" + "".join(f"{name:>11}" for name in names) + "    default")
    for method, row in cells.items():
        means = {name: math.exp(sum(row[name]) / len(row[name])) if row[name] else math.inf for name in names}
        print(f"{method:<22}" + "".join(f"{means[name]:11.2f}" for name in names) + f"    {SOLVERS[method].grid}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if asked to check and a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--grids", action="store_true", help="show what each solver loses on each grid")
    parser.add_argument("--measure", choices=["mean", "rms"], default="mean", help="what grids are fitted to")
    parser.add_argument("--check", action="store_true", help="fail unless the goals are met")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    begun = time.thread_time()
    budgets = [budget for budget in NOISES if budget <= 20 or not options.quick]
    names = [name for name in CASES if not (options.quick and name == "mixture64")]
    cases = [case(name, max(NOISES.values())) for name in names]
    entries, absent = list(ours(PRESETS)), []
    for peer in PEERS:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                entries += list(peer(PRESETS))
        except ImportError as error:
            absent.append(f"{peer.__name__} ({error})")
    print(f"{sum(e.whose == 'ours' for e in entries)} of ours, {sum(e.whose != 'ours' for e in entries)} of others")
    if absent:
        print("not installed:", "; ".join(absent))
    results = sweep(entries, cases, budgets)
    print(f"{time.thread_time() - begun:.0f} s of processor time")
    worse = compare(results, cases, budgets)
    if options.grids:
        defaults(results)

    print(f"\noptimised grids, fitted to the {options.measure} on other noises")
    gains: list[dict[str, float]] = []
    for name in names:
        gains += optimized(results, name, options.measure)
    said = ", ".join(f"{count} ({by})" for by, count in worse.items())
    print(f"\nof {len(cases) * len(budgets)} cells our best is worse than the peers' in {said};", end=" ")
    print(f"the optimised grid gains {GAIN} times or more in")
    reached = {by: sum(gain[by] >= GAIN for gain in gains) for by in MEASURES}
    for by, count in reached.items():
        mean = math.exp(sum(math.log(gain[by]) for gain in gains) / len(gains))
        print(f"  {count} of {len(gains)} in the {by} of the distances (geometric mean {mean:.2f})")
    print(f"{time.thread_time() - begun:.0f} s of processor time")
    return int(options.check and (worse["mean"] > 0 or reached[options.measure] < len(gains)))


if __name__ == "__main__":
    sys.exit(main())
