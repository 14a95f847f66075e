"""The variational bound of a data set, with as little noise as a network call can buy.

    bound(model, data.test)                            16 noise levels for each datum, twice
    bound(model, data.test, target_se=0.05)            in rounds, until the standard error is 0.05 nats
    bound(model, data.test, max_nfe=100)               as good as 100 network calls per datum make it
    bound(model, data.test, control=None)              stratified noise levels and nothing else

The estimate is the bound's for every choice below: they change its noise and never its mean.

* **Stratified levels.** The draws of a datum share the noise levels out evenly, one in each of K strata.
* **A control variate** (:mod:`sdegen.likelihood.variate`). With the same noise, the squared error of denoisers that
  need no network is subtracted, and its mean, which is known in closed form and integrated exactly, is added. How much
  of it, and how densely levels are drawn, is learned from a few pilot calls with noise of their own.
* **What is known is not drawn.** The prior term of a diffusion is a closed form, the reconstruction of a softmax or
  Gaussian decoder an integral. A decoder that asks the network gets as many draws as it deserves.

**The standard error.** The rounds repeat the K strata with independent noise, so that the variance of every stratum of
every datum is estimated without bias from two rounds or more, and their sum is the variance of the mean. With N data
and R rounds that is N K (R - 1) degrees of freedom if all strata matter alike, and two rounds suffice for a dozen data.
Of very few data in very few dimensions the error is skewed, and is largest where it is underestimated: the z-score of a
single number has a standard deviation of about 1.4 with two rounds of 16 levels and of 1.1 with four of 32; of four
numbers with the former 1.2, of sixteen 1.0. Further rounds of few levels help little, more levels do.

**Rounds.** With a target, the first rounds say how many are needed; these follow, and are checked again. Where to stop
is read off the same draws that are averaged: the bias of that is a small part of the error, and a target is not trusted
before there are 32 degrees of freedom.

**Noise is keyed**: the numbers of a draw are a function of (seed, number of the datum, number of the round). A value
does not depend on the batch, nor on the data beside it other than by the control variate, which is learned from all
that are given; hand in a finished :func:`sdegen.likelihood.pilot`, and shards of a data set give what the whole gives.

References: Kingma et al. 2021, arXiv:2107.00630 (the bound in continuous time); Owen 2013, Monte Carlo theory, methods
and examples, chapters 8 and 10 (control variates, stratification).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from sdegen.densities import UniformLogSNR
from sdegen.likelihood.control import Control
from sdegen.likelihood.keyed import Keyed, strata
from sdegen.likelihood.report import LikelihoodReport
from sdegen.likelihood.scoring import (
    beyond,
    chunks,
    describe,
    discreteness,
    enough,
    evaluating,
    finite,
    numbered,
    offset,
    positive,
    rows,
)
from sdegen.likelihood.variate import ControlVariate, variate_for
from sdegen.models.base import Elbo, LatentVariableModel
from sdegen.models.diffusion import GaussianDiffusion
from sdegen.objectives import Bound
from solvers.noise import BOUND

__all__ = ["bound", "ends"]

LOOKS = 1 / 8  # draws of z_0 for each noise level, where nobody has measured what they are worth

Terms = list[dict[str, Tensor]]
"""Terms of the bound of n data, each (n, columns), a column for each stratum. Terms in one dictionary were drawn
together and are added before their variance is taken; those of different dictionaries are independent."""
Draw = Callable[[Tensor, Tensor | None, Sequence[int], int], Terms]
"""``(x, cond, numbers, round) -> Terms`` of one round."""


def bound(
    model: LatentVariableModel,
    data: Tensor,
    cond: Tensor | None = None,
    *,
    draws: int = 16,
    repeats: int = 2,
    target_se: float | None = None,
    max_nfe: int | None = None,
    control: str | Control | ControlVariate | None = "auto",
    samples: Sequence[int] | None = None,
    batch: int | None = None,
    seed: int = 0,
    bin_width: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LikelihoodReport:
    """The variational bound of a data set; see :mod:`sdegen.likelihood.bound` for how.

    Args:
        model: any model with a bound.
        data: (N, *event), model units.
        cond: class labels (N,) or None.
        draws: noise levels (latents) of a datum in each round.
        repeats: rounds, at least 2 to know the estimator's error; the first ones, where there is a target.
        target_se: go on until the estimator's standard error of the mean is at most this, nats (as
            ``report.estimator_se``; D log 2 times as many as bits/dim).
        max_nfe: stop at so many network calls per datum, the pilot's included; without a target they are all spent.
        control: of a diffusion: "auto" for what suits the model, with mean, covariance and histogram of ``data``; one
            control, such as ``LinearGaussian.fit(train)``; a finished :func:`sdegen.likelihood.pilot`, whose calls are
            not counted again; None for stratified levels alone. All are unbiased: none of them knows the noise.
        samples: numbers of the data, which key their noise; ``range(N)`` by default.
        batch: network rows at a time; as many as fit into half a gigabyte by default.
        seed: of all noise.
        bin_width: width of the bins that ``data`` were dequantised over, to get bits from a density.
        progress: called as ``progress(done, N)`` after every batch; with a target both grow when rounds are added.

    Returns:
        A :class:`LikelihoodReport`; its settings say how many rounds there were, and its note whether a target was
        missed.
    """
    began, before = time.perf_counter(), model.evaluations
    model.check(data)
    bits = offset(model, bin_width)
    numbers = numbered(data, samples)
    positive(target_se)
    if draws < 1 or repeats < 1:
        raise ValueError(f"draws and repeats are at least 1, not {draws} and {repeats}")
    if model.exact:
        draws, repeats, target_se, max_nfe = 1, 1, None, None
    if target_se is not None:
        repeats = max(repeats, 2)
    least = repeats * (1 + _asks(model))
    if max_nfe is not None and max_nfe < least:
        raise ValueError(f"{repeats} rounds take at least {least} network calls per datum, not max_nfe={max_nfe}")

    with evaluating(model):
        planned = draws * repeats if max_nfe is None else min(draws * repeats, max_nfe - least)
        variate = variate_for(control, model, data, cond, planned, seed, batch)
        spent = (model.evaluations - before) / len(data)
        draws, looks, most = _effort(model, variate, draws, repeats, None if max_nfe is None else max_nfe - spent)
        if isinstance(model, GaussianDiffusion):
            draw = _levels(model, variate, draws, looks, seed)
        else:
            draw = _latents(model, draws, seed)

        tally, done, ready = _Tally(len(data)), 0, 0
        plan = repeats if most is None or target_se is not None else most
        while done < plan:
            start = 0
            for x, labels in chunks(model, data, cond, (batch or rows(model)) // draws):
                here = slice(start, start := start + len(x))
                for number in range(done, plan):
                    terms = draw(x, labels, numbers[here], number)
                    if not model.exact:  # a baseline may give no chance to what it has never seen
                        for term in chain(*(together.values() for together in terms)):
                            finite(term, numbers[here])
                    tally.add(here, terms)
                ready += (plan - done) * len(x)
                if progress is not None:
                    progress(ready // repeats, plan * len(data) // repeats)
            done = plan
            if target_se is not None:
                plan = enough(done, tally.error / target_se, len(data) * draws, most)

    reached = target_se is None or tally.error <= target_se
    spread = tally.values.var() if len(data) > 1 else torch.tensor(math.nan)
    effort = {"target_se": target_se, "max_nfe": max_nfe} if target_se or max_nfe else {}
    return LikelihoodReport(
        method="code length" if model.exact else "variational bound",
        kind="exact" if model.exact else "upper bound",
        of="probability" if model.discrete else "density",
        values=tally.values,
        parts=tally.parts,
        estimator_se=0.0 if model.exact else tally.error,
        data_se=beyond(spread, tally.variances.mean().nan_to_num(0.0), len(data)),
        solver_error=None,
        dims=model.dims,
        bits_offset=bits,
        forward=(model.evaluations - before) / len(data),
        vjp=0,
        jvp=0,
        seconds=time.perf_counter() - began,
        logsnr=getattr(model, "logsnr_ends", None),
        **discreteness(model, bin_width),
        solver=None,
        tolerance=None,
        seed=None if model.exact else seed,
        settings={**describe(model), "draws": draws, "repeats": done, "control": repr(variate), **effort},
        note="" if reached else f"standard error {tally.error:.3g} nats: the target {target_se:.3g} takes more calls",
    )


def _asks(model: LatentVariableModel) -> int:
    """Network calls of one look at z_0, beside those at the noise levels."""
    return model.decoder.calls if isinstance(model, GaussianDiffusion) and model.decoder.drawn else 0


def _effort(
    model: LatentVariableModel, variate: ControlVariate | None, draws: int, repeats: int, budget: float | None
) -> tuple[int, int, int | None]:
    """Noise levels and looks at z_0 of a datum in a round, and the most rounds that the budget of calls allows."""
    asks, worth = _asks(model), LOOKS if variate is None else variate.looks

    def looks(draws: int) -> int:
        return min(max(round(draws * worth), 1), draws) if asks else draws

    def cost(draws: int) -> int:
        return draws + looks(draws) * asks

    if budget is None:
        return draws, looks(draws), None
    rounds = max(repeats, math.ceil(budget / cost(draws)))
    draws = max((d for d in range(1, draws + 1) if rounds * cost(d) <= budget), default=1)
    return draws, looks(draws), rounds


def _levels(model: GaussianDiffusion, variate: ControlVariate | None, draws: int, looks: int, seed: int) -> Draw:
    """Rounds of a diffusion: its three terms have draws of their own, or none."""
    path, levels = model.path, model.levels
    density = UniformLogSNR() if variate is None else variate.density
    constant = model.dims * levels.constant(path)
    known = None if variate is None else variate.integral(levels, path)

    def latent(x: Tensor, cond: Tensor | None, normal: Keyed) -> Tensor:
        n, at = len(x), x.repeat_interleave(draws, 0)
        labels = None if cond is None else cond.repeat_interleave(draws, 0)
        u, noise = strata(normal, at), normal(at)

        def error(t: Tensor) -> Tensor:
            f = model.error(at, t, noise, labels)
            if variate is None:
                return f
            logsnr, eps = path.logsnr(t).reshape(n, draws), noise.reshape(n, draws, *x.shape[1:])
            return f - variate(x[:, None], logsnr, eps).flatten()

        drawn = levels.integral(path, u, error, density, Bound()).reshape(n, draws) + constant
        return drawn if known is None else drawn + known(x)[:, None]

    def draw(x: Tensor, cond: Tensor | None, numbers: Sequence[int], number: int) -> Terms:
        reconstruction, prior = ends(model, x, cond, Keyed(seed, numbers, number, looks, BOUND + 2))
        between = latent(x, cond, Keyed(seed, numbers, number, draws))
        return [{"reconstruction": reconstruction}, {"latent": between}, {"prior": prior}]

    return draw


def ends(model: GaussianDiffusion, x: Tensor, cond: Tensor | None, normal: Keyed) -> tuple[Tensor, Tensor]:
    """Reconstruction, (n, looks) for as many draws of z_0 as ``normal`` makes, or (n, 1) where none is drawn; prior."""
    q = model.encode(x, cond)
    prior = model.prior.divergence(q.top, x, x.new_zeros(len(x)), normal)[:, None]  # a closed form
    if not model.decoder.drawn:
        return model.reconstruction(x, q.bottom, x, cond)[:, None], prior
    at, labels = x.repeat_interleave(normal.draws, 0), None if cond is None else cond.repeat_interleave(normal.draws, 0)
    looks = model.reconstruction(at, model.encode(at, labels).bottom, normal(at), labels)
    return looks.reshape(len(x), normal.draws), prior


def _latents(model: LatentVariableModel, draws: int, seed: int) -> Draw:
    """Rounds of any other model: all of the bound from one draw of the latents."""

    def draw(x: Tensor, cond: Tensor | None, numbers: Sequence[int], number: int) -> Terms:
        normal, at = Keyed(seed, numbers, number, draws), x.repeat_interleave(draws, 0)
        labels = None if cond is None else cond.repeat_interleave(draws, 0)
        terms = model.bound(at, labels, strata(normal, at), normal)
        return [{name: term.reshape(-1, draws) for name, term in zip(Elbo._fields, terms, strict=True)}]

    return draw


@dataclass
class _Strata:
    """Running mean and sum of squared deviations of every stratum of every datum, (N, columns) each (Welford)."""

    count: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def empty(cls, n: int, columns: int) -> _Strata:
        return cls(*(torch.zeros(n, width, dtype=torch.float64) for width in (1, columns, columns)))

    def add(self, here: slice, values: Tensor) -> None:
        self.count[here] += 1
        off = values - self.mean[here]
        self.mean[here] += off / self.count[here]
        self.square[here] += off * (values - self.mean[here])

    @property
    def variances(self) -> Tensor:
        """Of the mean over rounds and columns, (N,); NaN after a single round."""
        return (self.square / (self.count * (self.count - 1))).sum(1) / self.square.shape[1] ** 2


@dataclass
class _Tally:
    """Rounds, added up."""

    n: int
    independent: list[_Strata] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, here: slice, terms: Terms) -> None:
        drawn = [{name: term.double().cpu() for name, term in together.items()} for together in terms]
        self.independent = self.independent or [
            _Strata.empty(self.n, next(iter(together.values())).shape[1]) for together in drawn
        ]
        for those, together in zip(self.independent, drawn, strict=True):
            those.add(here, torch.stack(list(together.values())).sum(0))
            for name, term in together.items():
                self.sums[name] = self.sums.get(name, 0.0) + float(term.mean(1).sum())

    @property
    def values(self) -> Tensor:
        """(N,)."""
        return torch.stack([those.mean.mean(1) for those in self.independent]).sum(0)

    @property
    def variances(self) -> Tensor:
        """Of the values, (N,)."""
        return torch.stack([those.variances for those in self.independent]).sum(0)

    @property
    def error(self) -> float:
        """Standard error of the mean of the values."""
        return math.sqrt(float(self.variances.sum())) / self.n

    @property
    def parts(self) -> dict[str, float]:
        """Mean of each term."""
        every = float(self.independent[0].count.sum())
        return {name: value / every for name, value in self.sums.items()}
