"""What every data set is: two tensors in model units, and the map that brought them there."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sdegen.bins import Bins

__all__ = ["Dataset"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and held-out examples in model units.

    Model units are ``x = scale * raw + shift``. For grey levels that is the centre of the level's bin (scale 2/V, shift
    1/V - 1); real-valued data from files get zero mean and unit variance; densities known exactly keep their own units.

    Args:
        name: for titles and file names.
        train: float32, shape (N, *event).
        test: float32, shape (M, *event), never trained on.
        bins: grey levels, or None for real-valued data.
        train_cond: int64 class labels (N,), or None.
        test_cond: int64 class labels (M,), or None.
        scale: model units per raw unit.
        shift: model value of raw zero.
        exact: an oracle that knows the density of the data, or None.
        source: where the data came from, for the records.
    """

    name: str
    train: Tensor
    test: Tensor
    bins: Bins | None = None
    train_cond: Tensor | None = None
    test_cond: Tensor | None = None
    scale: float = 1.0
    shift: float = 0.0
    exact: Any = None
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.train.shape[1:] != self.test.shape[1:]:
            raise ValueError(
                f"training examples have shape {tuple(self.train.shape[1:])}, "
                f"held-out ones {tuple(self.test.shape[1:])}: they must agree"
            )
        for x, cond, part in ((self.train, self.train_cond, "training"), (self.test, self.test_cond, "held-out")):
            if not len(x):
                raise ValueError(f"the {part} part of {self.name} is empty")
            if cond is not None and cond.shape != x.shape[:1]:
                raise ValueError(f"{part} labels have shape {tuple(cond.shape)}, but there are {len(x)} examples")

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one example, (C, H, W) or (D,)."""
        return tuple(self.train.shape[1:])

    @property
    def dims(self) -> int:
        """D, the number of values in one example."""
        return math.prod(self.event_shape)

    @property
    def classes(self) -> int:
        """Number of classes, 0 without labels."""
        return 0 if self.train_cond is None else int(self.train_cond.max()) + 1

    @property
    def log_volume(self) -> float:
        """Nats to add to a log-density in model units for one in raw units: D log scale."""
        return self.dims * math.log(self.scale)

    def raw(self, x: Tensor) -> Tensor:
        """Model units back to the units of the source: grey levels 0..V-1 (rounded), or the file's own numbers."""
        return (x - self.shift) / self.scale if self.bins is None else self.bins.nearest(x)

    def describe(self) -> str:
        """One line for people."""
        shape = "x".join(map(str, self.event_shape))
        values = "real-valued" if self.bins is None else f"{self.bins.count} grey levels"
        labels = f", {self.classes} classes" if self.classes else ""
        sizes = f"{len(self.train)} training and {len(self.test)} held-out examples"
        return f"{self.name}: {sizes} of {shape}, {values}{labels}"

    def to(self, device: torch.device | str) -> Dataset:
        """The same data on a device."""
        names = ("train", "test", "train_cond", "test_cond")
        return replace(self, **{n: None if getattr(self, n) is None else getattr(self, n).to(device) for n in names})
