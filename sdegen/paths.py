"""Gaussian paths: a curve in the (alpha, sigma) plane, run through at the speed logsnr(t).

Every diffusion model here mixes data x0 with noise eps ~ N(0, I) along a *Gaussian path*

    q(z_t | x0) = N(alpha(t) x0, sigma(t)^2 I),        t = 0 data, t = 1 noise,

and the family trees of the literature (VP, VE, sub-VP, flow matching, DDPM) differ in two choices only.

*The curve* says which pairs (alpha, sigma) are visited. A ray from the origin of that plane is a signal-to-noise ratio,
so a point on a curve is named by ``logsnr = log alpha^2 / sigma^2``, and what the curve adds is the overall scale of z:

    VP      alpha^2 + sigma^2 = 1    a circle      alpha^2 = sigmoid(logsnr)
    flow    alpha + sigma = 1        a chord       alpha = sigmoid(logsnr / 2)
    VE      alpha = 1                a ray         sigma = exp(-logsnr / 2)
    sub-VP  sigma = 1 - alpha^2      a parabola    alpha = exp(-asinh(exp(-logsnr / 2) / 2))

*The schedule* says how fast: a strictly falling function logsnr(t), with its slope and its inverse in closed form
(:mod:`sdegen.schedules`). The two are free of each other: ``VP(Cosine())`` and ``VP(Cosine()).on("ve")`` see the same
noise at the same time, and x0, eps and the variational bound do not notice the difference.

Everything else follows. With l = logsnr, and ' = d/dt, the forward SDE dz = f z dt + g dW has

    f = d log alpha / dt = (d log alpha / dl) l',        g^2 = -sigma^2 l',

and for s < t, with c = 1 - exp(l_t - l_s) the fraction of the precision lost between s and t,

    transition   q(z_t | z_s)     = N((alpha_t / alpha_s) z_s,  sigma_t^2 c)
    posterior    q(z_s | z_t, x0) = N((alpha_s / alpha_t)(1 - c) z_t + alpha_s c x0,  sigma_s^2 c).

Why logsnr and not beta, alpha-bar or sigma? Because near the data sigma^2 = 1 - alpha^2 is a difference of nearly equal
numbers, and near the noise alpha^2 = 1 - sigma^2 is. In logsnr both ends are ordinary numbers around +10 and -10, and
sigmoid, log1p and expm1 do the rest: all methods keep the dtype and device of t and are accurate to a few |logsnr| ulp.

The name *alpha* is the signal scale. Ho's alpha-bar is alpha^2, and his beta_i is 1 - (alpha_t / alpha_s)^2 between
t = i/T and s = (i - 1)/T; ``Tabulated`` makes a path from a table of either.

References: Sohl-Dickstein et al. 2015, arXiv:1503.03585; Ho et al. 2020, arXiv:2006.11239; Song et al. 2021,
arXiv:2011.13456; Kingma et al. 2021, arXiv:2107.00630, section 2 and appendix A; Lipman et al. 2023, arXiv:2210.02747.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sdegen.schedules import (
    Cosine,
    Learned,
    LinearBeta,
    LinearLogSNR,
    SameAlpha,
    Schedule,
    Sigmoid,
    StraightLine,
    Table,
    require,
)
from solvers.curves import Chord, Circle, Curve, Ray
from solvers.problem import expand

__all__ = [
    "CURVES",
    "PATHS",
    "VE",
    "VP",
    "Chord",
    "Circle",
    "Cosine",
    "Curve",
    "Flow",
    "GaussianPath",
    "Learned",
    "LinearBeta",
    "LinearLogSNR",
    "Parabola",
    "Ray",
    "SameAlpha",
    "Schedule",
    "Sigmoid",
    "StraightLine",
    "SubVP",
    "Table",
    "Tabulated",
]

Time = Tensor | float


def _as_tensor(t: Time) -> Tensor:
    """Floats (and integers) become float64 tensors; a floating-point tensor keeps its dtype and device."""
    if isinstance(t, Tensor) and t.is_floating_point():
        return t
    return torch.as_tensor(t, dtype=torch.float64)


# --- The curve: where -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parabola(Curve):
    """Sub-variance preserving: sigma = 1 - alpha^2, slope tanh(-log alpha) / 2.

    SNR = alpha^2 / (1 - alpha^2)^2 = 1 / (2 sinh(-log alpha))^2 is what makes the inverse an asinh.
    """

    def log_alpha(self, logsnr: Tensor) -> Tensor:
        return -torch.asinh(torch.exp(-logsnr / 2) / 2)

    def log_sigma(self, logsnr: Tensor) -> Tensor:
        return torch.log(-torch.expm1(2 * self.log_alpha(logsnr)))

    def slope(self, logsnr: Tensor) -> Tensor:
        return torch.tanh(-self.log_alpha(logsnr)) / 2


CURVES: dict[str, Curve] = {"vp": Circle(), "sub-vp": Parabola(), "ve": Ray(), "flow": Chord()}


# --- The path ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianPath:
    """A curve run through at the speed of a schedule, between ``t_min`` and ``t_max``.

    Every method takes times as a tensor of any shape, dtype and device, or as a float (which becomes a 0-dim float64
    tensor), and returns tensors of that shape, dtype and device.

    Args:
        curve: where in the (alpha, sigma) plane.
        schedule: when; logsnr as a falling function of t.
        t_min: cleanest time, in [0, 1); logsnr is finite there.
        t_max: noisiest time, in (t_min, 1]; logsnr is finite there.

    Raises:
        ValueError: if the range is empty, leaves [0, 1], or reaches a time of infinite logsnr.
    """

    curve: Curve
    schedule: Schedule
    t_min: float
    t_max: float

    def __post_init__(self) -> None:
        require(0 <= self.t_min < self.t_max <= 1, f"needs 0 <= t_min < t_max <= 1, got {self.t_min} and {self.t_max}")
        for name, t in (("t_min", self.t_min), ("t_max", self.t_max)):
            logsnr = self.logsnr(t).item()
            require(
                math.isfinite(logsnr), f"logsnr is {logsnr} at {name}={t}: move it inside the range of the schedule"
            )

    def on(self, curve: str) -> GaussianPath:
        """The same clock and range on another curve, one of ``CURVES``."""
        require(curve in CURVES, f"unknown curve {curve!r}: choose from {', '.join(CURVES)}")
        return replace(self, curve=CURVES[curve])

    def logsnr(self, t: Time) -> Tensor:
        """log alpha^2 / sigma^2, strictly falling in t."""
        return self.schedule.logsnr(_as_tensor(t))

    def dlogsnr(self, t: Time) -> Tensor:
        """d logsnr / dt, negative."""
        return self.schedule.dlogsnr(_as_tensor(t))

    def time(self, logsnr: Time) -> Tensor:
        """The inverse of :meth:`logsnr`."""
        return self.schedule.time(_as_tensor(logsnr))

    def log_alpha(self, t: Time) -> Tensor:
        """Log of the signal scale."""
        return self.curve.log_alpha(self.logsnr(t))

    def log_sigma(self, t: Time) -> Tensor:
        """Log of the noise scale."""
        return self.curve.log_sigma(self.logsnr(t))

    def alpha(self, t: Time) -> Tensor:
        """Signal scale."""
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Time) -> Tensor:
        """Noise scale."""
        return torch.exp(self.log_sigma(t))

    def f(self, t: Time) -> Tensor:
        """Drift coefficient of the forward SDE, d log alpha / dt, per unit of t."""
        return self.curve.slope(self.logsnr(t)) * self.dlogsnr(t)

    def g2(self, t: Time) -> Tensor:
        """Squared diffusion coefficient of the forward SDE, -sigma^2 d logsnr / dt, per unit of t."""
        return -torch.exp(2 * self.log_sigma(t)) * self.dlogsnr(t)

    def marginal(self, x0: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z_t | x0) = N(alpha x0, sigma^2 I).

        Args:
            x0: data, shape (B, *event).
            t: 0-dim or (B,).

        Returns:
            The mean, of the shape and dtype of ``x0``, and the standard deviation, which broadcasts with it.
        """
        return expand(self.alpha(t), x0) * x0, expand(self.sigma(t), x0)

    def transition(self, s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """Scale and standard deviation of q(z_t | z_s) = N(scale z_s, std^2 I), for s < t.

        scale = alpha_t / alpha_s,  std = sigma_t sqrt(1 - exp(logsnr_t - logsnr_s)).
        """
        kept = -torch.expm1(self.logsnr(t) - self.logsnr(s))
        return torch.exp(self.log_alpha(t) - self.log_alpha(s)), self.sigma(t) * torch.sqrt(kept)

    def posterior(self, s: Time, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients of q(z_s | z_t, x0) = N(coef_z z_t + coef_x0 x0, std^2 I), for s < t.

        coef_z = (alpha_s / alpha_t)(1 - c),  coef_x0 = alpha_s c,  std = sigma_s sqrt(c),
        with c = 1 - exp(logsnr_t - logsnr_s).

        Reference: Ho et al. 2020, arXiv:2006.11239, eqs. 6-7; Kingma et al. 2021, arXiv:2107.00630, appendix A.
        """
        gap = self.logsnr(t) - self.logsnr(s)
        c = -torch.expm1(gap)
        return torch.exp(self.log_alpha(s) - self.log_alpha(t) + gap), self.alpha(s) * c, self.sigma(s) * torch.sqrt(c)


LINEAR_BETA = LinearBeta()
"""The clock of Song's VP-SDE."""


def _path(curve: Curve, schedule: Schedule, t_min: float | None, t_max: float | None) -> GaussianPath:
    low, high = schedule.t_min if t_min is None else t_min, schedule.t_max if t_max is None else t_max
    return GaussianPath(curve, schedule, low, high)


def VP(schedule: Schedule = LINEAR_BETA, *, t_min: float | None = None, t_max: float | None = None) -> GaussianPath:
    """Variance-preserving path, alpha^2 + sigma^2 = 1.

    >>> path = VP(LinearBeta(0.1, 20.0))
    >>> path.logsnr(0.5)
    tensor(-2.4551, dtype=torch.float64)
    >>> path.time(path.logsnr(0.5))
    tensor(0.5000, dtype=torch.float64)
    """
    return _path(Circle(), schedule, t_min, t_max)


def SubVP(schedule: Schedule = LINEAR_BETA, *, t_min: float | None = None, t_max: float | None = None) -> GaussianPath:
    """Sub-VP path, sigma = 1 - alpha^2, with the alpha(t) of ``VP(schedule)`` and (if not told) its range of logsnr."""
    return _path(Parabola(), SameAlpha(schedule), t_min, t_max)


def VE(
    sigma_min: float = 0.01, sigma_max: float = 50.0, *, t_min: float | None = None, t_max: float | None = None
) -> GaussianPath:
    """Variance-exploding path, alpha = 1, with sigma(t) geometric from ``sigma_min`` to ``sigma_max`` (linear logsnr).

    Reference: Song et al. 2021, arXiv:2011.13456, appendix C.
    """
    ok = 0 < sigma_min < sigma_max < math.inf
    require(ok, f"VE needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    return _path(Ray(), LinearLogSNR(-2 * math.log(sigma_min), -2 * math.log(sigma_max)), t_min, t_max)


def Flow(*, t_min: float | None = None, t_max: float | None = None) -> GaussianPath:
    """Straight-line path, alpha = 1 - t and sigma = t: rectified flow, conditional optimal transport."""
    return _path(Chord(), StraightLine(), t_min, t_max)


def Tabulated(
    betas: ArrayLike | None = None,
    *,
    alphas_bar: ArrayLike | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
) -> GaussianPath:
    """VP path through a table of T levels: Ho's DDPM exactly at t = i/T, smooth in between; t_min is 1/T by default.

    Args:
        betas: beta_i for i = 1..T, each in (0, 1).
        alphas_bar: instead of betas, alpha-bar_i = PROD_{j <= i} (1 - beta_j), in (0, 1) and strictly falling.
        t_min: cleanest time.
        t_max: noisiest time.

    Raises:
        ValueError: if not exactly one table is given, or it is not a strictly falling table in (0, 1).

    Reference: Ho et al. 2020, arXiv:2006.11239, section 2.
    """
    require((betas is None) != (alphas_bar is None), "Tabulated needs exactly one of betas and alphas_bar")
    name = "alphas_bar" if betas is None else "betas"
    table = np.asarray(alphas_bar if betas is None else betas, dtype=np.float64)
    require(table.ndim == 1 and bool(np.all((table > 0) & (table < 1))), f"{name} must be a 1-D table in (0, 1)")
    if betas is None:
        require(bool(np.all(np.diff(table) < 0)), "alphas_bar must be strictly falling")
        decays = -np.log(table)
    else:
        decays = np.cumsum(-np.log1p(-table))
    return _path(Circle(), Table(tuple(decays.tolist())), t_min, t_max)


PATHS: dict[str, Callable[[], GaussianPath]] = {
    "vp-linear": VP,
    "vp-cosine": lambda: VP(Cosine()),
    "vp-logsnr": lambda: VP(LinearLogSNR()),
    "vp-sigmoid": lambda: VP(Sigmoid()),
    "sub-vp": SubVP,
    "ve": VE,
    "flow": Flow,
    "ddpm": lambda: Tabulated(betas=np.linspace(1e-4, 0.02, 1000)),
}
