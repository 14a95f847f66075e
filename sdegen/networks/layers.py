"""Two operations that PyTorch has, made fast on the CPU; elsewhere they are PyTorch's own. And a check of sizes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["at_least", "attention", "dropout"]


def at_least(least: int, **sizes: int) -> None:
    """Refuse sizes of which no network can be made.

    >>> at_least(1, width=64, depth=0)
    Traceback (most recent call last):
    ValueError: depth must be at least 1, not 0
    """
    for name, size in sizes.items():
        if size < least:
            raise ValueError(f"{name} must be at least {least}, not {size}")


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Set elements to zero with probability ``p`` and scale the others by 1 / (1 - p).

    PyTorch's own draws one double per element on the CPU and costs as much as half a convolution of a small network.
    Here one 64-bit number decides on eight elements, so that ``p`` acts in steps of 1/256. Like the original it draws
    from the global generator.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    q = round(256 * p)
    words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= q
    return x * kept.to(x.dtype).mul_(256 / (256 - q))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c)) v for (B, heads, pixels, c); the fused kernel wins on accelerators only."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
