"""Stochastic solvers that choose their steps, every sample its own; see :mod:`solvers.adaptive`.

A step that is refused has looked at the noise. To draw again, as Gotta-Go-Fast does, is to keep what is agreeable: an
increment that happens to undo the drift changes the slope least, so it is refused least often, and what is accepted is
no Brownian motion any more. In a few dimensions the law of the result is far off; in many, the error of a sample is an
average and hardly depends on the draw, which is why images do not show it. :class:`AdaptiveHeun` asks the one Brownian
path for a shorter increment, whose law *given the longer one* is the bridge's, and has no such bias.

Reference: Gaines and Lyons 1997, doi:10.1137/S0036139995286515; Jolicoeur-Martineau et al. 2021, arXiv:2105.14080.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.adaptive import Adaptive, Attempt
from solvers.noise import Noise, elsewhere
from solvers.problem import DiffusionProblem, mix

__all__ = ["AdaptiveHeun", "GottaGoFast"]


@dataclass(frozen=True)
class AdaptiveHeun(Adaptive):
    """Heun's method for the reverse SDE with steps of its own for every sample, on the Brownian path of the sample.

    u   = x + h b(x, t) + g(t) sqrt|h| z,                                                            (Euler-Maruyama)
    x_s = x + h/2 [b(x, t) + b(u, s)] + [g(t) + g(s)]/2 sqrt|h| z,        error = x_s - u,

    with z the normalised increment of W over the step. A step that is refused is tried again with the increment of the
    same path over the shorter step: nothing that was seen is thrown away, and the law of the result is right however
    sizes depend on the noise.

    Adaptive: order and evaluations per step 0 (1 for a step that is tried, 1 for one that is accepted); noise white.
    With tolerances to zero it converges strongly, to the sample that every stochastic solver has on that path.

    Args:
        eta: amount of noise, > 0; 1 is the reverse SDE of Anderson (1982).

    Reference: Gaines and Lyons 1997, doi:10.1137/S0036139995286515; Roberts 2012, arXiv:1210.0933 (the pair).
    """

    rtol: float = 1e-2
    atol: float = 1e-2
    eta: float = 1.0

    exponent = 1.5
    stages = 1
    stochastic = True
    reference = "Gaines, Lyons 1997, doi:10.1137/S0036139995286515; Roberts 2012, arXiv:1210.0933"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eta > 0:
            raise ValueError(f"eta is positive (use an ODE solver without noise), got {self.eta}")

    def increments(self, noise: Noise, like: Tensor) -> Callable[[int], Noise]:
        return lambda number: noise  # the one path, whatever was refused

    def first(self, problem: DiffusionProblem, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return (problem.predict(x, t).eps,)

    def attempt(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, first: tuple[Tensor, ...], noise: Noise
    ) -> Attempt:
        path, h, z = problem.path, s - t, noise(problem.path.logsnr(t) / 2, problem.path.logsnr(s) / 2)
        share = (1 - h.sign() * self.eta**2) / 2  # as in DiffusionProblem.sde, on the way to the data and back

        def drift(x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
            return mix((path.f(t), x), (share * path.g2(t) / path.sigma(t), eps))

        root = self.eta * h.abs().sqrt()
        g_t, g_s = path.g2(t).sqrt() * root, path.g2(s).sqrt() * root
        b_t = drift(x, t, first[0])
        u = mix((1.0, x), (h, b_t), (g_t, z))
        b_s = drift(u, s, problem.predict(u, s).eps)
        error = mix((h / 2, b_s), (-h / 2, b_t), ((g_s - g_t) / 2, z))
        return Attempt(mix((1.0, u), (1.0, error)), error)


@dataclass(frozen=True)
class GottaGoFast(AdaptiveHeun):
    """Gotta-Go-Fast, as published: a step that is refused is tried again with other noise.

    The pair of :class:`AdaptiveHeun`; E = rms(error / max(atol, rtol max(|u|, |x_t|))), h <- 0.9 h E^-0.9.

    **Biased**: what is refused depends on the noise, and the noise is drawn again. Measured on Gaussian data
    of standard deviation 0.5 at the tolerances of the paper, the variance is 2.7 times what it should be in one
    dimension, and 40 % and 10 % too large in 4 and 16. :class:`AdaptiveHeun` is the remedy.

    Adaptive: order and evaluations per step 0; noise white, and another one for every try.

    Reference: Jolicoeur-Martineau et al. 2021, arXiv:2105.14080, algorithm 1.
    """

    rtol: float = 0.05
    atol: float = 0.0078

    strong_order = 0.0  # what is refused is no part of the path
    reference = "Jolicoeur-Martineau et al. 2021, arXiv:2105.14080, algorithm 1"

    def scale(self, x: Tensor, new: Tensor) -> Tensor:
        return (self.rtol * torch.maximum(x.abs(), new.abs())).clamp(min=self.atol)

    def factor(self, error: Tensor, before: Tensor, accepted: Tensor, calm: Tensor) -> Tensor:
        return 0.9 * error.clamp(min=1e-8) ** -0.9

    def increments(self, noise: Noise, like: Tensor) -> Callable[[int], Noise]:
        return lambda number: elsewhere(noise, number)  # every try looks at another place
