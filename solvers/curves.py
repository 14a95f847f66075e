"""Coordinates: the same problem on another curve and in another clock.

A Gaussian path is a *curve* in the (alpha, sigma) plane run through at the speed of a *clock* ``logsnr(t)``. Neither
changes what is sampled: at equal logsnr the states of two paths differ by the factor ``alpha' / alpha``, and ``x0`` and
``eps`` do not differ at all. What they change is how well a solver that does not know the linear part of the equation
(Euler, Heun, any Runge-Kutta method, any black box) approximates it, and that can be a factor of two in network calls.

    curve     constraint               clock       time
    Circle    alpha^2 + sigma^2 = 1    Lam         -logsnr / 2
    Chord     alpha + sigma = 1        SigmaHat    sigma / alpha
    Ray       alpha = 1                FlowTime    sigma / (alpha + sigma)
    Tangent   sigma = 1                OwnClock    any path's own

"The EDM sampler" is Heun on the ray in the clock sigma / alpha, a flow sampler is Euler on the chord in flow time, and
a black box is at its best where the state and the drift stay of order one: on the circle, in lam.

Reference: Karras et al. 2022, arXiv:2206.00364, section 3; Kingma et al. 2021, arXiv:2107.00630, section 5.1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from solvers.problem import Path

__all__ = [
    "EDM",
    "FLOW",
    "VP_LAM",
    "Chord",
    "Circle",
    "Clock",
    "Coordinates",
    "Curve",
    "FlowTime",
    "Lam",
    "OwnClock",
    "Ray",
    "SigmaHat",
    "Tangent",
]


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), accurate at both ends."""
    return -torch.logaddexp(torch.zeros_like(x), -x)


class Curve(ABC):
    """A curve in the (alpha, sigma) plane that meets every signal-to-noise ratio once, parametrised by logsnr."""

    @abstractmethod
    def log_alpha(self, logsnr: Tensor) -> Tensor:
        """Log of the signal scale."""

    @abstractmethod
    def log_sigma(self, logsnr: Tensor) -> Tensor:
        """Log of the noise scale, log_alpha - logsnr / 2, in a form that keeps its digits where sigma is near 1."""

    @abstractmethod
    def slope(self, logsnr: Tensor) -> Tensor:
        """d log alpha / d logsnr, between 0 (ray) and 1/2 (tangent)."""

    def alpha(self, logsnr: Tensor) -> Tensor:
        """Signal scale."""
        return torch.exp(self.log_alpha(logsnr))

    def sigma(self, logsnr: Tensor) -> Tensor:
        """Noise scale."""
        return torch.exp(self.log_sigma(logsnr))


@dataclass(frozen=True)
class Circle(Curve):
    """Variance preserving: alpha^2 + sigma^2 = 1, slope sigma^2 / 2."""

    def log_alpha(self, logsnr: Tensor) -> Tensor:
        return log_sigmoid(logsnr) / 2

    def log_sigma(self, logsnr: Tensor) -> Tensor:
        return log_sigmoid(-logsnr) / 2

    def slope(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-logsnr) / 2


@dataclass(frozen=True)
class Chord(Curve):
    """Straight line between data and noise: alpha + sigma = 1, slope sigma / 2."""

    def log_alpha(self, logsnr: Tensor) -> Tensor:
        return log_sigmoid(logsnr / 2)

    def log_sigma(self, logsnr: Tensor) -> Tensor:
        return log_sigmoid(-logsnr / 2)

    def slope(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-logsnr / 2) / 2


@dataclass(frozen=True)
class Ray(Curve):
    """Variance exploding: alpha = 1, slope 0."""

    def log_alpha(self, logsnr: Tensor) -> Tensor:
        return torch.zeros_like(logsnr)

    def log_sigma(self, logsnr: Tensor) -> Tensor:
        return -logsnr / 2

    def slope(self, logsnr: Tensor) -> Tensor:
        return torch.zeros_like(logsnr)


@dataclass(frozen=True)
class Tangent(Curve):
    """Noise of unit scale: sigma = 1, the state x / sigma, slope 1/2."""

    def log_alpha(self, logsnr: Tensor) -> Tensor:
        return logsnr / 2

    def log_sigma(self, logsnr: Tensor) -> Tensor:
        return torch.zeros_like(logsnr)

    def slope(self, logsnr: Tensor) -> Tensor:
        return torch.full_like(logsnr, 0.5)


class Clock(Protocol):
    """A strictly falling function logsnr(t); every method keeps the shape and dtype of its argument."""

    def logsnr(self, t: Tensor) -> Tensor:
        """logsnr at time t."""
        ...

    def dlogsnr(self, t: Tensor) -> Tensor:
        """d logsnr / dt, negative."""
        ...

    def time(self, logsnr: Tensor) -> Tensor:
        """The inverse of :meth:`logsnr`."""
        ...


@dataclass(frozen=True)
class Lam:
    """Time is -logsnr / 2."""

    def logsnr(self, t: Tensor) -> Tensor:
        return -2 * t

    def dlogsnr(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -2.0)

    def time(self, logsnr: Tensor) -> Tensor:
        return -0.5 * logsnr


@dataclass(frozen=True)
class SigmaHat:
    """Time is sigma / alpha."""

    def logsnr(self, t: Tensor) -> Tensor:
        return -2 * t.log()

    def dlogsnr(self, t: Tensor) -> Tensor:
        return -2 / t

    def time(self, logsnr: Tensor) -> Tensor:
        return (-0.5 * logsnr).exp()


@dataclass(frozen=True)
class FlowTime:
    """Time is sigma / (alpha + sigma)."""

    def logsnr(self, t: Tensor) -> Tensor:
        return 2 * ((-t).log1p() - t.log())

    def dlogsnr(self, t: Tensor) -> Tensor:
        return -2 / (t * (1 - t))

    def time(self, logsnr: Tensor) -> Tensor:
        return (-0.5 * logsnr).sigmoid()


@dataclass(frozen=True)
class OwnClock:
    """The clock of a path."""

    path: Path

    def logsnr(self, t: Tensor) -> Tensor:
        return self.path.logsnr(t)

    def dlogsnr(self, t: Tensor) -> Tensor:
        return -self.path.g2(t) / self.path.sigma(t) ** 2

    def time(self, logsnr: Tensor) -> Tensor:
        return self.path.time(logsnr)


@dataclass(frozen=True)
class Coordinates:
    """A curve run through by a clock: a :class:`~solvers.problem.Path` without a range of its own.

    >>> t = torch.tensor([0.25, 0.75]).double()
    >>> EDM.sigma(t), FLOW.alpha(t)
    (tensor([0.2500, 0.7500], dtype=torch.float64), tensor([0.7500, 0.2500], dtype=torch.float64))
    """

    curve: Curve
    clock: Clock
    t_min: float = field(default=-math.inf, repr=False)
    t_max: float = field(default=math.inf, repr=False)

    def __repr__(self) -> str:
        """The name of the constant that it is, wherever in logsnr it is used."""
        for name, known in (("EDM", EDM), ("FLOW", FLOW), ("VP_LAM", VP_LAM)):
            if (self.curve, self.clock) == (known.curve, known.clock):
                return name
        return f"Coordinates(curve={self.curve!r}, clock={self.clock!r})"

    def over(self, path: Path) -> Coordinates:
        """The same coordinates on the range of logsnr in which ``path`` is used."""
        ends = self.clock.time(path.logsnr(torch.tensor([path.t_min, path.t_max], dtype=torch.float64)))
        return replace(self, t_min=float(ends[0]), t_max=float(ends[1]))

    def logsnr(self, t: Tensor) -> Tensor:
        return self.clock.logsnr(t)

    def time(self, logsnr: Tensor) -> Tensor:
        return self.clock.time(logsnr)

    def alpha(self, t: Tensor) -> Tensor:
        return self.curve.alpha(self.clock.logsnr(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.curve.sigma(self.clock.logsnr(t))

    def f(self, t: Tensor) -> Tensor:
        return self.curve.slope(self.clock.logsnr(t)) * self.clock.dlogsnr(t)

    def g2(self, t: Tensor) -> Tensor:
        return -(self.sigma(t) ** 2) * self.clock.dlogsnr(t)


EDM = Coordinates(Ray(), SigmaHat())
"""alpha = 1, sigma = t: where Karras et al. 2022 integrate."""

FLOW = Coordinates(Chord(), FlowTime())
"""alpha = 1 - t, sigma = t: flow matching and rectified flow."""

VP_LAM = Coordinates(Circle(), Lam())
"""The circle in the clock lam: state and drift of order one everywhere."""
