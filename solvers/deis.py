"""DEIS: extrapolate eps as a polynomial in a variable of your choice.

The exact solution in eps-form, x_s = (alpha_s / alpha_t) x_t - alpha_s INT exp(-lam) eps dlam, says nothing of the
variable in which the integrand is like a polynomial. Exponential Adams methods (:mod:`solvers.exponential`) take lam.
DEIS has two others:

tAB
    the path's own time t, in which networks were trained and eps may vary most evenly. The moments

        m_k = INT_0^h ((tau(u) - t) / (s - t))^k exp(h - u) du,         lam(tau(u)) = lam_t + u,

    have no closed form on most paths; Gauss and Legendre's quadrature in lam gives them to rounding, once per grid.
rhoAB
    rho = sigma / alpha = exp(-lam). With y = x / alpha the equation is dy/drho = eps, without any linear part, and the
    method is the classical Adams-Bashforth method with variable steps.

Both are of order r + 1 with polynomials of degree r; r = 0 is DDIM. Their start has degrees 0, 1, ..., r, and where the
first steps are long in lam it is seen: r = 2 and 3 then converge like r = 1. ``Warmup(DPMSolver3S(), DEIStAB(3), 2)``
keeps the order. (The scheduler of that name in diffusers takes log rho, that is lam: it is exponential Adams in
eps-form, with closed integrals in float32 that cancel until its error *grows* when steps are refined.)

Reference: Zhang and Chen 2022, arXiv:2204.13902.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from solvers.exponential import ExponentialMultistep, check, interpolating
from solvers.problem import Path

__all__ = ["DEISrhoAB", "DEIStAB"]

_PAPER = "Zhang, Chen 2022, arXiv:2204.13902"


@lru_cache
def _gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.as_tensor((nodes + 1) / 2), torch.as_tensor(weights / 2)


@dataclass(frozen=True)
class DEIStAB(ExponentialMultistep):
    """tAB-DEIS: eps as a polynomial of degree r in t.

    x_s = (alpha_s / alpha_t) x_t + SUM_{j=0}^r C_j eps_j,
    C_j = -alpha_s INT_{lam_t}^{lam_s} exp(-lam) PROD_{k != j} (tau - t_k) / (t_j - t_k) dlam,        tau = tau(lam).

    Order r + 1, 1 evaluation per step, noise none. Start: degrees 0, 1, ..., r.

    Args:
        r: degree of the polynomial, >= 0.

    Reference: Zhang and Chen 2022, arXiv:2204.13902, section 3, ingredient 4.
    """

    r: int = 2

    form = "eps"
    invariant = False
    reference = f"{_PAPER}, tAB"

    def __post_init__(self) -> None:
        check(self.r + 1, self.form)
        self.declare(order=self.r + 1, memory=self.r + 1)

    def weights(self, path: Path, lam: Tensor, lam_s: Tensor) -> Tensor:
        lam_t, h = lam[..., :1], (lam_s - lam[..., 0])[..., None]
        places, shares = _gauss_legendre(32)
        start, length = path.time(2 * lam_t), path.time(2 * lam_s[..., None]) - path.time(2 * lam_t)
        tau = (path.time(2 * (lam_t + h * places)) - start) / length
        kernel = h * shares * (h * (1 - places)).exp()
        powers = tau[..., None] ** torch.arange(lam.shape[-1])
        moments = (kernel[..., None] * powers).sum(-2)
        return interpolating((path.time(2 * lam) - start) / length, moments)


@dataclass(frozen=True)
class DEISrhoAB(ExponentialMultistep):
    """rhoAB-DEIS: eps as a polynomial of degree r in rho = sigma / alpha, that is variable-step Adams-Bashforth.

    x_s / alpha_s = x_t / alpha_t + SUM_{j=0}^r C_j eps_j,
    C_j = INT_{rho_t}^{rho_s} PROD_{k != j} (rho - rho_k) / (rho_j - rho_k) drho.

    Order r + 1, 1 evaluation per step, noise none. Start: degrees 0, 1, ..., r.

    Args:
        r: degree of the polynomial, >= 0.

    Reference: Zhang and Chen 2022, arXiv:2204.13902, section 4.
    """

    r: int = 2

    form = "eps"
    reference = f"{_PAPER}, rhoAB"

    def __post_init__(self) -> None:
        check(self.r + 1, self.form)
        self.declare(order=self.r + 1, memory=self.r + 1)

    def weights(self, path: Path, lam: Tensor, lam_s: Tensor) -> Tensor:
        lam_t, h = lam[..., :1], (lam_s - lam[..., 0])[..., None]
        nodes = torch.expm1(lam_t - lam) / torch.expm1(-h)  # (rho_j - rho_t) / (rho_s - rho_t)
        moments = torch.expm1(h) / torch.arange(1, lam.shape[-1] + 1)
        return interpolating(nodes, moments)
