"""Objectives: a weighting times a sampling density (times a parametrization, which the denoiser owns).

Every loss that diffusion models are trained with is the one integral

    L_w = 1/2 E INT w(logsnr) |eps - eps_hat|^2 d logsnr,

because errors in eps, x0, v and score are one error in different units,
|eps - eps_hat|^2 = SNR |x0 - x0_hat|^2 = sigma^2 |s - s_hat|^2 = |v - v_hat|^2 alpha^2 (VP). So there are three plugs:

* the *weighting* w says what is wanted. w = 1 is the latent term of the bound; the rest are better for looks.
* the *density* p says where network calls are spent. A draw at logsnr ~ p counts w / p, so p changes the variance of
  the loss and never its expectation.
* the *parametrization* says what the network returns, and is a change of variables inside the denoiser.

A paper's loss "W(logsnr) |eps - eps_hat|^2 at uniform times" has w = W p_t with p_t the density of logsnr under uniform
times, which is how ``simple`` (W = 1), min-SNR and P2 depend on the schedule and the others do not. Where w falls with
logsnr, L_w is the bound of noise-augmented data, averaged over the augmentation.

On the atoms of a DDPM the same formulas hold with d logsnr replaced by the atoms' mass and p_t by the share of the
times that each atom has; ``simple`` then is the plain mean over the T levels.

References: Kingma and Gao 2023, arXiv:2303.00848 (one weighting; table 1); Ho et al. 2020, arXiv:2006.11239, eq. 14;
Hang et al. 2023, arXiv:2303.09556 (min-SNR); Choi et al. 2022, arXiv:2204.00227 (P2); Karras et al. 2022,
arXiv:2206.00364, table 1; Kingma et al. 2021, arXiv:2107.00630, appendix I.1 (low-discrepancy times).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import ndtr, ndtri

from solvers.problem import Path

__all__ = [
    "DENSITIES",
    "ELBO",
    "OBJECTIVES",
    "P2",
    "Bound",
    "Density",
    "EDMWeighting",
    "Hyperbolic",
    "Logistic",
    "MinSNR",
    "Normal",
    "Objective",
    "SigmoidWeighting",
    "Simple",
    "UniformLogSNR",
    "UniformTime",
    "VelocityMSE",
    "Weighting",
    "low_discrepancy",
    "stratified",
]

Weighting = Callable[[Tensor, Tensor], Tensor]
"""``w(logsnr, own)``; ``own`` is the density of the path's own uniform time, for the losses defined through it."""


@dataclass(frozen=True)
class Bound:
    """w = 1: the variational bound."""

    def __call__(self, logsnr: Tensor, own: Tensor) -> Tensor:
        return torch.ones_like(logsnr)


@dataclass(frozen=True)
class Simple:
    """Mean squared error of eps at uniform times: w = p_t. With the cosine schedule, sech(logsnr / 2)."""

    def __call__(self, logsnr: Tensor, own: Tensor) -> Tensor:
        return own


@dataclass(frozen=True)
class VelocityMSE:
    """Mean squared error of v at uniform times: w = p_t / alpha^2. With the cosine schedule, exp(-logsnr / 2)."""

    def __call__(self, logsnr: Tensor, own: Tensor) -> Tensor:
        return own * (1 + (-logsnr).exp())


@dataclass(frozen=True)
class MinSNR:
    """Error of x0 weighted min(SNR, kappa) at uniform times: w = p_t min(1, kappa / SNR)."""

    kappa: float = 5.0

    def __call__(self, logsnr: Tensor, own: Tensor) -> Tensor:
        return own * (self.kappa * (-logsnr).exp()).clamp(max=1.0)


@dataclass(frozen=True)
class P2:
    """Error of eps weighted 1 / (k + SNR)^gamma at uniform times: w = p_t (k + SNR)^-gamma."""

    k: float = 1.0
    gamma: float = 1.0

    def __call__(self, logsnr: Tensor, own: Tensor) -> Tensor:
        return own * (self.k + logsnr.exp()) ** -self.gamma


@dataclass(frozen=True)
class EDMWeighting:
    """EDM's loss: w = N(logsnr; mean, std^2) (exp(-logsnr) + sigma_data^2) / sigma_data^2.

    log sigma ~ N(-1.2, 1.2^2) there is logsnr ~ N(2.4, 2.4^2) here.
    """

    mean: float = 2.4
    std: float = 2.4
    sigma_data: float = 0.5

    def __call__(self, logsnr: Tensor, own: Tensor) -> Tensor:
        normal = (-0.5 * ((logsnr - self.mean) / self.std).square()).exp() / (self.std * math.sqrt(2 * math.pi))
        return normal * ((-logsnr).exp() / self.sigma_data**2 + 1)


@dataclass(frozen=True)
class SigmoidWeighting:
    """w = sigmoid(b - logsnr): falls with logsnr, so that fine detail counts less."""

    b: float = 2.0

    def __call__(self, logsnr: Tensor, own: Tensor) -> Tensor:
        return torch.sigmoid(self.b - logsnr)


class Density(ABC):
    """A probability density on the noise levels of a path, as a map from uniform numbers to times.

    u = 0 is the cleanest time and u = 1 the noisiest.
    """

    @abstractmethod
    def time(self, u: Tensor, path: Path) -> Tensor:
        """The time below which a share ``u`` of the draws lies."""

    @abstractmethod
    def cdf(self, t: Tensor, path: Path) -> Tensor:
        """The share of draws below ``t``: the inverse of :meth:`time`."""

    @abstractmethod
    def pdf(self, t: Tensor, path: Path) -> Tensor:
        """Density per unit of logsnr at ``t``."""


@dataclass(frozen=True)
class UniformTime(Density):
    """The path's own clock: t uniform in [t_min, t_max]."""

    def time(self, u: Tensor, path: Path) -> Tensor:
        return path.t_min + (path.t_max - path.t_min) * u

    def cdf(self, t: Tensor, path: Path) -> Tensor:
        return (t - path.t_min) / (path.t_max - path.t_min)

    def pdf(self, t: Tensor, path: Path) -> Tensor:
        speed = path.g2(t) / path.sigma(t).square()  # |d logsnr / dt|
        return 1 / (speed * (path.t_max - path.t_min))


class _OfLogSNR(Density):
    """A density of logsnr cut off at the ends of the path; subclasses give it on the whole line."""

    @abstractmethod
    def _below(self, logsnr: Tensor) -> Tensor:
        """Distribution function."""

    @abstractmethod
    def _quantile(self, q: Tensor) -> Tensor:
        """Its inverse."""

    @abstractmethod
    def _density(self, logsnr: Tensor) -> Tensor:
        """Its derivative."""

    def _ends(self, path: Path, like: Tensor) -> tuple[Tensor, Tensor]:
        low, high = path.logsnr(torch.tensor([path.t_max, path.t_min], dtype=torch.float64)).to(like.device)
        return self._below(low), self._below(high)

    def time(self, u: Tensor, path: Path) -> Tensor:
        low, high = self._ends(path, u)
        return path.time(self._quantile(high - u * (high - low))).clamp(path.t_min, path.t_max)

    def cdf(self, t: Tensor, path: Path) -> Tensor:
        low, high = self._ends(path, t)
        return (high - self._below(path.logsnr(t))) / (high - low)

    def pdf(self, t: Tensor, path: Path) -> Tensor:
        low, high = self._ends(path, t)
        return self._density(path.logsnr(t)) / (high - low)


@dataclass(frozen=True)
class UniformLogSNR(_OfLogSNR):
    """logsnr uniform between the ends: the bound's integrand is then weighted by a constant."""

    def _below(self, logsnr: Tensor) -> Tensor:
        return logsnr

    def _quantile(self, q: Tensor) -> Tensor:
        return q

    def _density(self, logsnr: Tensor) -> Tensor:
        return torch.ones_like(logsnr)


@dataclass(frozen=True)
class Hyperbolic(_OfLogSNR):
    """p = sech(logsnr / 2) / 2 pi: what the cosine schedule draws at uniform times."""

    def _below(self, logsnr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan((0.5 * logsnr).exp())

    def _quantile(self, q: Tensor) -> Tensor:
        return 2 * torch.tan(0.5 * math.pi * q).log()

    def _density(self, logsnr: Tensor) -> Tensor:
        return 1 / (2 * math.pi * torch.cosh(0.5 * logsnr))


@dataclass(frozen=True)
class Logistic(_OfLogSNR):
    """logsnr logistic: sigmoid-shaped distribution function."""

    mean: float = 0.0
    scale: float = 2.0

    def _below(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid((logsnr - self.mean) / self.scale)

    def _quantile(self, q: Tensor) -> Tensor:
        return self.mean + self.scale * torch.logit(q)

    def _density(self, logsnr: Tensor) -> Tensor:
        p = self._below(logsnr)
        return p * (1 - p) / self.scale


@dataclass(frozen=True)
class Normal(_OfLogSNR):
    """logsnr normal: EDM draws log sigma ~ N(-1.2, 1.2^2), which is the default here."""

    mean: float = 2.4
    std: float = 2.4

    def _below(self, logsnr: Tensor) -> Tensor:
        return ndtr((logsnr - self.mean) / self.std)

    def _quantile(self, q: Tensor) -> Tensor:
        return self.mean + self.std * ndtri(q)

    def _density(self, logsnr: Tensor) -> Tensor:
        u = (logsnr - self.mean) / self.std
        return (-0.5 * u.square()).exp() / (self.std * math.sqrt(2 * math.pi))


DENSITIES: dict[str, Density] = {
    "logsnr": UniformLogSNR(),
    "time": UniformTime(),
    "hyperbolic": Hyperbolic(),
    "logistic": Logistic(),
    "normal": Normal(),
}
"""Sampling densities by name."""


@dataclass(frozen=True)
class Objective:
    """What a diffusion is trained for, and where it looks.

    Args:
        weighting: w(logsnr).
        density: p(logsnr).

    >>> OBJECTIVES["simple"]
    Objective(weighting=Simple(), density=UniformTime())
    """

    weighting: Weighting = Bound()
    density: Density = UniformLogSNR()

    @property
    def is_bound(self) -> bool:
        """Whether the loss is the latent term of the variational bound."""
        return self.weighting == Bound()


ELBO = Objective()

OBJECTIVES: dict[str, Objective] = {
    "elbo": ELBO,
    "simple": Objective(Simple(), UniformTime()),
    "v-mse": Objective(VelocityMSE(), UniformTime()),
    "min-snr": Objective(MinSNR(), UniformTime()),
    "p2": Objective(P2(), UniformTime()),
    "edm": Objective(EDMWeighting(), Normal()),
    "sigmoid": Objective(SigmoidWeighting(), Logistic(mean=2.0)),
}
"""Objectives by name, each with the density that suits it."""


def low_discrepancy(n: int, generator: torch.Generator) -> Tensor:
    """u_i = (u + i / n) mod 1: n uniform numbers that share one shift, evenly spread over a batch; (n,), float64."""
    device = generator.device
    shift = torch.rand((), generator=generator, device=device, dtype=torch.float64)
    return (shift + torch.arange(n, device=device, dtype=torch.float64) / n) % 1.0


def stratified(n: int, draws: int, generator: torch.Generator) -> Tensor:
    """u_{i,k} uniform in [k / draws, (k + 1) / draws): for each of n examples one number in each of ``draws`` strata.

    All numbers are independent, so that the spread between examples or repeats is an honest standard error.

    Returns:
        (n * draws,), float64, the draws of one example side by side.
    """
    device = generator.device
    inside = torch.rand((n, draws), generator=generator, device=device, dtype=torch.float64)
    return ((inside + torch.arange(draws, device=device, dtype=torch.float64)) / draws).flatten()
