"""The variational bound of a data set: VAE, DDPM(T), VP-SDE, baselines."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from sdegen.likelihood.report import LikelihoodReport
from sdegen.likelihood.scoring import chunks, describe, discreteness, errors, evaluating, offset, rows
from sdegen.models.base import Elbo, LatentVariableModel

__all__ = ["bound"]


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
    with evaluating(model):
        for x, labels in chunks(model, data, cond, (batch or rows(model)) // draws):
            terms = [model.elbo(x, labels, generator=generator, draws=draws) for _ in range(repeats)]
            totals.append(torch.stack([e.total for e in terms]).cpu())
            parts.append(torch.stack([torch.stack(tuple(e)).mean(1) * len(x) for e in terms]).mean(0).cpu())
            done += len(x)
            if progress is not None:
                progress(done, len(data))
    values, estimator, spread = errors(torch.cat(totals, 1))
    return LikelihoodReport(
        method="code length" if model.exact else "variational bound",
        kind="exact" if model.exact else "upper bound",
        of="probability" if model.discrete else "density",
        values=values,
        parts=dict(zip(Elbo._fields, (torch.stack(parts).sum(0) / len(data)).tolist(), strict=True)),
        estimator_se=0.0 if model.exact else estimator,
        data_se=spread,
        solver_error=None,
        dims=model.dims,
        bits_offset=offset(model, bin_width),
        forward=(model.evaluations - before) / len(data),
        vjp=0,
        jvp=0,
        seconds=time.perf_counter() - began,
        logsnr=getattr(model, "logsnr_ends", None),
        **discreteness(model, bin_width),
        solver=None,
        tolerance=None,
        seed=None if model.exact else seed,
        settings={**describe(model), "draws": draws, "repeats": repeats},
    )
