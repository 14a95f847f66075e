"""Schedules: logsnr as a strictly falling function of time, with its slope and its inverse in closed form.

A schedule is the clock of a Gaussian path: it says which signal-to-noise ratio is reached at which time, and nothing
about the scale of z (that is the curve's part, see :mod:`sdegen.paths`). All of them are here:

    LinearLogSNR   logsnr = max (1 - t) + min t                     also the geometric sigma(t) of VE
    Cosine         logsnr = 2 log cot(pi t / 2) + shift             alpha = cos(pi t / 2) on the circle
    StraightLine   logsnr = 2 log((1 - t) / t)                      sigma = t on the chord
    Sigmoid        logsnr = log sinh(w (1 - t)) - log sinh(w t) + c
    LinearBeta     logsnr = -log(exp(B) - 1), B = INT beta          the VP-SDE
    Table          the same with B from a table of T levels         Ho's DDPM
    Learned        logsnr through given values              a clock that was fitted
    SameAlpha      logsnr = 2 u + log(1 + exp(-u))                  the clock of sub-VP from that of VP, u

The formulas are arranged so that nothing is lost at either end: 1 - t is exact for t > 1/2, so what vanishes at the
noise end is written in 1 - t; what vanishes at the data end is written with expm1 and log1p; large numbers that cancel
are cancelled on paper.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from sdegen.splines import RisingSpline

__all__ = [
    "Cosine",
    "Learned",
    "LinearBeta",
    "LinearLogSNR",
    "SameAlpha",
    "Schedule",
    "Sigmoid",
    "StraightLine",
    "Table",
    "require",
]


def require(condition: bool, message: str) -> None:
    """Raise a ValueError of one line unless the condition holds (a comparison with NaN does not)."""
    if not condition:
        raise ValueError(message)


class Schedule(ABC):
    """logsnr as a strictly falling function of t, with its slope and its inverse.

    ``t_min`` and ``t_max`` are the range in which a path uses the schedule unless told otherwise: most schedules reach
    logsnr = +-infinity at t = 0 and 1, where no density and no score exists.
    """

    @property
    def t_min(self) -> float:
        """Cleanest time in normal use."""
        return 0.0

    @property
    def t_max(self) -> float:
        """Noisiest time in normal use."""
        return 1.0

    @abstractmethod
    def logsnr(self, t: Tensor) -> Tensor:
        """log alpha^2 / sigma^2 at time t."""

    @abstractmethod
    def dlogsnr(self, t: Tensor) -> Tensor:
        """d logsnr / dt, negative."""

    @abstractmethod
    def time(self, logsnr: Tensor) -> Tensor:
        """The inverse of :meth:`logsnr`."""


@dataclass(frozen=True)
class LinearLogSNR(Schedule):
    """logsnr falls linearly from ``max`` at t = 0 to ``min`` at t = 1: the schedule of variational diffusion models.

    Reference: Kingma et al. 2021, arXiv:2107.00630 (who learn the end points).
    """

    max: float = 13.3
    min: float = -10.0

    def __post_init__(self) -> None:
        finite = math.isfinite(self.max) and math.isfinite(self.min)
        require(
            finite and self.min < self.max, f"LinearLogSNR needs finite min < max, got max={self.max}, min={self.min}"
        )

    def logsnr(self, t: Tensor) -> Tensor:
        return self.max * (1 - t) + self.min * t

    def dlogsnr(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.min - self.max)

    def time(self, logsnr: Tensor) -> Tensor:
        return (self.max - logsnr) / (self.max - self.min)


@dataclass(frozen=True)
class Cosine(Schedule):
    """logsnr = -2 log tan(pi t / 2) + shift, that is alpha = cos(pi t / 2) on the VP curve when shift = 0.

    Written with sin(pi (1 - t) / 2) for the cosine, so that the noise end keeps its digits. ``shift`` is Hoogeboom's
    2 log(64 / d) for images of side d.

    Reference: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17 (without its offset, whose part t_min plays);
    Hoogeboom et al. 2023, arXiv:2301.11093, section 3.1.
    """

    shift: float = 0.0

    @property
    def t_min(self) -> float:
        return 1e-3

    @property
    def t_max(self) -> float:
        return 1 - 4e-3

    def __post_init__(self) -> None:
        require(math.isfinite(self.shift), f"Cosine needs a finite shift, got {self.shift}")

    def logsnr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log(torch.sin(math.pi / 2 * (1 - t))) - torch.log(torch.sin(math.pi / 2 * t))) + self.shift

    def dlogsnr(self, t: Tensor) -> Tensor:
        return -math.pi / (torch.sin(math.pi / 2 * (1 - t)) * torch.sin(math.pi / 2 * t))

    def time(self, logsnr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp((self.shift - logsnr) / 2))


@dataclass(frozen=True)
class StraightLine(Schedule):
    """logsnr = 2 log((1 - t) / t): sigma = t on the flow curve.

    Reference: Lipman et al. 2023, arXiv:2210.02747, section 4.1, with sigma_min = 0; Liu et al. 2023,
    arXiv:2209.03003.
    """

    @property
    def t_min(self) -> float:
        return 1e-3

    @property
    def t_max(self) -> float:
        return 1 - 1e-3

    def logsnr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - torch.log(t))

    def dlogsnr(self, t: Tensor) -> Tensor:
        return -2 / (t * (1 - t))

    def time(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-logsnr / 2)


@dataclass(frozen=True)
class Sigmoid(Schedule):
    """alpha^2 on the VP curve falls from 1 to 0 like a sigmoid seen between ``start / tau`` and ``end / tau``.

    alpha^2 = [S(b) - S(u)] / [S(b) - S(a)],  a = start / tau,  b = end / tau,  u = a + (b - a) t,  S = sigmoid. Since
    S(p) - S(q) = sinh((p - q) / 2) / (2 cosh(p / 2) cosh(q / 2)), the ratio alpha^2 / sigma^2 loses its differences:

        logsnr = log sinh(w (1 - t)) - log sinh(w t) + log cosh(a / 2) - log cosh(b / 2),    w = (b - a) / 2.

    Reference: Jabri et al. 2022, arXiv:2212.11972; Chen 2023, arXiv:2301.10972, algorithm 1.
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0

    @property
    def t_min(self) -> float:
        return 1e-4

    @property
    def t_max(self) -> float:
        return 1 - 1e-4

    def __post_init__(self) -> None:
        ok = math.isfinite(self.start) and math.isfinite(self.end) and self.start < self.end and 0 < self.tau < math.inf
        require(ok, f"Sigmoid needs start < end and tau > 0, got start={self.start}, end={self.end}, tau={self.tau}")

    @property
    def _width(self) -> float:
        return (self.end - self.start) / (2 * self.tau)

    @property
    def _offset(self) -> float:
        a, b = abs(self.start / self.tau), abs(self.end / self.tau)
        return (a - b) / 2 + math.log1p(math.exp(-a)) - math.log1p(math.exp(-b))

    def logsnr(self, t: Tensor) -> Tensor:
        w = self._width
        noise, data = torch.log(-torch.expm1(-2 * w * (1 - t))), torch.log(-torch.expm1(-2 * w * t))
        return w * (1 - 2 * t) + noise - data + self._offset

    def dlogsnr(self, t: Tensor) -> Tensor:
        w = self._width
        return -w * (1 / torch.tanh(w * (1 - t)) + 1 / torch.tanh(w * t))

    def time(self, logsnr: Tensor) -> Tensor:
        w = self._width
        return torch.log1p(-math.expm1(-2 * w) / (torch.exp(logsnr - self._offset - w) + math.exp(-2 * w))) / (2 * w)


class _Decay(Schedule):
    """A schedule given by B(t) = -log alpha^2 = INT_0^t beta on the VP curve: logsnr = -log(exp(B) - 1)."""

    @abstractmethod
    def decay(self, t: Tensor) -> Tensor:
        """B(t), rising from 0."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """dB / dt."""

    @abstractmethod
    def time_of_decay(self, decay: Tensor) -> Tensor:
        """The inverse of :meth:`decay`."""

    def logsnr(self, t: Tensor) -> Tensor:
        decay = self.decay(t)
        return -decay - torch.log(-torch.expm1(-decay))

    def dlogsnr(self, t: Tensor) -> Tensor:
        return self.beta(t) / torch.expm1(-self.decay(t))

    def time(self, logsnr: Tensor) -> Tensor:
        return self.time_of_decay(-logsigmoid(logsnr))  # softplus(-logsnr); torch's softplus drops digits beyond 20


@dataclass(frozen=True)
class LinearBeta(_Decay):
    """beta(t) = beta_min + (beta_max - beta_min) t, per unit of t: the VP-SDE.

    The default t_min = 1e-3 (logsnr 9.1) suits sampling and data of a few grey levels; the likelihood of 8-bit images
    needs 1e-5 (logsnr 13.8).

    Reference: Song et al. 2021, arXiv:2011.13456, appendices B and C.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    @property
    def t_min(self) -> float:
        return 1e-3

    def __post_init__(self) -> None:
        ok = 0 <= self.beta_min <= self.beta_max and 0 < self.beta_max < math.inf
        require(ok, f"LinearBeta needs 0 <= beta_min <= beta_max, got {self.beta_min} and {self.beta_max}")

    def decay(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + (self.beta_max - self.beta_min) / 2 * t)

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def time_of_decay(self, decay: Tensor) -> Tensor:
        root = torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * decay)
        return 2 * decay / (self.beta_min + root)


@dataclass(frozen=True, repr=False)
class Table(_Decay):
    """B(i/T) from a table, and in between the :class:`sdegen.splines.RisingSpline`, so that logsnr falls strictly.

    Args:
        decays: B(i/T) = -log alpha-bar_i for i = 1..T, positive and strictly rising; ``Tabulated`` computes them.

    Raises:
        ValueError: if there are fewer than two levels, or they do not rise strictly.
    """

    decays: tuple[float, ...]

    def __post_init__(self) -> None:
        require(len(self.decays) >= 2, f"a table needs at least 2 levels, got {len(self.decays)}")
        rising = all(a < b < math.inf for a, b in zip((0.0, *self.decays), self.decays, strict=False))
        require(rising, "a table needs -log alphas_bar finite, positive and strictly rising")

    def __repr__(self) -> str:
        first, last = math.exp(-self.decays[0]), math.exp(-self.decays[-1])
        return f"Table({len(self.decays)} levels, alphas_bar {first:.6g}..{last:.6g})"

    @property
    def t_min(self) -> float:
        return 1 / len(self.decays)

    @cached_property
    def _spline(self) -> RisingSpline:
        return RisingSpline(torch.tensor((0.0, *self.decays), dtype=torch.float64))

    def decay(self, t: Tensor) -> Tensor:
        return self._spline(t)

    def beta(self, t: Tensor) -> Tensor:
        return self._spline.slope(t)

    def time_of_decay(self, decay: Tensor) -> Tensor:
        return self._spline.inverse(decay)


@dataclass(frozen=True, repr=False)
class Learned(Schedule):
    """logsnr through given values at t = 0, 1/K, ..., 1, smooth and falling in between: a schedule as data.

    What :class:`sdegen.adaptive.LearnedClock` has found is kept as one; any other clock that was fitted can be.

    Args:
        logsnrs: K + 1 finite values, strictly falling, K at least 2.

    Raises:
        ValueError: if they are fewer than three, or do not fall strictly.

    >>> Learned((8.0, 3.0, 1.0, -5.0)).logsnr(torch.tensor(1 / 3).double())
    tensor(3.0000, dtype=torch.float64)
    """

    logsnrs: tuple[float, ...]

    def __post_init__(self) -> None:
        require(len(self.logsnrs) >= 3, f"a learned schedule needs at least 3 values, got {len(self.logsnrs)}")
        falling = all(math.inf > a > b > -math.inf for a, b in pairwise(self.logsnrs))
        require(falling, "a learned schedule needs finite values of logsnr that fall strictly")

    def __repr__(self) -> str:
        return f"Learned({len(self.logsnrs)} values, logsnr {self.logsnrs[0]:.6g}..{self.logsnrs[-1]:.6g})"

    @cached_property
    def _spline(self) -> RisingSpline:
        return RisingSpline(-torch.tensor(self.logsnrs, dtype=torch.float64))

    def logsnr(self, t: Tensor) -> Tensor:
        return -self._spline(t)

    def dlogsnr(self, t: Tensor) -> Tensor:
        return -self._spline.slope(t)

    def time(self, logsnr: Tensor) -> Tensor:
        return self._spline.inverse(-logsnr)


@dataclass(frozen=True)
class SameAlpha(Schedule):
    """The clock of a sub-VP path whose alpha(t) is that of ``VP(vp)``: sigma is then the square of the VP sigma.

    With u the VP logsnr, logsnr = 2 u + log(1 + exp(-u)).

    Reference: Song et al. 2021, arXiv:2011.13456, appendix B.
    """

    vp: Schedule = field(default_factory=LinearBeta)

    @property
    def t_min(self) -> float:
        return self.time(self.vp.logsnr(torch.tensor(self.vp.t_min, dtype=torch.float64))).item()  # the same end logsnr

    @property
    def t_max(self) -> float:
        return self.vp.t_max

    def logsnr(self, t: Tensor) -> Tensor:
        u = self.vp.logsnr(t)
        return 2 * u - logsigmoid(u)

    def dlogsnr(self, t: Tensor) -> Tensor:
        return (1 + torch.sigmoid(self.vp.logsnr(t))) * self.vp.dlogsnr(t)

    def time(self, logsnr: Tensor) -> Tensor:
        return self.vp.time(logsnr / 2 - torch.asinh(torch.exp(-logsnr / 2) / 2))
