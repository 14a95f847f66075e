"""Two-dimensional densities: a model of one trains in seconds and can be looked at whole.

Each has mean zero and a spread of about one. The ones made here have no density in closed form; the mixtures of
:mod:`sdegen.oracles` go by their names too, and then ``Dataset.exact`` knows the true density.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from sdegen.data.dataset import Dataset

__all__ = ["TOYS", "toy"]

Sampler = Callable[[np.random.Generator, int], np.ndarray]


def _moons(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two interleaved half circles with Gaussian blur."""
    angle, side = rng.uniform(0, math.pi, n), rng.choice([-1.0, 1.0], n)
    x = np.stack([side * np.cos(angle) - 0.5 * side, side * (np.sin(angle) - 0.25)], axis=1)
    return 1.4 * (x + 0.08 * rng.standard_normal((n, 2)))


def _swiss_roll(rng: np.random.Generator, n: int) -> np.ndarray:
    """One spiral of one and a half turns, uniform in angle, with Gaussian blur."""
    angle = 1.5 * math.pi * (1 + 2 * rng.uniform(size=n))
    x = np.stack([angle * np.cos(angle), angle * np.sin(angle)], axis=1)
    return (x + 0.35 * rng.standard_normal((n, 2)) - [2.0, 0.7]) / 6.8


def _checkerboard(rng: np.random.Generator, n: int) -> np.ndarray:
    """The eight dark squares of a 4x4 board, uniform: log-density -log(8 h^2) on them with h the side of a square."""
    row = rng.integers(0, 4, n)
    column = 2 * rng.integers(0, 2, n) + row % 2
    return 0.85 * (np.stack([column, row], axis=1) + rng.uniform(size=(n, 2)) - 2)


def _circles(rng: np.random.Generator, n: int) -> np.ndarray:
    """Two rings around the origin with Gaussian blur."""
    angle, radius = rng.uniform(0, 2 * math.pi, n), rng.choice([0.75, 1.75], n)
    x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return x + 0.08 * rng.standard_normal((n, 2))


def _pinwheel(rng: np.random.Generator, n: int) -> np.ndarray:
    """Five Gaussian arms, twisted."""
    arm, x = rng.integers(0, 5, n), rng.standard_normal((n, 2)) * [0.3, 0.1] + [1.0, 0.0]
    angle = 2 * math.pi * arm / 5 + 0.25 * np.exp(x[:, 0])
    turned = [x[:, 0] * np.cos(angle) - x[:, 1] * np.sin(angle), x[:, 0] * np.sin(angle) + x[:, 1] * np.cos(angle)]
    return 1.35 * np.stack(turned, axis=1)


TOYS: dict[str, Sampler] = {
    "moons": _moons,
    "swiss_roll": _swiss_roll,
    "checkerboard": _checkerboard,
    "circles": _circles,
    "pinwheel": _pinwheel,
}


def toy(name: str, *, size: int = 10_000, test_size: int = 2_000, seed: int = 0) -> Dataset:
    """Samples of a two-dimensional density.

    Args:
        name: one of :data:`TOYS`, or an entry of ``sdegen.oracles.ORACLES``.
        size: training examples.
        test_size: held-out examples, from an independent stream.
        seed: of both.

    >>> toy("moons").event_shape
    (2,)
    """
    if name in TOYS:
        train, test = (
            torch.from_numpy(TOYS[name](np.random.default_rng([seed, part]), n)).float()
            for part, n in enumerate((size, test_size))
        )
        return Dataset(name, train, test, source=f"sdegen.data.toys, seed {seed}")
    from sdegen.oracles import ORACLES, oracle

    if name not in ORACLES:
        raise ValueError(f"unknown density {name!r}; there are {', '.join([*TOYS, *ORACLES])}")
    exact = oracle(name)
    train, test = (exact.sample(n, seed=2 * seed + part).float() for part, n in enumerate((size, test_size)))
    return Dataset(name, train, test, exact=exact, source=f"sdegen.oracles, seed {seed}")
