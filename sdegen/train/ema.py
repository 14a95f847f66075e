"""An exponential moving average of a model's weights: what is evaluated, sampled from and saved."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

__all__ = ["EMA"]

# one call for all tensors: without these, hundreds of small launches per step
_lerp_, _copy_ = torch._foreach_lerp_, torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """theta_ema <- d theta_ema + (1 - d) theta with d = min(decay, (1 + n) / (10 + n)) at step n.

    The rising d forgets the initial weights quickly, so that the average is useful from the first steps on.

    Args:
        model: whose weights are followed; a copy of it, ``module``, carries the average.
        decay: d in the long run.
    """

    def __init__(self, model: M, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: M, step: int) -> None:
        """Take in the weights of ``model`` after step number ``step`` (from 0); buffers are copied."""
        d = min(self.decay, (1 + step) / (10 + step))
        _lerp_(list(self.module.parameters()), list(model.parameters()), 1 - d)
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def copy_to(self, model: M) -> None:
        """Put the average into ``model``."""
        _copy_(list(model.parameters()), list(self.module.parameters()))
