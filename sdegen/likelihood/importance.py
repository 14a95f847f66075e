"""The importance-weighted bound of a VAE, and how far it can be trusted.

With K latents z_k ~ q(z | x) and weights w_k = p(x | z_k) p(z_k) / q(z_k | x),

    -log p(x)  <=  E [ -log 1/K SUM_k w_k ],

the ordinary bound for K = 1, and tighter with every further latent. What is missing is about Var(w) / (2 K E[w]^2), if
that variance is finite; where q has lighter tails than the posterior it is not, a few weights decide, and neither the
gap nor any error bar computed from the weights means much. Three numbers tell:

* the **effective sample size** (SUM w)^2 / SUM w^2: how many latents of equal weight would say as much;
* **Pareto k**: the largest weights are fitted by a generalized Pareto distribution, whose shape k says how many moments
  the weights have, 1/k. Above 0.7 no number of latents that one can afford is enough, and the report says so;
* the **jackknife**: leaving out each latent in turn estimates how the bound depends on K, and so what is missing, K
  (L_K - mean L_{K-1}) with L the bound; taking it off gives an estimate that is no bound and has a smaller bias,
  O(1/K^2). The spread of the L_{K-1} gives the standard error of a single datum.

References: Burda et al. 2016, arXiv:1509.00519; Nowozin 2018, "Debiasing evidence approximations: on
importance-weighted autoencoders and jackknife variational inference"; Vehtari et al. 2024, arXiv:1507.02646 (Pareto k);
Zhang and Stephens 2009, doi:10.1198/tech.2009.08017 (the fit).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdegen.likelihood.dequantize import Dequantizer
from sdegen.likelihood.report import LikelihoodReport
from sdegen.likelihood.scoring import (
    chunks,
    describe,
    discreteness,
    enough,
    errors,
    evaluating,
    finite,
    numbered,
    offset,
    positive,
    rows,
    spreadable,
)
from sdegen.models.base import ModelPrior
from sdegen.models.vae import VAE
from solvers import standard_normal
from solvers.noise import ENCODER

__all__ = ["HEAVY", "Jackknife", "effective_sample_size", "importance", "jackknife", "pareto_k"]

HEAVY = 0.7
"""Pareto k above which importance weights are not to be trusted."""
BLOCK = 16  # latents whose noise is drawn together


# --- what weights say -------------------------------------------------------------------------------------------------


def effective_sample_size(log_w: Tensor) -> Tensor:
    """(SUM w)^2 / SUM w^2 of log-weights (B, K), (B,), between 1 and K.

    >>> effective_sample_size(torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -99.0, -99.0, -99.0]]))
    tensor([4., 1.])
    """
    return (2 * log_w.logsumexp(1) - (2 * log_w).logsumexp(1)).exp()


@dataclass(frozen=True)
class Jackknife:
    """The importance-weighted bound with one latent left out at a time.

    Attributes:
        value: the debiased estimate of -log p, (B,).
        error: its standard error, (B,).
    """

    value: Tensor
    error: Tensor


def jackknife(log_w: Tensor) -> Jackknife:
    """Debiased -log mean w, K L_K - (K - 1) mean_i L_{K-1}^(-i), from log-weights (B, K) with K >= 2.

    Reference: Nowozin 2018, eq. 12 with m = 1; Efron and Stein 1981, doi:10.1214/aos/1176345462 (the error).
    """
    K = log_w.shape[1]
    total = log_w.logsumexp(1)
    share = (log_w - total[:, None]).exp().clamp(max=1 - 1e-15)
    change = math.log(K) - math.log(K - 1) + torch.log1p(-share)  # of the log-mean without latent i
    bound = math.log(K) - total
    error = ((K - 1) / K * (change - change.mean(1, keepdim=True)).square().sum(1)).sqrt()
    return Jackknife(bound + (K - 1) * change.mean(1), error)


def pareto_k(log_w: Tensor) -> Tensor:
    """Shape k of a generalized Pareto distribution fitted to the largest of the weights, (B,), from log-weights (B, K).

    The largest min(K / 5, 3 sqrt K) weights are fitted by what they exceed the next one by; with fewer than five of
    them k is NaN, and where the exceedances do not differ, as all weights are equal, it is minus infinity.

    The likelihood of exceedances y depends on theta = -k / scale through k(theta) = mean log(1 - theta y), and the
    estimate is the mean of theta under the likelihood of a grid of values that the data suggest, with a prior worth
    ten exceedances that k is 1/2.

    Reference: Zhang and Stephens 2009, doi:10.1198/tech.2009.08017; Vehtari et al. 2024, arXiv:1507.02646, appendix C.
    """
    K = log_w.shape[1]
    n = min(K // 5, math.ceil(3 * math.sqrt(K)))
    if n < 5:
        return log_w.new_full((len(log_w),), math.nan)
    top = log_w.topk(n + 1, dim=1).values.flip(1).double()  # rising
    w = (top - top[:, -1:]).exp()
    y = w[:, 1:] - w[:, :1]
    largest, quarter = y[:, -1:], y[:, math.floor(n / 4 + 0.5) - 1, None]
    j = torch.arange(1, 31 + math.floor(math.sqrt(n)), dtype=torch.float64, device=y.device)
    theta = 1 / largest + (1 - (len(j) / (j - 0.5)).sqrt()) / (3 * quarter)

    def shape(theta: Tensor) -> Tensor:
        return torch.log1p(-theta[..., None] * y[:, None]).mean(-1)

    k = shape(theta)
    log_likelihood = n * ((-theta / k).log() - k - 1)
    mean = (log_likelihood.softmax(1) * theta).sum(1, keepdim=True)
    found = (n * shape(mean)[:, 0] + 10 * 0.5) / (n + 10)
    return torch.where(largest[:, 0] > 1e-12, found, -math.inf).to(log_w.dtype)


# --- a report ---------------------------------------------------------------------------------------------------------


def importance(
    model: VAE,
    data: Tensor,
    K: int,
    cond: Tensor | None = None,
    *,
    repeats: int = 2,
    dequantizer: Dequantizer | None = None,
    debias: bool = False,
    target_se: float | None = None,
    max_nfe: int | None = None,
    samples: Sequence[int] | None = None,
    batch: int | None = None,
    seed: int = 0,
    bin_width: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LikelihoodReport:
    """The importance-weighted bound of a VAE with K latents per datum.

    Args:
        model: a VAE with a normal prior.
        data: (N, *event), model units.
        K: latents per datum.
        cond: class labels (N,) or None.
        repeats: independent repeats; of a single one the jackknife says the estimator's error.
        dequantizer: spreads grey levels over their bins, for a density decoder: every latent then has its own draw, and
            the result is of probabilities.
        debias: the jackknife's estimate in place of the bound.
        target_se: go on until the estimator's standard error of the mean is at most this, nats.
        max_nfe: stop at so many network calls per datum; without a target they are all spent.
        samples: numbers of the data, which key their noise; ``range(N)`` by default.
        batch: network rows at a time; as many as fit into half a gigabyte by default.
        seed: of all noise.
        bin_width: width of the bins that ``data`` were dequantised over, to get bits from a density.
        progress: called as ``progress(done, N)`` after every batch; with a target both grow when repeats are added.

    Returns:
        A :class:`LikelihoodReport`; its settings say what the weights are worth.
    """
    began, before = time.perf_counter(), model.evaluations
    model.check(data)
    n, numbers = len(data), numbered(data, samples)
    positive(target_se)
    spreadable(model, dequantizer, bin_width)
    repeats = _checked(model, K, repeats, debias, max_nfe)
    tally, ready, total = _Tally(), 0, 0
    most = None if max_nfe is None else max_nfe // K
    plan = repeats if target_se is not None or most is None else most
    with evaluating(model):
        while (done := len(tally.bound)) < plan:
            total += (plan - done) * n
            found: list[_Weighed] = []
            for x, labels in chunks(model, data, cond, (batch or rows(model)) // min(K, BLOCK)):
                here = numbers[sum(one.bound.shape[1] for one in found) :][: len(x)]
                weights = [_log_weights(model, x, labels, K, here, r, seed, dequantizer) for r in range(done, plan)]
                found.append(_Weighed.of([finite(log_w, here) for log_w in weights]))
                ready += (plan - done) * len(x)
                if progress is not None:
                    progress(ready // repeats, total // repeats)
            tally.add(found)
            if target_se is not None:
                plan = enough(plan, tally.summary(debias)[1] / target_se, n, most)
    values, se, spread = tally.summary(debias)
    notes = [tally.warning]
    if target_se is not None and se > target_se:
        notes.append(f"the target of {target_se:.3g} nats is not reached with max_nfe={max_nfe}")
    discrete = model.discrete or dequantizer is not None
    return LikelihoodReport(
        method=f"importance-weighted {'estimate, debiased' if debias else 'bound'}, K = {K}",
        kind="estimate" if debias else "upper bound",
        of="probability" if discrete else "density",
        values=values,
        parts={"bound, K = 1": tally.single, "importance weighting": float(values.mean()) - tally.single},
        estimator_se=se,
        data_se=spread,
        solver_error=None,
        dims=model.dims,
        bits_offset=0.0 if discrete else offset(model, bin_width),
        forward=(model.evaluations - before) / n,
        vjp=0,
        jvp=0,
        seconds=time.perf_counter() - began,
        logsnr=None,
        **discreteness(model, bin_width, dequantizer),
        solver=None,
        tolerance=None,
        seed=seed,
        settings={**describe(model), "K": K, "repeats": len(tally.bound), **tally.facts},
        note="; ".join(filter(None, notes)),
    )


def _checked(model: VAE, K: int, repeats: int, debias: bool, max_nfe: int | None) -> int:
    """The number of repeats, once everything is as it must be."""
    if K < 1 or repeats < 1:
        raise ValueError(f"K and repeats are at least 1, not {K} and {repeats}")
    if debias and K < 2:
        raise ValueError("the jackknife leaves out one latent of several: K is at least 2")
    if isinstance(model.prior, ModelPrior):
        raise ValueError(
            "importance weights need log p(z), which of a model prior is known by a bound only: use the bound"
        )
    if max_nfe is not None and max_nfe < K:
        raise ValueError(f"K = {K} latents take {K} network calls per datum: max_nfe={max_nfe} is not enough")
    return repeats if max_nfe is None else max(1, min(repeats, max_nfe // K))


def _log_weights(
    model: VAE, x: Tensor, cond: Tensor | None, K: int, numbers: Sequence[int], repeat: int, seed: int,
    dequantizer: Dequantizer | None,
) -> Tensor:  # fmt: skip
    """log p(x, z_k) / q(z_k | x), (B, K), a block of latents at a time."""
    keys = [(repeat << 32) + n for n in numbers]
    width = model.latent + (0 if dequantizer is None else model.dims)
    found: list[Tensor] = []
    for number in range(-(-K // BLOCK)):
        shape = (len(x), BLOCK, width)
        noise = standard_normal(shape, seed, samples=keys, stream=ENCODER, number=number, dtype=x.dtype)
        noise = noise[:, : K - number * BLOCK].to(x.device)
        if dequantizer is None:
            found.append(model.log_weights(x, noise, cond))
            continue
        each = noise.shape[1]
        rows = x.repeat_interleave(each, 0)
        labels = None if cond is None else cond.repeat_interleave(each, 0)
        y, log_q = dequantizer.draw(rows, noise[:, :, model.latent :].reshape(rows.shape))
        log_w = model.log_weights(y, noise[:, :, : model.latent].flatten(0, 1)[:, None], labels)
        found.append((log_w[:, 0] - log_q).reshape(len(x), each))
    return torch.cat(found, 1)


@dataclass(frozen=True)
class _Weighed:
    """What the weights of some data say, (R, B) each."""

    bound: Tensor
    single: Tensor
    debiased: Tensor
    error: Tensor
    ess: Tensor
    tail: Tensor

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> _Weighed:
        """From the log-weights (B, K) of every repeat."""
        rows: list[tuple[Tensor, ...]] = []
        for log_w in weights:
            K = log_w.shape[1]
            bound = math.log(K) - log_w.logsumexp(1)
            left = jackknife(log_w) if K > 1 else Jackknife(bound, bound * math.nan)
            row = (bound, -log_w.mean(1), left.value, left.error, effective_sample_size(log_w), pareto_k(log_w))
            rows.append(tuple(part.cpu() for part in row))
        return cls(*(torch.stack(column) for column in zip(*rows, strict=True)))


@dataclass
class _Tally:
    """Repeats, added up; (R, N) each."""

    parts: list[_Weighed] = field(default_factory=list)

    def add(self, found: Sequence[_Weighed]) -> None:
        columns = ([getattr(one, name) for one in found] for name in _Weighed.__dataclass_fields__)
        self.parts.append(_Weighed(*(torch.cat(column, 1) for column in columns)))

    def _all(self, name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in self.parts])

    @property
    def bound(self) -> Tensor:
        return self._all("bound") if self.parts else torch.empty(0, 0)

    @property
    def single(self) -> float:
        return float(self._all("single").mean())

    def summary(self, debias: bool) -> tuple[Tensor, float, float]:
        """Values (N,), the estimator's and the data's standard error."""
        repeats = self._all("debiased" if debias else "bound")
        values, se, spread = errors(repeats)
        if len(repeats) == 1:
            se = float(self._all("error").square().sum().sqrt()) / len(values)
        return values, se, spread

    @property
    def facts(self) -> dict[str, Any]:
        """What the weights are worth."""
        ess, tail = self._all("ess"), self._all("tail")
        known = bool(tail.isfinite().any())
        return {
            "ess_mean": float(ess.mean()),
            "ess_min": float(ess.min()),
            "pareto_k_max": float(tail.max()) if known else None,
            "pareto_k_heavy": int((tail.amax(0) > HEAVY).sum()) if known else None,
            "jackknife": float(self._all("debiased").mean()),
            "jackknife_se": self.summary(debias=True)[1],
        }

    @property
    def warning(self) -> str:
        tail = self._all("tail").amax(0)
        heavy = int((tail > HEAVY).sum())
        if not heavy:
            return ""
        return (
            f"Pareto k is above {HEAVY} for {heavy} of {len(tail)} data (largest {float(tail.max()):.2f}): a few "
            "latents decide, and the bound is loose by an amount that these weights do not tell"
        )
