"""Encode and decode: the noise that a datum came from, and how much of the datum comes back.

The probability-flow ODE is a bijection, so data have *codes*: walk from t_min to t_max and the code is what the ODE
would sample the datum from. It is as exact as the solver. A step from t to s and the step back from s to t are not each
other's inverse (the second looks at another point), so a solver of order p comes back with an error of h^p, and that
error, per sample, says how far editing or interpolating codes can be trusted.

Methods that draw noise have no code: what they do is not a function of the datum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from solvers.grids import Grid
from solvers.integrate import Solver, Trajectory
from solvers.names import resolve
from solvers.problem import Problem
from solvers.solve import solve

__all__ = ["RoundTrip", "round_trip"]


@dataclass(frozen=True)
class RoundTrip:
    """What :func:`round_trip` returns.

    Attributes:
        encoded: the way from data to noise; ``encoded.x`` is the code.
        decoded: the way back; ``decoded.x`` is what came back.
        error: root mean square difference of what came back, per sample, (B,).
    """

    encoded: Trajectory
    decoded: Trajectory
    error: Tensor

    @property
    def code(self) -> Tensor:
        """The states at t_max, (B, *event)."""
        return self.encoded.x

    @property
    def nfe(self) -> int:
        """Calls of ``predict``, both ways."""
        return self.encoded.nfe + self.decoded.nfe

    def __repr__(self) -> str:
        mean, worst = float(self.error.mean()), float(self.error.max())
        return f"RoundTrip({self.encoded.solver!r}, nfe={self.nfe}, error mean {mean:.1e}, worst {worst:.1e})"


def round_trip(
    problem: Problem,
    x: Tensor,
    *,
    solver: str | Solver[Any],
    steps: int | None = None,
    nfe: int | None = None,
    ts: Tensor | None = None,
    tol: float | None = None,
    grid: str | Grid | None = None,
) -> RoundTrip:
    """Encode data, decode the codes with the same solver on the same grid, and compare.

    Args:
        problem: what is solved.
        x: data, that is states at t_min, (B, *event).
        solver: a deterministic method.
        steps: number of steps, each way.
        nfe: budget of network calls, each way.
        ts: the grid from noise to data, (N + 1,); encoding walks it backwards.
        tol: tolerance of a solver that controls its own steps.
        grid: name of the grid, or a function (path, n) -> ts.

    Raises:
        ValueError: a solver that draws noise; and what :func:`~solvers.solve` raises.
    """
    method = resolve(solver)
    if method.stochastic:
        raise ValueError(f"{method} draws noise, and what draws noise has no code: use a deterministic solver")
    budget: dict[str, Any] = {"solver": method, "steps": steps, "nfe": nfe, "tol": tol, "grid": grid}
    encoded = solve(problem, x, encode=True, ts=None if ts is None else ts.flip(0), **budget)
    decoded = solve(problem, encoded.x, ts=ts, **budget)
    return RoundTrip(encoded, decoded, (decoded.x - x).double()[:, None].flatten(1).square().mean(1).sqrt())
