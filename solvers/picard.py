"""Parallel in time: all steps of a window at once, again and again, until nothing moves.

A sequential solve is the fixed point of a map on whole trajectories. With the step written as what it adds,

    x_(i+1) = x_i + d(x_i, i),        x_n = x_0 + SUM_{i<n} d(x_i, i),

the right side can be evaluated at a *guess* of all states together, in one batch, and gives a better guess: Picard's
iteration. After k sweeps the first k states are those of the sequential solve exactly, so as many sweeps as steps
always suffice; a smooth trajectory needs far fewer. What is saved is time where a batch costs as much as a sample,
and what is paid are evaluations: the number of *calls* falls, that of evaluated states rises.

ParaDiGMS keeps a window of states and slides it over those that have settled: after a sweep, the error of state j is
compared with the tolerance, and the window moves on to the first state that still moves.

Here the increments are those of y = x / alpha, in which a step of DDIM adds (sigma_s / alpha_s - sigma_t / alpha_t) eps
and no part of the equation that is known. Any method with fixed steps will do, for it is not told that it is run in
parallel: its code is run until it asks for a prediction; all questions are answered together; it is run again, from the
start, with the answers that it has. What a multistep method remembers is handed from step to step within a sweep; while
the step before waits for an answer, what that left in the last sweep stands for it, which in the end is the same.

Reference: Shih, Belkhale, Ermon, Sadigh and Anari 2023, arXiv:2305.16317.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.grids import check_grid
from solvers.integrate import Counter, Solver, Trajectory
from solvers.names import resolve
from solvers.noise import Noise, silent
from solvers.problem import DiffusionProblem, Predict, Prediction, expand

__all__ = ["Parallel", "picard"]


class Parallel(NamedTuple):
    """What :func:`picard` returns.

    Attributes:
        trajectory: as of a sequential solve; ``nfe`` counts calls, ``spent`` the evaluations of each sample.
        sweeps: how often a window was evaluated: the length of the solve in time, in units of one step.
        residuals: of each sweep, the largest change of a state that it settled, in units of the state's scale.
    """

    trajectory: Trajectory
    sweeps: int
    residuals: tuple[float, ...]


def picard(
    solver: str | Solver[Any],
    problem: DiffusionProblem,
    x: Tensor,
    ts: Tensor,
    *,
    tol: float = 1e-6,
    window: int | None = None,
    noise: Noise | None = None,
) -> Parallel:
    """The solve ``integrate(solver, problem, x, ts)``, with the steps of a window in one batch.

    y_(j+1) <- y_first + SUM_{first <= i <= j} [ step(x_i) / alpha_(i+1) - x_i / alpha_i ],        y = x / alpha,

    until the change, as rms over the coordinates of the worst sample and divided by sqrt(1 + sigma^2 / alpha^2) (the
    scale of y), is at most ``tol``; the window then begins at the first state whose change is larger.

    Args:
        solver: a method with fixed steps, or its name (:mod:`solvers.names`).
        problem: what it solves; ``predict`` is asked with up to window x B states, those of a step
            together, and as many times; conditions of samples have to be repeated by it.
        x: state at ``ts[0]``, (B, *event).
        ts: grid (N + 1,), strictly monotone within the problem's range.
        tol: largest change of a state that counts as settled, > 0.
        window: how many steps are taken together; all of them where None.
        noise: Brownian increments for stochastic solvers: the same in every sweep.

    Returns:
        A :class:`Parallel`; its result differs from the sequential one by about ``tol``.

    Raises:
        ValueError: a solver with steps of its own, no noise where it is needed, bad settings.

    Reference: Shih et al. 2023, arXiv:2305.16317, algorithm 1.
    """
    solver, ts = resolve(solver), check_grid(ts, problem.t_min, problem.t_max)
    steps, batch = len(ts) - 1, len(x)
    width = steps if window is None else window
    if not tol > 0 or width < 1:
        raise ValueError(f"tol is positive and a window has at least one step, got tol={tol} and window={window}")
    if solver.nfe_per_step == 0:
        raise ValueError(f"steps can be taken together by methods with fixed steps, not by {solver}")
    if solver.stochastic and noise is None:
        raise ValueError(f"{solver} draws noise: pass noise=BrownianMotion(x, seed)")

    sweeps, calls, nodes = 0, Counter(lambda: f"{solver}: sweep {sweeps + 1}"), ts.unbind()
    predict = calls(problem.predict)
    planned = problem.at(nodes)
    memories = [solver.init(planned, x, ts)] * (steps + 1)  # at every node; right up to the first that still moves
    alpha = problem.path.alpha(ts)
    scale = (1 + (problem.path.sigma(ts) / alpha) ** 2).sqrt()

    def rows(c: Tensor) -> Tensor:
        """Coefficients of nodes, to multiply states (K, B, *event)."""
        return expand(c, ys)

    ys = x.double() / float(alpha[0])
    ys = ys.expand(steps + 1, *x.shape).clone()  # the guess: nothing moves
    first, evaluations, residuals = 0, 0, list[float]()
    while first < steps and batch:  # of nobody there is nothing to settle
        last = min(first + width, steps)
        here, there = slice(first, last), slice(first + 1, last + 1)
        xs = (rows(alpha[here]) * ys[here]).to(x.dtype)
        moved, memories[first : last + 1], asked = _together(
            solver, planned, predict, xs, nodes[first : last + 1], memories[first : last + 1], noise or silent
        )
        memories[last + 1 :] = [memories[last]] * (steps - last)
        change = moved.double() / rows(alpha[there]) - xs.double() / rows(alpha[here])
        new = ys[first] + change.cumsum(0)

        off = ((new - ys[there]) / rows(scale[there])).reshape(last - first, batch, -1)
        off = off.square().mean(-1).sqrt().amax(-1).cpu()  # of the worst sample
        unsettled = (~(off <= tol)).nonzero()
        # The step from a state that is right is right: the window moves on by one in any case.
        stride = max(int(unsettled[0]), 1) if len(unsettled) else last - first
        residuals.append(float(off[:stride].max()))
        ys[there], ys[last + 1 :] = new, new[-1]
        first, sweeps, evaluations = first + stride, sweeps + 1, evaluations + asked
    out = (ys[-1] * float(alpha[-1])).to(x.dtype)
    spent = torch.full((batch,), evaluations, dtype=torch.int64)
    trajectory = Trajectory(out, ts, calls.calls, solver, getattr(noise, "seed", None), spent=spent)
    return Parallel(trajectory, sweeps, tuple(residuals))


class _Asks(Exception):
    """A step wants to know a prediction."""

    def __init__(self, x: Tensor, t: Tensor) -> None:
        super().__init__()
        self.x, self.t = x, t


def _together(
    solver: Solver[Any],
    problem: DiffusionProblem,
    predict: Predict,
    xs: Tensor,
    nodes: Sequence[Tensor],
    memories: Sequence[Any],
    noise: Noise,
) -> tuple[Tensor, list[Any], int]:
    """One step from every node but the last, with one call of ``predict`` for each of its stages.

    Args:
        solver: the method.
        problem: what it solves.
        predict: answers for many states at once.
        xs: states at all nodes but the last, (K, B, *event).
        nodes: K + 1 of them.
        memories: what is remembered at the nodes: right at the first, a guess at the others.
        noise: Brownian increments.

    Returns:
        The states that the steps lead to, what is then remembered at the nodes, and how many predictions it took.
    """
    known: list[list[Prediction]] = [[] for _ in xs]
    while True:
        moved: list[Tensor] = []
        asked: list[tuple[list[Prediction], _Asks]] = []
        after: list[Any] = [memories[0]]
        for x, (t, s), answers, guess in zip(xs, pairwise(nodes), known, memories[1:], strict=True):
            try:
                out, memory = solver.step(problem.calling(_answering(answers)), x, t, s, after[-1], noise)
            except _Asks as question:
                asked.append((answers, question))
                after.append(guess)
                continue
            moved.append(out)
            after.append(memory)
        if not asked:
            return torch.stack(moved), after, sum(map(len, known))
        points = torch.cat([question.x for _, question in asked])
        times = torch.cat([question.t.expand(len(question.x)) for _, question in asked])
        shape = (len(asked), *xs.shape[1:])
        for (answers, _), *answer in zip(asked, *(part.reshape(shape) for part in predict(points, times)), strict=True):
            answers.append(Prediction(*answer))


def _answering(answers: list[Prediction]) -> Callable[[Predict], Predict]:
    """``predict`` that knows its first answers, and stops the step at the next question."""

    def wrap(predict: Predict) -> Predict:
        left = iter(answers)

        def call(x: Tensor, t: Tensor) -> Prediction:
            answer = next(left, None)
            if answer is None:
                raise _Asks(x, t)
            return answer

        return call

    return wrap
