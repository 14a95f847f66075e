"""What step n sees: a function of (seed, n), so that there is nothing to save and nothing to lose."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from sdegen.data import Dataset
from sdegen.train.config import TrainConfig

__all__ = ["batch", "distorted_class", "labels", "seed_of"]


def labels(cond: Tensor | None, rows: Tensor, config: TrainConfig) -> Tensor | None:
    """The batch's classes, some of them dropped (-1), so that the network learns with and without."""
    if cond is None or not config.conditional:
        return None
    kept = torch.rand(rows.shape, device=rows.device) >= config.drop_labels
    return cond[rows].where(kept, -1)


def distorted_class(data: Dataset, config: TrainConfig) -> int:
    """The label of what :mod:`sdegen.train.augment` distorts: one more than the data's own."""
    return data.classes if config.conditional else 0


def seed_of(*key: int) -> int:
    """A well-mixed seed from a tuple of numbers: (root seed, stream, index)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, 3, epoch]).permutation(count))


def batch(count: int, size: int, seed: int, step: int) -> Tensor:
    """Rows of batch number ``step``: every epoch goes once through a new random order, in whole batches."""
    size = min(size, count)
    epoch, i = divmod(step, count // size)
    return _order(count, seed, epoch)[i * size : (i + 1) * size]
