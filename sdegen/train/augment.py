"""Distorted copies in every batch, labelled as such: more data without another distribution.

A few hundred images are too few for a network that is trained for minutes: it learns them by heart. Slightly turned,
sheared, stretched and shifted copies are almost as good as new images, but they are not the data, and a density model
that takes them for data is a model of something else. So it is told: the network gets one more class than there are
labels, and what is distorted carries it. Asked without a label, as sampling and scoring do, it speaks of the data.

References: Jun et al. 2020, Distribution augmentation for generative modeling (ICML); Karras et al. 2022,
arXiv:2206.00364, appendix F.2 ("non-leaky" augmentation).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from sdegen.bins import Bins

__all__ = ["augmented", "distorted"]

TURN, STRETCH, SHEAR, SHIFT = 0.2, 0.12, 0.2, 0.7  # radians, log of a factor, shear, pixels: at most, either way


def augmented(
    x: Tensor, cond: Tensor | None, share: float, label: int, bins: Bins | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A batch with a share of its images distorted.

    Args:
        x: images (B, C, H, W), in random order.
        cond: class labels (B,), or None.
        share: of the images that are distorted, the first ones.
        label: what they are labelled; the others keep theirs, or have none, which is -1.
        bins: the grey levels to round to, None for real numbers.
        generator: of the distortions.

    Returns:
        Images and labels.
    """
    if x.ndim != 4:
        raise ValueError(f"augmentation distorts images (B, C, H, W), not data of shape {tuple(x.shape)}")
    count = round(share * len(x))
    others = distorted(x[:count], generator)
    if bins is not None:
        others = bins.value(bins.nearest(others), x.dtype)
    kept = torch.full((len(x),), -1, device=x.device) if cond is None else cond.clone()
    kept[:count] = label
    return torch.cat([others, x[count:]]), kept


def distorted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, C, H, W), each turned, stretched, sheared and shifted a little; bilinear, edges extended."""
    n, height, width = len(x), *x.shape[-2:]

    def either(limit: float) -> Tensor:
        return limit * (2 * torch.rand(n, generator=generator, device=generator.device) - 1).to(x.device)

    turn, shear, wide, high = either(TURN), either(SHEAR), either(STRETCH).exp(), either(STRETCH).exp()
    right, down = either(2 * SHIFT / width), either(2 * SHIFT / height)
    cos, sin = turn.cos(), turn.sin()
    first = torch.stack([cos * wide, cos * shear - sin * high, right], 1)
    second = torch.stack([sin * wide, sin * shear + cos * high, down], 1)
    grid = affine_grid(torch.stack([first, second], 1).to(x), list(x.shape), align_corners=False)
    return grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
