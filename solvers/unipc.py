"""UniPC: a predictor, and a corrector that costs nothing.

A multistep *predictor* extends the polynomial through the predictions at lam_t, lam_previous, ... to lam_s. Once the
state at s has been predicted from, in the next step, the value there is known, and the step from t to s can be taken
again with the polynomial that goes through it too: the *corrector*, of one order more. The prediction itself is not
repeated at the corrected state, so N steps cost N evaluations.

In the notation of :mod:`solvers.exponential`, with r_m the nodes in units of the step, r = 0 its start and r = 1 its
end, the paper writes both as

    x_s = kept x_t + new [ m_0 P_0 + B(h) SUM_m a_m (P_m - P_0) / r_m ],      SUM_m a_m r_m^(k-1) = m_k / B(h),

and asks of B only that B(h) = O(h). Where the a_m solve the equations, B cancels: UniP and UniC are the exponential
Adams-Bashforth and Adams-Moulton methods. It does not cancel where there is but one difference, for there the paper
takes a_1 = 1/2 in place of m_1 / B(h), in both the predictor of order 2 and the corrector of order 1:

    "bh1"  B(h) = h              m_1 := h / 2
    "bh2"  B(h) = m_0            m_1 := m_0 / 2          (m_0 = e^h - 1 for eps, 1 - e^-h for x0)
    "vary" the coefficients of the derivatives themselves, m_1 and all others exact

so UniP-2 with bh2 is DPM-Solver++(2M). (The authors' code for "vary" takes the corrector's last coefficients with a
loop index that was left over and is of order 1 from p = 2 on; the method itself is as good as the other two.)

Reference: Zhao, Bai, Rao, Zhou and Lu 2023, arXiv:2302.04867.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.exponential import FORMS, ExponentialMultistep, History, Memory, Node, Row, check, filed, row_of, windows
from solvers.integrate import Solver
from solvers.names import find
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, Path, Predict, Prediction, mix

__all__ = ["VARIANTS", "UniC", "UniP", "UniPC"]

VARIANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bh1": lambda h, m: h / 2,
    "bh2": lambda h, m: m[..., 0] / 2,
    "vary": lambda h, m: m[..., 1],
}
"""What stands for the first moment m_1 of a formula with a single difference, given h and the exact moments."""

_PAPER = "Zhao et al. 2023, arXiv:2302.04867"


@dataclass(frozen=True)
class UniP(ExponentialMultistep):
    """UniP-p, the predictor alone.

    x_s = kept x_t + new [ m_0 P_t + B(h) SUM_{j=1}^{p-1} a_j (P_j - P_t) / r_j ],        r_j = (lam_j - lam_t) / h.

    Order p, 1 evaluation per step, noise none. Start: orders 1, 2, ..., p.

    Args:
        p: order, >= 1.
        form: "x0" or "eps", what is extrapolated.
        variant: "bh1", "bh2" or "vary".

    Reference: Zhao et al. 2023, arXiv:2302.04867, section 3, UniP-p.
    """

    p: int = 3
    form: str = "x0"
    variant: str = "bh2"

    reference = _PAPER

    def __post_init__(self) -> None:
        check(self.p, self.form)
        find(self.variant, VARIANTS, "variant of UniPC")
        self.declare(order=self.p, memory=self.p)

    def moments(self, h: Tensor, count: int) -> Tensor:
        m = super().moments(h, count)
        return torch.stack([m[..., 0], VARIANTS[self.variant](h, m)], -1) if count == 2 else m


@dataclass(frozen=True)
class UniPC(UniP):
    """UniPC-p: UniP-p, corrected by UniC-p when the next prediction is there.

    corrected   x_t <- kept x_r + new INT_r^t (polynomial through P_t, P_r, ... : p + 1 nodes),
    predicted   x_s  = kept x_t + new INT_t^s (polynomial through P_t, P_r, ... : p nodes).

    Order p + 1, 1 evaluation per step, noise none. Start: predictors of orders 1, 2, ..., p, each corrected, which
    leaves order 3 formally: p = 2 needs no other start. The last step is predicted and not corrected.

    Both lines are linear in the same predictions, and x_t as it was predicted is known, so one row does both: what the
    corrector changes is ``new (w - v) P``, with w its weights and v the predictor's, and it is carried on by ``kept``.

    Reference: Zhao et al. 2023, arXiv:2302.04867, section 3, UniC-p and UniP-p.
    """

    start_order = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.declare(order=self.p + 1, memory=self.p + 1)

    def weights(self, path: Path, lam: Tensor, lam_s: Tensor) -> Tensor:
        q, lam_t = lam.shape[-1], lam[..., 0]
        predicted = _padded(self.integral(lam[..., : self.p], lam_t, lam_s), q)
        if q == 1:
            return predicted
        lam_r = lam[..., 1]
        corrector = self.integral(lam, lam_r, lam_t)
        predictor = self.integral(lam[..., 1:], lam_r, lam_t)
        change = corrector - torch.cat([torch.zeros_like(predictor[..., :1]), predictor], -1)
        # kept new_t / new_s = exp(sign h) in either form
        return predicted + (FORMS[self.form].sign * (lam_s - lam_t)).exp()[..., None] * change

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: Memory, noise: Noise
    ) -> tuple[Tensor, Memory]:
        if state.nodes and state.target != 0.5 * problem.path.logsnr(t).item():
            # Another method brought x here: nothing of ours to correct.
            uncorrected = UniP(self.p, self.form, self.variant)
            moved, memory = uncorrected.step(problem, x, t, s, state._replace(planned=_nothing), noise)
            return moved, memory._replace(planned=state.planned)
        return super().step(problem, x, t, s, state, noise)


def _padded(weights: Tensor, count: int) -> Tensor:
    """Zeros for the nodes that are not used."""
    return torch.nn.functional.pad(weights, (0, count - weights.shape[-1]))


def _nothing(key: tuple[float, ...]) -> None:
    return None


class Corrected(NamedTuple):
    """What :class:`UniC` hands from step to step.

    Attributes:
        inner: the predictor's memory.
        nodes: predictions so far, the newest first.
        planned: the corrector's rows on the grid, by (lam_t, lam_r, ...); None for one that was not foreseen.
        last: the last step of the predictor: corrected state and time where it began, lam and state where it arrived.
    """

    inner: Any
    nodes: History
    planned: Callable[[tuple[float, ...]], Row | None]
    last: tuple[Tensor, Tensor, float, Tensor] | None


@dataclass(frozen=True)
class UniC(Solver[Corrected]):
    """UniC-p, a corrector for any deterministic predictor.

    x_t <- kept x_r + new INT_r^t (polynomial through P_t and p earlier predictions),

    where x_t is what the predictor made of the corrected x_r. The prediction P_t, made at the uncorrected x_t, is used
    for both the correction and the predictor's next step, so nothing is evaluated that the predictor would not
    evaluate; the other half of the pair is renewed, so that z = alpha x0 + sigma eps holds of the corrected state.

    Order min(predictor's, p) + 1 (its order without its own corrector, where it has one), as many evaluations as the
    predictor, noise none. Start: correctors of orders 1, 2, ..., p. The last step is not corrected.
    ``UniC(UniP(p), p)`` is ``UniPC(p)``.

    Args:
        predictor: any method with fixed steps and without noise; every such method here looks at (x, t) first.
        p: how many earlier predictions the corrector uses, 1 to 8.
        form: "x0" or "eps".
        variant: "bh1", "bh2" or "vary", which differ in the corrector of order 1.

    Reference: Zhao et al. 2023, arXiv:2302.04867, section 3, UniC-p.
    """

    predictor: Solver[Any]
    p: int = 2
    form: str = "x0"
    variant: str = "bh2"

    start_order = 3
    grid = "sqrt_flow"

    def __post_init__(self) -> None:
        if self.predictor.stochastic or self.predictor.nfe_per_step == 0:
            raise ValueError(f"UniC corrects methods with fixed steps and without noise, not {self.predictor}")
        # What corrects itself predicts with one order less, and that is where the corrector's prediction is made.
        alone = self.predictor.order - isinstance(self.predictor, (UniC, UniPC))
        self.declare(
            order=min(alone, self._rule.p) + 1,
            nfe_per_step=self.predictor.nfe_per_step,
            invariant=self.predictor.invariant,
            reference=_PAPER,
            grid=self.predictor.grid,
        )

    @property
    def _rule(self) -> UniP:
        return UniP(self.p, self.form, self.variant)

    def _weights(self, lam: Tensor) -> Tensor:
        """Of the step that ended at lam[..., 0], through the predictions there and before, (..., q + 1)."""
        return self._rule.integral(lam, lam[..., 1], lam[..., 0])

    def init(self, problem: DiffusionProblem, x: Tensor, ts: Tensor) -> Corrected:
        kept, new = FORMS[self.form].factors(problem.path, ts[:-1], ts[1:])
        planned: dict[tuple[float, ...], Row] = {}
        for first, last, nodes in windows(problem.path.logsnr(ts[:-1]) / 2, self.p + 1, least=2):
            to = slice(first - 1, last - 1)  # the steps that end where there are so many predictions
            planned |= filed(nodes, row_of(kept[to], new[to], self._weights(nodes)))
        return Corrected(self.predictor.init(problem, x, ts), (), planned.get, None)

    def observe(self, state: Corrected, lam: Tensor, prediction: Prediction) -> Corrected:
        nodes = (Node(lam, *prediction), *state.nodes)[: self.p + 1]
        return state._replace(inner=self.predictor.observe(state.inner, lam, prediction), nodes=nodes)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: Corrected, noise: Noise
    ) -> tuple[Tensor, Corrected]:
        path, now = problem.path, problem.predict(x, t)
        nodes = (Node(0.5 * path.logsnr(t), *now), *state.nodes)[: self.p + 1]
        key = tuple(node.lam.item() for node in nodes)
        if state.last is not None and state.last[2] == key[0]:
            before, r, _, arrived = state.last
            row = state.planned(key)
            if row is None:
                weights = self._weights(torch.stack([node.lam for node in nodes]))
                kept, new = FORMS[self.form].factors(path, r, t)
                row = row_of(kept, new, weights)
            terms = zip(row, [before, *(getattr(node, self.form) for node in nodes)], strict=True)
            # Who has moved the state since, by a step of Langevin's for example, has moved the corrected one too.
            x = mix(*terms) if x is arrived else mix(*terms, (1.0, x), (-1.0, arrived))
            now = FORMS[self.form].tied(now, x, path.alpha(t), path.sigma(t))
        moved, inner = self.predictor.step(problem.calling(_answering(now)), x, t, s, state.inner, noise)
        return moved, Corrected(inner, nodes, state.planned, (x, t, 0.5 * path.logsnr(s).item(), moved))

    def nfe(self, steps: int) -> int:
        return self.predictor.nfe(steps)


def _answering(first: Prediction) -> Callable[[Predict], Predict]:
    """``predict`` with the first answer known."""

    def wrap(predict: Predict) -> Predict:
        known = [first]

        def call(x: Tensor, t: Tensor) -> Prediction:
            return known.pop() if known else predict(x, t)

        return call

    return wrap
