"""What a solver is given: a Gaussian path and a prediction.

Data ``x0`` and noise ``eps ~ N(0, I)`` are mixed along a *Gaussian path*,

    z_t = alpha(t) x0 + sigma(t) eps,          logsnr(t) = log alpha(t)^2 / sigma(t)^2  (falls with t),

with ``t = 0`` at the data and ``t = 1`` at the noise. A network (or an exact formula) looks at ``z_t`` and *predicts*
the pair ``(x0, eps)``, that is their posterior means; the two are tied by the equation above, so one call gives both.
Score, velocity and every drift are linear in that pair:

    score     = -eps / sigma
    velocity  = f x + g^2 / (2 sigma) eps                                      (probability-flow ODE, eta = 0)
    drift     = f x - (1 + eta^2) / 2 g^2 score,    diffusion = eta g         (the reverse family, eta = 1: reverse SDE)
    drift     = f x - (1 - eta^2) / 2 g^2 score,    diffusion = eta g         (the same family run from data to noise)

with ``f = d log alpha / dt`` and ``g^2 = -sigma^2 d logsnr / dt`` for *every* Gaussian path (Song et al. 2021,
arXiv:2011.13456, eq. 13 and appendix D; Kingma et al. 2021, arXiv:2107.00630, eq. 9). Nothing here knows a network: a
solver needs a function and a path, and both may come from anywhere.

Times and coefficients are 0-dim float64 CPU tensors, states keep their dtype and device; coefficients meet states in
:mod:`solvers.linear`, and are looked up in :mod:`solvers.nodes`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from torch import Tensor

from solvers.linear import Terms, expand, gather, mix
from solvers.nodes import Nodes, Passage, Path, pulls

__all__ = [
    "ODE",
    "SDE",
    "DiffusionProblem",
    "Nodes",
    "Passage",
    "Path",
    "Predict",
    "Prediction",
    "Problem",
    "Terms",
    "expand",
    "gather",
    "mix",
]


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
Velocity = Callable[[Tensor, Tensor], Tensor]
"""``velocity(x, t)`` with arguments of the same kinds."""


@dataclass(frozen=True)
class ODE:
    """Any ordinary differential equation dx/dt = velocity(x, t) on ``[t_min, t_max]``.

    Runge-Kutta solvers and the adapters need nothing else; an example is the probability-flow ODE with one more column
    for the log-density.

    Args:
        velocity: ``velocity(x, t)`` with x (B, *event) and t 0-dim or (B,).
        t_min: start of the range.
        t_max: its end.
        select: ``select(rows)`` is the velocity of some rows of the batch, a whole-number tensor; where it is given,
            samples with steps of their own leave the batch when they arrive.
    """

    velocity: Velocity
    t_min: float = 0.0
    t_max: float = 1.0
    select: Callable[[Tensor], Velocity] | None = None

    def calling(self, wrap: Callable[[Velocity], Velocity]) -> ODE:
        """The same equation with its function wrapped, as the loop does to count calls."""
        select = self.select

        def some(rows: Tensor) -> Velocity:
            return wrap(cast("Callable[[Tensor], Velocity]", select)(rows))

        return ODE(wrap(self.velocity), self.t_min, self.t_max, None if select is None else some)

    def terms(self, x: Tensor, t: Tensor) -> Terms:
        """The state as a combination of one term; see :meth:`DiffusionProblem.through`."""
        return ((1.0, x),)

    def slope(self, x: Tensor, t: Tensor) -> Terms:
        """The velocity as a combination of one term."""
        return ((1.0, self.velocity(x, t)),)

    def state(self, t: Tensor, *weighted: tuple[Tensor | float, Terms]) -> Tensor:
        """The state that is this combination."""
        return mix(*gather(*weighted))

    def at(self, nodes: Sequence[Tensor]) -> ODE:
        """The same equation: it has no coefficients that could be looked up."""
        return self

    @property
    def path(self) -> Path:
        """There is none.

        Raises:
            ValueError: always, for a method that asks.
        """
        raise ValueError("an ODE has a velocity and neither path nor prediction: this method needs a DiffusionProblem")

    predict = path


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
        unit: how many times the path's state a tensor is that stands for it, a function of t; None: it is the state.
            See :meth:`through`.
    """

    path: Path
    predict: Predict
    unit: Callable[[Tensor], Tensor | float] | None = None

    @property
    def t_min(self) -> float:
        return self.path.t_min

    @property
    def t_max(self) -> float:
        return self.path.t_max

    def calling(self, wrap: Callable[[Predict], Predict]) -> DiffusionProblem:
        """The same problem with ``predict`` wrapped: guidance, thresholding, counting."""
        return DiffusionProblem(self.path, wrap(self.predict), self.unit)

    def at(self, nodes: Sequence[Tensor]) -> DiffusionProblem:
        """The same problem with the path's coefficients at the nodes of a grid computed at once; see :class:`Nodes`."""
        return DiffusionProblem(Nodes(self.path, nodes), self.predict, self.unit)

    # --- The equation, in the path's own state ------------------------------------------------------------------------

    def terms(self, x: Tensor, t: Tensor) -> Terms:
        """The path's state for which ``x`` stands, as a combination of one term."""
        return ((1.0, x),) if self.unit is None else ((1.0 / self.unit(t), x),)

    def state(self, t: Tensor, *weighted: tuple[Tensor | float, Terms]) -> Tensor:
        """The tensor that stands for a combination."""
        if self.unit is None:
            return mix(*gather(*weighted))
        unit = self.unit(t)
        return mix(*gather(*((unit * c, terms) for c, terms in weighted)))

    def slope(self, x: Tensor, t: Tensor) -> Terms:
        """The terms of :meth:`velocity`, for a method that adds them up with others."""
        ((c, _),), (f, rate) = self.terms(x, t), pulls(self.path, t)
        pulled = rate, self.predict(x, t).eps
        return (pulled,) if isinstance(f, float) and f == 0.0 else ((f * c, x), pulled)  # zero on the ray

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of the probability-flow ODE, dx/dt = f x + g^2 / (2 sigma) eps, shape of ``x``.

        Reference: Song et al. 2021, arXiv:2011.13456, eq. 13.
        """
        return mix(*self.slope(x, t))

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """Gradient of log q(z_t): -eps / sigma, shape of ``x``."""
        return self.predict(x, t).eps / -expand(self.path.sigma(t), x)

    def sde(self, eta: float = 1.0, *, encode: bool = False) -> SDE:
        """The family dx = [f x - (1 + eta^2) / 2 g^2 score] dt + eta g dW, run from t = 1 to t = 0.

        Every member has the marginals of the forward process; eta = 0 is the probability-flow ODE and eta = 1 the
        reverse SDE of Anderson (1982). Run from data to noise, the score's factor is (1 - eta^2) / 2: at eta = 1 that
        is the forward process itself.

        Args:
            eta: amount of noise, >= 0.
            encode: the member that is run from t = 0 to t = 1.

        Reference: Song et al. 2021, arXiv:2011.13456, eqs. 6 and 13; Zhang and Chen 2022, arXiv:2204.13902, eq. 4.
        """
        share = (1 - eta**2 if encode else 1 + eta**2) / 2

        def drift(x: Tensor, t: Tensor) -> Tensor:
            ((c, _),) = self.terms(x, t)
            factor = share * self.path.g2(t) / self.path.sigma(t)
            return mix((self.path.f(t) * c, x), (factor, self.predict(x, t).eps))

        return SDE(drift, lambda t: eta * self.path.g2(t).sqrt())

    # --- On another path ----------------------------------------------------------------------------------------------

    def through(self, passage: Passage) -> DiffusionProblem:
        """The same problem by the equation of another path, while its states stay what they are.

        Who adds up a step from :meth:`terms` and :meth:`slope` and makes a tensor of the sum by :meth:`state` has the
        factor between the two paths' states in its coefficients, where it costs nothing.

        Args:
            passage: from the problem's path to the other one.

        Returns:
            A problem on the other path, in its time, whose ``predict`` is given states of this one.
        """
        predict, back, unit, before = self.predict, passage.back, passage.unit, self.unit
        if before is not None:
            return DiffusionProblem(passage.new, lambda x, t: predict(x, back(t)), lambda t: before(back(t)) * unit(t))
        return DiffusionProblem(passage.new, lambda x, t: predict(x, back(t)), unit)

    def scaled(self) -> DiffusionProblem:
        """The same problem with the path's own states, which are scaled, in a pass of its own, for ``predict``."""

        def predict(x: Tensor, t: Tensor) -> Prediction:
            return self.predict(self.state(t, (1.0, ((1.0, x),))), t)

        return DiffusionProblem(self.path, predict)

    def rescaled(self, path: Path) -> DiffusionProblem:
        """The same problem seen on another path, with that path's states: x' = (alpha' / alpha) x at equal logsnr.

        Args:
            path: the path to transport to, with its own clock.

        Returns:
            A problem on ``path`` whose ``predict(x', t')`` asks this one at the time of equal logsnr.
        """
        return self.through(Passage(self.path, path)).scaled()


Problem = DiffusionProblem | ODE
