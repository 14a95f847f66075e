"""Dense output: the state at any time of a solve, without another network call.

A method that looks at the network once per step, at the step's start, knows for the whole step what it will assume of
the prediction: a constant (DDIM), a polynomial through the last few (Adams, DPM-Solver, UniPC, DEIS). Where it would
have arrived had the step been shorter is then a matter of other coefficients for the same predictions. So the state
between two nodes is *the same step, taken to there*: it meets the node at the step's end exactly, and its error is that
of one step of the method, as small as that of the nodes. (It is continuous; but UniPC corrects the state at a node when
it leaves it, and there it jumps by that correction.)

    trajectory = dense("unipc_2", problem, x, ts)
    trajectory(0.37)                                     # the state at t = 0.37

Methods that evaluate inside their steps (Runge-Kutta, DPM-Solver singlestep) have looked at places that a shorter step
would not have; they are refused, and so are stochastic ones.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.integrate import Solver, Trajectory, integrate
from solvers.names import resolve
from solvers.noise import Noise, silent
from solvers.problem import DiffusionProblem, Predict, Prediction

__all__ = ["DenseOutput", "dense"]


class _Piece(NamedTuple):
    """One step: its end points, what the method was given and what it was told."""

    t: Tensor
    s: Tensor
    x: Tensor
    state: Any
    prediction: Prediction


@dataclass(frozen=True, eq=False, repr=False)
class _Recorder(Solver[Any]):
    """A solver that takes down what it is given."""

    solver: Solver[Any]
    pieces: list[_Piece]

    def __repr__(self) -> str:
        return repr(self.solver)

    def init(self, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> Any:
        return self.solver.init(problem, x, ts)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise
    ) -> tuple[Tensor, Any]:
        asked: list[tuple[Tensor, Prediction]] = []

        def watched(predict: Predict) -> Predict:
            def call(x: Tensor, t: Tensor) -> Prediction:
                asked.append((t, predict(x, t)))
                return asked[-1][1]

            return call

        moved, memory = self.solver.step(problem.calling(watched), x, t, s, state, noise)
        if len(asked) != 1 or float(asked[0][0]) != float(t):
            raise ValueError(f"{self.solver} looks at {len(asked)} places in the step from t = {float(t):.6g}: {_ONE}")
        self.pieces.append(_Piece(t, s, x, state, asked[0][1]))
        return moved, memory


_ONE = "dense output needs a method that evaluates once per step, at its start"


class DenseOutput:
    """The states of a solve, at every time between the ends of its grid.

    Attributes:
        trajectory: the solve.
    """

    def __init__(self, problem: DiffusionProblem, trajectory: Trajectory, pieces: list[_Piece]) -> None:
        self.trajectory = trajectory
        self._problem, self._pieces = problem, pieces
        self._way = 1 if trajectory.ts[-1] > trajectory.ts[0] else -1
        self._ends = [self._way * float(piece.s) for piece in pieces]

    def __repr__(self) -> str:
        start, end = float(self.trajectory.ts[0]), float(self.trajectory.ts[-1])
        return f"DenseOutput({self.trajectory.solver!r}, t from {start:.6g} to {end:.6g}, nfe={self.trajectory.nfe})"

    def __call__(self, t: float | Tensor) -> Tensor:
        """The state at time t.

        Args:
            t: a time on the grid's range, or (K,) of them.

        Returns:
            State (B, *event), or (K, B, *event); at a node exactly what the solve had there.

        Raises:
            ValueError: a time outside the grid's range.
        """
        time = torch.as_tensor(t, dtype=torch.float64)
        if time.ndim == 1:
            return torch.stack([self(each) for each in time])
        ts = self.trajectory.ts
        at, start, end = float(time), float(ts[0]), float(ts[-1])
        if not self._way * start <= self._way * at <= self._way * end:
            raise ValueError(f"dense output covers t from {start:.6g} to {end:.6g}, got {at:.6g}")
        if not self._pieces:  # a batch of none
            return self.trajectory.x
        piece = self._pieces[bisect_left(self._ends, self._way * at)]
        if at == float(piece.t):
            return piece.x
        known = self._problem.calling(_answering(piece.prediction))
        # The piece's own end is handed over as the node it was, so that planned coefficients are found.
        s = piece.s if at == float(piece.s) else time
        return self.trajectory.solver.step(known, piece.x, piece.t, s, piece.state, silent)[0]


def _answering(prediction: Prediction) -> Callable[[Predict], Predict]:
    return lambda predict: lambda x, t: prediction


def dense(solver: str | Solver[Any], problem: DiffusionProblem, x: Tensor, ts: Tensor) -> DenseOutput:
    """Walk ``x`` along ``ts`` as :func:`~solvers.integrate` does, and keep what it takes to say the state in between.

    Args:
        solver: a deterministic method with one evaluation per step, or its name in ``SOLVERS``.
        problem: what it solves.
        x: state at ``ts[0]``, (B, *event).
        ts: grid (N + 1,), strictly monotone within the problem's range.

    Returns:
        A :class:`DenseOutput`, a function of time; it holds the states and predictions of all N steps.

    Raises:
        ValueError: a method for which it does not exist.
    """
    method = resolve(solver)
    if method.stochastic:
        raise ValueError(f"{method} draws noise: {_ONE}, and no noise")
    pieces: list[_Piece] = []
    done = integrate(_Recorder(method, pieces), problem, x, ts)
    done = Trajectory(done.x, done.ts, done.nfe, method)
    return DenseOutput(problem, done, pieces)
