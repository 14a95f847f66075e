"""From a latent to a distribution of the datum, p(x | z).

Two families, one result (a :class:`sdegen.distributions.Distribution`):

**Decoders of a diffusion** read z_0 = alpha_0 x + sigma_0 eps, the cleanest state of the path. They give the bound's
reconstruction term and they end sampling; the model has one decoder and both uses ask it.

===========================  =========================================================  =====
decoder                      p(x | z_0)                                                 calls
===========================  =========================================================  =====
:class:`SoftmaxDecoder`      softmax over levels of log N(z_0; alpha_0 v_k, sigma_0^2)  0
:class:`PosteriorDecoder`    the denoiser's own posterior over the levels               1
:class:`RoundingDecoder`     N(x0_hat(z_0), (sigma_0 / alpha_0)^2) rounded to the bins  1
:class:`GaussianDecoder`     density N(z_0 / alpha_0, (sigma_0 / alpha_0)^2)            0
:class:`TweedieDecoder`      density N(x0_hat(z_0), (sigma_0 / alpha_0)^2)              1
===========================  =========================================================  =====

A softmax decoder costs nothing when the spacing of the levels is several sigma_0 / alpha_0, which :func:`logsnr_for`
turns into a rule for the clean end of the path; what it costs is the same for all pixels of a level, one integral for
each level, so that no z_0 need be drawn. With a density decoder the reconstruction is
(D / 2) (log 2 pi - logsnr_0) plus half the squared error of the noise, whose mean for :class:`GaussianDecoder` is D.

**Heads of a VAE** say what the numbers mean that a decoder network returns, ``outputs`` of them per coordinate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sdegen.bins import Bins
from sdegen.distributions import (
    Bernoulli,
    Categorical,
    DiscretisedGaussian,
    DiscretisedLogistic,
    Distribution,
    Gaussian,
)
from solvers.problem import Prediction

__all__ = [
    "HEADS",
    "BernoulliHead",
    "CategoricalHead",
    "Clean",
    "Decoder",
    "DiscretisedGaussianHead",
    "DiscretisedLogisticHead",
    "GaussianDecoder",
    "GaussianHead",
    "Head",
    "PosteriorDecoder",
    "RoundingDecoder",
    "SoftmaxDecoder",
    "TweedieDecoder",
    "logsnr_for",
]

TWO = Bins(2)


def logsnr_for(bins: Bins) -> float:
    """The clean end of a path at which the levels can be told apart: spacing / sigma = 6.04, logsnr = 2 log(3.02 V).

    Two neighbouring levels are then confused with probability Phi(-3.02) = 0.0013, about a hundredth of a bit per
    coordinate; a cleaner end buys nothing and costs network capacity.

    >>> round(logsnr_for(Bins(17)), 2), round(logsnr_for(Bins(256)), 2)
    (7.88, 13.3)
    """
    return 2 * math.log(3.02 * bins.count)


class Clean(Protocol):
    """What a decoder may ask about the cleanest state z_0; a diffusion model answers."""

    alpha: Tensor
    sigma: Tensor

    def predict(self, z: Tensor) -> Prediction:
        """The denoiser at z_0."""
        ...

    def level_logits(self, z: Tensor) -> Tensor:
        """The denoiser's log-posterior of the grey levels, (B, *event, V)."""
        ...


@dataclass(frozen=True)
class Decoder(ABC):
    """p(x | z_0) of a diffusion.

    Attributes:
        discrete: whether it is a probability (else a density).
        calls: network calls it makes.
        drawn: whether :meth:`reconstruction` depends on its noise (else it is the expectation itself).
    """

    discrete: ClassVar[bool]
    calls: ClassVar[int] = 0
    drawn: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, z: Tensor, at: Clean) -> Distribution:
        """The distribution of x.

        Args:
            z: z_0, shape (B, *event), in the path's scaling.
            at: alpha_0, sigma_0 (0-dim float64) and the denoiser at this noise level.
        """

    def reconstruction(self, x: Tensor, q: Gaussian, noise: Tensor, at: Clean) -> Tensor:
        """An unbiased estimate of E_q(z_0 | x) [-log p(x | z_0)], nats, (B,).

        Args:
            x: data (B, *event), model units.
            q: q(z_0 | x).
            noise: standard normal numbers that draw z_0.
            at: as above.
        """
        return -self(q.sample(noise), at).log_prob(x)


@dataclass(frozen=True)
class SoftmaxDecoder(Decoder):
    """p(x | z_0) proportional to N(z_0; alpha_0 v, sigma_0^2) over the levels v.

    Args:
        bins: the grey levels.

    Reference: Kingma et al. 2021, arXiv:2107.00630, eq. 14 and appendix C.
    """

    bins: Bins
    discrete = True
    drawn = False

    def __call__(self, z: Tensor, at: Clean) -> Distribution:
        residual = (z.unsqueeze(-1) - at.alpha * self.bins.centers(z.dtype, z.device)) / at.sigma
        return Categorical(-0.5 * residual.square(), self.bins)

    def reconstruction(self, x: Tensor, q: Gaussian, noise: Tensor, at: Clean) -> Tensor:
        """The expectation itself: a sum over the pixels of what each one's level costs, no draw is needed."""
        costs = _confusion(self.bins, float(at.alpha / at.sigma)).to(x.device)
        return costs[self.bins.index(x)].flatten(1).sum(1)


@lru_cache(maxsize=16)
def _confusion(bins: Bins, gain: float) -> Tensor:
    """E log SUM_j exp [e^2 / 2 - (gain (v_k - v_j) + e)^2 / 2] over e ~ N(0, 1), for every level k: (V,), float64.

    The trapezoidal rule converges geometrically on it: 181 nodes give all digits.
    """
    e = torch.linspace(-9, 9, 181, dtype=torch.float64)
    density = torch.exp(-0.5 * e.square()) * (e[1] - e[0]) / math.sqrt(2 * math.pi)
    levels = gain * bins.centers(torch.float64)
    found = [
        torch.logsumexp(0.5 * (e.square() - (level - levels[:, None] + e).square()), 0) @ density for level in levels
    ]
    return torch.stack(found)


@dataclass(frozen=True)
class PosteriorDecoder(Decoder):
    """The posterior over the levels of a denoiser that predicts ``"levels"``: Bayes with what the other pixels say.

    The bound then hardly depends on where the path ends; with independent pixels it does not depend on it at all.
    """

    bins: Bins
    discrete = True
    calls = 1

    def __call__(self, z: Tensor, at: Clean) -> Distribution:
        return Categorical(at.level_logits(z), self.bins)


@dataclass(frozen=True)
class RoundingDecoder(Decoder):
    """A Gaussian around the denoised state, rounded to the bins, open at both ends.

    Reference: Ho et al. 2020, arXiv:2006.11239, eq. 13.
    """

    bins: Bins
    discrete = True
    calls = 1

    def __call__(self, z: Tensor, at: Clean) -> Distribution:
        return DiscretisedGaussian(at.predict(z).x0, (at.sigma / at.alpha).log(), self.bins)


@dataclass(frozen=True)
class GaussianDecoder(Decoder):
    """The density N(x; z_0 / alpha_0, (sigma_0 / alpha_0)^2), Bayes with a flat prior."""

    discrete = False
    drawn = False

    def __call__(self, z: Tensor, at: Clean) -> Distribution:
        return Gaussian(z / at.alpha, (at.sigma / at.alpha).log())

    def reconstruction(self, x: Tensor, q: Gaussian, noise: Tensor, at: Clean) -> Tensor:
        """The entropy D/2 (1 + log 2 pi - logsnr_0), a constant: no draw is needed."""
        per_dim = 0.5 * (1 + math.log(2 * math.pi)) + float((at.sigma / at.alpha).log())
        return torch.full((len(x),), per_dim * x[0].numel(), dtype=torch.float64, device=x.device)


@dataclass(frozen=True)
class TweedieDecoder(Decoder):
    """The density N(x; x0_hat(z_0), (sigma_0 / alpha_0)^2): the denoised state.

    Reference: Song et al. 2021, arXiv:2101.09258, appendix (the residual at the cutoff).
    """

    discrete = False
    calls = 1

    def __call__(self, z: Tensor, at: Clean) -> Distribution:
        return Gaussian(at.predict(z).x0, (at.sigma / at.alpha).log())


@dataclass(frozen=True)
class Head(ABC):
    """What the outputs of a VAE's decoder network mean.

    Attributes:
        discrete: whether p(x | z) is a probability (else a density).
    """

    discrete: ClassVar[bool]

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Numbers per coordinate."""

    @abstractmethod
    def __call__(self, params: Tensor) -> Distribution:
        """(B, *event, outputs) -> the distribution of x."""


@dataclass(frozen=True)
class CategoricalHead(Head):
    """V logits per coordinate."""

    bins: Bins
    discrete = True

    @property
    def outputs(self) -> int:
        return self.bins.count

    def __call__(self, params: Tensor) -> Distribution:
        return Categorical(params, self.bins)


@dataclass(frozen=True)
class BernoulliHead(Head):
    """One logit per coordinate, for data with two levels."""

    bins: Bins = TWO
    discrete = True

    @property
    def outputs(self) -> int:
        return 1

    def __call__(self, params: Tensor) -> Distribution:
        return Bernoulli(params.squeeze(-1), self.bins)


@dataclass(frozen=True)
class GaussianHead(Head):
    """A density: a mean per coordinate, and a log standard deviation unless ``std`` fixes it.

    Args:
        std: standard deviation in model units, None to let the network say.
    """

    std: float | None = None
    discrete = False

    @property
    def outputs(self) -> int:
        return 2 if self.std is None else 1

    def __call__(self, params: Tensor) -> Distribution:
        if self.std is not None:
            return Gaussian(params.squeeze(-1), torch.tensor(math.log(self.std), dtype=torch.float64))
        mean, log_std = params.unbind(-1)
        return Gaussian(mean, log_std)


@dataclass(frozen=True)
class DiscretisedGaussianHead(Head):
    """A mean and a log standard deviation per coordinate, rounded to the bins."""

    bins: Bins
    discrete = True

    @property
    def outputs(self) -> int:
        return 2

    def __call__(self, params: Tensor) -> Distribution:
        mean, log_scale = params.unbind(-1)
        return DiscretisedGaussian(mean, log_scale, self.bins)


@dataclass(frozen=True)
class DiscretisedLogisticHead(Head):
    """A mean and a log scale per coordinate, rounded to the bins."""

    bins: Bins
    discrete = True

    @property
    def outputs(self) -> int:
        return 2

    def __call__(self, params: Tensor) -> Distribution:
        mean, log_scale = params.unbind(-1)
        return DiscretisedLogistic(mean, log_scale, self.bins)


HEADS: dict[str, type[Head]] = {
    "categorical": CategoricalHead,
    "discretised-gaussian": DiscretisedGaussianHead,
    "discretised-logistic": DiscretisedLogisticHead,
    "bernoulli": BernoulliHead,
    "gaussian": GaussianHead,
}
"""The heads by name; all but ``"gaussian"`` take the data's bins."""
