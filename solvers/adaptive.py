"""Solvers that choose their steps, every sample its own.

A pair of methods that share their evaluations gives a result and, as the difference of the two, an estimate of what is
wrong with it. A step whose estimate

    E = rms( error / (atol + rtol max(|x_t|, |x_s|)) )        over the coordinates of one sample

is at most 1 is accepted, and E says how long the next may be: with an error of order h^k, the step that would have had
E = 1 is h E^(-1/k). The PI controller also looks at the E before,

    h <- 0.9 h E^(-0.7 / k) E_before^(0.4 / k),

which keeps sizes from swinging; after a rejection h <- 0.9 h E^(-1 / k).

Libraries measure E over the batch, so that a sample is another one in other company. Here a batch is integrated
together and decided apart: time, step, error and acceptance are those of each sample, and x and t are replaced where a
step was accepted and kept where it was not. Who has arrived leaves, if the problem says how to do without it
(:attr:`solvers.problem.ODE.select`), and else waits in its row: a predictor may have conditions by row.
Every operation works element by element, and the one sum, that of E, in an order that is fixed (:func:`rms`): with a
predictor that does the same, a sample alone and in company has the same bits.

What a step of the tableaux has seen last is what the next sees first (FSAL), and nobody looks again at a place after a
rejection. The state, the times and the decisions stay on the device of the state; the host asks them once in ``look``
tries who has arrived.

On which curve and in which clock steps are chosen is said by :class:`solvers.combine.OnPath`, as for any method, and it
matters as much as the method: ``OnPath(DormandPrince54(), VP_LAM)`` needs half of the evaluations of others.

Reference: Hairer, Noersett and Wanner 1993, Solving Ordinary Differential Equations I, section II.4; Soederlind 2003,
doi:10.1145/641876.641877 (the controller).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from solvers.integrate import Solver
from solvers.noise import Noise, silent
from solvers.problem import ODE, Problem, mix
from solvers.runge_kutta import BogackiShampine, DormandPrince, Tableau

__all__ = [
    "Adaptive",
    "Attempt",
    "BogackiShampine32",
    "DormandPrince54",
    "EmbeddedRungeKutta",
    "rms",
]


def rms(x: Tensor) -> Tensor:
    """Root mean square of each sample, (B,), summed in an order that does not depend on the batch.

    >>> rms(torch.tensor([[3.0, 3.0, 3.0], [0.0, 0.0, 6.0]]))
    tensor([3.0000, 3.4641])
    """
    parts = x.reshape(len(x), -1).square()
    count = parts.shape[1]
    while parts.shape[1] > 1:  # halves are added to halves
        half = parts.shape[1] // 2
        parts = torch.cat([parts[:, :half] + parts[:, half : 2 * half], parts[:, 2 * half :]], 1)
    return (parts[:, 0] / count).sqrt()


class Ledger(NamedTuple):
    """What an adaptive method hands from interval to interval.

    Attributes:
        size: length of the next step of each sample, (B,); None before the first.
        evaluations: of each sample so far, (B,) whole numbers.
    """

    size: Tensor | None
    evaluations: Tensor


class Attempt(NamedTuple):
    """A step that was tried.

    Attributes:
        x: where it leads.
        error: the estimated error of that, of the same shape.
        first: what the step after it begins with, where that is known already.
    """

    x: Tensor
    error: Tensor
    first: tuple[Tensor, ...] | None = None


class _Running(NamedTuple):
    """Where the samples are; every part has one row for each."""

    x: Tensor
    t: Tensor
    size: Tensor
    before: Tensor  # E of the last accepted step
    calm: Tensor  # whether the last step was accepted
    evaluations: Tensor
    first: tuple[Tensor, ...]

    def rows(self, which: Tensor) -> _Running:
        """Some of the samples."""
        x, t, size, before, calm, evaluations = (part[which] for part in self[:6])
        return _Running(x, t, size, before, calm, evaluations, tuple(part[which] for part in self.first))


T = TypeVar("T", bound="Adaptive")


@dataclass(frozen=True)
class Adaptive(Solver[Ledger]):
    """A method that chooses its steps; a subclass says how one is tried.

    Args:
        rtol: relative tolerance.
        atol: absolute tolerance.
        tries: how many steps are tried in one interval of the grid before it is given up.
        look: on an accelerator, how many tries are made between two looks at whether all have arrived.
        longest: step that is allowed, as a share of the problem's range: on a VP path nothing moves at either end, and
            a step over all that does can look harmless.

    Attributes:
        exponent: k, the order in h of the error of one step.
        stages: evaluations of a step that is tried, after the first.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    tries: int = 10_000
    look: int = 4
    longest: float = 1 / 8

    exponent: ClassVar[float]
    stages: ClassVar[int]
    order = 0
    nfe_per_step = 0
    linear = False

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"tolerances are positive, got rtol={self.rtol} and atol={self.atol}")
        if self.tries < 1 or self.look < 1:
            raise ValueError(f"tries and look are at least 1, got {self.tries} and {self.look}")
        if not 0 < self.longest <= 1:
            raise ValueError(f"the longest step is a share of the range, in (0, 1], not {self.longest}")

    @abstractmethod
    def first(self, problem: Any, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """The evaluation with which a step begins: one, whatever the length of the step."""

    @abstractmethod
    def attempt(
        self, problem: Any, x: Tensor, t: Tensor, s: Tensor, first: tuple[Tensor, ...], noise: Noise
    ) -> Attempt:
        """One step of each sample.

        Args:
            problem: what is solved.
            x: states (b, *event).
            t: where each is, (b,).
            s: where each goes, (b,); t for one that has arrived.
            first: what :meth:`first` said of x and t.
            noise: increments, for stochastic methods.
        """

    def with_tolerance(self: T, tol: float) -> T:
        return replace(self, rtol=tol, atol=tol)

    def scale(self, x: Tensor, new: Tensor) -> Tensor:
        """What is allowed as error of each coordinate."""
        return self.atol + self.rtol * torch.maximum(x.abs(), new.abs())

    def factor(self, error: Tensor, before: Tensor, accepted: Tensor, calm: Tensor) -> Tensor:
        """How many times longer the next step is: PI after a step that was accepted, by its own error after another."""
        k = self.exponent
        grown = 0.9 * error.clamp(min=1e-8) ** (-0.7 / k) * before ** (0.4 / k)
        grown = torch.where(calm, grown, grown.clamp(max=1.0))  # no growth right after a rejection
        return torch.where(accepted, grown, 0.9 * error.clamp(min=1.0) ** (-1 / k)).clamp(0.2, 5.0)

    def increments(self, noise: Noise, like: Tensor) -> Callable[[int], Noise]:
        """What the samples see of the noise in their ``number``-th try, as a function of that."""
        return lambda number: silent

    def _every(self, x: Tensor) -> int:
        """After how many tries the host looks; where it does not have to wait for an answer, after each."""
        return 1 if x.device.type == "cpu" else self.look

    def spent(self, state: Ledger) -> Tensor:
        return state.evaluations

    def init(self, problem: Problem, x: Tensor, ts: Tensor) -> Ledger:
        return Ledger(None, torch.zeros(len(x), dtype=torch.int64, device=x.device))

    def step(
        self, problem: Problem, x: Tensor, t: Tensor, s: Tensor, state: Ledger, noise: Noise
    ) -> tuple[Tensor, Ledger]:
        way = 1.0 if s > t else -1.0
        longest = self.longest * (problem.t_max - problem.t_min)
        shortest = 1e-10 * longest
        begin, end = t.to(x.device), s.to(x.device)
        size = state.size
        if size is None:
            size = torch.full_like(begin.expand(len(x)), longest * min(self.rtol, 1.0) ** (1 / self.exponent))
        look = self._every(x)

        seen = self.increments(noise, x)
        start, ones = begin.repeat(len(x)), torch.ones_like(size)
        run = _Running(x, start, size, ones, ones > 0, state.evaluations + 1, ())
        run = run._replace(first=self.first(problem, x, start))
        select = problem.select if isinstance(problem, ODE) else None
        rows = torch.arange(len(x), device=x.device)  # who is here
        final = (x, size, run.evaluations)  # of those who have left

        for number in range(1, self.tries + 1):
            left = (end - run.t).abs()
            last, going = run.size >= left, left > 0
            target = torch.where(last, end, run.t + way * run.size)
            tried = self.attempt(problem, run.x, run.t, target, run.first, seen(number))
            error = rms(tried.error / self.scale(run.x, tried.x)).to(run.t).nan_to_num(nan=torch.inf)

            used = (target - run.t).abs()
            tiny = used <= 2 * shortest  # to be refused for ever; an infinite error is no matter of size
            accepted = going & ((error <= 1) | tiny)
            lost = going & tiny & error.isinf()
            longer = used * self.factor(error, run.before, accepted, run.calm)
            longer = torch.where(accepted & last, torch.maximum(longer, run.size), longer).clamp(shortest, longest)
            run = _Running(
                x=_chosen(accepted, (tried.x,), (run.x,))[0],
                t=torch.where(lost, end, torch.where(accepted, target, run.t)),
                size=torch.where(going, longer, run.size),
                before=torch.where(accepted, error.clamp(1e-4, 1.0), run.before),
                calm=accepted,
                evaluations=run.evaluations + self.stages * going,
                first=run.first if tried.first is None else _chosen(accepted, tried.first, run.first),
            )

            moved = True
            if number % look == 0:
                going = run.t != end
                if not bool(going.any()):
                    x, size, evaluations = _put(final, rows, run)
                    return x, Ledger(size, evaluations)
                if select is not None and not bool(going.all()):
                    final = _put(final, rows[~going], run.rows(~going))
                    rows, run, accepted = rows[going], run.rows(going), accepted[going]
                    problem = replace(problem, velocity=select(rows))
                moved = bool(accepted.any())
            if tried.first is None and moved:  # who was refused has its first evaluation still
                run = run._replace(
                    first=_chosen(accepted, self.first(problem, run.x, run.t), run.first),
                    evaluations=run.evaluations + (accepted & (run.t != end)),
                )
        worst = int((run.t != end).int().argmax())
        raise ValueError(
            f"{self}: no end after {self.tries} tries between t = {float(t):.6g} and {float(s):.6g}: "
            f"sample {int(rows[worst])} is at t = {float(run.t[worst]):.6g}; is it stiff?"
        )


def _put(final: tuple[Tensor, ...], rows: Tensor, run: _Running) -> tuple[Tensor, ...]:
    """State, size and evaluations of all, with those of ``rows`` as they are now."""
    parts = (run.x, run.size, run.evaluations)
    if len(rows) == len(final[0]):
        return parts
    return tuple(old.index_copy(0, rows, new) for old, new in zip(final, parts, strict=True))


def _chosen(where: Tensor, these: tuple[Tensor, ...], those: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rows of these where ``where``, else of those."""
    return tuple(
        torch.where(where.reshape(-1, *(1,) * (this.ndim - 1)), this, that)
        for this, that in zip(these, those, strict=True)
    )


# --- Tableaux ---------------------------------------------------------------------------------------------------------


class EmbeddedRungeKutta(Adaptive):
    """An explicit Runge-Kutta pair whose last stage is the slope at the end of the step (FSAL).

    x_s = x_t + h SUM_i b_i k_i,        k_last = velocity(x_s, s),        error = h SUM_i d_i k_i,

    with d the difference of the two methods' weights. It runs on any problem that has a velocity; ``velocity`` is
    asked with times of shape (B,).

    Attributes:
        tableau: of the method whose result is taken, without the last stage.
        d: weights of the error, those of the last stage included.
    """

    tableau: ClassVar[Tableau]
    d: ClassVar[tuple[float, ...]]

    def first(self, problem: Problem, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return (problem.velocity(x, t),)

    def attempt(
        self, problem: Problem, x: Tensor, t: Tensor, s: Tensor, first: tuple[Tensor, ...], noise: Noise
    ) -> Attempt:
        h = s - t
        slopes = list(first)
        for row, c in zip(self.tableau.a, self.tableau.c[1:], strict=True):
            stage = mix((1.0, x), *((h * a, k) for a, k in zip(row, slopes, strict=True) if a))
            slopes.append(problem.velocity(stage, s if abs(c - 1) < 1e-12 else t + c * h))
        new = mix((1.0, x), *((h * b, k) for b, k in zip(self.tableau.b, slopes, strict=True) if b))
        slopes.append(problem.velocity(new, s))
        return Attempt(new, mix(*((h * d, k) for d, k in zip(self.d, slopes, strict=True) if d)), (slopes[-1],))


@dataclass(frozen=True)
class BogackiShampine32(EmbeddedRungeKutta):
    """The pair 3(2) of Bogacki and Shampine, with steps of its own for every sample.

    Adaptive: order and evaluations per step 0 (3 for a step that is tried, 1 more at the start); noise none.

    Reference: Bogacki and Shampine 1989, doi:10.1016/0893-9659(89)90079-7.
    """

    tableau = BogackiShampine.tableau
    d = (-5 / 72, 1 / 12, 1 / 9, -1 / 8)
    exponent = 3
    stages = 3
    reference = "Bogacki, Shampine 1989, doi:10.1016/0893-9659(89)90079-7"


@dataclass(frozen=True)
class DormandPrince54(EmbeddedRungeKutta):
    """The pair 5(4) of Dormand and Prince, with steps of its own for every sample.

    Adaptive: order and evaluations per step 0 (6 for a step that is tried, 1 more at the start); noise none.

    Reference: Dormand and Prince 1980, doi:10.1016/0771-050X(80)90013-3.
    """

    tableau = DormandPrince.tableau
    d = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
    exponent = 5
    stages = 6
    reference = "Dormand, Prince 1980, doi:10.1016/0771-050X(80)90013-3"
