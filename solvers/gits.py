"""The grid of a trajectory's geometry: the shortest way along a fine solution in steps of Euler.

Solutions of the probability-flow ODE, seen as y = x / alpha over sigma / alpha, are nearly straight at both ends and
bend in between, all of them in much the same way. Where they are straight one step goes far. On a fine grid of M steps
a step of Euler from node i lands beside node j by

    c_ij = mean_b | y_i + (sigma_j / alpha_j - sigma_i / alpha_i) eps_i - y_j |,

and of all ways from the first node to the last in n steps that of least cost is found exactly, from the end backwards:

    V_1(i) = c_iM,        V_k(i) = min_j  c_ij + gamma V_(k-1)(j).

gamma > 1 makes a late error dearer than an early one, and so the last steps shorter.

It costs one fine solve and asks nothing about the solver that will use the grid; :func:`solvers.optimize_grid` measures
that solver on that budget, hundreds of times, and finds better ones.

Reference: Chen et al. 2024, arXiv:2405.11326 ("On the Trajectory Regularity of ODE-based Diffusion Sampling").
"""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.ancestral import DDIM
from solvers.grids import Grid, karras
from solvers.integrate import integrate
from solvers.linear import expand
from solvers.problem import DiffusionProblem

__all__ = ["gits"]


def gits(
    problem: DiffusionProblem, x: Tensor, n: int, *, fine: int = 100, gamma: float = 1.15, along: Grid = karras
) -> Tensor:
    """The n steps that follow a solution of ``fine`` steps of DDIM best.

    Args:
        problem: what is solved.
        x: noises, states at t_max, (B, *event): some ten are enough; 3 ``fine`` + 1 times their memory is taken.
        n: number of steps of the grid, at least 1 and at most ``fine``.
        fine: number of steps of the solution, and of calls of ``predict``; the nodes are some of its nodes.
        gamma: factor of what comes after a step, > 0; the paper's is 1.15.
        along: grid of the fine solution.

    Returns:
        ts of shape (n + 1,), float64, falling from t_max to t_min.

    Raises:
        ValueError: a number of steps that does not fit, a factor that is none.

    Reference: Chen et al. 2024, arXiv:2405.11326, section 4.
    """
    if not 1 <= n <= fine:
        raise ValueError(f"of {fine} fine steps 1 to {fine} are chosen, got n={n}")
    if not gamma > 0:
        raise ValueError(f"gamma is positive, got {gamma}")
    ts = along(problem.path, fine)
    cost = _costs(problem, x, ts)
    value, ways = cost[:-1, -1], list[Tensor]()  # of one step to the end, from every node but the end
    for _ in range(n - 1):
        value, way = (cost[:-1, :-1] + gamma * value).min(1)
        ways.append(way)
    chosen = [0]
    for way in reversed(ways):
        chosen.append(int(way[chosen[-1]]))
    return ts[[*chosen, fine]]


def _costs(problem: DiffusionProblem, x: Tensor, ts: Tensor) -> Tensor:
    """c_ij, (M + 1, M + 1) float64 on the CPU; infinite where j is not after i."""
    with torch.no_grad():
        walked = integrate(DDIM(), problem, x, ts, save="all")
        assert walked.xs is not None
        assert walked.predictions is not None
        ys, level = walked.xs / expand(problem.path.alpha(ts), walked.xs), (-0.5 * problem.path.logsnr(ts)).exp()
        cost = torch.full((len(ts), len(ts)), torch.inf, dtype=torch.float64)
        for i, eps in enumerate(walked.predictions.eps):
            after = ys[i + 1 :]
            off = ys[i] + expand(level[i + 1 :] - level[i], after) * eps - after
            cost[i, i + 1 :] = off[:, :, None].flatten(2).double().square().sum(2).sqrt().mean(1).cpu()
    return cost
