"""What every solver owes its caller, whatever its order: shapes, bits, counts, times.

Each promise is looked at where it would be broken: a state of other shape and dtype, the same seed twice, one sample
alone and in company, two solves taken in turns, a step that goes nowhere, a start moved in its twelfth digit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from os.path import basename, dirname
from sysconfig import get_path
from traceback import extract_tb
from typing import Any

import torch
from torch import Tensor

from solvers.certify.convergence import Measured, rms
from solvers.certify.problems import gaussian, starts
from solvers.grids import logsnr, uniform
from solvers.integrate import Solver, integrate
from solvers.noise import BrownianMotion
from solvers.problem import DiffusionProblem, Path, Prediction

__all__ = ["Check", "checked", "contract", "said"]


@dataclass(frozen=True)
class Check:
    """One line of a certificate.

    Attributes:
        what: what was looked at.
        passed: whether it holds.
        seen: what was seen.
        measured: the errors, where it is about an order.
    """

    what: str
    passed: bool
    seen: str = ""
    measured: Measured | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.what:<44} {self.seen}".rstrip()


Look = Callable[[], tuple[bool, str] | tuple[bool, str, Measured]]


def checked(what: str, look: Look) -> Check:
    """A check whose look may go wrong: a solver that raises has failed it, and the others go on."""
    try:
        passed, seen, *measured = look()
        return Check(what, passed, seen, *measured)
    except Exception as error:
        return Check(what, False, said(error))


def said(error: Exception) -> str:
    """An error in one line, and in which line of the solver's file it happened."""
    frames = [f for f in extract_tb(error.__traceback__) if not f.filename.startswith(OTHERS)]
    where = f" ({basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    text = re.sub(r"[\w.]+\.<locals>\.", "", " ".join(str(error).split()))  # where we define a function is our affair
    return f"{type(error).__name__}: {text}{where}"


OTHERS = (dirname(dirname(__file__)), *map(get_path, ("stdlib", "purelib", "platlib")), "<")
"""Where code lies that the author of a solver did not write: ours, Python's, that of libraries."""


def contract(solver: Solver[Any], path: Path, *, steps: int = 10, event: Sequence[int] = (2, 4, 4)) -> Iterator[Check]:
    """What every solver owes its caller, on Gaussian data, whose exact denoiser works element by element.

    Args:
        solver: the method.
        path: a Gaussian path.
        steps: of the grid.
        event: shape of a sample besides vectors (2,).
    """
    bench = _Bench(solver, path, steps, tuple(event))
    looks: dict[str, Look] = {
        "shape and dtype of the state are kept": bench.keeps_shapes,
        "same seed, same bits": bench.repeats,
    }
    if solver.stochastic:
        looks["another seed, another sample"] = bench.hears_the_seed
    looks["a sample does not see its batch"] = bench.each_alone
    looks["nothing is kept between solves"] = bench.forgets
    if solver.nfe_per_step > 0:
        looks["counted calls are the declared ones"] = bench.counts
        if _steps_anywhere(solver, path):
            looks["a step uses its times"] = bench.knows_the_time
            looks["float64 is float64 inside"] = bench.keeps_digits
    else:
        looks["calls are counted"] = bench.counts_something
    if not solver.stochastic:
        looks["t -> s -> t comes back"] = bench.comes_back
    looks["nothing is asked outside the path's range"] = bench.stays_inside
    before = torch.random.get_rng_state()
    for what, look in looks.items():
        yield checked(what, look)
    after = torch.random.get_rng_state()
    yield Check("the global random state is untouched", torch.equal(before, after))


def _steps_anywhere(solver: Solver[Any], path: Path) -> bool:
    """Whether it solves over a part of the path: a restart needs its interval on the way."""
    problem, ts = gaussian(path), path.time(torch.linspace(-0.5, 0.5, 4, dtype=torch.float64))
    x = starts(problem, 1, (2,))
    try:
        integrate(solver, problem, x, ts, noise=BrownianMotion(x, 0))
    except ValueError:
        return False
    return True


class _Bench:
    """One solver, and what is done to it."""

    def __init__(self, solver: Solver[Any], path: Path, steps: int, event: tuple[int, ...]) -> None:
        self.solver, self.path = solver, path
        self.steps = steps if solver.nfe_per_step > 0 else 3  # each of which is a solve of its own
        self.times: list[float] = []
        self.problem = gaussian(path).calling(self._noting)
        self.ts = logsnr(path, steps)
        self.images, self.vectors = starts(self.problem, 3, event), starts(self.problem, 3, (2,))

    def _noting(self, predict: Any) -> Any:
        def call(x: Tensor, t: Tensor) -> Prediction:
            self.times.extend(map(float, t.reshape(-1)))
            return predict(x, t)

        return call

    def run(self, x: Tensor, ts: Tensor | None = None, seed: int = 5, samples: Sequence[int] | None = None) -> Any:
        noise = BrownianMotion(x, seed, samples=samples)
        return integrate(self.solver, self.problem, x, self.ts if ts is None else ts, noise=noise)

    def walk(self, x: Tensor, ts: Tensor) -> Iterator[Tensor]:
        """The states of a solve, one after the other, so that something else may happen in between."""
        nodes, noise = ts.unbind(), BrownianMotion(x, 5)
        problem = self.problem.at(nodes)
        state = self.solver.init(problem, x, ts)
        for t, s in pairwise(nodes):
            x, state = self.solver.step(problem, x, t, s, state, noise)
            yield x

    # --- The looks ---------------------------------------------------------------------------------------------------

    def keeps_shapes(self) -> tuple[bool, str]:
        for x in (self.images, self.vectors, self.images.float(), self.vectors.float()):
            start = x.clone()
            out = self.run(x).x
            if out.shape != x.shape or out.dtype != x.dtype:
                return False, f"{x.dtype} {tuple(x.shape)} became {out.dtype} {tuple(out.shape)}"
            if not bool(out.isfinite().all()):
                return False, f"not finite for {x.dtype} {tuple(x.shape)}"
            if not torch.equal(start, x):
                return False, "the start was written to"
        return True, "(B, C, H, W), (B, 2); float32, float64"

    def repeats(self) -> tuple[bool, str]:
        first, again = (self.run(self.images.float()) for _ in range(2))
        gap = rms(first.x - again.x)
        return torch.equal(first.x, again.x), f"seed {first.seed}" if gap == 0 else f"apart by {gap:.1e}"

    def hears_the_seed(self) -> tuple[bool, str]:
        first, other = (self.run(self.images.float(), seed=seed).x for seed in (5, 6))
        return not torch.equal(first, other), ""

    def each_alone(self) -> tuple[bool, str]:
        x = self.images.float()
        together, alone = self.run(x).x[1:2], self.run(x[1:2], samples=[1]).x
        gap = rms(together - alone)
        if self.solver.nfe_per_step > 0:
            return torch.equal(together, alone), "bit for bit" if gap == 0 else f"apart by {gap:.1e}"
        return gap < 1e-3, "bit for bit" if gap == 0 else f"apart by {gap:.1e}: one step size for the batch"

    def forgets(self) -> tuple[bool, str]:
        """Another solve in between, and another solve at the same time, change nothing."""
        x, other = self.vectors, self.vectors.flip(0)[:2] * 0.7
        ts, theirs = self.ts[2:], uniform(self.path, self.steps + 3)
        before = self._attributes()
        first = [*self.walk(x, ts)][-1]
        _ = [*self.walk(other, theirs)]
        again = [*self.walk(x, ts)][-1]
        taken_in_turns = [
            mine for mine, _ in zip_longest(self.walk(x, ts), self.walk(other, theirs)) if mine is not None
        ]
        changed = [name for name, value in self._attributes().items() if before.get(name) != value]
        if changed:
            return False, f"a solve changes the solver's {', '.join(changed)}"
        if not torch.equal(first, again):
            return False, f"after another solve the same one is apart by {rms(first - again):.1e}"
        gap = rms(taken_in_turns[-1] - first)
        return (
            gap == 0,
            "other solves before and in between" if gap == 0 else f"two solves in turns: apart by {gap:.1e}",
        )

    def _attributes(self) -> dict[str, str]:
        """What the solver, and its class, hold."""
        return {name: repr(value) for name, value in {**vars(type(self.solver)), **vars(self.solver)}.items()}

    def counts(self) -> tuple[bool, str]:
        n = (1, 2, self.steps)
        spent = [self.run(self.vectors, logsnr(self.path, steps)).nfe for steps in n]
        declared = [self.solver.nfe(steps) for steps in n]
        where = f"in {', '.join(map(str, n))} steps"
        return spent == declared, f"{spent} {where}" if spent == declared else f"{spent} {where}, declared {declared}"

    def counts_something(self) -> tuple[bool, str]:
        done = self.run(self.vectors)
        return done.nfe > 0, f"{done.nfe} over {self.steps} intervals"

    def knows_the_time(self) -> tuple[bool, str]:
        """A step goes where it is told from where it is told, and nowhere when told to stay."""
        x = self.vectors
        t, s, beyond = self.path.time(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)).unbind()

        def blind(x: Tensor, t: Tensor) -> Prediction:
            return Prediction(0.3 * x, 0.7 * x)  # eps = x would hold the state of the flow path where it is

        def one(t: Tensor, s: Tensor) -> tuple[list[float], Tensor]:
            self.times.clear()
            problem = DiffusionProblem(self.path, self._noting(blind))
            state = self.solver.init(problem, x, torch.stack([t, s]))
            out, _ = self.solver.step(problem, x, t, s, state, lambda a, b: torch.ones_like(x))
            return [*self.times], out

        def same(a: tuple[list[float], Tensor], b: tuple[list[float], Tensor]) -> bool:
            return a[0] == b[0] and torch.equal(a[1], b[1])

        self.times.clear()
        self.run(x)
        asked = len(set(self.times))
        if asked < min(self.steps, self.solver.nfe(self.steps)):
            return False, f"asks at {asked} different time{'s' * (asked != 1)} in {self.steps} steps"
        whole, short, later = one(t, beyond), one(t, s), one(s, beyond)
        if same(whole, short):
            return False, "where a step goes makes no difference"
        if same(whole, later):
            return False, "where a step begins makes no difference"
        if not self.solver.stochastic:
            near = self.path.time(torch.tensor(-1.0 + 2e-6, dtype=torch.float64))
            moved = rms(next(self.walk(x, torch.stack([t, near]))) - x) / rms(x)
            if moved > 1e-3:
                return False, f"a step of no length moves the state by {100 * moved:.1f} %"
        return True, "its start and its end"

    def keeps_digits(self) -> tuple[bool, str]:
        """A start moved in its tenth digit moves the result as one moved in its fourth does.

        Over a short way: a stochastic solve forgets its start.
        """
        x, way = self.vectors, self.vectors.flip(0)
        ts = self.path.time(torch.linspace(-0.5, 0.5, 4, dtype=torch.float64))
        base = self.run(x, ts).x
        fine, coarse = ((self.run(x + size * way, ts).x - base) / size for size in (1e-10, 1e-4))
        lost = rms(fine - coarse) / rms(coarse)
        return lost < 1e-2, "" if lost < 1e-2 else f"a start moved in its tenth digit: {lost:.0%} of the effect is lost"

    def comes_back(self) -> tuple[bool, str]:
        x, errors = self.vectors, list[float]()
        for n in (4 * self.steps, 8 * self.steps):
            ts = logsnr(self.path, n)
            errors.append(rms(self.run(self.run(x, ts).x, ts.flip(0)).x - x) / rms(x))
        fell = errors[1] < 0.75 * errors[0] or errors[1] < (1e-4 if self.solver.nfe_per_step else 1e-3)
        return fell, f"{errors[0]:.1e}, {errors[1]:.1e} with twice the steps"

    def stays_inside(self) -> tuple[bool, str]:
        self.times.clear()
        self.run(self.vectors)
        if not self.solver.stochastic:
            self.run(self.vectors, self.ts.flip(0))
        low, high = min(self.times), max(self.times)
        return self.path.t_min <= low and high <= self.path.t_max, f"t in [{low:.3g}, {high:.3g}]"
