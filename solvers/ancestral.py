"""Ancestral sampling: DDPM, DDIM and everything between.

Given the predicted pair ``(x0, eps)`` at ``t``, the state at ``s`` is put together anew from its parts,

    x_s = alpha_s x0 + sigma_s ( sqrt(1 - tau) eps + sqrt(tau) z ),        z ~ N(0, I),

with a share ``tau`` of the noise's variance drawn afresh. ``tau = 0`` keeps the predicted noise (DDIM, deterministic);
``tau = 1 - exp(-2 |h|)``, with ``h`` the step in ``lam = logsnr / 2``, is the posterior q(x_s | x_t, x0) of the forward
process (DDPM); the share ``eta^2`` of that lies between. Written in this form no ratio alpha_s / alpha_t appears, so a
step is defined everywhere, from pure noise (alpha_t = 0) as well as to clean data (sigma_s = 0), and it does not see
which curve in the (alpha, sigma) plane the path is.

The same formula encodes: for s > t, ``tau = 1 - exp(-2 |h|)`` makes it the forward transition q(x_s | x_t).

Two questions remain, and each has a literature.

*How much variance?* The posterior is averaged over x0, so its variance is larger than sigma_s^2 tau. Leaving the excess
out makes samples too narrow (beta-tilde), putting in what is right for data N(0, I) makes them too wide (beta),
estimating it is Analytic-DPM (:mod:`solvers.analytic`). All are O(h^2) apart, so all are of weak order 1.

*How to move the mean?* One evaluation freezes (x0, eps). The ancestral samplers of second order take a step of a better
ODE solver, to the lower level ``lam_s - log(1 - tau) / 2`` where only sqrt(1 - tau) of the noise is left, and add the
fresh noise there.

*Variance after 20 steps*, here and in the other stochastic families: the error of the variance, on data of standard
deviation 1/2, that 20 steps of equal logsnr from -8 to 8 make on the circle. It says whether the samples of a coarse
solve are too wide (+) or too narrow (-).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.integrate import Solver
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, mix

__all__ = [
    "DDIM",
    "Ancestral",
    "DPM2Ancestral",
    "DPMPP2SAncestral",
    "EulerAncestral",
    "ReverseDiffusion",
]


def lams(problem: DiffusionProblem, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """lam = logsnr / 2 at both ends of a step."""
    return problem.path.logsnr(t) / 2, problem.path.logsnr(s) / 2


def fresh_share(lam_t: Tensor, lam_s: Tensor, eta: float = 1.0) -> Tensor:
    """tau = eta^2 (1 - exp(-2 |lam_s - lam_t|)), the share of the noise's variance that is drawn afresh."""
    return -(eta**2) * torch.expm1(-2 * (lam_s - lam_t).abs())


def check_eta(eta: float) -> None:
    """Refuse a share of the posterior's standard deviation outside [0, 1].

    Raises:
        ValueError: saying what is allowed.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is in [0, 1], got {eta}")


# --- One evaluation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DDIM(Solver[None]):
    """Denoising diffusion implicit models.

    x_s = alpha_s x0 + sigma_s ( sqrt(1 - tau) eps + sqrt(tau) z ),    tau = eta^2 (1 - exp(-2 |lam_s - lam_t|)).

    Order 1 (weak order 1 for eta > 0), 1 evaluation per step, noise none (white for eta > 0). With eta = 0 it is also
    the first-order member of every exponential family (DPM-Solver-1, Euler on the ray in sigma / alpha). Variance after
    20 steps: -21 % with eta = 1/2, -31 % with eta = 1.

    Args:
        eta: share of the posterior's standard deviation that is drawn afresh, in [0, 1]; 1 is DDPM.

    Reference: Song, Meng and Ermon 2021, arXiv:2010.02502, eqs. 12 and 16.
    """

    eta: float = 0.0

    order = 1
    invariant = True
    nfe_per_step = 1
    reference = "Song, Meng, Ermon 2021, arXiv:2010.02502"

    def __post_init__(self) -> None:
        check_eta(self.eta)
        self.declare(stochastic=self.eta > 0, grid="logsnr" if self.eta > 0 else "sqrt_flow")

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        x0, eps = problem.predict(x, t)
        if self.eta == 0:
            return mix((path.alpha(s), x0), (path.sigma(s), eps)), state
        lam_t, lam_s = lams(problem, t, s)
        tau = fresh_share(lam_t, lam_s, self.eta)
        kept, fresh = path.sigma(s) * (1 - tau).sqrt(), path.sigma(s) * tau.sqrt()
        return mix((path.alpha(s), x0), (kept, eps), (fresh, noise(lam_t, lam_s))), state


@dataclass(frozen=True)
class EulerAncestral(DDIM):
    """Euler-a: Euler in sigma / alpha down to a lower level, then noise back up. It is DDIM(eta), here with eta = 1.

    With sh = sigma / alpha and y = x / alpha, sh_down = sh_s sqrt(1 - tau), sh_up = sh_s sqrt(tau),

        y_s = y_t + (sh_down - sh_t) eps + sh_up z = x0 + sh_down eps + sh_up z.

    Weak order 1, 1 evaluation per step, noise white.

    Reference: Crowson 2022, github.com/crowsonkb/k-diffusion, sample_euler_ancestral.
    """

    eta: float = 1.0

    reference = "Crowson 2022, k-diffusion, sample_euler_ancestral"


@dataclass(frozen=True)
class Ancestral(Solver[None]):
    """Ancestral sampling with the variances of DDPM.

    x_s = mean of q(x_s | x_t, x0) + std z
        = alpha_s x0 + sigma_s sqrt(1 - tau) eps + sigma_s^(1 - v) sigma_t^v sqrt(tau) z,
    tau = 1 - exp(-2 |lam_s - lam_t|).

    The two variances of the paper are the ends of a line in log-variance: v = 0 is beta-tilde = sigma_s^2 tau, the
    posterior's own, right for data that are one point; v = 1 is beta = sigma_t^2 tau, the variance of q(x_t | x_s),
    right for data that are N(0, I). v between is the interpolation that "learned variance" networks predict
    (:class:`solvers.analytic.LearnedVariance`).

    Weak order 1, 1 evaluation per step, noise white. With v > 0 the result depends on the path's curve: beta is
    measured in units of x_t. Variance after 20 steps: -31 % with v = 0; +19 % (on the circle) and +53 % (on the ray)
    with v = 1.

    Args:
        variance: v in [0, 1].

    Reference: Ho et al. 2020, arXiv:2006.11239, eqs. 6-7 and section 3.2; Nichol and Dhariwal 2021, arXiv:2102.09672,
    eq. 15.
    """

    variance: float = 0.0

    order = 1
    nfe_per_step = 1
    stochastic = True
    eta = 1.0
    reference = "Ho et al. 2020, arXiv:2006.11239"

    def __post_init__(self) -> None:
        if not 0 <= self.variance <= 1:
            raise ValueError(f"variance is in [0, 1] (0 beta-tilde, 1 beta), got {self.variance}")
        self.declare(invariant=self.variance == 0)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        x0, eps = problem.predict(x, t)
        lam_t, lam_s = lams(problem, t, s)
        tau = fresh_share(lam_t, lam_s)
        std = path.sigma(s) ** (1 - self.variance) * path.sigma(t) ** self.variance * tau.sqrt()
        mean_eps = path.sigma(s) * (1 - tau).sqrt()
        return mix((path.alpha(s), x0), (mean_eps, eps), (std, noise(lam_t, lam_s))), state


# --- The forward chain, reversed --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReverseDiffusion(Solver[None]):
    """The forward chain's own discretisation, reversed term by term.

    The chain between two nodes is x_t = a x_s + b z with a = alpha_t / alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2;
    reversed,

        x_s = (2 - a) x_t + b^2 score + b z,        score = -eps / sigma_t,

    which on a VP path is (2 - sqrt(1 - beta)) x + beta score + sqrt(beta) z. For s > t it is the chain itself.

    Weak order 1, 1 evaluation per step, noise white. Variance after 20 steps: +39 % on the circle, +53 % on the ray.

    Reference: Song et al. 2021, arXiv:2011.13456, appendix E.
    """

    order = 1
    nfe_per_step = 1
    stochastic = True
    eta = 1.0
    reference = "Song et al. 2021, arXiv:2011.13456, appendix E"

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        lam_t, lam_s = lams(problem, t, s)
        tau, z = fresh_share(lam_t, lam_s), noise(lam_t, lam_s)
        noisier = t if t > s else s
        b2 = path.sigma(noisier) ** 2 * tau
        if s > t:
            return mix((path.alpha(s) / path.alpha(t), x), (b2.sqrt(), z)), state
        eps = problem.predict(x, t).eps
        return mix((2 - path.alpha(t) / path.alpha(s), x), (-b2 / path.sigma(t), eps), (b2.sqrt(), z)), state


# --- Two evaluations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DPM2Ancestral(Solver[None]):
    """DPM2-a: the midpoint (in lam) slope, used down to a lower level, then noise back up.

    tau = eta^2 (1 - exp(-2 |lam_s - lam_t|)),        h = lam_s - log(1 - tau) / 2 - lam_t,
    u   = (alpha_m / alpha_t) x_t - sigma_m (e^(h/2) - 1) eps_t,                       lam_m = lam_t + h / 2,
    x_s = (alpha_s / alpha_t) x_t - sigma_s sqrt(1 - tau) (e^h - 1) eps(u, t_m) + sigma_s sqrt(tau) z.

    Weak order 2, 2 evaluations per step, noise white (none for eta = 0: DPM-Solver-2). The midpoint lies at s for
    eta = 1. Variance after 20 steps: +9.4 %.

    Args:
        eta: share of the posterior's standard deviation that is drawn afresh, in [0, 1].

    Reference: Crowson 2022, github.com/crowsonkb/k-diffusion, sample_dpm_2_ancestral.
    """

    eta: float = 1.0

    order = 2
    invariant = True
    nfe_per_step = 2
    reference = "Crowson 2022, k-diffusion, sample_dpm_2_ancestral"

    def __post_init__(self) -> None:
        check_eta(self.eta)
        self.declare(stochastic=self.eta > 0)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        lam_t, lam_s = lams(problem, t, s)
        tau = fresh_share(lam_t, lam_s, self.eta)
        h = lam_s - torch.log1p(-tau) / 2 - lam_t
        m = s if self.eta == 1 and h > 0 else path.time(2 * lam_t + h)

        eps = problem.predict(x, t).eps
        u = mix((path.alpha(m) / path.alpha(t), x), (-path.sigma(m) * torch.expm1(h / 2), eps))
        down = path.sigma(s) * (1 - tau).sqrt()
        moved = mix((path.alpha(s) / path.alpha(t), x), (-down * torch.expm1(h), problem.predict(u, m).eps))
        if self.eta == 0:
            return moved, state
        return mix((1.0, moved), (path.sigma(s) * tau.sqrt(), noise(lam_t, lam_s))), state


@dataclass(frozen=True)
class DPMPP2SAncestral(Solver[None]):
    """DPM++ 2S a: :class:`DPM2Ancestral` in x0-form.

    tau = eta^2 (1 - exp(-2 |lam_s - lam_t|)),        h = lam_s - log(1 - tau) / 2 - lam_t,
    u   = (sigma_m / sigma_t) x_t + alpha_m (1 - e^(-h/2)) x0_t,                       lam_m = lam_t + h / 2,
    x_s = sqrt(1 - tau) (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) x0(u, t_m) + sigma_s sqrt(tau) z.

    Weak order 2, 2 evaluations per step, noise white (none for eta = 0: DPM-Solver++(2S)). Variance after 20 steps:
    -6.6 %.

    Args:
        eta: share of the posterior's standard deviation that is drawn afresh, in [0, 1].

    Reference: Crowson 2022, github.com/crowsonkb/k-diffusion, sample_dpmpp_2s_ancestral.
    """

    eta: float = 1.0

    order = 2
    invariant = True
    nfe_per_step = 2
    reference = "Crowson 2022, k-diffusion, sample_dpmpp_2s_ancestral"

    def __post_init__(self) -> None:
        check_eta(self.eta)
        self.declare(stochastic=self.eta > 0)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        lam_t, lam_s = lams(problem, t, s)
        tau = fresh_share(lam_t, lam_s, self.eta)
        h = lam_s - torch.log1p(-tau) / 2 - lam_t
        m = s if self.eta == 1 and h > 0 else path.time(2 * lam_t + h)

        x0 = problem.predict(x, t).x0
        u = mix((path.sigma(m) / path.sigma(t), x), (-path.alpha(m) * torch.expm1(-h / 2), x0))
        kept = path.sigma(s) / path.sigma(t) * (1 - tau).sqrt()
        moved = mix((kept, x), (-path.alpha(s) * torch.expm1(-h), problem.predict(u, m).x0))
        if self.eta == 0:
            return moved, state
        return mix((1.0, moved), (path.sigma(s) * tau.sqrt(), noise(lam_t, lam_s))), state
