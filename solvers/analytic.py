"""Ancestral sampling with a variance that is estimated or learned.

The posterior q(x_s | x_t, x0) of the forward process is Gaussian with variance sigma_s^2 tau and a mean that is linear
in x0 (:mod:`solvers.ancestral`). A sampler knows only the mean of x0, so the variance of the best Gaussian step is

    std^2 = sigma_s^2 tau + c^2 Var[x0 | x_t],        c = alpha_s - sigma_s sqrt(1 - tau) alpha_t / sigma_t,

and Var[x0 | x_t] is the squared error that the best predictor makes. Averaged over x_t and over coordinates it is one
number for every level, which can be measured before sampling (Analytic-DPM); number by number it is a second output of
the network (learned variance).

*Variance after 20 steps*: see :mod:`solvers.ancestral`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.ancestral import check_eta, fresh_share, lams
from solvers.integrate import Solver
from solvers.noise import Noise, standard_normal
from solvers.problem import DiffusionProblem, mix

__all__ = ["AnalyticDPM", "GaussianMSE", "LearnedVariance", "MeasuredMSE"]


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
    invariant = True
    nfe_per_step = 1
    stochastic = True
    reference = "Bao et al. 2022, arXiv:2201.06503"

    def __post_init__(self) -> None:
        check_eta(self.eta)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        x0, eps = problem.predict(x, t)
        lam_t, lam_s = lams(problem, t, s)
        tau = fresh_share(lam_t, lam_s, self.eta)
        kept = path.sigma(s) * (1 - tau).sqrt()
        slope = path.alpha(s) - kept * path.alpha(t) / path.sigma(t)
        std = (path.sigma(s) ** 2 * tau + slope**2 * self.mse(path.logsnr(t))).sqrt()
        return mix((path.alpha(s), x0), (kept, eps), (std, noise(lam_t, lam_s))), state


@dataclass(frozen=True)
class MeasuredMSE:
    """A mean squared error measured at some levels, log-linear between them and constant beyond; logsnr of any shape.

    Args:
        logsnr: levels, rising.
        mse: E|x0 - x0_hat|^2 / D there, positive.

    >>> MeasuredMSE((-2.0, 2.0), (1.0, 0.01))(torch.tensor(0.0).double())
    tensor(0.1000, dtype=torch.float64)
    """

    logsnr: tuple[float, ...]
    mse: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = len(self.logsnr) >= 2 and list(self.logsnr) == sorted(set(self.logsnr))
        if not rising or len(self.logsnr) != len(self.mse) or min(self.mse) <= 0:
            raise ValueError("a measured error has two or more rising levels of logsnr and as many positive errors")

    def __call__(self, logsnr: Tensor) -> Tensor:
        levels, logs = (torch.tensor(a, dtype=torch.float64, device=logsnr.device) for a in (self.logsnr, self.mse))
        logs, at = logs.log(), logsnr.double().clamp(self.logsnr[0], self.logsnr[-1])
        i = torch.searchsorted(levels, at).clamp(1, len(levels) - 1)
        return torch.lerp(logs[i - 1], logs[i], (at - levels[i - 1]) / (levels[i] - levels[i - 1])).exp()

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
        lam_t, lam_s = lams(problem, t, s)
        tau = fresh_share(lam_t, lam_s)
        least, most = (path.sigma(s) * tau.sqrt()).log(), (path.sigma(t) * tau.sqrt()).log()
        v = self.share(x, t).to(x)
        std = (v * float(most) + (1 - v) * float(least)).exp()
        mean = mix((path.alpha(s), x0), (path.sigma(s) * (1 - tau).sqrt(), eps))
        return torch.addcmul(mean, std, noise(lam_t, lam_s)), state
