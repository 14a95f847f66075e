"""Training: one readable loop, atomic checkpoints, an average of the weights."""

from sdegen.train.checkpoint import load_weights, save_weights
from sdegen.train.config import TrainConfig
from sdegen.train.ema import EMA
from sdegen.train.held_out import held_out
from sdegen.train.loop import Interrupted, fit
from sdegen.train.snapshot import NonFiniteLoss, Snapshot

__all__ = [
    "EMA",
    "Interrupted",
    "NonFiniteLoss",
    "Snapshot",
    "TrainConfig",
    "fit",
    "held_out",
    "load_weights",
    "save_weights",
]
