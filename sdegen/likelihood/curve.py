"""The denoising error between the noise levels where it was measured.

What is measured are averages over bands of logsnr, and so, exactly, the areas below their edges. The curve is the
derivative of the cubic spline through these areas: its average over each band is the measured one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

__all__ = ["ErrorCurve"]


@dataclass(frozen=True, eq=False)
class ErrorCurve:
    """m(logsnr) = E|x - x0_hat|^2 / D, smooth, from the average error of the noise in bands.

    Calling it is what :class:`sdegen.levels.Optimal` and :class:`solvers.AnalyticDPM` want.

    Args:
        edges: of the bands, logsnr, rising, (K + 1,).
        errors: average of |eps - eps_hat|^2 / D over each band, (K,).
    """

    edges: Tensor
    errors: Tensor

    def weights(self, logsnr: Tensor) -> Tensor:
        """How much each band's average counts for the curve at a level, (..., K); each row sums to one."""
        return self._curve(logsnr, np.eye(len(self.errors)))

    def noise(self, logsnr: Tensor) -> Tensor:
        """E|eps - eps_hat|^2 / D, not negative."""
        return self._curve(logsnr, self.errors.numpy()).clamp(min=0).to(logsnr.device)

    def _curve(self, logsnr: Tensor, averages: np.ndarray) -> Tensor:
        """The derivative of the spline through the areas that lie below the edges, for averages (K, ...)."""
        edges = self.edges.numpy()
        areas = np.cumsum((np.diff(edges) * averages.T).T, 0)
        below = CubicSpline(edges, np.concatenate([np.zeros_like(areas[:1]), areas]))
        at = logsnr.detach().cpu().double().clamp(float(edges[0]), float(edges[-1]))
        return torch.from_numpy(np.asarray(below(at.numpy(), 1)))

    def __call__(self, logsnr: Tensor) -> Tensor:
        return (-logsnr).exp() * self.noise(logsnr)

    def __repr__(self) -> str:
        return f"ErrorCurve({len(self.errors)} bands)"
