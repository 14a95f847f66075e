"""Schedules: logsnr as a strictly falling function of time, with its slope and its inverse in closed form.

A schedule is the clock of a Gaussian path: it says which signal-to-noise ratio is reached at which time, and nothing
about the scale of z (that is the curve's part, see :mod:`sdegen.paths`). All of them are here:

    LinearLogSNR   logsnr = max (1 - t) + min t                     also the geometric sigma(t) of VE
    Cosine         logsnr = 2 log cot(pi t / 2) + shift             alpha = cos(pi t / 2) on the circle
    StraightLine   logsnr = 2 log((1 - t) / t)                      sigma = t on the chord
    Sigmoid        logsnr = log sinh(w (1 - t)) - log sinh(w t) + c
    LinearBeta     logsnr = -log(exp(B) - 1), B = INT beta          the VP-SDE
    Table          the same with B from a table of T levels         Ho's DDPM
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

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = [
    "Cosine",
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
    """B(i/T) from a table, and in between the monotone C1 rational quadratic, whose inverse is a quadratic equation.

    With u in [0, 1] the way through an interval, s its secant and p, q the slopes at its ends,

        B = B_i + (B_{i+1} - B_i) [s u^2 + p u (1 - u)] / [s + (p + q - 2 s) u (1 - u)].

    The slope at a level is the harmonic mean of the secants beside it, and at both ends the linear extrapolation of the
    slopes, which is 2 s^2 / (s + s') for s' the secant next to s: positive, so logsnr falls strictly.

    Args:
        decays: B(i/T) = -log alpha-bar_i for i = 1..T, positive and strictly rising; ``Tabulated`` computes them.

    Raises:
        ValueError: if there are fewer than two levels, or they do not rise strictly.

    Reference: Gregory and Delbourgo 1982, doi:10.1093/imanum/2.2.123; Durkan et al. 2019, arXiv:1906.04032.
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
    def _intervals(self) -> Tensor:
        """(4, T): B at the left end, and per interval rise (its secant too, in units of 1/T), left and right slope."""
        nodes = torch.tensor((0.0, *self.decays), dtype=torch.float64)
        rise = nodes.diff()
        inner = 2 / (1 / rise[1:] + 1 / rise[:-1])
        first, last = 2 * rise[0] ** 2 / (rise[0] + rise[1]), 2 * rise[-1] ** 2 / (rise[-1] + rise[-2])
        slopes = torch.cat([first[None], inner, last[None]])
        return torch.stack([nodes[:-1], rise, slopes[:-1], slopes[1:]])

    def _at(self, i: Tensor) -> Tensor:
        """Columns of the table, (4, *i.shape)."""
        return self._intervals.to(i.device).index_select(1, i.reshape(-1)).reshape(4, *i.shape)

    def _locate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        levels = len(self.decays)
        way = t.double() * levels
        i = way.floor().clamp(0, levels - 1)
        return self._at(i.long()), way - i

    def decay(self, t: Tensor) -> Tensor:
        (start, s, p, q), u = self._locate(t)
        return (start + s * u * (s * u + p * (1 - u)) / (s + (p + q - 2 * s) * u * (1 - u))).to(t)

    def beta(self, t: Tensor) -> Tensor:
        (_, s, p, q), u = self._locate(t)
        top, bottom = q * u**2 + 2 * s * u * (1 - u) + p * (1 - u) ** 2, s + (p + q - 2 * s) * u * (1 - u)
        return (len(self.decays) * s**2 * top / bottom**2).to(t)

    def time_of_decay(self, decay: Tensor) -> Tensor:
        levels, target = len(self.decays), decay.double()
        i = torch.bucketize(target, self._intervals[0, 1:].to(decay.device), right=True)
        start, s, p, q = self._at(i)
        gone = torch.minimum(target - start, s)  # beyond the last level there is no time
        bend = gone * (p + q - 2 * s)
        b = s * p - bend
        root = torch.sqrt((b**2 + 4 * s * gone * (s * (s - p) + bend)).clamp(min=0))
        return ((i.double() + 2 * s * gone / (b + root)) / levels).to(decay)


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
