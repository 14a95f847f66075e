"""What every estimator of a likelihood does around its formula: batches, evaluation mode, two standard errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sdegen.bins import Bins
from sdegen.likelihood.dequantize import Dequantizer
from sdegen.models.base import LatentVariableModel
from sdegen.models.diffusion import GaussianDiffusion
from sdegen.models.vae import VAE

__all__ = [
    "beyond",
    "bins_of",
    "chunks",
    "describe",
    "discreteness",
    "enough",
    "errors",
    "evaluating",
    "finite",
    "numbered",
    "offset",
    "positive",
    "reader",
    "rows",
    "spreadable",
]

FREEDOM = 32  # degrees of freedom of a standard error that ends the sampling


def numbered(data: Tensor, samples: Sequence[int] | None) -> list[int]:
    """The numbers of the data, which key their noise: those given, or 0 and on."""
    numbers = list(range(len(data)) if samples is None else samples)
    if len(numbers) != len(data):
        raise ValueError(f"there are {len(data)} data and {len(numbers)} sample numbers")
    return numbers


def positive(target_se: float | None) -> None:
    """Refuse a target that no sampling meets."""
    if target_se is not None and not target_se > 0:
        raise ValueError(f"target_se is a positive number of nats, not {target_se}")


def spreadable(model: LatentVariableModel, dequantizer: Dequantizer | None, bin_width: float | None = None) -> None:
    """Refuse a dequantizer where there is nothing to spread, and bins that are not its own."""
    if model.discrete and dequantizer is not None:
        raise ValueError("this model gives probabilities of grey levels: a dequantizer is for density decoders")
    if dequantizer is not None and bin_width not in (None, dequantizer.bins.width):
        raise ValueError(f"the dequantizer's bins are {dequantizer.bins.width:.6g} wide, not bin_width={bin_width}")


def finite(values: Tensor, numbers: Sequence[int]) -> Tensor:
    """The values (n, ...) of the data with these numbers; refuses what is not finite, as a network with NaN weights."""
    bad = ~values.isfinite().flatten(1).all(1)
    if bool(bad.any()):
        raise ValueError(f"what the model says of example {numbers[int(bad.int().argmax())]} is not finite")
    return values


@contextmanager
def evaluating(model: LatentVariableModel) -> Iterator[None]:
    """Evaluation mode and no gradients, then back to what it was."""
    before = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(before)


def chunks(
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


def rows(model: LatentVariableModel) -> int:
    """Rows whose largest tensor, one number for each level of each coordinate, has 2^24 numbers; at most 4096."""
    bins = bins_of(model)
    return max(1, min(4096, 2**24 // (model.dims * (1 if bins is None else bins.count))))


def bins_of(model: LatentVariableModel) -> Bins | None:
    """The grey levels that a model gives probabilities of; None for a density."""
    return getattr(reader(model), "bins", None)


def reader(model: LatentVariableModel) -> Any:
    """What turns a latent into a distribution of data: a diffusion's decoder, a VAE's head, or a baseline itself."""
    return model.decoder if isinstance(model, GaussianDiffusion) else getattr(model, "head", model)


def errors(repeats: Tensor) -> tuple[Tensor, float, float]:
    """Values (N,), the estimator's and the data's standard error of their mean, from independent repeats (R, N)."""
    r, n = repeats.shape
    values = repeats.mean(0)
    noise = repeats.var(0).sum() / r if r > 1 else torch.tensor(math.nan)  # sum of the values' variances
    spread = values.var() if n > 1 else torch.tensor(math.nan)
    within = noise / n if r > 1 else torch.tensor(0.0)
    return values, float(noise.sqrt()) / n, beyond(spread, within, n)


def enough(done: int, ratio: float, independent: float, most: int | None) -> int:
    """Rounds after which a standard error should be what is wanted, now that it is ``ratio`` times that.

    Args:
        done: rounds so far.
        ratio: the error over the target.
        independent: numbers in a round, each of which has its own variance estimated; a target is not trusted before
            there are 32 degrees of freedom.
        most: that the budget allows, if it says.

    Returns:
        All rounds, those that are done among them; ``done`` to stop.

    >>> enough(2, 3.0, 100, None), enough(2, 0.5, 100, None), enough(2, 0.5, 4, None), enough(2, 3.0, 100, 5)
    (18, 2, 9, 5)
    """
    if done < 1 + FREEDOM / independent:
        wanted = 1 + math.ceil(FREEDOM / independent)
    else:
        wanted = done if ratio <= 1 else max(math.ceil(done * ratio**2), done + 1)
    return wanted if most is None else max(done, min(wanted, most))


def beyond(spread: Tensor, within: Tensor, n: int) -> float:
    """Standard error of a mean of n from the values' variance beyond their own noise; NaN if that is all there is."""
    return float(((spread - within) / n).sqrt()) if spread >= within else math.nan


def offset(model: LatentVariableModel, bin_width: float | None) -> float | None:
    return None if not model.discrete and bin_width is None else model.bits_offset(bin_width)


def discreteness(
    model: LatentVariableModel, bin_width: float | None, dequantizer: Dequantizer | None = None
) -> dict[str, Any]:
    """The fields ``dequantizer`` and ``bin_width`` of a report: the discrete decoder's own, or what a caller says."""
    if dequantizer is not None:
        return {"dequantizer": repr(dequantizer), "bin_width": dequantizer.bins.width}
    if not model.discrete:
        return {"dequantizer": None if bin_width is None else "the caller's", "bin_width": bin_width}
    bins = bins_of(model)
    by = reader(model)
    return {"dequantizer": None if by is model else repr(by), "bin_width": None if bins is None else bins.width}


def describe(model: LatentVariableModel) -> dict[str, Any]:
    if isinstance(model, GaussianDiffusion):
        return {"path": repr(model.path), "levels": repr(model.levels), "decoder": repr(model.decoder)}
    return {"levels": repr(model.levels)} | ({"head": repr(model.head)} if isinstance(model, VAE) else {})
