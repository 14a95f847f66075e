"""Training: one readable loop, atomic checkpoints, an average of the weights."""

from sdegen.train.checkpoint import load_weights, save_weights
from sdegen.train.config import TrainConfig
from sdegen.train.ema import EMA
from sdegen.train.loop import Interrupted, fit, held_out
from sdegen.train.recipes import RECIPES, Recipe
from sdegen.train.snapshot import NonFiniteLoss, Snapshot

__all__ = [
    "EMA",
    "RECIPES",
    "Interrupted",
    "NonFiniteLoss",
    "Recipe",
    "Snapshot",
    "TrainConfig",
    "fit",
    "held_out",
    "load_weights",
    "save_weights",
]
