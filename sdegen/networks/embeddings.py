"""What a network is told besides the noisy state: the noise level and, optionally, a class."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

__all__ = ["Conditioning", "fourier_features", "sinusoids"]


def sinusoids(logsnr: Tensor, features: int) -> Tensor:
    """Sines and cosines of the noise level, with periods from 4 to 256 units of logsnr.

    Models use logsnr from about -10 to 14: the longest waves are nearly linear over that range and the shortest tell
    levels apart that differ by a fraction of a unit.

    Args:
        logsnr: shape (B,).
        features: even.

    Returns:
        Shape (B, features).
    """
    period = torch.logspace(math.log2(4), math.log2(256), features // 2, base=2, device=logsnr.device)
    angle = logsnr.unsqueeze(-1) * (2 * math.pi / period).to(logsnr.dtype)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def fourier_features(z: Tensor, octaves: tuple[int, ...]) -> Tensor:
    """Sines and cosines of 2^n pi z, so that a network sees the last bits of nearly clean data.

    Args:
        z: shape (B, C, *rest).
        octaves: exponents n.

    Returns:
        Shape (B, 2 len(octaves) C, *rest).

    Reference: Kingma et al. 2021, arXiv:2107.00630, appendix C.
    """
    angles = torch.cat([z * (2.0**n * math.pi) for n in octaves], dim=1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Conditioning(nn.Module):
    """(logsnr, class) -> one vector per sample.

    Args:
        width: of the vector.
        classes: number of classes, 0 for none. One more embedding stands for "no class", the answer to ``cond=None``
            and to labels equal to -1; it is what classifier-free guidance trains and contrasts with.
        features: number of sinusoids.
    """

    def __init__(self, width: int, classes: int = 0, features: int = 32) -> None:
        super().__init__()
        self.features, self.classes = features, classes
        self.layers = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width) if classes else None
        if self.label is not None:
            nn.init.zeros_(self.label.weight)

    def forward(self, logsnr: Tensor, cond: Tensor | None = None) -> Tensor:
        """Args: logsnr (B,), cond (B,) int64 labels in 0..classes-1, -1 for none, or None. Returns (B, width)."""
        h = self.layers(sinusoids(logsnr, self.features))
        if self.label is not None:
            h = h + (self.label.weight[0] if cond is None else self.label(cond + 1))
        elif cond is not None:
            raise ValueError("this network has no classes: build it with classes=K or leave cond out")
        return silu(h)
