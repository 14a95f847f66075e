"""One solver under examination: what is asked, in which order, and what the answers mean together.

First whether it runs, and whether it sees the curve: if it does not, grids with the same logsnr at their nodes are one
grid, however many paths they lie on. Then what is cheap and sharp: the order of its own steps and of its start in the
middle of the path, or the size of its noise. Then every path and grid, with as many steps as it takes; where something
is wrong already, with no more than shows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from solvers.certify.contract import Check, checked, contract, said
from solvers.certify.convergence import (
    ENOUGH,
    MOST,
    SLACK,
    Measured,
    measured_order,
    rms,
    strong_order,
    tolerance_proportional,
)
from solvers.certify.local import graded, local_order
from solvers.certify.problems import CERTIFIED_GRIDS, exact, gaussian, starts
from solvers.certify.weak import NoiseScale, noise_scale, weak_order
from solvers.grids import Grid, logsnr
from solvers.integrate import Solver, integrate
from solvers.noise import BrownianMotion
from solvers.problem import DiffusionProblem, Path

__all__ = ["Examination"]


class Cell(NamedTuple):
    """A grid, and the problems on which it is the same one for the solver at hand; the first is looked at."""

    names: tuple[str, ...]
    grid: str
    problem: DiffusionProblem

    @property
    def where(self) -> str:
        return f"{'/'.join(self.names)}, {self.grid}"

    @property
    def make(self) -> Grid:
        return CERTIFIED_GRIDS[self.grid]


DIVERGED = Measured((1, 2), (1.0, 1e300))


def _kind(thing: Any) -> str:
    """What it is, in a few words."""
    if isinstance(thing, tuple):
        return f"{len(cast('tuple[Any, ...]', thing))} things"
    return "nothing" if thing is None else type(thing).__name__


@dataclass
class Examination:
    """What was measured so far.

    Attributes:
        solver: the method.
        problems: the same data on several paths, by name.
        grids: names in ``CERTIFIED_GRIDS``.
        batch: samples that are followed.
        event: shape of a sample.
        answers: exact solutions, by the problem's name, as far as they are known.
        cells: errors on the paths and grids so far.
        graded: cells in which the first steps cost order, as declared.
        warm: local errors with exact history.
        cold: local errors from a cold start.
        scales: the size of the noise, at several places.
        free: whether it does not see the curve.
    """

    solver: Solver[Any]
    problems: Mapping[str, DiffusionProblem]
    grids: Sequence[str]
    batch: int
    event: tuple[int, ...]
    answers: dict[str, Tensor]
    cells: dict[Cell, dict[str, Measured]] = field(default_factory=dict[Cell, dict[str, Measured]])
    graded: set[Cell] = field(default_factory=set[Cell])
    warm: Measured | None = None
    cold: Measured | None = None
    scales: list[NoiseScale] = field(default_factory=list[NoiseScale])
    free: bool = False

    def checks(self) -> Iterator[Check]:
        solver, path = self.solver, self.path
        runs = checked("it runs", self._runs)
        if not runs.passed:
            yield runs
            return
        try:
            yield from self._invariance()
        except Exception as error:
            yield Check("it runs", False, said(error))
        if solver.order > 0 and solver.stochastic:
            yield from self._noise()
            yield from self._weak()
            yield from self._too_low()
            yield self._strong()
        elif solver.order > 0:
            yield from self._local()
            yield from self._global()
            yield from self._too_low()
        elif not solver.stochastic and solver.nfe_per_step == 0:
            yield from self._tolerance()
        # What claims no order and follows no tolerance promises the contract alone: a corrector that goes on at a fixed
        # rate, or a published method that has a bias.
        yield from contract(solver, path)

    def _runs(self) -> tuple[bool, str]:
        problem = gaussian(self.path)
        x, ts = starts(problem, 2, (2,)), logsnr(problem.path, 3)
        state = self.solver.init(problem, x, ts)
        out: Any = self.solver.step(problem.at(ts.unbind()), x, ts[0], ts[1], state, BrownianMotion(x, 0))
        if not isinstance(out, tuple) or len(cast("tuple[Any, ...]", out)) != 2:
            return False, f"a step returns a pair, the state at s and what to remember; got {_kind(out)}"
        if not isinstance(out[0], Tensor):
            return False, f"the first of the pair that a step returns is the state, a tensor; got {_kind(out[0])}"
        done = integrate(self.solver, problem, x, ts, noise=BrownianMotion(x, 0))
        return True, f"{done.nfe} calls in 3 steps"

    # --- On every path and grid --------------------------------------------------------------------------------------

    def _invariance(self) -> Iterator[Check]:
        """One grid in logsnr on all paths: the same numbers, up to alpha?"""
        if len(self.problems) < 2 or (self.solver.stochastic and self.solver.nfe_per_step == 0):
            return  # a step that is just accepted here is just rejected there
        problems = list(self.problems.values())
        ends = torch.stack([p.path.logsnr(torch.tensor([p.t_max, p.t_min], dtype=torch.float64)) for p in problems])
        low, high = 0.97 * ends[:, 0].max(), 0.97 * ends[:, 1].min()
        levels = torch.lerp(low, high, torch.linspace(0, 1, 13, dtype=torch.float64) ** 1.2)
        y = starts(problems[0], 4, self.event) / problems[0].path.alpha(torch.tensor(problems[0].t_max).double())
        out: list[Tensor] = []
        for problem in problems:
            path = problem.path
            ts = path.time(levels)
            x = path.alpha(ts[0]) * y
            out.append(integrate(self.solver, problem, x, ts, noise=BrownianMotion(x, 1)).x / path.alpha(ts[-1]))
        gap = max(rms(other - out[0]) for other in out[1:]) / rms(out[0])
        self.free = gap < 1e-9
        if self.solver.invariant or self.free:
            undeclared = "" if self.solver.invariant else ", though not declared"
            yield Check(f"the same sample on {', '.join(self.problems)}", self.free, f"apart by {gap:.0e}{undeclared}")

    def _grouped(self) -> Iterator[Cell]:
        """The grids on all paths, those once that are the same for a solver that does not see the curve."""
        found: list[tuple[list[str], str, DiffusionProblem, Tensor]] = []
        for grid in self.grids:
            for name, problem in self.problems.items():
                levels = problem.path.logsnr(CERTIFIED_GRIDS[grid](problem.path, 20))
                twins = (one for one in found if one[1] == grid and torch.allclose(one[3], levels, atol=1e-9, rtol=0))
                twin = next(twins, None) if self.free else None
                if twin is None:
                    found.append(([name], grid, problem, levels))
                else:
                    twin[0].append(name)
        return (Cell(tuple(names), grid, problem) for names, grid, problem, _ in found)

    def _answer(self, name: str) -> Tensor:
        if name not in self.answers:
            problem = self.problems[name]
            self.answers[name] = exact(problem, starts(problem, self.batch, self.event))
        return self.answers[name]

    @property
    def most(self) -> int:
        """How many steps a grid may have: where something is wrong already, no more than shows it."""
        local = self.own > self.solver.order - SLACK and self.begins > self.start_order - SLACK
        right = local and all(scale.right for scale in self.scales) and not self._short()
        return MOST if right else ENOUGH

    def _short(self) -> list[Cell]:
        """Cells that were looked at, and in which the order is not reached."""
        p, begins = self.solver.order, self.start_order

        def reached(cell: Cell, seen: dict[str, Measured]) -> bool:
            return all(m.attains(begins if cell in self.graded else p) for m in seen.values())

        return [cell for cell, seen in self.cells.items() if not reached(cell, seen)]

    def _global(self) -> Iterator[Check]:
        p, begins = self.solver.order, self.start_order
        for cell in self._grouped():
            x, answer = starts(cell.problem, self.batch, self.event), self._answer(cell.names[0])

            def look(cell: Cell = cell, x: Tensor = x, answer: Tensor = answer) -> tuple[bool, str, Measured]:
                measured = measured_order(self.solver, cell.problem, x, cell.make, answer=answer, most=self.most)
                self.cells[cell] = {"error": measured}
                if measured.attains(p) or begins == p or not measured.attains(begins):
                    return measured.attains(p), self._said(measured), measured
                behind = measured_order(self.solver, cell.problem, x, graded(cell.make), answer=answer)
                if behind.attains(p):
                    self.graded.add(cell)
                return behind.attains(p), f"{measured}; behind a graded start {behind.slope:.2f}", measured

            check = checked(f"order {p}, {cell.where}", look)
            self.cells.setdefault(cell, {"error": DIVERGED})
            yield check

    def _weak(self) -> Iterator[Check]:
        p = self.solver.order
        if not self.solver.linear:
            yield Check(f"weak order {p}", False, "what is not linear has no law to compute: declare order 0")
            return
        for cell in self._grouped():
            try:
                mean, variance = weak_order(self.solver, cell.problem.path, cell.make, most=self.most)
            except Exception as error:
                self.cells[cell] = {"variance": DIVERGED}
                yield Check(f"weak order {p}, {cell.where}", False, said(error))
                continue
            self.cells[cell] = {"mean": mean, "variance": variance}
            for what, measured in self.cells[cell].items():
                yield Check(
                    f"weak order {p}, {what}, {cell.where}", measured.attains(p), self._said(measured), measured
                )

    def _said(self, measured: Measured) -> str:
        more = measured.settled and measured.slope > self.solver.order + SLACK
        return f"{measured}, more than declared" if more else str(measured)

    # --- In the middle of the path -----------------------------------------------------------------------------------

    @property
    def path(self) -> Path:
        return next(iter(self.problems.values())).path

    @property
    def start_order(self) -> int:
        """The order of the whole where the first steps weigh."""
        declared = self.solver.start_order
        return self.solver.order if declared is None else min(declared, self.solver.order)

    @property
    def own(self) -> float:
        """The order of the method's own steps, between exact neighbours."""
        return math.inf if self.warm is None else max(self.warm.slope, self.warm.trend) - 1

    @property
    def begins(self) -> float:
        """The order that the first steps leave to the whole."""
        return math.inf if self.cold is None else max(self.cold.slope, self.cold.trend)

    def _local(self) -> Iterator[Check]:
        p, first = self.solver.order, self.start_order
        try:
            self.warm, self.cold = (local_order(self.solver, self.path, warm=warm) for warm in (True, False))
        except Exception as error:
            yield Check(f"order {p} with exact history", False, said(error))
            return
        yield Check(f"order {p} with exact history", self.own > p - SLACK, f"short steps err by h^{self.own + 1:.2f}")
        yield Check(f"order {first} from a cold start", self.begins > first - SLACK, f"by h^{self.begins:.2f}")

    def _noise(self) -> Iterator[Check]:
        try:
            self.scales = noise_scale(self.solver, self.path) if self.solver.linear else []
        except Exception as error:
            yield Check("the noise is what the drift needs", False, said(error))
        if self.scales:
            worst = max(self.scales, key=lambda scale: abs(scale.scale - 1))
            right = all(scale.right for scale in self.scales)
            yield Check("the noise is what the drift needs", right, str(worst))

    # --- As a whole --------------------------------------------------------------------------------------------------

    def _too_low(self) -> Iterator[Check]:
        seen = [m for cell in self.cells.values() for m in cell.values() if m.slopes]
        shown = [m.slope for m in seen if m.settled] or [m.trend for m in seen]
        least = min([*shown, self.own, self.begins])
        if not self._short() and math.isfinite(least):
            low = least < self.solver.order + SLACK
            yield Check("the order is not declared too low", low, f"least order seen {least:.2f}")

    def _strong(self) -> Check:
        linear, declared = gaussian(self.path), self.solver.strong_order

        def look() -> tuple[bool, str, Measured]:
            # One sample of many coordinates, each with its own noise: an average over many paths. A slope from 256 of
            # them has a standard error of 0.1, half of what is allowed.
            measured = strong_order(self.solver, linear, starts(linear, 1, (4096,)))
            return measured.attains(declared), str(measured), measured

        return checked(f"strong order {declared:g} on one Brownian path", look)

    def _tolerance(self) -> Iterator[Check]:
        names = list(self.problems)
        for seen_on in [names] if self.free else [[name] for name in names]:
            problem, answer = self.problems[seen_on[0]], self._answer(seen_on[0])
            x = starts(problem, self.batch, self.event)

            def look(problem: DiffusionProblem = problem, x: Tensor = x, answer: Tensor = answer) -> tuple[bool, str]:
                errors = tolerance_proportional(self.solver, problem, x, answer=answer)
                seen = ", ".join(f"{error:.1e} at {tol:.0e}" for tol, error in errors.items())
                return all(error < 100 * tol for tol, error in errors.items()), seen

            yield checked(f"error follows the tolerance, {'/'.join(seen_on)}", look)

    # --- In words ----------------------------------------------------------------------------------------------------

    def findings(self) -> Iterator[str]:
        """What is wrong, as far as orders and noise say it; a broken promise of the contract says it itself."""
        p = self.solver.order
        wrong = [scale for scale in self.scales if not scale.right]
        if wrong:
            worst = max(wrong, key=lambda scale: abs(scale.scale - 1))
            if math.isinf(worst.scale):
                yield "its drift needs no noise at all (it is that of the probability-flow ODE), and noise is added"
            else:
                much = "much" if worst.scale > 1 else "little"
                yield f"{100 * abs(worst.scale - 1):.2g} % too {much} noise for its drift"
        bad = set(self._short())
        well = set(self.cells) - bad
        uneven = bool(well) and {cell.grid for cell in bad} == {"uneven"} and "uneven" not in {c.grid for c in well}
        if uneven:
            yield "the order is lost where neighbouring steps differ: are its weights those of equal steps?"
        elif self.own < 0.5:
            yield "a short step is wrong by a share of its length: its coefficients do not add up to the step"
        elif self.own < p - SLACK:
            yield f"its own steps, with exact history, are of order {self.own:.1f}, not {p}: is a coefficient off?"
        elif self.begins < self.start_order - SLACK:
            yield (
                f"the first steps are of order {self.begins - 1:.1f} and leave order {self.begins:.1f} to the whole, "
                f"not {self.start_order}: begin with a better method (Warmup), or declare start_order"
            )
        paths = {name for cell in bad for name in cell.names}
        if well and not paths & {name for cell in well for name in cell.names}:
            yield f"fails on {' and '.join(sorted(paths))} only: does a formula hold for the other paths alone?"
        short = [m for cell in bad for m in self.cells[cell].values() if not m.attains(p)]
        stuck = [m.errors[-1] for m in short if abs(m.slope) < 0.5 and m.errors[-1] < 1e-5]
        slopes = [m.slope for m in short]
        if stuck:
            yield f"errors stop falling at {max(stuck):.0e}: is something computed in float32?"
        elif slopes and min(slopes) < -1:
            yield "its errors grow when steps are refined"
        elif slopes and max(slopes) < p - SLACK:
            least, most = f"{min(slopes):.1f}", f"{max(slopes):.1f}"
            yield f"the order seen is {least if least == most else f'{least} to {most}'}, declared is {p}"
