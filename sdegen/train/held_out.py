"""The number to watch while training: the bound on held-out examples."""

from __future__ import annotations

import math
from typing import Any

import torch

from sdegen.data import Dataset
from sdegen.objectives import low_discrepancy
from sdegen.train.batches import seed_of
from sdegen.train.config import TrainConfig

__all__ = ["held_out"]


@torch.no_grad()
def held_out(model: Any, dataset: Dataset, config: TrainConfig) -> float:
    """Mean bound on held-out examples in bits per dimension, with the same noise at every call.

    Of grey levels this is a code length; of real-valued data, a density's, in model units, and may be negative. The
    noise levels of all examples and draws are evenly spread, which makes the mean several times as precise as
    independent ones; it is for watching and comparing, and :meth:`elbo` is for reports with standard errors.

    Args:
        model: see :func:`fit`.
        dataset: on the model's device.
        config: says how many examples, how many draws of the noise level, and the seed.
    """
    x, cond = dataset.test[: config.eval_size], None
    if dataset.test_cond is not None and config.conditional:
        cond = dataset.test_cond[: config.eval_size]
    generator = torch.Generator(x.device).manual_seed(seed_of(config.seed, 2, 0))
    u, nats = low_discrepancy(config.eval_draws * len(x), generator).reshape(config.eval_draws, -1), []
    for draw in u:
        for rows in torch.arange(len(x), device=x.device).split(256):
            bound = model.bound(x[rows], None if cond is None else cond[rows], draw[rows], generator)
            nats.append(bound.total)
    return float(torch.cat(nats).mean()) / (dataset.dims * math.log(2))
