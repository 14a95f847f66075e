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
times, which is how ``simple`` (W = 1), min-SNR and P2 depend on the schedule and the others do not.

**Which bound is it?** Let L(l) = 1/2 E INT_{l_min}^l |eps - eps_hat|^2 d logsnr, the latent term of data to which noise
of level l was added. Integration by parts gives

    L_w = w(l_max) L(l_max) + INT (-w'(l)) L(l) dl.

Where w falls, both parts are positive, and L_w / w(l_min) is an average of bounds: the bound of *noise-augmented* data,
with the noise level drawn with the density -w' / w(l_min), and a share w(l_max) / w(l_min) of them left clean. Where w
rises it is no bound: there a better L(l) makes the loss worse. ``print(OBJECTIVES["edm"])`` says which it is.

On the atoms of a DDPM the same formulas hold with d logsnr replaced by the atoms' mass and p_t by the share of the
times that each atom has; ``simple`` then is the plain mean over the T levels.

References: Kingma and Gao 2023, arXiv:2303.00848 (one weighting; table 1; the augmentation, section 4); Ho et al. 2020,
arXiv:2006.11239, eq. 14; Hang et al. 2023, arXiv:2303.09556 (min-SNR); Choi et al. 2022, arXiv:2204.00227 (P2); Karras
et al. 2022, arXiv:2206.00364, table 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdegen.adaptive import LearnedClock, SecondMoment
from sdegen.densities import (
    Density,
    Hyperbolic,
    Logistic,
    Normal,
    Spectrum,
    UniformLogSNR,
    UniformTime,
    low_discrepancy,
    stratified,
)
from sdegen.paths import VP, Cosine
from solvers.problem import Path

__all__ = [
    "DENSITIES",
    "ELBO",
    "OBJECTIVES",
    "P2",
    "Augmentation",
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

    def __str__(self) -> str:
        return "1"


@dataclass(frozen=True)
class Simple:
    """Mean squared error of eps at uniform times: w = p_t. With the cosine schedule, sech(logsnr / 2)."""

    def __call__(self, logsnr: Tensor, own: Tensor) -> Tensor:
        return own

    def __str__(self) -> str:
        return "p_t"


@dataclass(frozen=True)
class VelocityMSE:
    """Mean squared error of v at uniform times: w = p_t / alpha^2. With the cosine schedule, exp(-logsnr / 2)."""

    def __call__(self, logsnr: Tensor, own: Tensor) -> Tensor:
        return own * (1 + (-logsnr).exp())

    def __str__(self) -> str:
        return "p_t (1 + exp(-logsnr))"


@dataclass(frozen=True)
class MinSNR:
    """Error of x0 weighted min(SNR, kappa) at uniform times: w = p_t min(1, kappa / SNR)."""

    kappa: float = 5.0

    def __call__(self, logsnr: Tensor, own: Tensor) -> Tensor:
        return own * (self.kappa * (-logsnr).exp()).clamp(max=1.0)

    def __str__(self) -> str:
        return f"p_t min(1, {self.kappa:g} exp(-logsnr))"


@dataclass(frozen=True)
class P2:
    """Error of eps weighted 1 / (k + SNR)^gamma at uniform times: w = p_t (k + SNR)^-gamma."""

    k: float = 1.0
    gamma: float = 1.0

    def __call__(self, logsnr: Tensor, own: Tensor) -> Tensor:
        return own * (self.k + logsnr.exp()) ** -self.gamma

    def __str__(self) -> str:
        return f"p_t ({self.k:g} + exp(logsnr))^-{self.gamma:g}"


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

    def __str__(self) -> str:
        return f"N(logsnr; {self.mean:g}, {self.std:g}^2) (1 + exp(-logsnr) / {self.sigma_data:g}^2)"


@dataclass(frozen=True)
class SigmoidWeighting:
    """w = sigmoid(b - logsnr): falls with logsnr, so that fine detail counts less."""

    b: float = 2.0

    def __call__(self, logsnr: Tensor, own: Tensor) -> Tensor:
        return torch.sigmoid(self.b - logsnr)

    def __str__(self) -> str:
        return f"sigmoid({self.b:g} - logsnr)"


@dataclass(frozen=True)
class Augmentation:
    """What a weighting asks for on a path: which data, with how much noise added, the loss is the bound of.

    Attributes:
        weighting: w in words.
        path: on which.
        logsnr: its noisy and its clean end.
        falls: whether w falls (or stays) everywhere in between: only then is it a bound.
        rises_to: the largest logsnr that w rises to, NaN where it falls everywhere.
        clean: share of the data without noise, w(l_max) / w(l_min); NaN where w rises.
        noise: standard deviation sigma / alpha of the noise that 10, 50 and 90 % of the data have less of; NaN where w
            rises.
    """

    weighting: str
    path: str
    logsnr: tuple[float, float]
    falls: bool
    rises_to: float
    clean: float
    noise: tuple[float, float, float]

    def __str__(self) -> str:
        low, high = self.logsnr
        if not self.falls:
            top = "everywhere" if self.rises_to >= high - 1e-9 else f"up to logsnr {round(self.rises_to, 2) + 0.0:.2f}"
            what = f"not monotone: w rises {top}, and the loss is no bound"
        elif self.clean > 1 - 1e-9:
            what = "w is constant: the bound of the data themselves"
        else:
            few, half, most = (f"{std:.3g}" for std in self.noise)
            what = (
                f"w falls: the bound of data with noise added, sigma / alpha below {few}, {half} and {most} in 10, 50 "
                f"and 90 % of them, none in {100 * self.clean:.2g} %"
            )
        return f"w(logsnr) = {self.weighting}\n  logsnr from {low:.2f} to {high:.2f}, {self.path}\n  {what}"


@dataclass(frozen=True)
class Objective:
    """What a diffusion is trained for, and where it looks.

    Args:
        weighting: w(logsnr).
        density: p(logsnr).

    >>> OBJECTIVES["simple"]
    Objective(weighting=Simple(), density=UniformTime())
    >>> print(OBJECTIVES["edm"].describe(VP(Cosine())))
    w(logsnr) = N(logsnr; 2.4, 2.4^2) (1 + exp(-logsnr) / 0.5^2)
      logsnr from -10.14 to 12.91, GaussianPath(curve=Circle(), schedule=Cosine(shift=0.0), t_min=0.001, t_max=0.996)
      not monotone: w rises up to logsnr -3.31, and the loss is no bound
    """

    weighting: Weighting = Bound()
    density: Density = field(default_factory=UniformLogSNR)

    @property
    def is_bound(self) -> bool:
        """Whether the loss is the latent term of the variational bound."""
        return self.weighting == Bound()

    def describe(self, path: Path, nodes: int = 4001) -> Augmentation:
        """Whether the weighting falls on a path, and so which noise-augmented data it is the bound of.

        Args:
            path: its ends limit the weighting, and its clock decides p_t.
            nodes: levels at which w is looked at.
        """
        ends = path.logsnr(torch.tensor([path.t_max, path.t_min], dtype=torch.float64))
        logsnr = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, nodes, dtype=torch.float64))
        t = path.time(logsnr).clamp(path.t_min, path.t_max)
        w = self.weighting(logsnr, UniformTime().pdf(t, path))
        rising = w.diff() > 1e-9 * w.max()
        about = {"weighting": str(self.weighting), "path": repr(path), "logsnr": (float(ends[0]), float(ends[1]))}
        if bool(rising.any()):
            top = float(logsnr[1:][rising][-1])
            unknown = math.nan
            return Augmentation(**about, falls=False, rises_to=top, clean=unknown, noise=(unknown, unknown, unknown))
        left = (w / w[0]).cummin(0).values  # share with less noise than the level
        places = torch.searchsorted(-left, -torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
        std = torch.exp(-0.5 * logsnr[places.clamp(max=nodes - 1)]).where(places < nodes, 0.0)
        few, half, most = std.tolist()
        return Augmentation(**about, falls=True, rises_to=math.nan, clean=float(left[-1]), noise=(few, half, most))

    def __str__(self) -> str:
        return f"{self.describe(VP(Cosine()))}\n  drawn with {self.density!r}"


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

DENSITIES: dict[str, Callable[[Tensor], Density]] = {
    "logsnr": lambda x: UniformLogSNR(),
    "time": lambda x: UniformTime(),
    "hyperbolic": lambda x: Hyperbolic(),
    "logistic": lambda x: Logistic(),
    "normal": lambda x: Normal(),
    "importance": lambda x: Spectrum(),
    "spectrum": Spectrum.of,
    "second-moment": lambda x: SecondMoment(),
    "learned": lambda x: LearnedClock(),
}
"""Sampling densities by name, made from training data (N, *event): a new one at each call, for some of them learn."""
