"""Baselines, exactly: what a generative model has to beat, or has learnt nothing.

:class:`Independent` grey levels know nothing of each other. An :class:`Autoregressive` network knows a pixel's past,

    log p(x) = SUM_j log p(x_j | x_1, ..., x_{j-1}),

all conditionals in one pass, because its weights are masked so that output j sees inputs before j only.

Both are latent-variable models with a latent of no coordinates, so that the bound has one term and is exact.

Reference: Germain et al. 2015, arXiv:1502.03509 (the masks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from sdegen.bins import Bins
from sdegen.distributions import Categorical, Distribution, Gaussian
from sdegen.levels import Empty
from sdegen.models.base import Encoding, LatentVariableModel, NormalPrior
from solvers import standard_normal

__all__ = [
    "Autoregressive",
    "Baseline",
    "Independent",
    "global_histogram",
    "pixel_histogram",
    "uniform",
]


class Baseline(LatentVariableModel):
    """A distribution of grey levels without latents.

    Args:
        event_shape: of one example.
        bins: the levels.
    """

    exact = True

    def __init__(self, event_shape: Sequence[int], bins: Bins) -> None:
        super().__init__()
        self.bins, self.event_shape, self.levels, self.prior = bins, tuple(event_shape), Empty(), NormalPrior()

    @property
    def discrete(self) -> bool:
        return True

    def encode(self, x: Tensor, cond: Tensor | None = None) -> Encoding:
        """A latent without coordinates, (B, 0)."""
        none = Gaussian(x.new_zeros(len(x), 0), torch.tensor(0.0, dtype=torch.float64))
        return Encoding(none, none)


class Independent(Baseline):
    """Every pixel has its own distribution over the levels and knows nothing of the others.

    Args:
        log_p: log-probabilities, (*event, V).
        bins: the levels.
    """

    log_p: Tensor

    def __init__(self, log_p: Tensor, bins: Bins) -> None:
        super().__init__(log_p.shape[:-1], bins)
        self.register_buffer("log_p", log_p.double().log_softmax(-1))

    def decode(self, z: Tensor, cond: Tensor | None = None) -> Distribution:
        """The same distribution for every row."""
        return Categorical(self.log_p.expand(len(z), *self.log_p.shape), self.bins)

    def sample(self, n: int, cond: Tensor | None = None, *, seed: int = 0, first: int = 0, **settings: Any) -> Tensor:
        """Pixels drawn one by one, (n, *event), model units."""
        shape, samples = (n, *self.event_shape), range(first, first + n)
        noise = standard_normal(shape, seed, samples=samples, device=self.log_p.device)
        return self.decode(noise).sample(noise).to(torch.get_default_dtype())


class Autoregressive(Baseline):
    """Every pixel given those before it, row by row: one hidden layer, masked.

    Hidden unit i has a degree m_i and sees pixels up to m_i; the logits of pixel j see units of degree below j, and the
    pixels before it directly. They are added to the logarithm of the pixel's histogram, where training starts.

    Args:
        log_histogram: (*event, V), see :meth:`sdegen.bins.Bins.log_histogram`.
        bins: the levels.
        width: hidden units.
        dropout: share of them that is dropped in training.
    """

    log_histogram: Tensor
    before: Tensor
    after: Tensor
    past: Tensor

    def __init__(self, log_histogram: Tensor, bins: Bins, *, width: int = 512, dropout: float = 0.7) -> None:
        super().__init__(log_histogram.shape[:-1], bins)
        d, v = self.dims, bins.count
        pixel, degree = torch.arange(d), torch.arange(width) % max(d - 1, 1)
        self.register_buffer("log_histogram", log_histogram.reshape(d, v).float())
        self.register_buffer("before", (pixel <= degree[:, None]).float())  # (width, d)
        self.register_buffer("after", (degree < pixel[:, None]).float().repeat_interleave(v, 0))  # (d v, width)
        self.register_buffer("past", (pixel < pixel[:, None]).float().repeat_interleave(v, 0))  # (d v, d)
        self.hidden, self.drop = nn.Linear(d, width), nn.Dropout(dropout)
        self.logits, self.direct = nn.Linear(width, d * v), nn.Linear(d, d * v, bias=False)
        nn.init.normal_(self.hidden.weight, std=1.7 / math.sqrt(d))  # half of the pixels are masked on average
        for layer in (self.logits, self.direct):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.logits.bias)

    def conditionals(self, x: Tensor) -> Distribution:
        """p(x_j | x_1, ..., x_{j-1}) for all j at once, at data (B, *event)."""
        pixels = x.flatten(1).to(self.hidden.weight)
        h = self.drop(silu(linear(pixels, self.hidden.weight * self.before, self.hidden.bias)))
        logits = linear(h, self.logits.weight * self.after, self.logits.bias)
        logits = logits + linear(pixels, self.direct.weight * self.past)
        logits = logits.reshape(len(x), -1, self.bins.count) + self.log_histogram
        return Categorical(logits.reshape(len(x), *self.event_shape, -1), self.bins)

    def reconstruction(self, x: Tensor, q: Gaussian, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        self.evaluations += len(x)
        return -self.conditionals(x).log_prob(x)

    def decode(self, z: Tensor, cond: Tensor | None = None) -> Distribution:
        raise TypeError("an autoregressive model has no latent to decode: ask for its conditionals at data")

    @torch.no_grad()
    def sample(self, n: int, cond: Tensor | None = None, *, seed: int = 0, first: int = 0, **settings: Any) -> Tensor:
        """Pixel after pixel, (n, *event), model units."""
        shape = (n, *self.event_shape)
        noise = standard_normal(shape, seed, samples=range(first, first + n), device=self.hidden.weight.device)
        x = torch.full(shape, float(self.bins.centers()[0]), device=noise.device)
        for j in range(self.dims):
            x.view(n, -1)[:, j] = self.conditionals(x).sample(noise).view(n, -1)[:, j]
        return x


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
