"""A likelihood is a report, not a number.

:class:`LikelihoodReport` holds a value in nats and in bits per dimension together with all that is needed to believe
it: whether it is a bound or exact, its parts, two standard errors kept apart (the *estimator's*, which more draws
reduce, and the *data's*, which only more data reduce), the network calls spent, and every setting. Three functions make
one:

    bound(model, data)            the variational bound: VAE, DDPM(T), VP-SDE, baselines
    ode_likelihood(model, data)   the probability-flow ODE
    importance(model, data, K)    the importance-weighted bound of a VAE
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdegen.likelihood.ode import Trace, ode_log_prob, trace_for
from sdegen.models.base import Elbo, LatentVariableModel
from sdegen.models.diffusion import GaussianDiffusion
from sdegen.models.vae import VAE
from solvers import resolve

__all__ = ["LikelihoodReport", "bound", "importance", "ode_likelihood"]


@dataclass(frozen=True)
class LikelihoodReport:
    """How likely data are under a model, and how that is known.

    Attributes:
        method: what was computed.
        kind: "exact", "upper bound" (on the negative log-likelihood, in expectation) or "estimate" (an ODE's: the
            solver's error is in it, which the standard errors do not see; halve the tolerance to see it).
        of: "probability" (of grey levels) or "density" (per unit of x).
        values: negative log-likelihood of each datum, nats, (N,), float64.
        parts: mean of each term, nats per example.
        estimator_se: standard error of the mean that comes from random draws, nats; NaN where it is not known.
        data_se: standard error of the mean as an estimate for the population the data come from, nats; NaN where the
            estimator's noise hides it.
        dims: coordinates of one datum.
        bits_offset: -log2(bin width) for a density of dequantised data, 0 for a probability, None for a density whose
            bin width is not known: bits/dim have no meaning then.
        forward: network calls per example.
        products: Jacobian products per example.
        seconds: wall-clock time.
        logsnr: at the clean and the noisy end, None without a path.
        settings: everything else that made the number: levels, decoder, draws, solver, tolerance, seed.
    """

    method: str
    kind: str
    of: str
    values: Tensor = field(repr=False)
    parts: dict[str, float]
    estimator_se: float
    data_se: float
    dims: int
    bits_offset: float | None
    forward: float
    products: float
    seconds: float
    logsnr: tuple[float, float] | None
    settings: dict[str, Any]

    @property
    def nats(self) -> float:
        """Mean negative log-likelihood, nats per example."""
        return float(self.values.mean())

    @property
    def bits_per_dim(self) -> float:
        """Mean negative log-likelihood in bits per coordinate; NaN for a density without a bin width."""
        return self.in_bits(self.nats) + (math.nan if self.bits_offset is None else self.bits_offset)

    def in_bits(self, nats: float) -> float:
        """Nats per example as bits per coordinate, for parts and standard errors."""
        return nats / (self.dims * math.log(2))

    def to_dict(self) -> dict[str, Any]:
        """All but the values of single examples, as plain numbers, strings, lists and dictionaries."""
        return {
            "method": self.method,
            "kind": self.kind,
            "of": self.of,
            "nats": self.nats,
            "bits_per_dim": self.bits_per_dim,
            "parts": dict(self.parts),
            "estimator_se": self.estimator_se,
            "data_se": self.data_se,
            "estimator_se_bits": self.in_bits(self.estimator_se),
            "data_se_bits": self.in_bits(self.data_se),
            "examples": len(self.values),
            "dims": self.dims,
            "bits_offset": self.bits_offset,
            "forward": self.forward,
            "products": self.products,
            "seconds": self.seconds,
            "logsnr": None if self.logsnr is None else list(self.logsnr),
            "settings": dict(self.settings),
        }

    def __str__(self) -> str:
        sign = {"exact": "=", "upper bound": "<=", "estimate": "~"}[self.kind]
        what = "-log P(x)" if self.of == "probability" else "-log p(x)"

        def both(nats: float) -> str:
            return f"{nats:.4f} nats ({self.in_bits(nats):.4f} bits/dim)"

        lines = [
            f"{self.method}: {what} {sign} {self.nats:.4f} nats, {self.bits_per_dim:.4f} bits/dim",
            f"  standard error: estimator {both(self.estimator_se)}, data {both(self.data_se)}, "
            f"{len(self.values)} examples",
            "  parts (nats): " + ", ".join(f"{name} {value:.4f}" for name, value in self.parts.items()),
            f"  cost per example: {self.forward:g} network calls, {self.products:g} Jacobian products; "
            f"{self.seconds:.1f} s in all",
        ]
        if self.logsnr is not None:
            lines.append(f"  logsnr from {self.logsnr[0]:.3f} (data) to {self.logsnr[1]:.3f} (noise)")
        lines.append("  " + ", ".join(f"{name}={value}" for name, value in self.settings.items()))
        return "\n".join(lines)


@contextmanager
def _evaluating(model: LatentVariableModel) -> Iterator[None]:
    """Evaluation mode and no gradients, then back to what it was."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def _chunks(
    model: LatentVariableModel, x: Tensor, cond: Tensor | None, size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    model.check(x)
    if len(x) < 1:
        raise ValueError("there are no data to score")
    size = max(1, size)
    for i in range(0, len(x), size):
        part = x[i : i + size].to(model.device)
        part = part if part.dtype == torch.float64 else part.to(model.dtype)
        yield part, None if cond is None else cond[i : i + size].to(model.device)


def _rows(model: LatentVariableModel) -> int:
    """Rows whose largest tensor, one number for each level of each coordinate, has 2^24 numbers; at most 4096."""
    part = getattr(model, "decoder", None) if isinstance(model, GaussianDiffusion) else getattr(model, "head", None)
    bins = getattr(part, "bins", None)
    return max(1, min(4096, 2**24 // (model.dims * (1 if bins is None else bins.count))))


def _errors(repeats: Tensor) -> tuple[Tensor, float, float]:
    """Values (N,), the estimator's and the data's standard error of their mean, from independent repeats (R, N)."""
    r, n = repeats.shape
    values = repeats.mean(0)
    noise = repeats.var(0).sum() / r if r > 1 else torch.tensor(math.nan)  # sum of the values' variances
    spread = values.var() if n > 1 else torch.tensor(math.nan)
    within = noise / n if r > 1 else torch.tensor(0.0)
    return values, float(noise.sqrt()) / n, _beyond(spread, within, n)


def _beyond(spread: Tensor, within: Tensor, n: int) -> float:
    """Standard error of a mean of n from the values' variance beyond their own noise; NaN if that is all there is."""
    return float(((spread - within) / n).sqrt()) if spread > within else math.nan


def _offset(model: LatentVariableModel, bin_width: float | None) -> float | None:
    return None if not model.discrete and bin_width is None else model.bits_offset(bin_width)


def _describe(model: LatentVariableModel) -> dict[str, Any]:
    if isinstance(model, GaussianDiffusion):
        return {"path": repr(model.path), "levels": repr(model.levels), "decoder": repr(model.decoder)}
    return {"levels": repr(model.levels)} | ({"head": repr(model.head)} if isinstance(model, VAE) else {})


def bound(
    model: LatentVariableModel,
    data: Tensor,
    cond: Tensor | None = None,
    *,
    draws: int = 16,
    repeats: int = 2,
    batch: int | None = None,
    seed: int = 0,
    bin_width: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LikelihoodReport:
    """The variational bound of a data set.

    Every datum is scored ``repeats`` times, each with ``draws`` stratified noise levels; the spread of the repeats is
    the estimator's standard error, without assumptions.

    Args:
        model: any model with a bound.
        data: (N, *event), model units.
        cond: class labels (N,) or None.
        draws: noise levels (latents) in each repeat.
        repeats: independent repeats, at least 2 to know the estimator's error.
        batch: network rows at a time; as many as fit into half a gigabyte by default.
        seed: of all noise.
        bin_width: width of the bins that ``data`` were dequantised over, to get bits from a density.
        progress: called as ``progress(done, N)`` after every batch.

    Returns:
        A :class:`LikelihoodReport`.
    """
    began, before = time.perf_counter(), model.evaluations
    if draws < 1 or repeats < 1:
        raise ValueError(f"draws and repeats are at least 1, not {draws} and {repeats}")
    generator = torch.Generator().manual_seed(seed)
    totals: list[Tensor] = []
    parts: list[Tensor] = []
    done = 0
    with _evaluating(model):
        for x, labels in _chunks(model, data, cond, (batch or _rows(model)) // draws):
            terms = [model.elbo(x, labels, generator=generator, draws=draws) for _ in range(repeats)]
            totals.append(torch.stack([e.total for e in terms]).cpu())
            parts.append(torch.stack([torch.stack(tuple(e)).mean(1) * len(x) for e in terms]).mean(0).cpu())
            done += len(x)
            if progress is not None:
                progress(done, len(data))
    values, estimator, spread = _errors(torch.cat(totals, 1))
    return LikelihoodReport(
        method="code length" if model.exact else "variational bound",
        kind="exact" if model.exact else "upper bound",
        of="probability" if model.discrete else "density",
        values=values,
        parts=dict(zip(Elbo._fields, (torch.stack(parts).sum(0) / len(data)).tolist(), strict=True)),
        estimator_se=0.0 if model.exact else estimator,
        data_se=spread,
        dims=model.dims,
        bits_offset=_offset(model, bin_width),
        forward=(model.evaluations - before) / len(data),
        products=0,
        seconds=time.perf_counter() - began,
        logsnr=getattr(model, "logsnr_ends", None),
        settings={**_describe(model), "draws": draws, "repeats": repeats, "seed": seed, "bin_width": bin_width},
    )


def ode_likelihood(
    model: GaussianDiffusion,
    data: Tensor,
    cond: Tensor | None = None,
    *,
    trace: Trace | None = None,
    draws: int = 1,
    batch: int | None = None,
    seed: int = 0,
    bin_width: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> LikelihoodReport:
    """The likelihood of a data set by the probability-flow ODE; see :mod:`sdegen.likelihood.ode` for what it is.

    Args:
        model: a diffusion.
        data: (N, *event), model units.
        cond: class labels (N,) or None.
        trace: exact up to 16 coordinates, one Hutchinson probe beyond, by default.
        draws: z_0 for each datum, for a discrete decoder.
        batch: rows at a time; at most 512, and as many as fit into half a gigabyte by default. The default solver gives
            every row its own steps; the black boxes (``"dopri5"``, ``"rk45"``) share theirs within a batch, which then
            changes values at the level of the tolerance.
        seed: of all noise.
        bin_width: width of the bins that ``data`` were dequantised over, to get bits from a density.
        progress: called as ``progress(done, N)`` after every batch.
        settings: of :func:`log_density`: ``solver``, ``tol`` or ``steps`` or ``nfe`` or ``ts``, ``grid``.

    Returns:
        A :class:`LikelihoodReport`. The estimator's standard error is known with two draws or probes or more.
    """
    trace = trace or trace_for(model.dims, seed)
    began, done, calls, products = time.perf_counter(), 0, 0.0, 0.0
    found: list[tuple[Tensor, Tensor]] = []
    parts: dict[str, float] = {}
    with _evaluating(model):
        for x, labels in _chunks(model, data, cond, (batch or min(512, _rows(model))) // max(draws, 1)):
            numbers = range(done, done + len(x))
            one = ode_log_prob(model, x, labels, trace=trace, draws=draws, seed=seed, samples=numbers, **settings)
            found.append((-one.log_prob.cpu(), one.spread.cpu()))
            terms = {"minus log prior": -one.log_prior, "minus log det": -one.log_det, **one.parts}
            for name, term in terms.items():
                sign = -1.0 if name == "scale" else 1.0
                parts[name] = parts.get(name, 0.0) + sign * float(term.sum()) / len(data)
            calls, products = calls + one.forward * len(x), products + one.products * len(x)
            done += len(x)
            if progress is not None:
                progress(done, len(data))
    values, spreads = (torch.cat(parts) for parts in zip(*found, strict=True))
    n = len(values)
    if model.discrete and float(values.mean()) < 0:
        raise ValueError(
            f"the ODE gives grey levels a probability above one ({float(values.mean()):.4g} nats): its solver's error "
            "is larger than the result; ask for a smaller tol or more steps"
        )
    unknown = model.discrete and draws == 1  # one z_0 each: its noise cannot be told from the data's
    within = spreads.square().mean() if not unknown and bool(spreads.isfinite().all()) else torch.tensor(0.0)
    spread = values.var() if n > 1 else torch.tensor(math.nan)
    method = resolve(settings.get("solver", "dopri54"))
    if settings.get("tol") is not None:
        method = method.with_tolerance(settings["tol"])
    return LikelihoodReport(
        method="probability-flow ODE",
        kind="estimate",  # the solver's own error is in it, which no standard error sees
        of="probability" if model.discrete else "density",
        values=values,
        parts=parts,
        estimator_se=math.nan if unknown else float(spreads.square().sum().sqrt()) / n,
        data_se=_beyond(spread, within, n),
        dims=model.dims,
        bits_offset=_offset(model, bin_width),
        forward=calls / n,
        products=products / n,
        seconds=time.perf_counter() - began,
        logsnr=model.logsnr_ends,
        settings={
            **_describe(model),
            **{k: v for k, v in settings.items() if k != "solver"},
            "solver": repr(method),
            "trace": repr(trace),
            "draws": draws,
            "seed": seed,
            "bin_width": bin_width,
        },
    )


def importance(
    model: VAE,
    data: Tensor,
    K: int,
    cond: Tensor | None = None,
    *,
    repeats: int = 2,
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
        repeats: independent repeats, at least 2 to know the estimator's error.
        batch: data at a time; as many as fit into half a gigabyte by default.
        seed: of all noise.
        bin_width: width of the bins that ``data`` were dequantised over, to get bits from a density.
        progress: called as ``progress(done, N)`` after every batch.
    """
    began, before = time.perf_counter(), model.evaluations
    generator = torch.Generator().manual_seed(seed)
    totals: list[Tensor] = []
    with _evaluating(model):
        for x, labels in _chunks(model, data, cond, batch or _rows(model)):
            totals.append(torch.stack([model.iwae(x, K, labels, generator=generator).cpu() for _ in range(repeats)]))
            if progress is not None:
                progress(sum(t.shape[1] for t in totals), len(data))
    values, estimator, spread = _errors(torch.cat(totals, 1))
    return LikelihoodReport(
        method=f"importance-weighted bound, K = {K}",
        kind="upper bound",
        of="probability" if model.discrete else "density",
        values=values,
        parts={},
        estimator_se=estimator,
        data_se=spread,
        dims=model.dims,
        bits_offset=_offset(model, bin_width),
        forward=(model.evaluations - before) / len(data),
        products=0,
        seconds=time.perf_counter() - began,
        logsnr=None,
        settings={**_describe(model), "K": K, "repeats": repeats, "seed": seed, "bin_width": bin_width},
    )
