"""The one loop: a solver, a problem, a grid.

A solver is a frozen bundle of settings with two methods: ``init`` makes what it wants to remember, ``step`` moves the
state from ``t`` to ``s`` and returns the memory for the next step. ``s < t`` denoises and ``s > t`` encodes, with the
same code. Everything else (counting network calls, saving the trajectory, finding the step at which a number stopped
being one) is here, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor

from solvers.grids import check_grid
from solvers.noise import Noise, silent
from solvers.problem import DiffusionProblem, Prediction, Problem

__all__ = ["Counter", "Solver", "Trajectory", "integrate"]

S = TypeVar("S")


class Solver(ABC, Generic[S]):
    """A numerical method for a :class:`DiffusionProblem`. Subclasses are frozen dataclasses: settings, nothing mutable.

    Attributes:
        order: declared order of convergence in the largest step (weak order where ``stochastic``); 0 for a method with
            its own step control, which converges with its tolerance and not with the grid, and for one whose error no
            grid removes (Langevin dynamics). It is declared here and measured by the tests.
        nfe_per_step: calls of ``predict`` in one step in the middle of a grid; 0 where the method decides.
        stochastic: whether steps draw noise.
        strong_order: declared order on one Brownian path, where ``stochastic``.
        start_order: order that the first steps leave to the whole where they weigh; None: all of it. A method that
            begins with Euler's step is formally of order 2, whatever ``order`` its own steps have and show.
        invariant: whether a solve gives the same sample on every path with the same logsnr at the nodes of its grid
            (VP, VE, flow), up to the factor alpha.
        linear: whether a step of it is linear in state, predictions and noises.
        combines: whether it gets at states through ``problem.terms`` and makes them by ``problem.state`` only, so that
            another curve (:class:`solvers.combine.OnPath`) is in its coefficients and costs no pass over a state.
        reference: author, year, identifier.
        grid: name of the grid that ``solve`` takes when none is given, by what was measured for the family on several
            paths (``docs/benchmarks.md``).
    """

    order: int
    nfe_per_step: int
    stochastic: bool = False
    strong_order: float = 1.0
    start_order: int | None = None
    invariant: bool = False
    linear: bool = True
    combines: bool = False
    reference: str = ""
    grid: str = "logsnr"

    def __repr__(self) -> str:
        """As of a dataclass, for those that are none."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __str__(self) -> str:
        """What messages call it: its name in ``SOLVERS`` where it has one, which is shorter."""
        from solvers import SOLVERS

        own = repr(self)
        return next((name for name, known in SOLVERS.items() if repr(known) == own), own)

    def declare(self, **facts: Any) -> None:
        """State order, nfe_per_step, stochastic, reference or grid where they follow from the settings.

        For ``__post_init__``: the dataclass is frozen, and these are no settings of it.
        """
        for name, fact in facts.items():
            object.__setattr__(self, name, fact)

    def init(self, problem: Any, x: Tensor, ts: Tensor) -> S:
        """What the first step is given; None for one-step methods."""
        return cast(S, None)

    @abstractmethod
    def step(self, problem: Any, x: Tensor, t: Tensor, s: Tensor, state: S, noise: Noise) -> tuple[Tensor, S]:
        """Move ``x`` from time ``t`` to time ``s``.

        Args:
            problem: a :class:`DiffusionProblem`; methods that need a velocity only take any :class:`ODE` too.
            x: state (B, *event).
            t: current time, 0-dim float64.
            s: target time, 0-dim float64; s < t denoises, s > t encodes.
            state: what ``init`` or the last step returned.
            noise: increments of the shared Brownian motion; not called by deterministic methods.

        Returns:
            The state at ``s`` and the memory for the next step.
        """

    def observe(self, state: S, lam: Tensor, prediction: Prediction) -> S:
        """What the method remembers of a step that another one took (:class:`solvers.combine.Warmup`).

        Args:
            state: memory so far.
            lam: logsnr / 2 at the start of that step, 0-dim.
            prediction: what was predicted there.
        """
        return state

    def with_tolerance(self, tol: float) -> Solver[S]:
        """The same method at another tolerance, for methods that control their own steps.

        Raises:
            ValueError: the method takes fixed steps.
        """
        raise ValueError(f"{self} takes fixed steps: give steps, nfe or ts, not tol")

    def spent(self, state: S) -> Tensor | None:
        """Evaluations of each sample so far, (B,), for methods in which samples differ; None for the others."""
        return None

    def nfe(self, steps: int) -> int:
        """Calls of ``predict`` that a grid of ``steps`` steps costs; the loop counts what was really spent."""
        return steps * self.nfe_per_step


class Counter:
    """Wraps a function of (x, t): counts its calls, refuses what is no prediction, and keeps the state's dtype.

    What a network under autocast predicts in half precision, or an exact formula in double, is cast to the dtype of the
    state that it was asked about; nothing is done where they are the same.

    Args:
        where: who calls, for the error's text.
        kind: what the function returns, a ``Prediction`` or, if it is a velocity, a ``Tensor``.
        note: told every answer.

    Attributes:
        calls: calls so far.
    """

    def __init__(
        self, where: Callable[[], str], kind: type = Prediction, note: Callable[[Any], None] | None = None
    ) -> None:
        self.calls, self.where, self.kind, self.note = 0, where, kind, note

    def __call__(self, function: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
        def counted(x: Tensor, t: Tensor) -> Any:
            self.calls += 1
            out, shape, dtype = function(x, t if t.ndim == 0 else t.reshape(-1)), x.shape, x.dtype
            same, parts = True, self._parts(out)
            for part in parts:
                same = same and part.dtype == dtype
                if part.shape == shape:
                    continue
                shapes = " and ".join(str(tuple(part.shape)) for part in parts)
                raise ValueError(
                    f"{self.where()}: the prediction has shape {shapes} where the state has {tuple(x.shape)}"
                )
            if not same:
                out = Prediction(*(part.to(dtype) for part in parts)) if self.kind is Prediction else out.to(dtype)
            if self.note is not None:
                self.note(out)
            return out

        return counted

    def _parts(self, out: Any) -> tuple[Tensor, ...]:
        parts: tuple[Any, ...] = (out,) if self.kind is Tensor else out
        if isinstance(out, self.kind) and all(isinstance(part, Tensor) for part in parts):
            return parts
        wanted = (
            "a velocity returns one tensor"
            if self.kind is Tensor
            else "predict returns Prediction(x0, eps), two tensors"
        )
        raise TypeError(f"{self.where()}: {wanted} of the state's shape, got {_described(out)}")


def _described(out: Any) -> str:
    """What somebody returned in place of a prediction."""
    if isinstance(out, Tensor):
        return f"one tensor of shape {tuple(out.shape)}"
    kind: str = type(out).__name__
    return f"{kind}({', '.join(type(part).__name__ for part in out)})" if kind in ("tuple", "Prediction") else kind


@dataclass(frozen=True)
class Trajectory:
    """What a solve returns.

    Attributes:
        x: final state (B, *event).
        ts: the grid that was walked, float64 (N + 1,).
        nfe: calls of ``predict``, counted.
        solver: the solver with its settings.
        seed: seed of the noise, None for a deterministic solve.
        xs: states at every node (N + 1, B, *event) with ``save="all"``, else None.
        predictions: with ``save="all"`` what was predicted first in each of the N steps, ``predictions.x0`` and
            ``predictions.eps`` of shape (N, B, *event); else, and for an :class:`ODE`, None. With ``xs`` that is three
            states for each step. Entry i is the prediction at ``xs[i]`` and ``ts[i]``, also of methods with steps of
            their own and of black boxes, of which those in between are not kept. Of methods that move the state before
            they look (:class:`Churn`, :class:`AnnealedLangevin`) it is that at the place to which they moved it; NaN of
            a step without any.
        end: "stop" (``x`` is the state at ``ts[-1]``) or "denoise" (``x`` is the data predicted from it).
        spent: evaluations that each sample needed (B,), where samples have steps of their own; else None: all of them.
        grid: which grid that was, a name in ``GRIDS`` or that of a function; None where ``ts`` was given.
    """

    x: Tensor
    ts: Tensor
    nfe: int
    solver: Solver[Any]
    seed: int | None = None
    xs: Tensor | None = None
    predictions: Prediction | None = None
    end: str = "stop"
    spent: Tensor | None = None
    grid: str | None = None

    def __repr__(self) -> str:
        seed = "" if self.seed is None else f", seed={self.seed}"
        steps = f"{len(self.ts) - 1} steps" + (f" of {self.grid}" if self.grid else "")
        return f"Trajectory({self.solver!r}, {steps}, nfe={self.nfe}, x={tuple(self.x.shape)}{seed})"


def integrate(
    solver: Solver[Any],
    problem: Problem,
    x: Tensor,
    ts: Tensor,
    *,
    noise: Noise | None = None,
    save: Literal["last", "all"] = "last",
    end: Literal["stop", "denoise"] = "stop",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Trajectory:
    """Walk ``x`` along the grid ``ts``.

    Args:
        solver: the method.
        problem: what it solves.
        x: state at ``ts[0]``, (B, *event), floating; one of no samples stays as it is, and nothing is predicted.
        ts: grid (N + 1,), strictly monotone within the problem's range.
        noise: Brownian increments for stochastic solvers.
        save: "all" keeps the state at every node and the first prediction of every step.
        end: "denoise" returns the data predicted at the last node (one more call) in place of the state there.
        callback: called as ``callback(i, t, x)`` after the i-th step, at the node it reached.

    Returns:
        A :class:`Trajectory`.

    Raises:
        ValueError: no grid, a state or a prediction of the wrong shape, a missing noise.
        FloatingPointError: a state stopped being finite; the message names solver, step, time and sample.
    """
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"a state is a floating tensor of shape (B, *event), got {x.dtype} of shape {tuple(x.shape)}")
    if end not in ("stop", "denoise") or save not in ("last", "all"):
        raise ValueError(f"end is 'stop' or 'denoise' and save 'last' or 'all', got {end!r} and {save!r}")
    if end == "denoise" and not isinstance(problem, DiffusionProblem):
        raise ValueError("end='denoise' needs a DiffusionProblem: an ODE predicts no data")
    ts = check_grid(ts, problem.t_min, problem.t_max)
    nodes = ts.unbind()
    i, diffusion = 0, isinstance(problem, DiffusionProblem)
    start, xs, made = x, [x], list[Prediction]()

    def note(answer: Prediction) -> None:
        if len(made) == i:
            made.append(answer)

    keep = save == "all"
    counter = Counter(
        lambda: f"{solver}: step {i + 1}, t = {float(ts[min(i, len(ts) - 2)]):.6g}",
        Prediction if diffusion else Tensor,
        note if keep and diffusion else None,
    )
    counting = problem.calling(counter)
    counted = cast("DiffusionProblem", counting.at(nodes))
    noise = noise or silent

    state = solver.init(counted, x, ts)
    for i, (t, s) in enumerate(pairwise(nodes)):
        if len(x):
            x, state = solver.step(counted, x, t, s, state, noise)
        if keep:
            xs.append(x)
            if len(made) == i:
                made.append(Prediction(*[torch.full_like(x, torch.nan)] * 2))
        if callback is not None:
            callback(i, s, x)
    spent = solver.spent(state)
    if end == "denoise" and len(x):
        x, spent = counted.predict(x, nodes[-1]).x0, None if spent is None else spent + 1

    if x.shape != start.shape:
        raise ValueError(f"{solver}: its steps made a state of shape {tuple(x.shape)} of one of {tuple(start.shape)}")
    # A finite sum has finite terms, and is one pass; an infinite one may be an overflow.
    if not bool(x.sum().isfinite()) and not bool(x.isfinite().all()):
        _find_culprit(solver, counting, start, ts, noise)
    states = torch.stack(xs) if keep else None
    predictions = Prediction(*map(torch.stack, zip(*made, strict=True))) if keep and diffusion else None
    seed = getattr(noise, "seed", None)
    return Trajectory(x, ts, counter.calls, solver, seed, states, predictions, end, spent)


def _find_culprit(solver: Solver[Any], problem: Problem, x: Tensor, ts: Tensor, noise: Noise) -> None:
    """Walk once more, looking at every step: the happy path then pays for one look at the end only."""

    def check(where: str, t: Tensor, value: Tensor) -> None:
        bad = (~value.isfinite()).flatten(1).any(1) if value.ndim > 1 else ~value.isfinite()
        if bool(bad.any()):
            time, first = float(t.reshape(-1)[0]), int(bad.int().argmax())
            raise FloatingPointError(f"{solver}: {where} at t = {time:.6g} is not finite (first bad sample: {first})")

    step = 0

    def watched(function: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
        def call(x: Tensor, t: Tensor) -> Any:
            out = function(x, t)
            for part in (out,) if isinstance(out, Tensor) else out:
                check(f"the prediction in step {step}", t, part)
            return out

        return call

    check("the initial state", ts[0], x)
    nodes = ts.unbind()
    problem = cast("DiffusionProblem", problem.calling(watched).at(nodes))
    state = solver.init(problem, x, ts)
    for step, (t, s) in enumerate(pairwise(nodes), start=1):
        x, state = solver.step(problem, x, t, s, state, noise)
        check(f"the state after step {step}", s, x)
    raise FloatingPointError(f"{solver}: the predicted data at t = {float(ts[-1]):.6g} is not finite")
