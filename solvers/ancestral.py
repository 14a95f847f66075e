"""Ancestral sampling: DDPM, DDIM and everything between.

Given the predicted pair ``(x0, eps)`` at ``t``, the state at ``s`` is put together anew from its parts,

    x_s = alpha_s x0 + sigma_s ( sqrt(1 - tau) eps + sqrt(tau) z ),        z ~ N(0, I),

with a share ``tau`` of the noise's variance drawn afresh. ``tau = 0`` keeps the predicted noise (DDIM, deterministic);
``tau = 1 - exp(-2 |h|)``, with ``h`` the step in ``lam = logsnr / 2``, is the posterior q(x_s | x_t, x0) of the forward
process (DDPM); the share ``eta^2`` of that lies between. Written in this form no ratio alpha_s / alpha_t appears, so a
step is defined everywhere, from pure noise (alpha_t = 0) as well as to clean data (sigma_s = 0), and it does not see
which curve in the (alpha, sigma) plane the path is.

The same formula encodes: for s > t, ``tau = 1 - exp(-2 |h|)`` makes it the forward transition q(x_s | x_t).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.integrate import Solver
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, mix

__all__ = ["DDIM", "Ancestral"]


@dataclass(frozen=True)
class DDIM(Solver[None]):
    """Denoising diffusion implicit models.

    x_s = alpha_s x0 + sigma_s ( sqrt(1 - tau) eps + sqrt(tau) z ),    tau = eta^2 (1 - exp(-2 |lam_s - lam_t|)).

    Order 1 (weak order 1 for eta > 0), 1 evaluation per step, noise none (white for eta > 0). With eta = 0 it is also
    the first-order member of every exponential family (DPM-Solver-1, Euler on the ray in sigma / alpha).

    Args:
        eta: share of the posterior's standard deviation that is drawn afresh, in [0, 1]; 1 is DDPM.

    Reference: Song, Meng and Ermon 2021, arXiv:2010.02502, eqs. 12 and 16.
    """

    eta: float = 0.0

    order = 1
    nfe_per_step = 1
    reference = "Song, Meng, Ermon 2021, arXiv:2010.02502"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is in [0, 1], got {self.eta}")
        self.declare(stochastic=self.eta > 0)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        x0, eps = problem.predict(x, t)
        if self.eta == 0:
            return mix((path.alpha(s), x0), (path.sigma(s), eps)), state
        lam_t, lam_s = path.logsnr(t) / 2, path.logsnr(s) / 2
        tau = -(self.eta**2) * torch.expm1(-2 * (lam_s - lam_t).abs())
        kept, fresh = path.sigma(s) * (1 - tau).sqrt(), path.sigma(s) * tau.sqrt()
        return mix((path.alpha(s), x0), (kept, eps), (fresh, noise(lam_t, lam_s))), state


@dataclass(frozen=True)
class Ancestral(Solver[None]):
    """Ancestral sampling with the variances of DDPM.

    x_s = mean of q(x_s | x_t, x0) + std z
        = alpha_s x0 + sigma_s sqrt(1 - tau) eps + sigma_s^(1 - v) sigma_t^v sqrt(tau) z,
    tau = 1 - exp(-2 |lam_s - lam_t|).

    The two variances of the paper are the ends of a line in log-variance: v = 0 is beta-tilde = sigma_s^2 tau, the
    posterior's own, right for data that are one point; v = 1 is beta = sigma_t^2 tau, the variance of q(x_t | x_s),
    right for data that are N(0, I). v between is the interpolation that "learned variance" networks predict.

    Weak order 1, 1 evaluation per step, noise white. With v > 0 the result depends on the path's curve: beta is
    measured in units of x_t.

    Args:
        variance: v in [0, 1].

    Reference: Ho et al. 2020, arXiv:2006.11239, eqs. 6-7 and section 3.2; Nichol and Dhariwal 2021, arXiv:2102.09672,
    eq. 15.
    """

    variance: float = 0.0

    order = 1
    nfe_per_step = 1
    stochastic = True
    reference = "Ho et al. 2020, arXiv:2006.11239"

    def __post_init__(self) -> None:
        if not 0 <= self.variance <= 1:
            raise ValueError(f"variance is in [0, 1] (0 beta-tilde, 1 beta), got {self.variance}")

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        x0, eps = problem.predict(x, t)
        lam_t, lam_s = path.logsnr(t) / 2, path.logsnr(s) / 2
        tau = -torch.expm1(-2 * (lam_s - lam_t).abs())
        std = path.sigma(s) ** (1 - self.variance) * path.sigma(t) ** self.variance * tau.sqrt()
        mean_eps = path.sigma(s) * (1 - tau).sqrt()
        return mix((path.alpha(s), x0), (mean_eps, eps), (std, noise(lam_t, lam_s))), state
