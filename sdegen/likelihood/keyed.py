"""Noise that belongs to a datum: the same whatever the batch, the shard, and the data beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.special import ndtr

from solvers import standard_normal
from solvers.noise import BOUND

__all__ = ["PROFILE", "Keyed", "strata"]

PROFILE = BOUND + 64
"""The first stream of a denoising profile, beyond those of all terms of a bound: the two share no noise."""


class Keyed:
    """Normals that are a function of (seed, number of the datum, number of the round); every call is another stream.

    Args:
        seed: of all.
        numbers: of the data.
        number: of the round.
        draws: of each datum in a round; rows are data times draws, the draws of one datum side by side.
        stream: the first.
    """

    def __init__(self, seed: int, numbers: Sequence[int], number: int, draws: int, stream: int = BOUND) -> None:
        self.seed, self.draws, self.stream = seed, draws, stream
        self.keys = [(number << 32) + n for n in numbers]

    def __call__(self, like: Tensor) -> Tensor:
        shape, kind = (len(self.keys), self.draws, *like.shape[1:]), {"dtype": like.dtype, "device": like.device}
        self.stream += 1
        return standard_normal(shape, self.seed, samples=self.keys, stream=self.stream - 1, **kind).flatten(0, 1)


def strata(normal: Keyed, rows: Tensor) -> Tensor:
    """u in [k / draws, (k + 1) / draws) for the k-th draw of each datum, (n * draws,), float64."""
    inside = ndtr(normal(rows.new_empty(len(rows), 1, dtype=torch.float64))[:, 0])
    return (torch.arange(len(rows), device=rows.device) % normal.draws + inside) / normal.draws
