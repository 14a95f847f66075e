"""Where network calls are spent: sampling densities of the noise level.

An integral over noise levels is estimated from draws at logsnr ~ p, each counted 1 / p, so that p changes the variance
of the estimate and never its mean. For independent draws of l = w |eps - eps_hat|^2 / 2p the second moment is

    E l^2 = 1/4 INT w^2 E|eps - eps_hat|^4 / p dlogsnr,        least for  p* = w sqrt(E|eps - eps_hat|^4) / norm,

so a good density is large where errors are large. Four ways to know where that is, from the least to the most:

=================================  =================================================================================
a guess                            :class:`UniformLogSNR`, :class:`UniformTime`, :class:`Hyperbolic`,
                                   :class:`Logistic`, :class:`Normal`
the data are N(0, 1)               :class:`Spectrum` with its defaults: uniform in log sigma^2 (VP)
the data's covariance              :class:`Spectrum` of its eigenvalues: what a linear denoiser errs
the model                          :class:`Shares` of a measured profile (:mod:`sdegen.likelihood.profile`), or what a
                                   density learns while it is used (:mod:`sdegen.adaptive`)
=================================  =================================================================================

A density is used as a map from uniform numbers to times. Uniform numbers that are spread evenly over a batch or over
the draws of one datum (:func:`low_discrepancy`, :func:`stratified`) remove what the noise level adds to the variance,
and leave what data and noise add at each level: with them the best density is w times the *standard deviation* of the
error at a level, and the choice matters less.

Where does a density's name come from? ScoreFlow's importance sampling of g^2 / sigma^2 is uniform in logsnr, for
|dlogsnr/dt| = g^2 / sigma^2: it is VDM's linear schedule. LSGM's and i-DODE's importance sampling is uniform in
log sigma^2, the best one for a perfect denoiser of N(0, I).

References: Kingma et al. 2021, arXiv:2107.00630, appendix I; Song et al. 2021, arXiv:2101.09258 (ScoreFlow), section
5; Vahdat et al. 2021, arXiv:2106.05931 (LSGM), section 3.2; Zheng et al. 2023, arXiv:2305.03935 (i-DODE); Karras et al.
2022, arXiv:2206.00364, table 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.special import ndtr, ndtri

from solvers.problem import Path

__all__ = [
    "Banded",
    "Density",
    "Hyperbolic",
    "Logistic",
    "Normal",
    "Placed",
    "Shares",
    "Spectrum",
    "UniformLogSNR",
    "UniformTime",
    "band",
    "low_discrepancy",
    "stratified",
]


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

    def learn(self, u: Tensor, values: Tensor, path: Path) -> Tensor | float:
        """What a density that adapts takes from a batch of training; the others take nothing.

        Args:
            u: the uniform numbers of the batch, (B,).
            values: the integrand over the density that they led to, l above, (B,).
            path: between whose ends the levels lie.

        Returns:
            To be added to the loss: zero in value, possibly with a gradient in the density's own parameters.
        """
        return 0.0


def _ends(path: Path, like: Tensor) -> tuple[Tensor, Tensor]:
    """logsnr at the noisy and at the clean end."""
    low, high = path.logsnr(torch.tensor([path.t_max, path.t_min], dtype=torch.float64)).to(like.device)
    return low, high


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


# --- Known on the whole line, cut off at the ends of the path ---------------------------------------------------------


class _OfLogSNR(Density):
    """A density of logsnr cut off at the ends of the path; subclasses give it on the whole line, up to a factor."""

    @abstractmethod
    def _below(self, logsnr: Tensor) -> Tensor:
        """Distribution function."""

    @abstractmethod
    def _quantile(self, q: Tensor) -> Tensor:
        """Its inverse."""

    @abstractmethod
    def _density(self, logsnr: Tensor) -> Tensor:
        """Its derivative."""

    def time(self, u: Tensor, path: Path) -> Tensor:
        low, high = map(self._below, _ends(path, u))
        return path.time(self._quantile(high - u * (high - low))).clamp(path.t_min, path.t_max)

    def cdf(self, t: Tensor, path: Path) -> Tensor:
        low, high = map(self._below, _ends(path, t))
        return (high - self._below(path.logsnr(t))) / (high - low)

    def pdf(self, t: Tensor, path: Path) -> Tensor:
        low, high = map(self._below, _ends(path, t))
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


@dataclass(frozen=True)
class Spectrum(_OfLogSNR):
    """p proportional to the error of the best linear denoiser of data with given variances.

    With SNR r and variance c_i^2 along eigenvector i of the covariance, that error and its primitive are

        E|eps - eps_lin|^2 = sum_i r c_i^2 / (1 + r c_i^2),        INT = sum_i log(1 + r c_i^2),

    so the distribution function is in closed form. Its inverse is Newton's method from a table: three steps reach the
    last digits. The default is one variance of one, for which p is uniform in log sigma^2 on a VP path.

    Args:
        variances: c_i^2, positive.
    """

    variances: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.variances or not all(0 < v < math.inf for v in self.variances):
            raise ValueError(f"a spectrum is one or more positive variances, not {self.variances[:8]}")

    def __repr__(self) -> str:
        return f"Spectrum({len(self.variances)} variances, {min(self.variances):.3g}..{max(self.variances):.3g})"

    @classmethod
    def of(cls, x: Tensor) -> Spectrum:
        """Of the covariance of data (N, *event); variances below a millionth of the largest are raised to that."""
        rows = x.detach().double().flatten(1)
        rows = rows - rows.mean(0)
        spread = torch.linalg.svdvals(rows).square() / max(len(rows) - 1, 1)
        spread = torch.cat([spread, spread.new_zeros(rows.shape[1] - len(spread))])  # fewer data than dimensions
        largest = float(spread.max())
        if not largest:
            return cls()
        return cls(tuple(spread.clamp(min=1e-6 * largest).tolist()))

    @cached_property
    def _logs(self) -> Tensor:
        return torch.tensor(self.variances, dtype=torch.float64).log()

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        nodes = torch.linspace(-40, 40, 801, dtype=torch.float64)
        return nodes, self._below(nodes)

    def _shifted(self, logsnr: Tensor) -> Tensor:
        return logsnr.unsqueeze(-1) + self._logs.to(logsnr.device)

    def _below(self, logsnr: Tensor) -> Tensor:
        return -logsigmoid(-self._shifted(logsnr)).sum(-1)

    def _quantile(self, q: Tensor) -> Tensor:
        nodes, below = (table.to(q.device) for table in self._table)
        i = torch.searchsorted(below, q).clamp(1, len(nodes) - 1)
        share = (q - below[i - 1]) / (below[i] - below[i - 1])
        logsnr = torch.lerp(nodes[i - 1], nodes[i], share.clamp(0, 1))
        for _ in range(3):
            logsnr = logsnr - (self._below(logsnr) - q) / self._density(logsnr)
        return logsnr

    def _density(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(self._shifted(logsnr)).sum(-1)


# --- Known between the ends of the path -------------------------------------------------------------------------------


class Placed(Density):
    """A density of the *place* of a level, (logsnr_clean - logsnr) / (logsnr_clean - logsnr_noisy) in [0, 1].

    The ends of the path are the ends of the density by construction, whatever is in between.
    """

    @abstractmethod
    def place(self, u: Tensor) -> Tensor:
        """The place below which a share ``u`` lies."""

    @abstractmethod
    def share(self, place: Tensor) -> Tensor:
        """The share below a place."""

    @abstractmethod
    def crowd(self, place: Tensor) -> Tensor:
        """The density: d share / d place."""

    def time(self, u: Tensor, path: Path) -> Tensor:
        low, high = _ends(path, u)
        return path.time(high - self.place(u) * (high - low)).clamp(path.t_min, path.t_max)

    def cdf(self, t: Tensor, path: Path) -> Tensor:
        return self.share(self.where(t, path))

    def pdf(self, t: Tensor, path: Path) -> Tensor:
        low, high = _ends(path, t)
        return self.crowd(self.where(t, path)) / (high - low)

    @staticmethod
    def where(t: Tensor, path: Path) -> Tensor:
        """The place of a time."""
        low, high = _ends(path, t)
        return ((high - path.logsnr(t)) / (high - low)).clamp(0, 1)


class Banded(Placed):
    """A share of the draws for each of K bands of equal width in logsnr, uniform within a band."""

    @abstractmethod
    def masses(self) -> Tensor:
        """The shares of the bands from the clean end to the noisy one, (K,), float64, positive, with sum 1."""

    def place(self, u: Tensor) -> Tensor:
        masses, below = self._bands(u)
        i = torch.searchsorted(below[1:-1].contiguous(), u, right=True)
        return (i + ((u - below[i]) / masses[i]).clamp(0, 1)) / len(masses)

    def share(self, place: Tensor) -> Tensor:
        masses, below = self._bands(place)
        i = band(place, len(masses))
        return below[i] + masses[i] * (place * len(masses) - i)

    def crowd(self, place: Tensor) -> Tensor:
        masses, _ = self._bands(place)
        return masses[band(place, len(masses))] * len(masses)

    def _bands(self, like: Tensor) -> tuple[Tensor, Tensor]:
        masses = self.masses().to(like.device)
        below = torch.cat([masses.new_zeros(1), masses.cumsum(0)])
        return masses, below / below[-1]


@dataclass(frozen=True)
class Shares(Banded):
    """The bands' shares as given.

    Args:
        shares: from the clean end to the noisy one, positive; they are brought to sum 1.
    """

    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share < math.inf for share in self.shares):
            raise ValueError(f"every band has a positive share of the draws, not {self.shares[:8]}")

    def __repr__(self) -> str:
        return f"Shares({len(self.shares)} bands)"

    def masses(self) -> Tensor:
        found = torch.tensor(self.shares, dtype=torch.float64)
        return found / found.sum()


def band(place: Tensor, k: int) -> Tensor:
    """Which of k equal bands a place in [0, 1] lies in."""
    return (place * k).long().clamp(0, k - 1)
