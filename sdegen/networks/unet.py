"""A U-Net with attention, for images from 8x8 upwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle, silu

from sdegen.networks.embeddings import Conditioning, fourier_features
from sdegen.networks.layers import at_least, attention, dropout

__all__ = ["UNet"]


def _zeroed(layer: nn.Conv2d | nn.Linear) -> Any:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _norm(channels: int) -> nn.GroupNorm:
    """Group norm with 8 groups, or the largest number below that divides the channels."""
    return nn.GroupNorm(next(g for g in range(min(8, channels), 0, -1) if channels % g == 0), channels)


class Attention(nn.Module):
    """x + project(attention(norm(x))) over the pixels, heads of about 32 channels; starts as x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = next(h for h in range(max(1, channels // 32), 0, -1) if channels % h == 0)
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.project = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2)
        q, k, v = qkv.unbind(1)  # each (B, heads, pixels, channels per head)
        h = attention(q, k, v)
        return x + self.project(h.transpose(-1, -2).reshape(x.shape))


class ResBlock(nn.Module):
    """skip(x) + conv(drop(silu(norm(conv(silu(norm(x)))) (1 + a) + b))) with a, b from the conditioning.

    Args:
        inputs, outputs: channels.
        condition: width of the conditioning vector.
        dropout: share of features dropped in training.
        attention: let the pixels look at each other afterwards.
    """

    def __init__(self, inputs: int, outputs: int, condition: int, dropout: float, attention: bool = False) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = _norm(outputs), _zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.modulate = _zeroed(nn.Linear(condition, 2 * outputs))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attend = Attention(outputs) if attention else nn.Identity()
        self.dropout = dropout

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        scale, shift = self.modulate(condition).unsqueeze(-1).unsqueeze(-1).chunk(2, dim=1)
        h = silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        return self.attend(self.skip(x) + self.conv2(dropout(h, self.dropout, self.training)))


class UNet(nn.Module):
    """Residual blocks on a pyramid of resolutions, with skip connections of equal resolution.

    Down by a strided convolution, up by nearest neighbour (a block follows), the group norm scaled and shifted by the
    noise level. A learned bias for every input pixel says where a pixel is, and a channel of ones where the image ends.
    Every residual branch and the output start at zero. One level only is a network without down-sampling, as
    variational diffusion models use.

    Args:
        event_shape: (C, H, W), any sizes; odd ones are halved upwards.
        outputs: output channels for every channel of the data (V for grey levels).
        channels: width of each level, finest first.
        blocks: residual blocks per level and direction.
        attention: levels with attention after each block, counted from 0, beside the one in the middle.
        classes: number of classes for conditioning, 0 for none.
        dropout: share of features dropped in training.
        space_to_depth: fold squares of this many pixels into channels first (1 or 2, 4...); must divide H and W.
        octaves: Fourier features sin, cos 2^n pi z of the input; empty for none.
        condition: width of the embedding of the noise level.

    Reference: Ho et al. 2020, arXiv:2006.11239, appendix B; Kingma et al. 2021, arXiv:2107.00630, appendix B.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        outputs: int = 1,
        *,
        channels: tuple[int, ...] = (24, 48),
        blocks: int = 1,
        attention: tuple[int, ...] = (),
        classes: int = 0,
        dropout: float = 0.05,
        space_to_depth: int = 1,
        octaves: tuple[int, ...] = (),
        condition: int = 128,
    ) -> None:
        super().__init__()
        if len(event_shape) != 3:
            raise ValueError(
                f"a U-Net needs images of shape (C, H, W), not {tuple(event_shape)}; use an MLP for vectors"
            )
        at_least(1, channels=min(channels, default=0), outputs=outputs, condition=condition)
        at_least(0, blocks=blocks, classes=classes)
        c, height, width = event_shape
        if space_to_depth < 1 or height % space_to_depth or width % space_to_depth:
            raise ValueError(f"space_to_depth={space_to_depth} must divide the image size {height}x{width}")
        if min(-(-height // space_to_depth), -(-width // space_to_depth)) <= 2 ** (len(channels) - 2):
            raise ValueError(f"{len(channels)} levels are too many for images of {height}x{width}")
        if not set(attention) <= set(range(len(channels))):
            raise ValueError(f"attention={attention} must name levels from 0 to {len(channels) - 1}")
        self.event_shape, self.space_to_depth, self.octaves = tuple(event_shape), space_to_depth, tuple(octaves)
        patch = space_to_depth**2
        inputs = c * patch * (1 + 2 * len(self.octaves)) + 1
        self.condition = Conditioning(condition, classes)
        self.embed = nn.Conv2d(inputs, channels[0], 3, padding=1)
        self.position = nn.Parameter(torch.zeros(channels[0], height // space_to_depth, width // space_to_depth))

        now, skips = channels[0], [channels[0]]  # channels at hand, and of what the way up will find
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, wide in enumerate(channels):
            if i:
                self.down.append(nn.Conv2d(now, now, 3, stride=2, padding=1))
                skips.append(now)
            for _ in range(blocks):
                self.down.append(ResBlock(now, wide, condition, dropout, i in attention))
                now = wide
                skips.append(now)
        self.middle = nn.ModuleList(ResBlock(now, now, condition, dropout, first) for first in (True, False))
        for i, wide in reversed(list(enumerate(channels))):
            for _ in range(blocks + 1):
                self.up.append(ResBlock(now + skips.pop(), wide, condition, dropout, i in attention))
                now = wide
        self.readout = nn.Sequential(_norm(now), nn.SiLU(), _zeroed(nn.Conv2d(now, c * outputs * patch, 3, padding=1)))

    def forward(self, z: Tensor, logsnr: Tensor, cond: Tensor | None = None) -> Tensor:
        """Args: z (B, C, H, W), logsnr (B,), cond (B,) or None. Returns (B, outputs * C, H, W)."""
        condition = self.condition(logsnr, cond)
        x = torch.cat([z, fourier_features(z, self.octaves)], dim=1) if self.octaves else z
        x = pixel_unshuffle(x, self.space_to_depth)
        h = self.embed(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        h = h + self.position.to(h.dtype)
        skips = [h]
        for layer in self.down:
            h = layer(h, condition) if isinstance(layer, ResBlock) else layer(h)
            skips.append(h)
        for block in self.middle:
            h = block(h, condition)
        for block in self.up:
            skip = skips.pop()
            if h.shape[-2:] != skip.shape[-2:]:
                h = interpolate(h, size=skip.shape[-2:], mode="nearest")
            h = block(torch.cat([h, skip], dim=1), condition)
        return pixel_shuffle(self.readout(h), self.space_to_depth)
