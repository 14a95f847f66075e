"""Distributions of a datum (or a latent) whose coordinates are independent given something.

Everything the bound needs of p(x | z_0), q(z | x) and p(z_1) is here: a log-probability summed over the event in
float64, the mean, the mode, and a sample as a *deterministic function of standard normal noise* of the event's shape,
so that one source of noise, one value per coordinate, serves Gaussians (x = mean + std eps) and discrete variables
(inverse distribution function at Phi(eps)) alike and a sample never depends on its batch mates.

Discrete data are probabilities, in nats of P(x); continuous data are densities, in nats per unit of x. The two differ
by the logarithm of the bin width, and :attr:`Distribution.discrete` says which one a number is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.special import log_ndtr, ndtr

from sdegen.bins import Bins

__all__ = ["Bernoulli", "Categorical", "DiscretisedGaussian", "DiscretisedLogistic", "Distribution", "Gaussian"]


def _total(values: Tensor) -> Tensor:
    """Sum over the event in float64, (B, *event) -> (B,)."""
    return values.flatten(1).sum(1, dtype=torch.float64)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^-x) for x > 0, without cancellation at either end."""
    return torch.where(x < math.log(2), torch.log(-torch.expm1(-x)), torch.log1p(-torch.exp(-x)))


class Distribution(ABC):
    """Independent coordinates of shape (B, *event).

    Attributes:
        discrete: whether :meth:`log_prob` is the logarithm of a probability (else of a density).
    """

    discrete: ClassVar[bool]

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) summed over the event: (B, *event) in model units -> (B,) in nats, float64."""

    @abstractmethod
    def sample(self, noise: Tensor) -> Tensor:
        """The value that standard normal ``noise`` (B, *event) is carried to; the same noise gives the same value."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """(B, *event), model units."""

    @property
    @abstractmethod
    def mode(self) -> Tensor:
        """The most likely value, (B, *event), model units."""


class Gaussian(Distribution):
    """N(mean, std^2) in every coordinate.

    Args:
        mean: (B, *event).
        log_std: log of the standard deviation, any shape that broadcasts to ``mean``; a 0-dim float64 tensor keeps
            its precision beside a float32 mean.
    """

    discrete = False

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self._mean, self.log_std = mean, torch.as_tensor(log_std).to(mean.device)

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def mode(self) -> Tensor:
        return self._mean

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std noise."""
        return self._mean + self.log_std.exp() * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """-1/2 ((x - mean) / std)^2 - log std - 1/2 log 2 pi, summed."""
        square = ((x - self._mean) * (-self.log_std).exp()).square()
        return -0.5 * _total(square) - _total(self.log_std.expand_as(self._mean)) - self._constant

    def kl_to_normal(self, log_std: Tensor) -> Tensor:
        """KL(self || N(0, s^2 I)) in nats, (B,).

        1/2 sum [ (mean / s)^2 + (std / s)^2 - 1 - log (std / s)^2 ]

        The three last terms nearly cancel where ``std`` is close to ``s``, as it is at the noise end of a diffusion;
        with u = log (std / s)^2 they are expm1(u) - u.

        Args:
            log_std: log s, 0-dim.
        """
        u = (2 * (self.log_std - log_std.to(self._mean.device))).expand_as(self._mean)
        return 0.5 * (_total((self._mean * (-log_std).exp()).square()) + _total(torch.expm1(u) - u))

    @property
    def _constant(self) -> float:
        return 0.5 * math.log(2 * math.pi) * math.prod(self._mean.shape[1:])


class Categorical(Distribution):
    """One of V grey levels in every coordinate.

    Args:
        logits: unnormalised log-probabilities, (B, *event, V).
        bins: the levels' values in model units.
    """

    discrete = True

    def __init__(self, logits: Tensor, bins: Bins) -> None:
        if logits.shape[-1] != bins.count:
            raise ValueError(f"{logits.shape[-1]} logits per coordinate do not fit {bins.count} grey levels")
        self.log_p, self.bins = logits.log_softmax(-1), bins

    @property
    def _values(self) -> Tensor:
        return self.bins.centers(self.log_p.dtype, self.log_p.device)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of the levels of ``x``; a value that is no bin centre raises ValueError."""
        return _total(self.log_p.gather(-1, self.bins.index(x).unsqueeze(-1)).squeeze(-1))

    @property
    def mean(self) -> Tensor:
        return self.log_p.exp() @ self._values

    @property
    def mode(self) -> Tensor:
        return self._values[self.log_p.argmax(-1)]

    def sample(self, noise: Tensor) -> Tensor:
        """The level at which the distribution function passes Phi(noise)."""
        below = self.log_p.double().exp().cumsum(-1)[..., :-1]
        return self._values[(ndtr(noise.double()).unsqueeze(-1) > below).sum(-1)]


class Bernoulli(Distribution):
    """One of two values in every coordinate: :class:`Categorical` with two levels and one logit.

    Grey pixels have no Bernoulli likelihood: binary cross-entropy with a target between the levels is not the logarithm
    of a probability, and is refused.

    Args:
        logits: log-odds of the upper level, (B, *event).
        bins: two levels.
    """

    discrete = True

    def __init__(self, logits: Tensor, bins: Bins | None = None) -> None:
        bins = bins or Bins(2)
        if bins.count != 2:
            raise ValueError(f"a Bernoulli variable has two levels, not {bins.count}: use a categorical decoder")
        self.logits, self.bins = logits, bins

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of the levels of ``x``."""
        sign = 2.0 * self.bins.index(x) - 1.0
        return _total(logsigmoid(sign * self.logits))

    @property
    def mean(self) -> Tensor:
        low, high = self.bins.centers(self.logits.dtype, self.logits.device)
        return low + (high - low) * self.logits.sigmoid()

    @property
    def mode(self) -> Tensor:
        return self.bins.centers(self.logits.dtype, self.logits.device)[(self.logits > 0).long()]

    def sample(self, noise: Tensor) -> Tensor:
        """The upper level where Phi(noise) is above the probability of the lower one."""
        upper = ndtr(noise.double()) > (-self.logits.double()).sigmoid()
        return self.bins.centers(self.logits.dtype, self.logits.device)[upper.long()]


class _Discretised(Distribution):
    """A continuous variable rounded to bins; the first and the last bin reach to infinity.

    P(k) = F((v_k + w/2 - mean) / scale) - F((v_k - w/2 - mean) / scale)

    The difference is taken in logarithms, in float64: it has no floor, so that a value forty standard deviations away
    costs its eight hundred nats and the probabilities of all levels sum to one.

    Args:
        mean: (B, *event).
        log_scale: log of the scale, broadcastable to ``mean``.
        bins: the levels.
    """

    discrete = True

    def __init__(self, mean: Tensor, log_scale: Tensor, bins: Bins) -> None:
        self._mean, self.log_scale, self.bins = mean, torch.as_tensor(log_scale).to(mean.device), bins

    @staticmethod
    @abstractmethod
    def _log_cdf(u: Tensor) -> Tensor:
        """log F(u); F is symmetric, F(-u) = 1 - F(u)."""

    @staticmethod
    @abstractmethod
    def _log_between(a: Tensor, b: Tensor) -> Tensor:
        """log(F(b) - F(a)) for a < b."""

    @staticmethod
    @abstractmethod
    def _quantile(noise: Tensor) -> Tensor:
        """F^-1(Phi(noise))."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of the levels of ``x``."""
        k, half = self.bins.index(x), 0.5 * self.bins.width
        mean, rate = self._mean.double(), (-self.log_scale.double()).exp()
        centre = self.bins.centers(torch.float64, x.device)[k]
        a, b = (centre - half - mean) * rate, (centre + half - mean) * rate
        inside = self._log_between(a, b)
        edge = torch.where(k == 0, self._log_cdf(b), self._log_cdf(-a))
        return _total(torch.where((k == 0) | (k == self.bins.count - 1), edge, inside))

    @property
    def mean(self) -> Tensor:
        """Of the continuous variable; rounding moves it by a small part of a bin."""
        return self._mean

    @property
    def mode(self) -> Tensor:
        return self.bins.value(self.bins.nearest(self._mean), self._mean.dtype).to(self._mean.device)

    def sample(self, noise: Tensor) -> Tensor:
        """mean + scale F^-1(Phi(noise)), rounded to its bin."""
        x = self._mean + self.log_scale.exp() * self._quantile(noise.double())
        return self.bins.value(self.bins.nearest(x), self._mean.dtype).to(x.device)


class DiscretisedGaussian(_Discretised):
    """A Gaussian rounded to bins. Reference: Ho et al. 2020, arXiv:2006.11239, eq. 13."""

    @staticmethod
    def _log_cdf(u: Tensor) -> Tensor:
        return log_ndtr(u)

    @staticmethod
    def _log_between(a: Tensor, b: Tensor) -> Tensor:
        # In the upper tail both values round to one: mirror to the lower tail, where the logarithm keeps all digits.
        upper = a + b > 0
        low, high = torch.where(upper, -b, a), torch.where(upper, -a, b)
        top = log_ndtr(high)
        return top + _log1mexp(top - log_ndtr(low))

    @staticmethod
    def _quantile(noise: Tensor) -> Tensor:
        return noise


class DiscretisedLogistic(_Discretised):
    """A logistic variable rounded to bins. Reference: Salimans et al. 2017, arXiv:1701.05517, section 2.1."""

    @staticmethod
    def _log_cdf(u: Tensor) -> Tensor:
        return logsigmoid(u)

    @staticmethod
    def _log_between(a: Tensor, b: Tensor) -> Tensor:
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a - b)), exactly
        return logsigmoid(b) + logsigmoid(-a) + _log1mexp(b - a)

    @staticmethod
    def _quantile(noise: Tensor) -> Tensor:
        return log_ndtr(noise) - log_ndtr(-noise)
