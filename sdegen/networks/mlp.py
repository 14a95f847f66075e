"""A residual multilayer perceptron, for vectors, two-dimensional densities, latents and very small images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from sdegen.networks.embeddings import Conditioning, fourier_features
from sdegen.networks.layers import at_least, dropout

__all__ = ["MLP"]


class _Block(nn.Module):
    """x + W2 drop(silu(W1 (norm(x) (1 + a) + b))) with scale a and shift b from the conditioning; W2 starts at zero."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.modulate = nn.Linear(width, 2 * width)
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = dropout
        for layer in (self.modulate, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulate(condition).chunk(2, dim=-1)
        h = layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        return x + self.last(dropout(silu(self.first(h)), self.dropout, self.training))


class MLP(nn.Module):
    """Residual blocks with layer norm, scaled and shifted by the noise level.

    Args:
        event_shape: shape of one example, (D,) or (C, H, W); it is flattened inside.
        outputs: output channels for every channel of the data (V for grey levels).
        width: of the hidden layers.
        depth: number of residual blocks of two layers.
        classes: number of classes for conditioning, 0 for none.
        dropout: share of hidden units that are dropped in training.
        octaves: Fourier features sin, cos 2^n pi z of the input; empty for none.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        outputs: int = 1,
        *,
        width: int = 128,
        depth: int = 3,
        classes: int = 0,
        dropout: float = 0.0,
        octaves: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        at_least(1, width=width, outputs=outputs)
        at_least(0, depth=depth, classes=classes)
        self.event_shape, self.octaves = tuple(event_shape), tuple(octaves)
        self.out_shape = (self.event_shape[0] * outputs, *self.event_shape[1:])
        size = math.prod(self.event_shape)
        self.condition = Conditioning(width, classes)
        self.embed = nn.Linear(size * (1 + 2 * len(self.octaves)), width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.readout = nn.Linear(width, math.prod(self.out_shape))
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)

    def forward(self, z: Tensor, logsnr: Tensor, cond: Tensor | None = None) -> Tensor:
        """Args: z (B, *event_shape), logsnr (B,), cond (B,) or None. Returns (B, outputs * C, *rest)."""
        x = z.flatten(1)
        if self.octaves:
            x = torch.cat([x, fourier_features(x, self.octaves)], dim=1)
        condition = self.condition(logsnr, cond)
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, condition)
        return self.readout(silu(layer_norm(h, h.shape[-1:]))).reshape(-1, *self.out_shape)
