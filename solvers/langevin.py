"""Langevin dynamics at a fixed noise level: correctors, and the sampler that consists of nothing else.

At every level the score of the marginal law is known, so a Markov chain that leaves that law in place can be run,

    x <- x + delta score(x, t) + sqrt(2 delta) z,        score = -eps / sigma,

to repair what the steps between the levels have damaged. It is Euler's method for an equation that is run for a time
delta: its own law is off by O(delta). Three rules for delta are in use, and on fine grids they differ:

    delta = size sigma_s^2                                  as much at every level, whatever the grid (NCSN)
    delta = 2 (alpha_t / alpha_s)^2 (snr |z| / |score|)^2   the same, but it looks at the sample (score SDE)
    delta = rate |lam_s - lam_t| sigma_s^2                  in proportion to the step of the grid

With the first two a bias stays whatever the grid, so the methods made of them have no order of convergence (``order =
0``), and the second is not linear. With the third, a predictor for the ODE and its corrector are a splitting method for
the reverse family with eta^2 = rate, and the bias goes away with the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from solvers.churn import inside
from solvers.integrate import Solver
from solvers.noise import Noise, elsewhere
from solvers.problem import DiffusionProblem, Prediction, mix

__all__ = ["AnnealedLangevin", "Corrector", "Langevin", "PredictorCorrector", "SNRLangevin"]


class Corrector(Protocol):
    """A step that leaves the noise level where it is.

    Attributes:
        order: weak order that it allows a predictor, 0 for one whose bias does not vanish on fine grids.
        linear: whether it is linear in the state, the prediction and the noise.
    """

    @property
    def order(self) -> int: ...

    @property
    def linear(self) -> bool: ...

    def correct(self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """One correction of a state at s that came from t, with a standard normal z."""
        ...


def _moved(x: Tensor, eps: Tensor, sigma: Tensor, delta: Tensor, z: Tensor) -> Tensor:
    return mix((1.0, x), (-delta / sigma, eps), ((2 * delta).sqrt(), z))


@dataclass(frozen=True)
class Langevin:
    """Langevin steps in proportion to the step of the grid: delta = rate |lam_s - lam_t| sigma_s^2.

    Args:
        rate: eta^2 of the reverse SDE that a corrected ODE solver approximates, > 0.
    """

    rate: float = 1.0

    order = 1
    linear = True

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"the rate of a corrector is positive, got {self.rate}")

    def correct(self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, z: Tensor) -> Tensor:
        path, sigma = problem.path, problem.path.sigma(s)
        delta = self.rate * (path.logsnr(s) - path.logsnr(t)).abs() / 2 * sigma**2
        return _moved(x, problem.predict(x, s).eps, sigma, delta, z)


@dataclass(frozen=True)
class SNRLangevin:
    """Langevin steps tuned to a signal-to-noise ratio: delta = 2 (alpha_t / alpha_s)^2 (snr |z| / |score|)^2.

    The norms are those of each sample; the authors' code takes their means over the batch, which makes a sample depend
    on its company. (alpha_t / alpha_s)^2 is the paper's alpha_i: 1 - beta_i on a VP path, 1 on a VE path.

    Args:
        snr: r of the paper, > 0.

    Reference: Song et al. 2021, arXiv:2011.13456, algorithms 4 and 5.
    """

    snr: float = 0.16

    order = 0
    linear = False

    def __post_init__(self) -> None:
        if not self.snr > 0:
            raise ValueError(f"the signal-to-noise ratio of a corrector is positive, got {self.snr}")

    def correct(self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, z: Tensor) -> Tensor:
        path, sigma = problem.path, problem.path.sigma(s)
        eps = problem.predict(x, s).eps
        squares = [v.reshape(len(v), -1).double().square().sum(1) for v in (z, eps)]
        ratio = (squares[0] / squares[1]).sqrt() * sigma  # |z| / |score|
        shrunk = path.alpha(t) / path.alpha(s) if t > s else path.alpha(s) / path.alpha(t)
        return _moved(x, eps, sigma, 2 * (shrunk * self.snr * ratio) ** 2, z)


@dataclass(frozen=True)
class PredictorCorrector(Solver[Any]):
    """Predictor-corrector sampling: a step of any solver to the next level, then Langevin steps there.

    Weak order that of the predictor, or the corrector's if that is lower: 1 with :class:`Langevin`, none (0) with
    :class:`SNRLangevin`; ``steps`` evaluations per step more than the predictor, noise white. The normals of the
    corrections are independent of the predictor's: they are taken from places (:func:`solvers.noise.elsewhere`) below
    zero, where only other correctors look.

    Args:
        predictor: any solver.
        corrector: the correction.
        steps: corrections at every level, 1 to 63.

    Reference: Song et al. 2021, arXiv:2011.13456, section 4.2, algorithms 1-3.
    """

    predictor: Solver[Any]
    corrector: Corrector = SNRLangevin()
    steps: int = 1

    stochastic = True

    def __post_init__(self) -> None:
        if not 1 <= self.steps < 64:
            raise ValueError(f"there are 1 to 63 corrections at every level, got {self.steps}")
        self.declare(
            invariant=self.predictor.invariant,
            order=min(self.predictor.order, self.corrector.order),
            nfe_per_step=self.predictor.nfe_per_step + self.steps,
            linear=self.predictor.linear and self.corrector.linear,
            reference="Song et al. 2021, arXiv:2011.13456, section 4.2",
            grid=self.predictor.grid,
        )

    def init(self, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> Any:
        return self.predictor.init(problem, x, ts)

    def observe(self, state: Any, lam: Tensor, prediction: Prediction) -> Any:
        return self.predictor.observe(state, lam, prediction)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: Any, noise: Noise
    ) -> tuple[Tensor, Any]:
        lam_t, lam_s = problem.path.logsnr(t) / 2, problem.path.logsnr(s) / 2
        x, state = self.predictor.step(problem, x, t, s, state, noise)
        taken = sum(part.steps for part in inside(self.predictor) if isinstance(part, PredictorCorrector))
        for k in range(self.steps):
            x = self.corrector.correct(problem, x, t, s, elsewhere(noise, -1 - taken - k)(lam_t, lam_s))
        return x, state

    def nfe(self, steps: int) -> int:
        return self.predictor.nfe(steps) + steps * self.steps


@dataclass(frozen=True)
class AnnealedLangevin(Solver[None]):
    """Annealed Langevin dynamics: at every level nothing but Langevin steps, of a size in proportion to sigma^2.

    x at s = (alpha_s / alpha_t) x at t, then n times  x <- x - delta / sigma_s eps + sqrt(2 delta) z,
    delta = size sigma_s^2.

    No order of convergence (0), n evaluations per step, noise white. In a direction in which data have the variance v,
    the chain at sigma_s settles at  u / (1 - delta / (2u)),  u = alpha_s^2 v + sigma_s^2:  too wide by delta / (2u), at
    most the share size / 2; and it takes some u / delta steps to settle, so that in directions in which data are wide
    it stays where it was when sigma fell below them.

    Args:
        size: the paper's epsilon / (2 sigma_L^2); (0.1 there). Less than 1.
        steps: n, the paper's T, 1 to 511.

    Reference: Song and Ermon 2019, arXiv:1907.05600, algorithm 1.
    """

    size: float = 0.1
    steps: int = 10

    order = 0
    invariant = True
    stochastic = True
    reference = "Song, Ermon 2019, arXiv:1907.05600, algorithm 1"

    def __post_init__(self) -> None:
        if not (0 < self.size < 1 and 1 <= self.steps < 512):
            raise ValueError(f"annealed Langevin dynamics need 0 < size < 1 and 1 to 511 steps, got {self}")
        self.declare(nfe_per_step=self.steps)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path, sigma = problem.path, problem.path.sigma(s)
        lam_t, lam_s = path.logsnr(t) / 2, path.logsnr(s) / 2
        x = mix((path.alpha(s) / path.alpha(t), x))
        for k in range(self.steps):
            z = elsewhere(noise, k)(lam_t, lam_s)
            x = _moved(x, problem.predict(x, s).eps, sigma, self.size * sigma**2, z)
        return x, state
