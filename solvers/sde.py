"""Stochastic solvers that discretise the reverse SDE itself, in the path's own time.

    dx = [f x - (1 + eta^2) / 2 g^2 score] dt + eta g dW

``W`` is the shared Brownian motion in the clock ``lam``: since g^2 |dt| = 2 sigma^2 |dlam|, a unit-variance increment
over the step's interval of lam, times sqrt|dt|, is the increment in t up to higher order, and solvers in different
clocks converge to the same sample.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from solvers.integrate import Solver
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, mix

__all__ = ["EulerMaruyama"]


@dataclass(frozen=True)
class EulerMaruyama(Solver[None]):
    """Euler's method for the reverse SDE.

    x_s = x + drift(x, t) (s - t) + eta g(t) sqrt|s - t| z.

    Weak order 1 (and strong order 1: the noise is additive), 1 evaluation per step, noise white.

    Args:
        eta: amount of noise, > 0; 1 is the reverse SDE of Anderson (1982).

    Reference: Song et al. 2021, arXiv:2011.13456, eq. 6 and appendix D; Kloeden and Platen 1992, section 10.2.
    """

    eta: float = 1.0

    order = 1
    nfe_per_step = 1
    stochastic = True
    reference = "Song et al. 2021, arXiv:2011.13456"

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ValueError(f"eta is positive (Euler is the method without noise), got {self.eta}")

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        h = s - t
        sde = problem.sde(self.eta, encode=bool(h > 0))
        z = noise(problem.path.logsnr(t) / 2, problem.path.logsnr(s) / 2)
        return mix((1.0, x), (h, sde.drift(x, t)), (sde.diffusion(t) * h.abs().sqrt(), z)), state
