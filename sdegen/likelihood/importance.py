"""The importance-weighted bound of a VAE."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from sdegen.likelihood.report import LikelihoodReport
from sdegen.likelihood.scoring import chunks, describe, discreteness, errors, evaluating, offset, rows
from sdegen.models.vae import VAE

__all__ = ["importance"]


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
    with evaluating(model):
        for x, labels in chunks(model, data, cond, batch or rows(model)):
            totals.append(torch.stack([model.iwae(x, K, labels, generator=generator).cpu() for _ in range(repeats)]))
            if progress is not None:
                progress(sum(t.shape[1] for t in totals), len(data))
    values, estimator, spread = errors(torch.cat(totals, 1))
    return LikelihoodReport(
        method=f"importance-weighted bound, K = {K}",
        kind="upper bound",
        of="probability" if model.discrete else "density",
        values=values,
        parts={},
        estimator_se=estimator,
        data_se=spread,
        solver_error=None,
        dims=model.dims,
        bits_offset=offset(model, bin_width),
        forward=(model.evaluations - before) / len(data),
        vjp=0,
        jvp=0,
        seconds=time.perf_counter() - began,
        logsnr=None,
        **discreteness(model, bin_width),
        solver=None,
        tolerance=None,
        seed=seed,
        settings={**describe(model), "K": K, "repeats": repeats},
    )
