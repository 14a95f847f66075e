"""The bound for every number of levels and every grid from one pass, and the best grid for each.

A bound with T levels is a sum over neighbouring levels, and each term is a function of the denoising error at one of
them. With the best variance of the reverse process it is

    E KL(t -> s) = D/2 log( 1 + (exp l_s - exp l_t) m(l_t) ),        m(l) = E|x - x0_hat|^2 / D at logsnr l,

so a measured curve m (:class:`sdegen.likelihood.profile.DenoisingProfile`) gives the bound of every grid, and the best
way to the i-th of T levels is the best way to some earlier level and one more step: dynamic programming finds the best
grid of all that lie on a fine one.

For isotropic Gaussian data the terms telescope: no grid is better than another, and one level is as good as all.

References: Watson et al. 2021, arXiv:2106.03802 (grids by dynamic programming); Bao et al. 2022, arXiv:2201.06503 (the
best variance).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sdegen.levels import Discrete, Optimal, Variance
from sdegen.likelihood.profile import DenoisingProfile
from sdegen.likelihood.report import LikelihoodReport
from solvers.grids import Grid

__all__ = ["best_grid", "bound_of_every_T"]


def bound_of_every_T(
    profile: DenoisingProfile,
    Ts: Sequence[int],
    grid: str | Grid | Mapping[int, Tensor] = "uniform",
    variance: str | Variance | None = None,
) -> dict[int, LikelihoodReport]:
    """The bound with T levels, for every T, without asking the network again.

    Args:
        profile: what was measured.
        Ts: numbers of levels.
        grid: a name in :data:`solvers.GRIDS`, a function, or the rising times themselves for each T, such as
            ``{T: best_grid(profile, T)}``.
        variance: of the reverse process; the best one for the measured error where None.
    """
    variance = Optimal(profile.mse) if variance is None else variance
    found: dict[int, LikelihoodReport] = {}
    for T in Ts:
        levels = Discrete.on(profile.path, T, grid="uniform" if isinstance(grid, Mapping) else grid, variance=variance)
        found[T] = profile.bound(replace(levels, ts=grid[T]) if isinstance(grid, Mapping) else levels)
    return found


def best_grid(
    profile: DenoisingProfile, T: int, *, variance: Variance | None = None, candidates: int | None = None
) -> Tensor:
    """The T levels with the least bound, by dynamic programming over equally spaced candidates in logsnr.

    A grid that is chosen on some data flatters these data a little: choose on a profile of training data.

    Args:
        profile: of the data to choose on.
        T: number of levels, at most ``candidates``.
        variance: as in :func:`bound_of_every_T`.
        candidates: places a level may have; four for each level by default, between 512 and 2048. The work is T times
            their square: ten seconds for a thousand levels.

    Returns:
        Rising times, (T + 1,), for ``Discrete(ts, variance)``.

    Reference: Watson et al. 2021, arXiv:2106.03802, algorithm 1.
    """
    candidates = candidates or min(2048, max(512, 4 * T))
    if not 1 <= T <= candidates:
        raise ValueError(f"T is between 1 and the number of candidates, {candidates}, not {T}")
    path, variance = profile.path, variance or Optimal(profile.mse)
    clean, noisy = float(profile.edges[-1]), float(profile.edges[0])
    logsnr = torch.linspace(clean, noisy, candidates + 1, dtype=torch.float64)
    ts = path.time(logsnr).clamp(path.t_min, path.t_max)
    ts[0], ts[-1] = path.t_min, path.t_max
    before, after = torch.triu_indices(candidates + 1, candidates + 1, offset=1)
    r = variance(path, ts[before], ts[after])
    kl = r * torch.expm1(logsnr[before] - logsnr[after]) * profile.mse.noise(logsnr)[after] + r - 1 - r.log()
    cost = torch.full((candidates + 1, candidates + 1), math.inf, dtype=torch.float64)  # row: to, column: from
    cost[after, before] = kl
    table, total = cost.numpy(), np.empty(cost.shape)
    best = np.full(candidates + 1, np.inf)
    best[0], came = 0.0, []
    for _ in range(T):
        np.add(table, best, out=total)
        came.append(total.argmin(1))
        best = np.take_along_axis(total, came[-1][:, None], 1)[:, 0]
    chosen = [candidates]
    for way in reversed(came):
        chosen.append(int(way[chosen[-1]]))
    return ts[chosen[::-1]]
