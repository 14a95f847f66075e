"""How far a cloud of endpoints is from the truth, and how far exact samples of the same size are.

Each number compares one property of two laws; none of them sees everything:

    sliced_w2     Wasserstein-2 distance of one-dimensional projections, root mean square over directions: global shape
    w2            Wasserstein-2 distance itself, by exact transport of a part of the cloud: everything, with a large
                  floor in many dimensions, where two samples of one law lie far apart
    energy        sqrt(2 E|X - Y| - E|X - X'| - E|Y - Y'|), zero only for equal laws: between the two
    mode_error    half of the sum of |weight found - true weight| over components: missed and doubled modes
    mean_error    |mean found - true mean| in units of the data's standard deviation
    cov_error     relative error of the covariance, Frobenius: too wide or too narrow
    log_density   mean log-density of the endpoints under the truth, nats: stray samples; higher is not better, exact
                  samples have minus the entropy

Exact samples of the same size have each of these too, from chance alone. That *floor* is measured on fresh exact
samples, with the upper end of its 95 % range: a distance below it says nothing against a solver.

All is in units of the data, x / alpha at t_min, and compared with the law there: solvers stop at t_min, and are not
blamed for the noise that is left.
"""

from __future__ import annotations

import importlib
import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdegen.oracles import MixtureOracle, Oracle
from solvers import standard_normal
from solvers.problem import Path

__all__ = ["DISTANCES", "Cloud", "sliced_wasserstein"]

DISTANCES = ("sliced_w2", "w2", "energy", "mode_error", "mean_error", "cov_error", "log_density")
FRESH = 8  # sets of exact samples that the floor is measured on


class Cloud:
    """Exact samples at t_min, and what endpoints are compared with them.

    Args:
        truth: the law of the data.
        path: the Gaussian path.
        count: samples.
        transport: of these, how many for ``w2`` and ``energy``; 0 leaves them out.
        seed: of the samples.
    """

    def __init__(self, truth: Oracle, path: Path, count: int, transport: int, seed: int) -> None:
        self.truth, self.path, self.count, self.transport, self.seed = truth, path, count, min(transport, count), seed
        self.t = torch.tensor(path.t_min, dtype=torch.float64)
        self.alpha, self.sigma = (float(c) for c in (path.alpha(self.t), path.sigma(self.t)))
        self.exact = self._drawn(0)

    def _drawn(self, number: int) -> Tensor:
        """Exact samples of the law at t_min, flat and in units of the data, float64."""
        seed = self.seed + number
        x = self.truth.sample(self.count, seed)
        noise = standard_normal(x.shape, seed + 500, dtype=torch.float64)
        return (x + self.sigma / self.alpha * noise).flatten(1)

    def measured(self, z: Tensor) -> dict[str, float]:
        """Every distance of endpoints (count, *event), as a solver returns them, by name; NaN where it is unknown."""
        return self._compared(z.double().cpu().flatten(1) / self.alpha)

    @cached_property
    def floors(self) -> dict[str, float]:
        """NAME_floor and NAME_floor_high: mean, and mean plus two standard deviations, over sets of exact samples."""
        sets = [self._compared(self._drawn(1 + i)) for i in range(FRESH)]
        found: dict[str, float] = {}
        for name in DISTANCES:
            values = np.array([one[name] for one in sets])
            found |= {
                f"{name}_floor": float(values.mean()),
                f"{name}_floor_high": float(values.mean() + 2 * values.std(ddof=1)),
            }
        return found

    def _compared(self, y: Tensor) -> dict[str, float]:
        found: dict[str, float] = dict.fromkeys(DISTANCES, math.nan)
        found["sliced_w2"] = sliced_wasserstein(y, self.exact)
        if self.transport:
            found["w2"] = wasserstein(y[: self.transport], self.exact[: self.transport])
            found["energy"] = self._energy(y[: self.transport])
        # The density of x / alpha is that of x times alpha^D.
        states = (self.alpha * y).reshape(len(y), *self.truth.event_shape)
        log_prob = self.truth.log_prob_t(states, self.path, self.t)
        found["log_density"] = float(log_prob.mean()) + y.shape[1] * math.log(self.alpha)
        if isinstance(self.truth, MixtureOracle):
            found.update(self._moments(self.truth, y, states))
        return found

    def _energy(self, y: Tensor) -> float:
        squared = 2 * _mean_distance(y, self.exact[: len(y)]) - _mean_distance(y, y) - self._own_distance
        return math.sqrt(max(squared, 0.0))

    @cached_property
    def _own_distance(self) -> float:
        some = self.exact[: self.transport]
        return _mean_distance(some, some)

    def _moments(self, truth: MixtureOracle, y: Tensor, states: Tensor) -> dict[str, float]:
        weights, means = truth.weights, truth.means
        mean = weights @ means
        apart = means - mean
        cov = torch.einsum("k,kij->ij", weights, truth.covs + apart[:, :, None] * apart[:, None, :])
        cov = cov + (self.sigma / self.alpha) ** 2 * torch.eye(len(mean), dtype=cov.dtype)
        shares = truth.component_probs(states, self.path, self.t).mean(0)
        centred = y - y.mean(0)
        spread = centred.T @ centred / (len(y) - 1) - cov
        modes = float((shares - weights).abs().sum() / 2) if len(weights) > 1 else math.nan
        return {
            "mode_error": modes,
            "mean_error": float((y.mean(0) - mean).norm() / cov.trace().sqrt()),
            "cov_error": float(spread.norm() / cov.norm()),
        }


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 64, seed: int = 0) -> float:
    """Root mean square, over directions, of the one-dimensional Wasserstein-2 distance of projected samples.

    Args:
        x: (N, *event).
        y: (N, *event), as many.
        projections: number of directions, the same for equal ``seed``.
        seed: of the directions.

    >>> x = torch.zeros(100, 2)
    >>> round(sliced_wasserstein(x, x + torch.tensor([1.0, 0.0])), 1)  # 1 / sqrt(2), the mean over directions
    0.7
    """
    if x.shape != y.shape:
        raise ValueError(f"needs as many samples of one as of the other, got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = x.double().flatten(1), y.double().flatten(1)
    directions = standard_normal((projections, x.shape[1]), seed, dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)
    a, b = ((z @ directions.T).sort(dim=0).values for z in (x, y))
    return float((a - b).square().mean().sqrt())


def wasserstein(x: Tensor, y: Tensor) -> float:
    """Wasserstein-2 distance of two samples of one size, by exact optimal transport; NaN where POT is not installed.

    Args:
        x: (N, D).
        y: (N, D).
    """
    pot = transport_library()
    if pot is None:
        return math.nan
    weights = np.full(len(x), 1 / len(x))
    cost = torch.cdist(x, y).square().numpy()
    return math.sqrt(max(float(pot.emd2(weights, weights, cost, numItermax=2_000_000)), 0.0))


def transport_library() -> Any:
    """POT, or None where it is not installed: ``pip install 'sdegen[metrics]'``."""
    try:
        return importlib.import_module("ot.lp")
    except ImportError:
        return None


def _mean_distance(x: Tensor, y: Tensor) -> float:
    # The differences themselves: |x|^2 + |y|^2 - 2 xy would cancel where x and y are close.
    return float(torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").mean())
