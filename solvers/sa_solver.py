"""SA-Solver: a stochastic Adams predictor and corrector, with an amount of noise that may change along the way.

The predictor is exponential Adams for the reverse SDE (:mod:`solvers.exponential_sde`) with the amount of noise ``tau``
held constant over each step. The corrector does the step once more with the same noise, when the prediction at its
end is known, and with the polynomial that goes through that one too. Since that prediction is needed for the next step
anyway, a corrected step costs one evaluation (PEC: predict, evaluate, correct; what is evaluated is the predicted
state, and the last state is not corrected). *Variance after 20 steps*: see :mod:`solvers.ancestral`.

Reference: Xue et al. 2023, arXiv:2309.05019.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.exponential import History, Node, interpolating
from solvers.exponential_sde import Linear, check_eta, linear
from solvers.integrate import Solver
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, Path, Prediction, mix

__all__ = ["SASolver", "Window"]


@dataclass(frozen=True)
class Window:
    """A function of logsnr that has one value where sigma / alpha is in a range and is 0 elsewhere.

    Args:
        value: in the range.
        low: least sigma / alpha.
        high: largest sigma / alpha.

    >>> tau = Window(0.8, low=0.05, high=1.0)
    >>> tau(torch.tensor(0.0).double()), tau(torch.tensor(8.0).double())
    (0.8, 0.0)
    """

    value: float
    low: float = 0.0
    high: float = 1e9

    def __call__(self, logsnr: Tensor) -> float:
        return self.value if self.low <= float((-0.5 * logsnr).exp()) <= self.high else 0.0


class Taken(NamedTuple):
    """The step that brought us here, for the corrector.

    Attributes:
        t: where it began.
        kept: what it kept of the state, times that state, plus its noise.
        part: the linear part it was taken with.
        lam: logsnr / 2 where it arrived.
        x: the state there.
    """

    t: Tensor
    kept: Tensor
    part: Linear
    lam: float
    x: Tensor


class Memory(NamedTuple):
    """Predictions so far, the newest first, and the last step."""

    nodes: History
    taken: Taken | None


@dataclass(frozen=True)
class SASolver(Solver[Memory]):
    """SA-Solver with a predictor of p predictions and a corrector of c.

    x_s = (sigma_s / sigma_t) e^(-tau^2 h) x_t + alpha_s SUM_j b_j x0_j + sigma_s sqrt(1 - e^(-2 tau^2 h)) z,
    SUM_j b_j P(lam_j) = INT_0^h a e^(-a (h - u)) P(lam_t + u) du for polynomials P of degree < p,    a = 1 + tau^2,

    through x0 at t and before (predictor), then, with the same z, through x0 at the predicted state and at t and before
    (corrector).

    Order min(p + 1, c) for tau = 0 (p without corrector), weak order min(2, that) else; 1 evaluation per step, noise
    white where tau > 0. Start: orders 1, 2, ... of both. Variance after 20 steps: +2.4 % with p = c = 3, +7.5 % with
    p = c = 2, and +28 % with the simple coefficients.

    Args:
        p: predictions that the predictor goes through, 1 to 8.
        c: predictions that the corrector goes through, 0 (none) to 8, the newest included.
        tau: amount of noise, a number or a function of logsnr (0-dim) that is asked at the start of each step
            (:class:`Window`); 1 is the reverse SDE.
        simple: for two predictions, the coefficients of the paper's appendix, in which the first moment is a h / 2
            where the exact one is a h^2 phi_2(-a h).

    Reference: Xue et al. 2023, arXiv:2309.05019, eqs. 15 and 18, appendix D.
    """

    p: int = 3
    c: int = 3
    tau: float | Callable[[Tensor], float] = 1.0
    simple: bool = False

    nfe_per_step = 1
    invariant = True
    reference = "Xue et al. 2023, arXiv:2309.05019"

    def __post_init__(self) -> None:
        if not (1 <= self.p <= 8 and 0 <= self.c <= 8):
            raise ValueError(f"a predictor goes through 1 to 8 predictions, a corrector through 0 to 8, got {self}")
        order = min(self.p + 1, self.c) if self.c else self.p
        if not callable(self.tau):
            check_eta(self.tau)
        noisy = callable(self.tau) or self.tau > 0
        order = min(order, 2) if noisy else order
        self.declare(order=order, stochastic=noisy, start_order=3 if self.c > 1 else 2)

    def init(self, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> Memory:
        return Memory((), None)

    def observe(self, state: Memory, lam: Tensor, prediction: Prediction) -> Memory:
        nodes = (Node(lam, *prediction), *state.nodes)[: max(self.p, self.c)]
        return Memory(nodes, None)

    def _terms(self, part: Linear, path: Path, t: Tensor, s: Tensor, nodes: History) -> list[tuple[Tensor, Tensor]]:
        """alpha_s b_j x0_j for the step from t to s."""
        lam_t = path.logsnr(t) / 2
        h = path.logsnr(s) / 2 - lam_t
        m = part.moments(h, len(nodes))
        if self.simple and len(nodes) == 2:
            m = torch.stack([m[0], part.rate(h) * h / 2])
        r = torch.stack([(node.lam - lam_t) / h for node in nodes])
        weights = path.alpha(s) * interpolating(r, m)
        return list(zip(weights.unbind(), [node.x0 for node in nodes], strict=True))

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: Memory, noise: Noise
    ) -> tuple[Tensor, Memory]:
        path = problem.path
        lam_t, lam_s = path.logsnr(t) / 2, path.logsnr(s) / 2
        nodes, _ = self.observe(state, lam_t, problem.predict(x, t))
        if self.c and state.taken is not None and state.taken.lam == float(lam_t):
            before, kept, part, _, arrived = state.taken
            terms = [(1.0, kept), *self._terms(part, path, before, t, nodes[: self.c])]
            # Who has moved the state since, by a step of Langevin's for example, has moved the corrected one too.
            x = mix(*terms) if x is arrived else mix(*terms, (1.0, x), (-1.0, arrived))

        part = linear("x0", self.tau(path.logsnr(t)) if callable(self.tau) else self.tau)
        factor, _, std = part.factors(path, t, s)
        fresh = [(std, noise(lam_t, lam_s))] if part.eta > 0 else []
        kept = mix((factor, x), *fresh)
        x = mix((1.0, kept), *self._terms(part, path, t, s, nodes[: self.p]))
        return x, Memory(nodes, Taken(t, kept, part, float(lam_s), x))
