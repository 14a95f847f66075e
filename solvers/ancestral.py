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

*How much variance?* The posterior is averaged over x0, so its variance is larger than sigma_s^2 tau, by

    c^2 Var[x0 | x_t],        c = alpha_s - sigma_s sqrt(1 - tau) alpha_t / sigma_t = d mean / d x0.

Leaving it out makes samples too narrow (beta-tilde), putting in what is right for data N(0, I) makes them too wide
(beta), estimating it is Analytic-DPM. All are O(h^2) apart, so all are of weak order 1.

*How to move the mean?* One evaluation freezes (x0, eps). The ancestral samplers of second order take a step of a better
ODE solver, to the lower level ``lam_s - log(1 - tau) / 2`` where only sqrt(1 - tau) of the noise is left, and add the
fresh noise there.

*Variance after 20 steps*, here and in the other stochastic families: the error of the variance, on data of standard
deviation 1/2, that 20 steps of equal logsnr from -8 to 8 make on the circle. It says whether the samples of a coarse
solve are too wide (+) or too narrow (-).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.integrate import Solver
from solvers.noise import Noise, standard_normal
from solvers.problem import DiffusionProblem, mix

__all__ = [
    "DDIM",
    "AnalyticDPM",
    "Ancestral",
    "DPM2Ancestral",
    "DPMPP2SAncestral",
    "EulerAncestral",
    "GaussianMSE",
    "LearnedVariance",
    "MeasuredMSE",
    "ReverseDiffusion",
]


def _lams(problem: DiffusionProblem, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return problem.path.logsnr(t) / 2, problem.path.logsnr(s) / 2


def _fresh(lam_t: Tensor, lam_s: Tensor, eta: float = 1.0) -> Tensor:
    """tau = eta^2 (1 - exp(-2 |lam_s - lam_t|)), the share of the noise's variance that is drawn afresh."""
    return -(eta**2) * torch.expm1(-2 * (lam_s - lam_t).abs())


def _check_eta(eta: float) -> None:
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
    nfe_per_step = 1
    reference = "Song, Meng, Ermon 2021, arXiv:2010.02502"

    def __post_init__(self) -> None:
        _check_eta(self.eta)
        self.declare(stochastic=self.eta > 0)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        x0, eps = problem.predict(x, t)
        if self.eta == 0:
            return mix((path.alpha(s), x0), (path.sigma(s), eps)), state
        lam_t, lam_s = _lams(problem, t, s)
        tau = _fresh(lam_t, lam_s, self.eta)
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
    (:class:`LearnedVariance`).

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
    reference = "Ho et al. 2020, arXiv:2006.11239"

    def __post_init__(self) -> None:
        if not 0 <= self.variance <= 1:
            raise ValueError(f"variance is in [0, 1] (0 beta-tilde, 1 beta), got {self.variance}")

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        x0, eps = problem.predict(x, t)
        lam_t, lam_s = _lams(problem, t, s)
        tau = _fresh(lam_t, lam_s)
        std = path.sigma(s) ** (1 - self.variance) * path.sigma(t) ** self.variance * tau.sqrt()
        mean_eps = path.sigma(s) * (1 - tau).sqrt()
        return mix((path.alpha(s), x0), (mean_eps, eps), (std, noise(lam_t, lam_s))), state


@dataclass(frozen=True)
class LearnedVariance(Solver[None]):
    """Ancestral sampling with a variance that is predicted, number by number, in the range of :class:`Ancestral`.

    x_s = mean of q(x_s | x_t, x0) + sigma_s^(1 - v) sigma_t^v sqrt(tau) z,        v = share(x_t, t).

    Weak order 1, 1 evaluation per step (what ``share`` costs is its own affair: a network that predicts both gives it
    from the same call), noise white. The step is not linear where v depends on x.

    Args:
        share: ``share(x, t)``, v in [0, 1] of the shape of x or one that broadcasts to it; the (v + 1) / 2 of the
            paper, whose networks answer in [-1, 1].

    Reference: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15.
    """

    share: Callable[[Tensor, Tensor], Tensor]

    order = 1
    nfe_per_step = 1
    stochastic = True
    linear = False
    reference = "Nichol, Dhariwal 2021, arXiv:2102.09672, eq. 15"

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        x0, eps = problem.predict(x, t)
        lam_t, lam_s = _lams(problem, t, s)
        tau = _fresh(lam_t, lam_s)
        least, most = (path.sigma(s) * tau.sqrt()).log(), (path.sigma(t) * tau.sqrt()).log()
        v = self.share(x, t).to(x)
        std = (v * float(most) + (1 - v) * float(least)).exp()
        mean = mix((path.alpha(s), x0), (path.sigma(s) * (1 - tau).sqrt(), eps))
        return torch.addcmul(mean, std, noise(lam_t, lam_s)), state


# --- The variance of the posterior, estimated -------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianMSE:
    """The mean squared error of the best predictor of data with variance v in every direction: v / (1 + v exp logsnr).

    Args:
        std: sqrt(v) of the data.
    """

    std: float = 1.0

    def __call__(self, logsnr: Tensor) -> Tensor:
        return self.std**2 * (-(logsnr + 2 * math.log(self.std))).sigmoid()


@dataclass(frozen=True)
class AnalyticDPM(Solver[None]):
    """Ancestral sampling with the best variance that does not depend on x.

    x_s = alpha_s x0 + sigma_s sqrt(1 - tau) eps + std z,        tau = eta^2 (1 - exp(-2 |lam_s - lam_t|)),
    std^2 = sigma_s^2 tau + (alpha_s - sigma_s sqrt(1 - tau) alpha_t / sigma_t)^2 mse(logsnr_t).

    ``mse`` is the mean squared error of the predicted x0 per number, E|x0 - x0_hat|^2 / D, at a level: for the perfect
    predictor it is the mean of Var[x0 | x_t], in the paper (sigma / alpha)^2 (1 - E|eps|^2 / D), by Tweedie's formula.
    It belongs to the data and the predictor, not to the path. For Gaussian data of equal variances a step is exact,
    whatever its length.

    Weak order 1, 1 evaluation per step, noise white.

    Args:
        mse: function of logsnr (0-dim) in units of x0 squared: :meth:`MeasuredMSE.of` estimates it. The default is
            right for data N(0, I): with it, as with "beta", samples of narrower data come out too wide (variance after
            20 steps: +19 %).
        eta: as in :class:`DDIM`; with eta = 0 it is Analytic-DDIM, which draws noise all the same.

    Reference: Bao et al. 2022, arXiv:2201.06503, theorem 1.
    """

    mse: Callable[[Tensor], Tensor] = GaussianMSE()
    eta: float = 1.0

    order = 1
    nfe_per_step = 1
    stochastic = True
    reference = "Bao et al. 2022, arXiv:2201.06503"

    def __post_init__(self) -> None:
        _check_eta(self.eta)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        x0, eps = problem.predict(x, t)
        lam_t, lam_s = _lams(problem, t, s)
        tau = _fresh(lam_t, lam_s, self.eta)
        kept = path.sigma(s) * (1 - tau).sqrt()
        slope = path.alpha(s) - kept * path.alpha(t) / path.sigma(t)
        std = (path.sigma(s) ** 2 * tau + slope**2 * self.mse(path.logsnr(t))).sqrt()
        return mix((path.alpha(s), x0), (kept, eps), (std, noise(lam_t, lam_s))), state


@dataclass(frozen=True)
class MeasuredMSE:
    """A mean squared error measured at some levels, log-linear between them and constant beyond.

    Args:
        logsnr: levels, rising.
        mse: E|x0 - x0_hat|^2 / D there, positive.

    >>> MeasuredMSE((-2.0, 2.0), (1.0, 0.01))(torch.tensor(0.0).double())
    tensor(0.1000, dtype=torch.float64)
    """

    logsnr: tuple[float, ...]
    mse: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.logsnr) != len(self.mse) or list(self.logsnr) != sorted(set(self.logsnr)) or min(self.mse) <= 0:
            raise ValueError("a measured error has rising levels of logsnr and as many positive errors")

    def __call__(self, logsnr: Tensor) -> Tensor:
        at = min(max(float(logsnr), self.logsnr[0]), self.logsnr[-1])
        i = max(next((j for j, level in enumerate(self.logsnr) if level >= at), 0), 1)
        (a, b), (p, q) = self.logsnr[i - 1 : i + 1], map(math.log, self.mse[i - 1 : i + 1])
        return torch.tensor(p + (q - p) * (at - a) / (b - a), dtype=torch.float64).exp()

    @classmethod
    def of(cls, problem: DiffusionProblem, data: Tensor, *, levels: int = 50, seed: int = 0) -> MeasuredMSE:
        """Measure the error of a predictor on noised data.

        Args:
            problem: path and predictor.
            data: clean data, (B, *event).
            levels: of equal logsnr over the path's range; as many calls of ``predict``.
            seed: of the noise.
        """
        path = problem.path
        ends = path.logsnr(torch.tensor([path.t_max, path.t_min], dtype=torch.float64))
        nodes = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, levels, dtype=torch.float64))
        eps = standard_normal(data.shape, seed, dtype=data.dtype, device=data.device)
        errors: list[float] = []
        for logsnr in nodes.unbind():
            t = path.time(logsnr).clamp(path.t_min, path.t_max)
            x0 = problem.predict(mix((path.alpha(t), data), (path.sigma(t), eps)), t).x0
            errors.append(float((x0 - data).double().square().mean()))
        return cls(tuple(float(logsnr) for logsnr in nodes), tuple(errors))


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
    reference = "Song et al. 2021, arXiv:2011.13456, appendix E"

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        lam_t, lam_s = _lams(problem, t, s)
        tau, z = _fresh(lam_t, lam_s), noise(lam_t, lam_s)
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
    nfe_per_step = 2
    reference = "Crowson 2022, k-diffusion, sample_dpm_2_ancestral"

    def __post_init__(self) -> None:
        _check_eta(self.eta)
        self.declare(stochastic=self.eta > 0)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        lam_t, lam_s = _lams(problem, t, s)
        tau = _fresh(lam_t, lam_s, self.eta)
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
    nfe_per_step = 2
    reference = "Crowson 2022, k-diffusion, sample_dpmpp_2s_ancestral"

    def __post_init__(self) -> None:
        _check_eta(self.eta)
        self.declare(stochastic=self.eta > 0)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        lam_t, lam_s = _lams(problem, t, s)
        tau = _fresh(lam_t, lam_s, self.eta)
        h = lam_s - torch.log1p(-tau) / 2 - lam_t
        m = s if self.eta == 1 and h > 0 else path.time(2 * lam_t + h)

        x0 = problem.predict(x, t).x0
        u = mix((path.sigma(m) / path.sigma(t), x), (-path.alpha(m) * torch.expm1(-h / 2), x0))
        kept = path.sigma(s) / path.sigma(t) * (1 - tau).sqrt()
        moved = mix((kept, x), (-path.alpha(s) * torch.expm1(-h), problem.predict(u, m).x0))
        if self.eta == 0:
            return moved, state
        return mix((1.0, moved), (path.sigma(s) * tau.sqrt(), noise(lam_t, lam_s))), state
