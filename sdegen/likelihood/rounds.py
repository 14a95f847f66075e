"""Rounds of draws until a standard error is what is wanted, for likelihoods by the ODE.

Draws are independent repetitions for every datum. Where z_0 is drawn, their spread says how noisy their mean is. Where
nothing but the probes of a trace is random, the trace knows its noise after a single solve, and more probes in another
one are cheaper than more solves: rounds may then have different numbers of probes, and count accordingly.

Sampling ends where the standard error is what is wanted and can be believed: with 32 degrees of freedom. Two probes
that stay tell one for each datum, and of one or two data they may agree by chance: an error of zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sdegen.likelihood.log_density import LogDensity, Route
from sdegen.likelihood.scoring import FREEDOM, enough
from sdegen.likelihood.trace import Hutchinson, Trace

__all__ = ["Progress", "Round", "Tally"]


@dataclass(frozen=True)
class Round:
    """What is done next: so many further draws for each datum, with so many probes."""

    draws: int
    trace: Trace


@dataclass
class Progress:
    tell: Callable[[int, int], None] | None
    n: int
    total: int = 0
    so_far: int = 0

    def add(self, n: int) -> None:
        self.total += n

    def done(self, n: int) -> None:
        self.so_far += n
        if self.tell is not None:
            self.tell(self.so_far, self.total)


@dataclass
class Tally:
    """Draws, added up.

    Args:
        drawn: whether z_0 is.
        trace: of the first round.
        fixed_steps: of the solver, which decides what the trace knows of its noise.
    """

    drawn: bool
    trace: Trace
    fixed_steps: bool
    rounds: list[Round] = field(default_factory=list)
    draws: list[Tensor] = field(default_factory=list)  # -log p of every draw of a round, (N, draws)
    within: list[Tensor] = field(default_factory=list)  # variance of one draw by the trace's noise, (N,)
    sums: dict[str, float] = field(default_factory=dict)
    forward: float = 0.0
    vjp: float = 0.0
    cost: float = 0.0  # network calls of one draw of one datum
    note: str = ""

    @property
    def taken(self) -> int:
        """Draws of each datum so far."""
        return sum(r.draws for r in self.rounds)

    @property
    def _weights(self) -> list[float]:
        """How much each round counts."""
        effort = [float(r.draws * (r.trace.vjps(1) if self.by_trace else 1)) for r in self.rounds]
        return [e / sum(effort) for e in effort]

    @property
    def by_trace(self) -> bool:
        """Whether the trace says how large the noise is."""
        return not self.drawn and all(bool(w.isfinite().all()) for w in self.within)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the noise that the traces of all solves told."""
        each = (r.draws * r.trace.freedom(self.cost, fixed_steps=self.fixed_steps) for r in self.rounds)
        return len(self.values) * sum(each)

    @property
    def values(self) -> Tensor:
        """-log p, (N,)."""
        return sum((w * d.mean(1) for w, d in zip(self._weights, self.draws, strict=True)), torch.zeros(())).double()

    @property
    def variances(self) -> Tensor:
        """Of the values, (N,); NaN where a single draw does not say."""
        if self.by_trace:
            each = zip(self._weights, self.within, self.rounds, strict=True)
            return sum((w**2 * v / r.draws for w, v, r in each), torch.zeros(())).double()
        return torch.cat(self.draws, 1).var(1) / self.taken if self.taken > 1 else self.values * math.nan

    @property
    def trace_variance(self) -> Tensor:
        """Of a single draw, by the trace's noise, mean over the data."""
        return torch.stack(self.within).mean()

    @property
    def parts(self) -> dict[str, float]:
        return dict(self.sums)

    def spend(self, found: Sequence[LogDensity], n: int) -> None:
        """Count network calls, per datum of n."""
        self.forward += sum(one.forward * len(one.log_prob) for one in found) / n
        self.vjp += sum(one.vjp * len(one.log_prob) for one in found) / n

    def add(self, plan: Round, found: Sequence[LogDensity]) -> None:
        before, n = self.forward, sum(len(one.log_prob) for one in found)
        self.spend(found, n)
        self.cost = (self.forward - before) / plan.draws
        self.rounds.append(plan)
        self.draws.append(-torch.cat([one.draws.cpu() for one in found]))
        self.within.append(torch.cat([one.trace_variance.cpu() for one in found]))
        share = self._weights[-1]
        self.sums = {name: (1 - share) * value for name, value in self.sums.items()}
        for one in found:
            terms = {"minus log prior": -one.log_prior, "minus log det": -one.log_det, **one.parts}
            for name, term in terms.items():
                self.sums[name] = self.sums.get(name, 0.0) + share * float(term.sum()) / n

    def first(self, draws: int, target: float | None, budget: int | None, known: bool, route: Route, n: int) -> Round:
        """The first round."""
        if budget is None or known:
            return Round(draws, self.trace)
        cost = self.cost or route.nfe or 0
        fit = draws if cost == 0 else int((budget - self.forward) / cost)
        if fit < 1:
            raise ValueError(
                f"one solve takes {cost:.0f} network calls per datum, and {self.forward:.0f} went into the measure of "
                f"its error: max_nfe={budget} is not enough; ask for fewer steps or a larger tol, or check=0"
            )
        return Round(min(draws, fit) if target is not None else fit, self.trace)

    def next(self, target: float | None, budget: int | None) -> Round | None:
        """What is needed to meet the target; None when it is met, or out of reach."""
        if target is None or (self.trace.exact and not self.drawn):
            return None
        n, taken = len(self.values), self.taken
        fit = None if budget is None else int((budget - self.forward) / max(self.cost, 1e-9))
        ratio = float(self.variances.sum().sqrt()) / n / target
        if self.by_trace and isinstance(self.trace, Hutchinson):
            plan = self._probes(ratio, n)
        else:
            wanted = enough(taken, ratio, n, None) - taken
            plan = None if wanted < 1 else Round(wanted if fit is None else min(wanted, fit), self.trace)
        if plan is not None and fit is not None and fit < 1:
            self.note = f"the target of {target:.3g} nats is not reached with max_nfe={budget}"
            return None
        return plan

    def _probes(self, ratio: float, n: int) -> Round | None:
        """One further solve with as many probes as are missing in the error, and in what is known of it."""
        assert isinstance(self.trace, Hutchinson)
        effort, lacking = sum(r.draws * r.trace.vjps(1) for r in self.rounds), FREEDOM - self.freedom
        if ratio <= 1 and lacking <= 0:
            return None
        probes = min(max(math.ceil(effort * (ratio**2 - 1)), 2), 64 * self.trace.probes)
        more = replace(self.trace, probes=probes)
        while n * more.freedom(self.cost, fixed_steps=self.fixed_steps) < lacking:
            more = replace(more, probes=more.probes + 1)
        return Round(1, more)
