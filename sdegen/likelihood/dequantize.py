"""Dequantization: grey levels under a density.

A density says nothing of a single point, and grey levels are points. Spread level k over its bin by noise with the
density q(y | x), which is zero outside the bin, and by Jensen's inequality

    -log P(x) = -log INT_bin p(y) dy  <=  E_q [ log q(y | x) - log p(y) ],

a bound on the code length of the level under the density that was integrated over the bin. Only the first term knows
the bins, and where q is uniform it is -D log(bin width), the offset of every such number in bits: it follows from the
data's own :class:`~sdegen.bins.Bins` and is no constant.

* :class:`Uniform` is right for a density that is smooth on the scale of a bin.
* :class:`TruncatedNormal` is right for one that is made of narrow peaks at the levels, as z_0 / alpha_0 is of a
  diffusion that was trained on levels: its noise N(0, s^2), with s = sigma_0 / alpha_0, is cut at the edges of the bin,
  and the bound is tight as soon as the peaks fit into their bins, tau = width / 2 s > 3.

With several draws for a datum, -log [1/K SUM_k p(y_k) / q(y_k | x)] is a bound too, and a tighter one; it needs the
densities without noise (:func:`sdegen.likelihood.ode_likelihood`).

References: Uria, Murray and Larochelle 2013, arXiv:1306.0186 (uniform); Theis, van den Oord and Bethge 2016,
arXiv:1511.01844 (the bound); Ho et al. 2019, arXiv:1902.00275 (other q, importance weights); Zheng et al. 2023,
arXiv:2305.03935, section 4.1 (truncated normal).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import ndtr

from sdegen.bins import Bins
from sdegen.models.diffusion import GaussianDiffusion

__all__ = ["DEQUANTIZERS", "Dequantizer", "TruncatedNormal", "Uniform"]


@dataclass(frozen=True)
class Dequantizer(ABC):
    """q(y | x), independent coordinates, on the bin of each.

    Args:
        bins: the grey levels of the data.
    """

    bins: Bins

    def draw(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """y, and log q(y | x) in nats.

        Args:
            x: grey levels in model units, (B, *event).
            noise: standard normal numbers of the same shape, of which y is a function.

        Returns:
            y like x, and (B,) in float64.

        Raises:
            ValueError: ``x`` is not at the levels of the bins.
        """
        self.bins.index(x)
        u, log_q = self._spread(noise.double())
        return (x.double() + u).to(x.dtype), log_q.flatten(1).sum(1)

    @abstractmethod
    def _spread(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """y - x and its log-density, for each coordinate."""

    @property
    @abstractmethod
    def entropy(self) -> float:
        """-E log q of one coordinate, nats."""


@dataclass(frozen=True)
class Uniform(Dequantizer):
    """y uniform on the bin; log q = -log(bin width) in each coordinate.

    >>> Uniform(Bins(256)).entropy / math.log(2)  # of data on [-1, 1], bits
    -7.0
    """

    def _spread(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.bins.width * (ndtr(noise) - 0.5), torch.full_like(noise, -math.log(self.bins.width))

    @property
    def entropy(self) -> float:
        return math.log(self.bins.width)


@dataclass(frozen=True)
class TruncatedNormal(Dequantizer):
    """y normal around the level, cut at the edges of the bin; tau = bin width / 2 std, Z = erf(tau / sqrt 2).

        log q = -u^2 / 2 std^2 - log(std sqrt(2 pi)) - log Z,       |u| < bin width / 2
        entropy = 1/2 (1 + log 2 pi std^2) + log Z - tau phi(tau) / Z        (phi is the standard normal density)

    Args:
        bins: the grey levels of the data.
        std: before the cut, model units; sigma_0 / alpha_0 of a diffusion.
    """

    std: float

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"the standard deviation of a dequantizer is positive, not {self.std}")

    @property
    def tau(self) -> float:
        """Half a bin in standard deviations."""
        return self.bins.width / (2 * self.std)

    @property
    def _mass(self) -> float:
        return math.erf(self.tau / math.sqrt(2))

    def _spread(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        # erf(|u| / std sqrt 2) is uniform on (0, Z); 1 - 2^-53 keeps a noise beyond 8 inside.
        u = torch.erfinv((self._mass * torch.erf(noise / math.sqrt(2))).clamp(2**-53 - 1, 1 - 2**-53)) * math.sqrt(2)
        log_q = -0.5 * u.square() - math.log(self.std * math.sqrt(2 * math.pi) * self._mass)
        return (self.std * u).clamp(-self.bins.width / 2, self.bins.width / 2), log_q

    @property
    def entropy(self) -> float:
        tau, z = self.tau, self._mass
        edge = tau * math.exp(-0.5 * tau**2) / math.sqrt(2 * math.pi) / z
        return 0.5 * (1 + math.log(2 * math.pi * self.std**2)) + math.log(z) - edge


DEQUANTIZERS: dict[str, Callable[[Bins, GaussianDiffusion], Dequantizer]] = {
    "uniform": lambda bins, model: Uniform(bins),
    "truncated-normal": lambda bins, model: TruncatedNormal(bins, float(model.sigma / model.alpha)),
}
"""Name -> ``make(bins, model)``; a truncated normal takes its width from the clean end of the model's path."""
