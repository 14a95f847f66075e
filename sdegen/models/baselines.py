"""Baselines: independent grey levels, exactly. A model that does not beat them has learnt nothing.

They are latent-variable models with a latent of no coordinates, so that the bound has one term and is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdegen.bins import Bins
from sdegen.distributions import Categorical, Distribution, Gaussian
from sdegen.levels import Empty
from sdegen.models.base import Encoding, LatentVariableModel, NormalPrior
from solvers import standard_normal

__all__ = ["Independent", "global_histogram", "pixel_histogram", "uniform"]


class Independent(LatentVariableModel):
    """Every pixel has its own distribution over the levels and knows nothing of the others.

    Args:
        log_p: log-probabilities, (*event, V).
        bins: the levels.
    """

    log_p: Tensor
    exact = True

    def __init__(self, log_p: Tensor, bins: Bins) -> None:
        super().__init__()
        self.register_buffer("log_p", log_p.double().log_softmax(-1))
        self.bins, self.event_shape, self.levels, self.prior = bins, tuple(log_p.shape[:-1]), Empty(), NormalPrior()

    @property
    def discrete(self) -> bool:
        return True

    def encode(self, x: Tensor, cond: Tensor | None = None) -> Encoding:
        """A latent without coordinates, (B, 0)."""
        none = Gaussian(x.new_zeros(len(x), 0), torch.tensor(0.0, dtype=torch.float64))
        return Encoding(none, none)

    def decode(self, z: Tensor, cond: Tensor | None = None) -> Distribution:
        """The same distribution for every row."""
        return Categorical(self.log_p.expand(len(z), *self.log_p.shape), self.bins)

    def sample(self, n: int, cond: Tensor | None = None, *, seed: int = 0, first: int = 0, **settings: Any) -> Tensor:
        """Pixels drawn one by one, (n, *event), model units."""
        shape, samples = (n, *self.event_shape), range(first, first + n)
        noise = standard_normal(shape, seed, samples=samples, device=self.log_p.device)
        return self.decode(noise).sample(noise).to(torch.get_default_dtype())


def uniform(event_shape: Sequence[int], bins: Bins) -> Independent:
    """All levels alike: log2 V bits per pixel."""
    return Independent(torch.full((*event_shape, bins.count), -math.log(bins.count)), bins)


def global_histogram(x: Tensor, bins: Bins) -> Independent:
    """One histogram for all pixels, with one count added to each level.

    Args:
        x: training data in model units, (N, *event).
        bins: the levels.
    """
    counts = torch.bincount(bins.index(x).flatten(), minlength=bins.count).double() + 1
    return Independent((counts / counts.sum()).log().expand(*x.shape[1:], bins.count), bins)


def pixel_histogram(x: Tensor, bins: Bins, *, pseudocount: float = 1.0) -> Independent:
    """One histogram for each pixel.

    p_j(k) = (n_j(k) + c q(k)) / (N + c) with q the histogram of all pixels: a pixel that has never shown a level
    borrows ``pseudocount`` images' worth from it (:meth:`sdegen.bins.Bins.log_histogram`).

    Args:
        x: training data in model units, (N, *event).
        bins: the levels.
        pseudocount: c > 0, in images.
    """
    return Independent(bins.log_histogram(x, pseudocount), bins)
