"""Stochastic solvers that discretise the reverse SDE itself, in the time of the path they are run on.

    dx = b(x, t) dt + g(t) dW,        b = f x - (1 + eta^2) / 2 g^2 score,   g standing for eta g.

The diffusion coefficient does not depend on the state: the noise is *additive*, which is why Euler's method converges
with strong order 1 here and a method of two evaluations can reach 1.5.

``W`` is the shared Brownian motion in the clock ``lam``: since g^2 |dt| = 2 sigma^2 |dlam|, a unit-variance increment
over the step's interval of lam, times sqrt|dt|, is the increment in t up to higher order, and solvers in different
clocks converge to the same sample. Strong order above 1 needs the increments themselves, hence the clock lam
(``OnPath(..., VP_LAM)``), where, in addition, state, drift and diffusion stay of order one, so that nothing is stiff.

*Variance after 20 steps*: see :mod:`solvers.ancestral`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from solvers.integrate import Solver
from solvers.noise import Noise, area
from solvers.problem import DiffusionProblem, mix

__all__ = ["SRA1", "EulerMaruyama", "StochasticHeun"]


def _check_eta(eta: float) -> None:
    if not eta > 0:
        raise ValueError(f"eta is positive (use an ODE solver without noise), got {eta}")


@dataclass(frozen=True)
class EulerMaruyama(Solver[None]):
    """Euler's method for the reverse SDE.

    x_s = x + h b(x, t) + g(t) sqrt|h| z,        h = s - t.

    Weak order 1 (and strong order 1: the noise is additive), 1 evaluation per step, noise white. Variance after 20
    steps: +9.5 %.

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
        _check_eta(self.eta)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        h = s - t
        sde = problem.sde(self.eta, encode=bool(h > 0))
        z = noise(problem.path.logsnr(t) / 2, problem.path.logsnr(s) / 2)
        return mix((1.0, x), (h, sde.drift(x, t)), (sde.diffusion(t) * h.abs().sqrt(), z)), state


@dataclass(frozen=True)
class StochasticHeun(Solver[None]):
    """Heun's method for the reverse SDE: predict with Euler, then average drift and diffusion over both ends.

    u   = x + h b(x, t) + g(t) sqrt|h| z,
    x_s = x + h/2 [b(x, t) + b(u, s)] + [g(t) + g(s)]/2 sqrt|h| z,        the same z.

    This is the improved Euler scheme of Roberts, whose random sign S only matters for noise that is not additive. Weak
    order 2, strong order 1, 2 evaluations per step, noise white. Variance after 20 steps: -2.4 %.

    Args:
        eta: amount of noise, > 0; 1 is the reverse SDE of Anderson (1982).

    Reference: Roberts 2012, arXiv:1210.0933; Kloeden and Platen 1992, section 15.1; the larger method inside
    Jolicoeur-Martineau et al. 2021, arXiv:2105.14080.
    """

    eta: float = 1.0

    order = 2
    nfe_per_step = 2
    stochastic = True
    reference = "Roberts 2012, arXiv:1210.0933"

    def __post_init__(self) -> None:
        _check_eta(self.eta)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        h = s - t
        sde = problem.sde(self.eta, encode=bool(h > 0))
        b, g = sde.drift, sde.diffusion
        z, root = noise(problem.path.logsnr(t) / 2, problem.path.logsnr(s) / 2), h.abs().sqrt()

        b_t = b(x, t)
        u = mix((1.0, x), (h, b_t), (g(t) * root, z))
        return mix((1.0, x), (h / 2, b_t), (h / 2, b(u, s)), ((g(t) + g(s)) / 2 * root, z)), state


@dataclass(frozen=True)
class SRA1(Solver[None]):
    """The stochastic Runge-Kutta method SRA1 for additive noise.

    u   = x + 3/4 h b(x, t) + 3/2 g(s) J,                                    J = INT_t^s (W(r) - W(t)) dr / h,
    x_s = x + h [1/3 b(x, t) + 2/3 b(u, t + 3/4 h)] + g(s) dW + (g(t) - g(s)) J.

    With dW = sqrt|h| z and the space-time area H ~ N(0, 1) of the same path, J = sqrt|h| (z / 2 + H / sqrt(12)).

    Weak order 2, 2 evaluations per step, noise white; strong order 1.5 in the clock lam (``OnPath(SRA1(), VP_LAM)``),
    where the Brownian motion lives, and 1 in any other. Variance after 20 steps: +6.2 %.

    Args:
        eta: amount of noise, > 0; 1 is the reverse SDE of Anderson (1982).
        parts: increments from which the area is computed; the share 1 / parts of it that they do not see leaves a term
            of strong order 1 with so small a factor.

    Reference: Roessler 2010, doi:10.1137/09076636X (SRA1).
    """

    eta: float = 1.0
    parts: int = 16

    order = 2
    nfe_per_step = 2
    stochastic = True
    strong_order = 1.5
    reference = "Roessler 2010, doi:10.1137/09076636X"

    def __post_init__(self) -> None:
        _check_eta(self.eta)
        if self.parts < 2:
            raise ValueError(f"an area is computed from at least 2 parts, got {self.parts}")

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        h = s - t
        sde = problem.sde(self.eta, encode=bool(h > 0))
        b, g = sde.drift, sde.diffusion
        lam_t, lam_s, root = problem.path.logsnr(t) / 2, problem.path.logsnr(s) / 2, h.abs().sqrt()
        bulge = area(noise, lam_t, lam_s, self.parts)
        z = noise(lam_t, lam_s)
        half, rest = root / 2, root / 12**0.5  # J = half z + rest bulge

        b_t = b(x, t)
        u = mix((1.0, x), (3 / 4 * h, b_t), (3 / 2 * g(s) * half, z), (3 / 2 * g(s) * rest, bulge))
        b_u = b(u, t + 3 / 4 * h)
        turn = g(t) - g(s)
        return mix(
            (1.0, x), (h / 3, b_t), (2 / 3 * h, b_u), (g(s) * root + turn * half, z), (turn * rest, bulge)
        ), state
