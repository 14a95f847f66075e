"""The settings of a training run, all of them, with what they mean."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields

import torch

__all__ = ["PRECISIONS", "TrainConfig"]

PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast, and what is written down.

    The budget is ``steps`` or ``seconds``; with both, whichever ends first. The learning rate follows the spent share u
    of the budget: lr min(1, (n+1)/warmup) (f + (1-f)(1 + cos pi u)/2) at step n.

    Args:
        steps: optimiser steps, or None.
        seconds: wall-clock seconds of training with its evaluations, or None.
        batch_size: examples per step; at most the size of the data set is used.
        lr: peak learning rate of AdamW.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices and filters, not on biases and gains.
        warmup: steps of linear warm-up.
        final_lr: f, the learning rate at the end as a share of ``lr``.
        clip: largest norm of the gradient.
        ema: decay of the averaged weights per step, ``min(ema, (1+n)/(10+n))`` at step n.
        conditional: train on class labels, where the data have them; the model must take them.
        drop_labels: share of examples that are shown without their label.
        augment: share of every batch's images that are slightly turned, sheared, stretched and shifted, and labelled as
            such (:mod:`sdegen.train.augment`), against learning few images by heart; the model has a class for them.
        precision: of the network in training: ``float32``, ``bfloat16`` (autocast), or ``auto`` for bfloat16 where the
            processor computes it natively.
        threads: CPU threads, at most the cores that this process may use. One is safe: two share a small network's
            work badly, and where anything else runs on the machine each step waits for the slower of them.
        seed: of batches, noise and dropout. Step n draws the same whether or not the run was interrupted.
        eval_every: steps between evaluations of the held-out bound, 0 for the end only.
        eval_size: held-out examples used for it during training.
        eval_draws: noise levels per example in it.
        checkpoint_seconds: seconds between checkpoints; one more is written at the end and at Ctrl-C.
    """

    steps: int | None = None
    seconds: float | None = None
    batch_size: int = 128
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup: int = 100
    final_lr: float = 0.02
    clip: float = 1.0
    ema: float = 0.99
    conditional: bool = False
    drop_labels: float = 0.1
    augment: float = 0.0
    precision: str = "auto"
    threads: int = 1
    seed: int = 0
    eval_every: int = 200
    eval_size: int = 1024
    eval_draws: int = 4
    checkpoint_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise ValueError("training needs a budget: steps or seconds")
        for name in ("steps", "seconds", "batch_size", "lr", "clip", "threads", "eval_size", "eval_draws"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, not {value}")
        for name in ("weight_decay", "warmup", "eval_every", "checkpoint_seconds", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        for name, value in (
            ("ema", self.ema),
            ("drop_labels", self.drop_labels),
            ("augment", self.augment),
            ("beta1", self.betas[0]),
            ("beta2", self.betas[1]),
        ):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {value}")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr is a share of lr and must lie in [0, 1], not {self.final_lr}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision!r}")

    def spent(self, step: int, seconds: float) -> float:
        """Share of the budget that is used up, at most 1."""
        shares = [step / self.steps if self.steps else 0.0, seconds / self.seconds if self.seconds else 0.0]
        return min(1.0, max(shares))

    def learning_rate(self, step: int, spent: float) -> float:
        """Learning rate of step number ``step`` (from 0) when a share ``spent`` of the budget is gone."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * rise * (self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * spent)) / 2)

    def autocast(self, device: torch.device) -> bool:
        """Whether the network runs in bfloat16 on ``device``."""
        if self.precision != "auto":
            return self.precision == "bfloat16"
        return native_bfloat16(device)

    def cpu_threads(self) -> int:
        """``threads``, but not more than the cores this process may use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(self.threads, cores)

    def changed(self, other: TrainConfig) -> list[str]:
        """Settings in which a continued run may not differ from its beginning, and does."""
        free = {"steps", "seconds", "threads", "checkpoint_seconds", "eval_every", "eval_size", "eval_draws"}
        return [f.name for f in fields(self) if f.name not in free and getattr(self, f.name) != getattr(other, f.name)]


def native_bfloat16(device: torch.device) -> bool:
    """Whether the processor multiplies bfloat16 in hardware; where it does not, autocast is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in probes)
