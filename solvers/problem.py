"""What a solver is given: a Gaussian path and a prediction.

Data ``x0`` and noise ``eps ~ N(0, I)`` are mixed along a *Gaussian path*,

    z_t = alpha(t) x0 + sigma(t) eps,          logsnr(t) = log alpha(t)^2 / sigma(t)^2  (falls with t),

with ``t = 0`` at the data and ``t = 1`` at the noise. A network (or an exact formula) looks at ``z_t`` and *predicts*
the pair ``(x0, eps)``, that is their posterior means; the two are tied by the equation above, so one call gives both.
Score, velocity and every drift are linear in that pair:

    score     = -eps / sigma
    velocity  = f x + g^2 / (2 sigma) eps                                      (probability-flow ODE, eta = 0)
    drift     = f x - (1 + eta^2) / 2 g^2 score,    diffusion = eta g         (the reverse family, eta = 1: reverse SDE)

with ``f = d log alpha / dt`` and ``g^2 = -sigma^2 d logsnr / dt`` for *every* Gaussian path (Song et al. 2021,
arXiv:2011.13456, eq. 13 and appendix D; Kingma et al. 2021, arXiv:2107.00630, eq. 9). Nothing here knows a network: a
solver needs a function and a path, and both may come from anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["ODE", "SDE", "DiffusionProblem", "Path", "Predict", "Prediction", "Problem", "expand"]


class Prediction(NamedTuple):
    """Posterior means of data and noise given ``z``, tied by ``z = alpha x0 + sigma eps``.

    Attributes:
        x0: predicted data, shape (B, *event).
        eps: predicted noise, same shape, unit variance at the data's prior.
    """

    x0: Tensor
    eps: Tensor


Predict = Callable[[Tensor, Tensor], Prediction]
"""``predict(x, t)`` with x (B, *event) and t a 0-dim or (B,) float64 tensor."""


@runtime_checkable
class Path(Protocol):
    """A Gaussian path. Every method takes a tensor of times of any shape and returns one of that shape and dtype."""

    @property
    def t_min(self) -> float:
        """The cleanest time at which the path is used; logsnr is finite there."""
        ...

    @property
    def t_max(self) -> float:
        """The noisiest time at which the path is used; logsnr is finite there."""
        ...

    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale."""
        ...

    def logsnr(self, t: Tensor) -> Tensor:
        """log alpha^2 / sigma^2, strictly falling in t."""
        ...

    def f(self, t: Tensor) -> Tensor:
        """Drift coefficient d log alpha / dt, per unit of t."""
        ...

    def g2(self, t: Tensor) -> Tensor:
        """Squared diffusion coefficient -sigma^2 d logsnr / dt, per unit of t."""
        ...

    def time(self, logsnr: Tensor) -> Tensor:
        """The inverse of :meth:`logsnr`."""
        ...


def expand(c: Tensor, x: Tensor) -> Tensor:
    """Give per-sample coefficients the trailing axes of a state.

    Args:
        c: 0-dim (returned as it is), or of shape (B,) or (B, 1, ..., 1).
        x: state of shape (B, *event).

    Returns:
        ``c`` as a 0-dim tensor or of shape (B, 1, ..., 1), on the device of ``x`` and in its dtype when per sample. A
        0-dim float64 CPU tensor multiplies a state on any device and of any dtype without a copy, so it stays.
    """
    return c if c.ndim == 0 else c.reshape(-1, *(1,) * (x.ndim - 1)).to(x)


@dataclass(frozen=True)
class ODE:
    """Any ordinary differential equation dx/dt = velocity(x, t) on ``[t_min, t_max]``.

    Runge-Kutta solvers and the adapters need nothing else; an example is the probability-flow ODE with one more column
    for the log-density.
    """

    velocity: Callable[[Tensor, Tensor], Tensor]
    t_min: float = 0.0
    t_max: float = 1.0

    def calling(self, wrap: Callable[[Callable[[Tensor, Tensor], Tensor]], Callable[[Tensor, Tensor], Tensor]]) -> ODE:
        """The same equation with its function wrapped, as the loop does to count calls."""
        return ODE(wrap(self.velocity), self.t_min, self.t_max)


@dataclass(frozen=True)
class SDE:
    """dx = drift(x, t) dt + diffusion(t) dW with scalar, state-independent (additive) diffusion."""

    drift: Callable[[Tensor, Tensor], Tensor]
    diffusion: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DiffusionProblem:
    """A Gaussian path and a function that predicts (x0, eps) on it.

    Args:
        path: the Gaussian path.
        predict: ``predict(x, t)`` with ``x`` of shape (B, *event) and ``t`` a float64 tensor, 0-dim or (B,).
    """

    path: Path
    predict: Predict

    @property
    def t_min(self) -> float:
        return self.path.t_min

    @property
    def t_max(self) -> float:
        return self.path.t_max

    def calling(self, wrap: Callable[[Predict], Predict]) -> DiffusionProblem:
        """The same problem with ``predict`` wrapped: guidance, thresholding, counting."""
        return DiffusionProblem(self.path, wrap(self.predict))

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """Gradient of log q(z_t): -eps / sigma, shape of ``x``."""
        return self.predict(x, t).eps / -expand(self.path.sigma(t), x)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of the probability-flow ODE, dx/dt = f x + g^2 / (2 sigma) eps, shape of ``x``.

        Reference: Song et al. 2021, arXiv:2011.13456, eq. 13.
        """
        return self.sde(eta=0.0).drift(x, t)

    def sde(self, eta: float = 1.0) -> SDE:
        """The reverse family dx = [f x - (1 + eta^2) / 2 g^2 score] dt + eta g dW, run from t = 1 to t = 0.

        Every member has the marginals of the forward process; eta = 0 is the probability-flow ODE and eta = 1 the
        reverse SDE of Anderson (1982).

        Reference: Song et al. 2021, arXiv:2011.13456, eqs. 6 and 13; Zhang and Chen 2022, arXiv:2204.13902, eq. 4.
        """

        def drift(x: Tensor, t: Tensor) -> Tensor:
            f, c = self.path.f(t), (1 + eta**2) * self.path.g2(t) / (2 * self.path.sigma(t))
            return expand(f, x) * x + expand(c, x) * self.predict(x, t).eps

        return SDE(drift, lambda t: eta * self.path.g2(t).sqrt())

    def rescaled(self, path: Path) -> DiffusionProblem:
        """The same problem seen on another path: x' = (alpha'/alpha) x at equal logsnr, where x0 and eps are unchanged.

        Args:
            path: the path to transport to, with its own clock.

        Returns:
            A problem on ``path`` whose ``predict(x', t')`` asks this one at the time of equal logsnr.
        """
        old = self.path

        def predict(x: Tensor, t: Tensor) -> Prediction:
            u = old.time(path.logsnr(t))
            return self.predict(x * expand(old.alpha(u) / path.alpha(t), x), u)

        return DiffusionProblem(path, predict)


Problem = DiffusionProblem | ODE
