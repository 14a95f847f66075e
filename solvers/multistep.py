"""Adams-Bashforth: extrapolate the velocity as a polynomial in time, in a time of your choice.

The slopes that earlier steps have seen are for free. An Adams-Bashforth method of order p lays a polynomial through the
last p of them and integrates it over the next step,

    x_s = x_t + INT_t^s P(r) dr = x_t + SUM_j w_j v_j,        P(t_j) = v_j  for j = 0..p-1,

where the weights follow from what they do to powers: with nodes r_j = (t_j - t) / (s - t), SUM_j w_j r_j^k is (s - t) /
(k + 1). Steps may have any lengths; the textbook's constants 3/2, -1/2 and 23/12, -16/12, 5/12 are those of equal
steps, and on others they cost the method its order (:mod:`solvers.pndm`).

Nothing here knows in which variable time is measured, and all depends on it. On the curve and in the clock of your
choice (:class:`solvers.combine.OnPath`) one method is many:

    OnPath(AdamsBashforth(p), EDM)     dy/drho = eps, rho = sigma / alpha    "LMS"; rhoAB-DEIS is the same numbers
    OnPath(AdamsBashforth(p), FLOW)    du/dr = eps - x0, r = sigma / (alpha + sigma)    "v-Adams"
    OnPath(AdamsBashforth(p), VP_LAM)  the circle, in lam

In flow time the state x / (alpha + sigma) moves from noise to data in unit time by a velocity of order one, so v-Adams
has no end at which its steps become too long, and where that velocity is constant it is exact.

Reference: Hairer, Noersett and Wanner 1993, Solving Ordinary Differential Equations I, section III.1 and III.5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.exponential import FORMS, ExponentialMultistep, Row, check, filed, interpolating, windows
from solvers.integrate import Solver
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, Path, Prediction, Problem, mix

__all__ = ["AdamsBashforth", "GradientEstimation"]


class Slope(NamedTuple):
    """A velocity that was seen, and when."""

    t: Tensor
    velocity: Tensor


class Slopes(NamedTuple):
    """What :class:`AdamsBashforth` hands from step to step.

    Attributes:
        seen: slopes so far, the newest first.
        planned: the weights of the grid's steps, by (s, t, t_previous, ...); None for one that was not foreseen.
        translate: (lam, prediction) -> slope, for steps that another method took.
    """

    seen: tuple[Slope, ...]
    planned: Callable[[tuple[float, ...]], Row | None]
    translate: Callable[[Tensor, Prediction], Slope]


@dataclass(frozen=True)
class AdamsBashforth(Solver[Slopes]):
    """Adams-Bashforth with variable steps, on the velocity of any problem in its own time.

    x_s = x_t + SUM_{j=0}^{p-1} w_j v_j,        SUM_j w_j ((t_j - t) / (s - t))^k = (s - t) / (k + 1)  for k = 0..p-1.

    Order p, 1 evaluation per step, noise none. Start: orders 1, 2, ..., p (Euler first, so formally order 2 of the
    whole; ``Warmup`` replaces it).

    Args:
        p: how many slopes the polynomial goes through, 1 to 8.

    Reference: Bashforth and Adams 1883; Hairer, Noersett and Wanner 1993, section III.5. In rho = sigma / alpha:
    Liu et al. 2022, arXiv:2202.09778, and "LMS" in Crowson's k-diffusion; Zhang and Chen 2022, arXiv:2204.13902.
    """

    p: int = 3

    nfe_per_step = 1
    start_order = 2
    combines = True
    grid = "vp_quadratic"
    reference = "Bashforth, Adams 1883; Hairer, Noersett, Wanner 1993, section III.5"

    def __post_init__(self) -> None:
        check(self.p, "eps")
        self.declare(order=self.p)

    @staticmethod
    def weights(t: Tensor, s: Tensor) -> Tensor:
        """Weights (..., q) of slopes at times t (..., q), the newest first, in a step from t[..., 0] to s (...)."""
        h = (s - t[..., 0])[..., None]
        return interpolating((t - t[..., :1]) / h, h / torch.arange(1, t.shape[-1] + 1))

    def init(self, problem: Problem, x: Tensor, ts: Tensor) -> Slopes:
        planned: dict[tuple[float, ...], Row] = {}
        for first, last, nodes in windows(ts[:-1], self.p):
            there = ts[first + 1 : last + 1]
            planned |= filed(torch.cat([there[:, None], nodes], -1), self.weights(nodes, there))

        def translate(lam: Tensor, prediction: Prediction) -> Slope:
            if not isinstance(problem, DiffusionProblem):
                raise TypeError("an ODE makes no predictions that could be remembered")
            path, t = problem.path, problem.path.time(2 * lam)
            x = mix((path.alpha(t), prediction.x0), (path.sigma(t), prediction.eps))
            return Slope(t, DiffusionProblem(path, lambda x, t: prediction).velocity(x, t))

        return Slopes((), planned.get, translate)

    def observe(self, state: Slopes, lam: Tensor, prediction: Prediction) -> Slopes:
        return state._replace(seen=(state.translate(lam, prediction), *state.seen)[: self.p])

    def step(
        self, problem: Problem, x: Tensor, t: Tensor, s: Tensor, state: Slopes, noise: Noise
    ) -> tuple[Tensor, Slopes]:
        seen = (Slope(t, problem.velocity(x, t)), *state.seen)[: self.p]
        weights = state.planned((s.item(), *[slope.t.item() for slope in seen]))
        if weights is None:
            weights = self.weights(torch.stack([slope.t for slope in seen]), s)
        past = ((w, ((1.0, slope.velocity),)) for w, slope in zip(weights, seen, strict=True))
        return problem.state(s, (1.0, problem.terms(x, t)), *past), state._replace(seen=seen)


@dataclass(frozen=True)
class GradientEstimation(ExponentialMultistep):
    """DDIM with a corrected direction: eps is an estimate of a gradient, and so is its change.

    x_s = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) [ gamma eps_t + (1 - gamma) eps_previous ],    h = lam_s - lam_t.

    The paper sees denoising as projection onto the data and sampling as descent of the squared distance to them, whose
    gradient this combination estimates better than eps_t does. As an integrator it extrapolates too far: gamma = 3/2
    would be Adams-Bashforth on equal steps of sigma / alpha, and every other gamma is of order 1.

    Order 1, 1 evaluation per step, noise none. Start: DDIM.

    Args:
        gamma: weight of the newest prediction, > 0; the authors take 2, and 1 is DDIM.

    Reference: Permenter and Yuan 2023, arXiv:2306.04848, algorithm 2.
    """

    gamma: float = 2.0

    form = "eps"
    memory = 2
    order = 1
    reference = "Permenter, Yuan 2023, arXiv:2306.04848, algorithm 2"

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma is positive (1 is DDIM, 2 the paper's choice), got {self.gamma}")

    def weights(self, path: Path, lam: Tensor, lam_s: Tensor) -> Tensor:
        shares = [self.gamma, 1 - self.gamma] if lam.shape[-1] == 2 else [1.0]
        zeroth = FORMS[self.form].zeroth(lam_s - lam[..., 0])
        return zeroth[..., None] * torch.tensor(shares, dtype=torch.float64)
