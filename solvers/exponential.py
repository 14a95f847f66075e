"""Exponential integrators: the linear part of the equation is solved exactly, only the prediction is approximated.

In the clock ``lam = logsnr / 2`` the probability-flow ODE of every Gaussian path has the exact solution (two forms)

    x_s = (sigma_s / sigma_t) x_t + sigma_s INT_{lam_t}^{lam_s} exp(lam) x0(lam) dlam
        = (alpha_s / alpha_t) x_t - alpha_s INT_{lam_t}^{lam_s} exp(-lam) eps(lam) dlam,

so a method is a rule for the integrand. Freeze it and you have DDIM; extend it as the polynomial through earlier
predictions and you have a *multistep* method, at one evaluation per step. With ``x0(lam) = SUM_k d_k (lam -
lam_t)^k / k!`` the first integral is ``alpha_s SUM_k d_k h^(k+1) phi_(k+1)(-h)``, where ``h = lam_s - lam_t`` and

    phi_0(z) = exp(z),        phi_(k+1)(z) = (phi_k(z) - 1/k!) / z.

A multistep method remembers the :class:`Node` of each earlier step. While its memory is short it extrapolates with the
lower order that the memory allows, beginning with DDIM: that is its *start*. :class:`solvers.combine.Warmup` replaces
the start by a method of your choice.

Reference: Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095; Hochbruck and Ostermann 2010, Acta Numerica 19.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from solvers.integrate import Solver
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, Prediction, mix

__all__ = ["DPMSolverPP", "History", "Multistep", "Node", "phi"]


def phi(k: int, z: Tensor) -> Tensor:
    """phi_k(z) = SUM_j z^j / (j + k)!, accurate to a few ulp for every z.

    Args:
        k: index, >= 0.
        z: float64, any shape.

    >>> phi(1, torch.tensor([0.0, 1e-9, -50.0]).double())
    tensor([1.0000, 1.0000, 0.0200], dtype=torch.float64)
    """
    near = z.abs() < 1
    small, large = torch.where(near, z, 0.0), torch.where(near, 1.0, z)
    series = torch.zeros_like(z)
    for j in reversed(range(20)):  # 1/20! is below the last digit
        series = series * small + 1 / math.factorial(j + k)
    # The recursion divides a difference by z: exact enough for |z| >= 1, useless below.
    ratio = large.exp()
    for j in range(k):
        ratio = (ratio - 1 / math.factorial(j)) / large
    return torch.where(near, series, ratio)


class Node(NamedTuple):
    """What a multistep method remembers of a step: where it began and what was predicted there."""

    lam: Tensor
    x0: Tensor
    eps: Tensor


History = tuple[Node, ...]
"""Nodes, the newest first."""


class Multistep(Solver[History]):
    """A method that extrapolates from the predictions of earlier steps; one evaluation per step.

    Attributes:
        memory: how many earlier nodes it uses.
    """

    memory: ClassVar[int]
    nfe_per_step = 1

    def init(self, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> History:
        return ()

    def observe(self, state: History, lam: Tensor, prediction: Prediction) -> History:
        return (Node(lam, *prediction), *state)[: self.memory]


@dataclass(frozen=True)
class DPMSolverPP(Multistep):
    """DPM-Solver++(2M), the multistep method of second order in x0-form.

    x_s = (sigma_s / sigma_t) x_t - alpha_s (exp(-h) - 1) D,
    D = (1 + 1/(2r)) x0_t - 1/(2r) x0_prev,                         r = h_prev / h.

    Order 2, 1 evaluation per step, noise none. Start: order 1, D = x0_t.

    Reference: Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """

    memory = 1
    order = 2
    reference = "Lu et al. 2022, arXiv:2211.01095, algorithm 2"

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: History, noise: Noise
    ) -> tuple[Tensor, History]:
        path = problem.path
        lam_t, lam_s = path.logsnr(t) / 2, path.logsnr(s) / 2
        h = lam_s - lam_t
        now = problem.predict(x, t)
        kept, new = path.sigma(s) / path.sigma(t), -path.alpha(s) * torch.expm1(-h)
        if not state:
            moved = mix((kept, x), (new, now.x0))
        else:
            half = h / (2 * (lam_t - state[0].lam))  # 1 / (2r)
            moved = mix((kept, x), (new * (1 + half), now.x0), (-new * half, state[0].x0))
        return moved, self.observe(state, lam_t, now)
