"""Whole recipes by name: data, model, network and settings that were measured to work together.

The figures are held-out bits per dimension of the digits (uniform: 4.09, per-pixel histogram: 2.42), the mean of the
bound over the 360 held-out images; the images alone put an uncertainty of about 0.015 on each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from sdegen.data import Dataset, load
from sdegen.models import LatentVariableModel
from sdegen.networks import NETWORKS
from sdegen.recipes import MODELS
from sdegen.train.config import TrainConfig

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """What to train on what, and how; the names are those of the command line.

    Args:
        train: the settings of training.
        reaches: held-out bits per dimension to expect, None where that says little.
        data: name of the data set.
        model: name of the model.
        network: name of the backbone, None for models with networks of their own.
        network_options: its options.
        model_options: the model's options.
    """

    train: TrainConfig
    reaches: float | None = None
    data: str = "digits"
    model: str = "vpsde"
    network: str | None = "unet"
    network_options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, data: Dataset | None = None) -> tuple[Dataset, LatentVariableModel]:
        """The data set and the untrained model, with initial weights from the seed of training.

        Args:
            data: in place of the recipe's own.
        """
        data = load(self.data) if data is None else data
        parts: dict[str, Any] = dict(self.model_options)
        if self.network is not None:
            parts["network"] = partial(NETWORKS[self.network], **self.network_options)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.train.seed)
            return data, MODELS[self.model](data, **parts)


RECIPES: dict[str, Recipe] = {
    # a minute on two idle cores; 1000 steps take about 75 seconds on one
    "digits-vpsde": Recipe(
        TrainConfig(seconds=60.0, lr=4e-3, ema=0.98),
        reaches=1.75,
        network_options={"channels": (24, 48), "dropout": 0.05},
    ),
    # few images and a wide network: half of its units are dropped, and it must not train longer
    "digits-vae": Recipe(
        TrainConfig(steps=1500, lr=1e-3, weight_decay=0.1),
        reaches=2.11,
        model="vae",
        network=None,
        model_options={"latent": 16, "width": 512, "dropout": 0.5},
    ),
    # seconds on one core, for tests
    "smoke": Recipe(
        TrainConfig(steps=300, lr=3e-3, ema=0.98, threads=1, eval_every=0),
        reaches=2.12,
        network="mlp",
        network_options={"width": 128, "depth": 2},
    ),
    "mixture": Recipe(
        TrainConfig(steps=1500, batch_size=256, lr=2e-3, threads=1),
        data="mixture2d",
        network="mlp",
        network_options={"width": 128, "depth": 3},
    ),
}
