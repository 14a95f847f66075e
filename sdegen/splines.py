"""A smooth curve through rising points that rises everywhere and is inverted by a quadratic equation.

With equal intervals of u, and in one of them u in [0, 1] the way through it, s its rise and p, q the slopes at its
ends, the rational quadratic

    y = y_i + s [s u^2 + p u (1 - u)] / [s + (p + q - 2 s) u (1 - u)]

goes from y_i to y_{i+1}, has those slopes, and rises for all positive p and q. The slope at a point is the harmonic
mean of the rises beside it, and at both ends the linear extrapolation of the slopes, which is 2 s^2 / (s + s') for s'
the rise next to s. So the points say everything, the curve is once differentiable, and where the points depend on
parameters, the curve and its inverse can be differentiated in them.

Reference: Gregory and Delbourgo 1982, doi:10.1093/imanum/2.2.123; Durkan et al. 2019, arXiv:1906.04032.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RisingSpline"]


class RisingSpline:
    """The curve through ``points`` at u = 0, 1/K, ..., 1.

    Args:
        points: K + 1 strictly rising values, float64, K at least 2.

    >>> curve = RisingSpline(torch.tensor([0.0, 0.1, 0.4, 1.0]).double())
    >>> curve.inverse(curve(torch.tensor(0.7).double()))
    tensor(0.7000, dtype=torch.float64)
    """

    def __init__(self, points: Tensor) -> None:
        rise = points.diff()
        inner = 2 / (1 / rise[1:] + 1 / rise[:-1])
        first, last = 2 * rise[0] ** 2 / (rise[0] + rise[1]), 2 * rise[-1] ** 2 / (rise[-1] + rise[-2])
        slopes = torch.cat([first[None], inner, last[None]])
        self.intervals = len(rise)
        self._rows = torch.stack([points[:-1], rise, slopes[:-1], slopes[1:]])  # slopes per interval, not per unit of u

    def __call__(self, u: Tensor) -> Tensor:
        """y at u in [0, 1], of any shape and dtype."""
        (start, s, p, q), u_ = self._locate(u)
        return (start + s * u_ * (s * u_ + p * (1 - u_)) / (s + (p + q - 2 * s) * u_ * (1 - u_))).to(u)

    def slope(self, u: Tensor) -> Tensor:
        """dy / du."""
        (_, s, p, q), u_ = self._locate(u)
        top, bottom = q * u_**2 + 2 * s * u_ * (1 - u_) + p * (1 - u_) ** 2, s + (p + q - 2 * s) * u_ * (1 - u_)
        return (self.intervals * s**2 * top / bottom**2).to(u)

    def inverse(self, y: Tensor) -> Tensor:
        """u at y; beyond the last point there is none, and 1 is returned."""
        target = y.double()
        i = torch.bucketize(target.detach(), self._rows[0, 1:].detach().to(y.device), right=True)
        start, s, p, q = self._at(i)
        gone = torch.minimum(target - start, s)
        bend = gone * (p + q - 2 * s)
        b = s * p - bend
        root = torch.sqrt((b**2 + 4 * s * gone * (s * (s - p) + bend)).clamp(min=0))
        return ((i.double() + 2 * s * gone / (b + root)) / self.intervals).to(y)

    def _locate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        way = u.double() * self.intervals
        i = way.floor().clamp(0, self.intervals - 1)
        return self._at(i.long()), way - i

    def _at(self, i: Tensor) -> Tensor:
        """Start, rise and both slopes of some intervals, (4, *i.shape)."""
        return self._rows.to(i.device).index_select(1, i.reshape(-1)).reshape(4, *i.shape)
