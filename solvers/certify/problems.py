"""Problems whose answer is known, and grids on which a wrong coefficient cannot hide.

A problem is in reach of a measurement when its steps are small: between logsnr -8 and 8, with components as broad as
they are far apart, 20 steps are few and 1280 are many. At the ends of a schedule with logsnr 20 they are not.

Grids matter as much. On a smooth grid neighbouring steps become equal as N grows, and a multistep method whose weights
are those of equal steps passes; :func:`uneven` repeats a pattern of unequal steps (ratios up to 4) at every N, and
stays as uneven as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.combine import OnPath
from solvers.curves import VP_LAM
from solvers.external import ScipyODE
from solvers.grids import Grid, karras, logsnr, uniform
from solvers.integrate import integrate
from solvers.noise import standard_normal
from solvers.problem import DiffusionProblem, Path, Prediction, expand

__all__ = ["CERTIFIED_GRIDS", "MEANS", "STDS", "exact", "gaussian", "mixture", "starts", "uneven"]


def uneven(path: Path, n: int, seed: int = 0) -> Tensor:
    """Steps in logsnr whose lengths repeat a random pattern of five, neighbours differing by factors up to 4.

    Args:
        path: the Gaussian path.
        n: number of steps; multiples of 5 hold whole patterns.
        seed: of the pattern.
    """
    widths = 4.0 ** -torch.linspace(0, 1, 5, dtype=torch.float64)
    order = standard_normal((5,), seed).argsort()
    parts = torch.cat([torch.zeros(1).double(), widths[order].repeat(n // 5 + 1)[:n].cumsum(0)])
    ends = path.logsnr(torch.tensor([path.t_max, path.t_min], dtype=torch.float64))
    ts = path.time(torch.lerp(ends[0], ends[1], parts / parts[-1]))
    ts[0], ts[-1] = path.t_max, path.t_min
    return ts


CERTIFIED_GRIDS: dict[str, Grid] = {"uniform": uniform, "logsnr": logsnr, "karras": karras, "uneven": uneven}
"""The grids that a certificate may be asked for, by name."""

MEANS = torch.tensor([-0.5, 0.3, 0.8], dtype=torch.float64)
STDS = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
"""Three Gaussians at once: the error of one may change its sign as N grows, and a slope there says nothing."""


def gaussian(path: Path, mean: Tensor | float = 0.3, std: Tensor | float = 0.5) -> DiffusionProblem:
    """The exact denoiser for data N(mean, std^2), independent coordinates: affine, elementwise, for any event shape.

    x0 = mean + alpha std^2 / (alpha^2 std^2 + sigma^2) (x - alpha mean),  eps = sigma / (...) (x - alpha mean).
    """

    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = expand(path.alpha(t), x), expand(path.sigma(t), x)
        variance, centred = (alpha * std) ** 2 + sigma**2, x - alpha * mean
        return Prediction(mean + alpha * std**2 / variance * centred, sigma / variance * centred)

    return DiffusionProblem(path, predict)


WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
CENTRES = torch.tensor([[-0.5, 0.3], [0.4, -0.4]], dtype=torch.float64)
VARIANCES = torch.tensor([[0.09, 0.16], [0.16, 0.09]], dtype=torch.float64)


def mixture(path: Path) -> DiffusionProblem:
    """The exact denoiser of two overlapping Gaussians in the plane, 0.3 and 0.7 of the data: smooth and not linear.

    eps = sigma SUM_k r_k(x) (x - alpha m_k) / (alpha^2 v_k + sigma^2),        r_k the posterior of component k.
    """

    def predict(x: Tensor, t: Tensor) -> Prediction:
        rows = x.unsqueeze(1)  # (B, 1, 2) against components (2, 2)
        alpha, sigma = path.alpha(t), path.sigma(t)
        a = expand(alpha, rows)
        variance = a**2 * VARIANCES.to(x) + expand(sigma, rows) ** 2
        centred = rows - a * CENTRES.to(x)
        towards = centred / variance
        share = (WEIGHTS.to(x).log() - 0.5 * (centred * towards + variance.log()).sum(-1)).softmax(-1)
        eps = expand(sigma, x) * (share.unsqueeze(-1) * towards).sum(1)
        return Prediction((x - expand(sigma, x) * eps) / expand(alpha, x), eps)

    return DiffusionProblem(path, predict)


def exact(problem: DiffusionProblem, x: Tensor) -> Tensor:
    """The solution of the probability-flow ODE from t_max to t_min, to about 1e-14."""
    ts = torch.tensor([problem.t_max, problem.t_min], dtype=torch.float64)
    return integrate(OnPath(ScipyODE("DOP853", rtol=3e-14, atol=1e-15), VP_LAM), problem, x, ts).x


def starts(problem: DiffusionProblem, batch: int = 16, event: tuple[int, ...] = (2,)) -> Tensor:
    """The states at t_max from which certificates are measured, float64."""
    sigma = float(problem.path.sigma(torch.tensor(problem.t_max, dtype=torch.float64)))
    return sigma * standard_normal((batch, *event), 1, dtype=torch.float64)
