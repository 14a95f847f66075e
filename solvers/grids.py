"""Time grids: where a solver evaluates, and the only place where a number of steps lives.

A grid is a 1-D float64 CPU tensor ``ts``, strictly monotone in the direction of travel: from ``t_max`` (noise) down to
``t_min`` (data) to sample, or back to encode. ``n`` steps have ``n + 1`` nodes. Where the nodes lie matters as much as
the solver. Nearly every grid in use spaces them equally in some function of the noise level sigma / alpha:

    t                 uniform        what a stochastic differential equation suggests; depends on the path's clock
    t^(1/p)           power          quadratic (p = 2) is dense near the data
    logsnr            logsnr         what exponential integrators are exact in; polyexponential bends it
    (sigma/alpha)^(1/rho)  karras    between logsnr (rho large) and uniform in sigma / alpha (rho = 1)
    sigma/(alpha+sigma)    flow      the time of straight lines; shift moves it towards the noise
                      shift_for_size  by as much as the size of an image asks for (dynamic shift)
    its square root   sqrt_flow      dense near the data, sparse at the noise: what measurements favour
    quantiles         beta           of a beta distribution of t: dense at both ends

``leading``, ``linspace`` and ``trailing`` pick whole-numbered levels of a discrete model, and :func:`through` carries a
list of levels that somebody else has found over to any number of steps (``ays_sd1`` is such a list). A grid for one
problem and one solver is found by :func:`solvers.optimize_grid`, and one from the geometry of its solutions by
:func:`solvers.gits`.

Every grid here ends at ``path.t_min``, where logsnr is finite; what happens after (stop there, or take the predicted
data) is said by the ``end`` of :func:`solvers.solve` and is no part of a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from scipy import special  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from solvers.problem import Path

__all__ = [
    "ALIGN_YOUR_STEPS",
    "GRIDS",
    "Grid",
    "beta",
    "check_grid",
    "flow",
    "karras",
    "leading",
    "linspace",
    "logsnr",
    "polyexponential",
    "power",
    "quadratic",
    "shift",
    "shift_for_size",
    "sqrt_flow",
    "through",
    "trailing",
    "uniform",
    "vp_quadratic",
]

Grid = Callable[[Path, int], Tensor]


def _ends(path: Path) -> Tensor:
    """The noisy and the clean end of the range, (2,), with all their digits."""
    return torch.tensor([path.t_max, path.t_min], dtype=torch.float64)


def _spread(ends: Tensor, n: int) -> Tensor:
    """n equal steps from ends[0] to ends[1]."""
    if n < 1:
        raise ValueError(f"a grid has at least one step, got {n}")
    return torch.lerp(ends[0], ends[1], torch.linspace(0, 1, n + 1, dtype=torch.float64))


def _pinned(path: Path, ts: Tensor) -> Tensor:
    """The same nodes with both ends exactly at the path's range: an inverse function is only exact to rounding."""
    ts[0], ts[-1] = path.t_max, path.t_min
    return ts


def uniform(path: Path, n: int) -> Tensor:
    """Equal steps in t. Reference: Song et al. 2021, arXiv:2011.13456.

    Args:
        path: the Gaussian path.
        n: number of steps.

    Returns:
        ts of shape (n + 1,), float64, falling from ``path.t_max`` to ``path.t_min``.
    """
    return _pinned(path, _spread(_ends(path), n))


def power(path: Path, n: int, p: float = 2.0) -> Tensor:
    """Equal steps in t^(1/p): p = 2 is the quadratic grid of DDIM, larger p puts more nodes near the data.

    Reference: Song, Meng and Ermon 2021, arXiv:2010.02502, appendix D.2.
    """
    if p <= 0:
        raise ValueError(f"the power of a grid is positive, got {p}")
    return _pinned(path, _spread(_ends(path) ** (1 / p), n) ** p)


def quadratic(path: Path, n: int) -> Tensor:
    """Equal steps in sqrt(t): :func:`power` with p = 2. In use for DDIM on CIFAR-10 and as the default of DEIS."""
    return power(path, n, 2.0)


def logsnr(path: Path, n: int) -> Tensor:
    """Equal steps in logsnr, also called exponential (in sigma). In use for DPM-Solver on small images.

    Reference: Lu et al. 2022, arXiv:2206.00927, section 3.3.
    """
    return polyexponential(path, n, 1.0)


def polyexponential(path: Path, n: int, rho: float = 1.0) -> Tensor:
    """logsnr = logsnr_min + (logsnr_max - logsnr_min) (1 - (1 - i/n)^rho): rho = 1 is :func:`logsnr`.

    rho > 1 takes its longest steps at the noise and is dense at the data, rho < 1 is the other way round.

    Reference: ``get_sigmas_polyexponential`` in Crowson's k-diffusion.
    """
    if rho <= 0:
        raise ValueError(f"rho is positive, got {rho}")
    noisy, clean = path.logsnr(_ends(path)).unbind()
    left = _spread(torch.tensor([1.0, 0.0], dtype=torch.float64), n) ** rho
    return _pinned(path, path.time(torch.lerp(clean, noisy, left)))


def karras(path: Path, n: int, rho: float = 7.0) -> Tensor:
    """Equal steps in (sigma / alpha)^(1/rho). In use for EDM: rho = 7; rho = 3 has the least truncation error.

    Reference: Karras et al. 2022, arXiv:2206.00364, eq. 5 and appendix D.1.
    """
    if rho <= 0:
        raise ValueError(f"rho is positive, got {rho}")
    ends = (-0.5 * path.logsnr(_ends(path)) / rho).exp()
    return _pinned(path, path.time(-2 * rho * _spread(ends, n).log()))


def flow(path: Path, n: int) -> Tensor:
    """Equal steps in flow time sigma / (alpha + sigma), which is t on the straight-line path: :func:`shift` by 1."""
    return shift(path, n, 1.0)


def shift(path: Path, n: int, s: float = 3.0) -> Tensor:
    """Equal steps in u, with flow time r = sigma / (alpha + sigma) = s u / (1 + (s - 1) u).

    s > 1 spends more steps at the noise, as larger images ask for: r / (1 - r) is the noise level, and s scales it.

    Reference: Esser et al. 2024, arXiv:2403.03206, eq. 23 (s = 3); Hoogeboom et al. 2023, arXiv:2301.11093.
    """
    if s <= 0:
        raise ValueError(f"the shift of a grid is positive, got {s}")
    # u / (1 - u) = (sigma / alpha) / s, so u is a sigmoid of logsnr, and back.
    u = _spread((-0.5 * path.logsnr(_ends(path)) - np.log(s)).sigmoid(), n)
    return _pinned(path, path.time(-2 * (u.logit() + np.log(s))))


def shift_for_size(
    path: Path,
    n: int,
    tokens: float = 4096,
    small: tuple[float, float] = (256, 0.5),
    large: tuple[float, float] = (4096, 1.15),
) -> Tensor:
    """:func:`shift` by s = e^mu, with mu a straight line in the size of the event: the "dynamic" shift of flow models.

    The same noise hides less of a larger image, whose neighbouring pixels say the same.

    Args:
        path: the Gaussian path.
        n: number of steps.
        tokens: size of the event as the network sees it, in patches; 4096 are 1024 x 1024 pixels in patches of 16 x 16.
        small: (tokens, mu) of a small event.
        large: (tokens, mu) of a large one.

    Reference: Black Forest Labs 2024, FLUX.1 (mu from 0.5 at 256 tokens to 1.15 at 4096), and ``use_dynamic_shifting``
        of diffusers; Esser et al. 2024, arXiv:2403.03206, eq. 23, where s is the root of a ratio of sizes.
    """
    if not tokens > 0 or small[0] == large[0]:
        raise ValueError(f"sizes are positive and those of the line differ, got {tokens} on {small} to {large}")
    mu = small[1] + (large[1] - small[1]) * (tokens - small[0]) / (large[0] - small[0])
    return shift(path, n, float(np.exp(mu)))


def sqrt_flow(path: Path, n: int) -> Tensor:
    """Equal steps in sqrt(sigma / (alpha + sigma)), the square root of flow time.

    The quadratic grid of straight lines, on whatever path: near the data steps grow as sqrt(sigma / alpha), near the
    noise as alpha / sigma. Of the grids here the most accurate for nearly every method of order 1 to 3 that
    extrapolates x0 or the velocity (``benchmarks/solvers.py``), and their default.
    """
    root = _spread((-0.5 * path.logsnr(_ends(path))).sigmoid().sqrt(), n)
    return _pinned(path, path.time(-2 * root.square().logit()))


def vp_quadratic(path: Path, n: int) -> Tensor:
    """Equal steps in log(1 + sigma^2 / alpha^2)^(1/4), which is sqrt(t) on the VP path of linear beta if beta_min = 0.

    DDIM's quadratic grid of that path on every other one: on the noise side it keeps more nodes than
    :func:`sqrt_flow`, which methods that integrate eps or a velocity by Runge-Kutta need. Their default.
    """
    root = _spread(torch.nn.functional.softplus(-path.logsnr(_ends(path))) ** 0.25, n)
    return _pinned(path, path.time(-torch.expm1(root**4).log()))


def beta(path: Path, n: int, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Quantiles of a beta distribution of *times*, as in the paper (some code bases take those of noise levels).

    (t - t_min) / (t_max - t_min) has the distribution function I_x(a, b); a, b < 1 is dense at both ends.

    Reference: Lee et al. 2024, arXiv:2407.12173, section 4 (a = b = 0.6).
    """
    if a <= 0 or b <= 0:
        raise ValueError(f"a beta distribution has positive parameters, got {a} and {b}")
    left = _spread(torch.tensor([1.0, 0.0], dtype=torch.float64), n)
    noisy, clean = _ends(path).unbind()
    quantiles = torch.tensor(cast("Any", special).betaincinv(a, b, left.numpy()), dtype=torch.float64)
    return _pinned(path, torch.lerp(clean, noisy, quantiles))


def through(levels: Sequence[float] | Tensor) -> Grid:
    """The grid through a list of noise levels sigma / alpha: with as many nodes the list itself, else in between.

    Between two of them the logarithm of the level is a straight line in the node's number, as is usual for lists that
    were optimised for ten steps and are used for more. The ends of the list are replaced by those of the path.

    Args:
        levels: falling, positive, at least two.

    Returns:
        A function (path, n) -> ts.

    Reference: Sabour et al. 2024, arXiv:2404.14507 ("Align Your Steps").
    """
    log = torch.as_tensor(levels, dtype=torch.float64).log()
    if log.ndim != 1 or len(log) < 2 or not bool(log.isfinite().all() & (log.diff() < 0).all()):
        raise ValueError(f"noise levels are positive and strictly falling, at least two, got {levels}")

    def grid(path: Path, n: int) -> Tensor:
        last = len(log) - 1
        where = _spread(torch.tensor([0.0, last], dtype=torch.float64), n)
        low = where.floor().clamp(max=last - 1).long()
        wanted = -2 * torch.lerp(log[low], log[low + 1], where - low)[1:-1]
        ends = path.logsnr(_ends(path))
        inside = torch.cat([ends[:1], wanted, ends[1:]])
        if not bool((inside.diff() > 0).all()):
            raise ValueError(f"noise levels {levels} do not lie inside the path's range")
        return _pinned(path, path.time(inside))

    return grid


ALIGN_YOUR_STEPS: dict[str, tuple[float, ...]] = {
    "ays_sd1": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays_svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""Noise levels that Sabour et al. (2024, arXiv:2404.14507) found for ten steps of three image and video models; that of
videos begins at a level that few paths reach, so it is no name in ``GRIDS``."""


def _levels(path: Path, index: Tensor, levels: int) -> Tensor:
    """Times of the whole-numbered levels 1..levels, equally spaced from t_min to t_max: i / T for a table of T."""
    noisy, clean = _ends(path).unbind()
    return torch.lerp(clean, noisy, (index - 1).double() / (levels - 1))


def _enough(n: int, levels: int) -> None:
    if not 1 <= n < levels:
        raise ValueError(f"a grid over {levels} levels has 1 to {levels - 1} steps, got {n}")


def leading(path: Path, n: int, levels: int = 1000) -> Tensor:
    """Every k-th of the discrete levels counted from the data end, as in DDPM code bases.

    It misses the noisiest level by design, so a sampler starts at the wrong signal-to-noise ratio; it is here to
    compare.

    Reference: Lin et al. 2024, arXiv:2305.08891, table 2.
    """
    _enough(n, levels)
    return _levels(path, 1 + torch.arange(n, -1, -1) * (levels // (n + 1)), levels)


def linspace(path: Path, n: int, levels: int = 1000) -> Tensor:
    """Equally spaced discrete levels, both ends included, rounded to whole levels (as :func:`leading`)."""
    _enough(n, levels)
    return _pinned(path, _levels(path, torch.linspace(levels, 1, n + 1, dtype=torch.float64).round(), levels))


def trailing(path: Path, n: int, levels: int = 1000) -> Tensor:
    """Every k-th of the discrete levels counted from the noise end, then the cleanest level (as :func:`leading`)."""
    _enough(n, levels)
    index = (levels - torch.arange(n + 1).double() * levels / n).round().clamp(min=1)
    return _pinned(path, _levels(path, index, levels))


GRIDS: dict[str, Grid] = {
    "uniform": uniform,
    "logsnr": logsnr,
    "quadratic": quadratic,
    "karras": karras,
    "flow": flow,
    "shift": shift,
    "shift_for_size": shift_for_size,
    "sqrt_flow": sqrt_flow,
    "vp_quadratic": vp_quadratic,
    "beta": beta,
    "leading": leading,
    "linspace": linspace,
    "trailing": trailing,
    "ays_sd1": through(ALIGN_YOUR_STEPS["ays_sd1"]),
    "ays_sdxl": through(ALIGN_YOUR_STEPS["ays_sdxl"]),
}
"""The grids by name; ``functools.partial(karras, rho=3)`` makes another, and so does :func:`through`."""


def check_grid(ts: Tensor, t_min: float, t_max: float) -> Tensor:
    """Refuse what is no grid.

    Args:
        ts: nodes, (N + 1,), any float dtype, on any device.
        t_min: cleanest time allowed.
        t_max: noisiest time allowed.

    Returns:
        The same nodes as a float64 CPU tensor.

    Raises:
        ValueError: fewer than two nodes, not finite, not strictly monotone (a step of 1e-12 of the time has no length),
            or outside [t_min, t_max].
    """
    ts = torch.as_tensor(ts).detach().to("cpu", torch.float64)
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(f"a grid is 1-D with at least two nodes, got shape {tuple(ts.shape)}")
    if not bool(ts.isfinite().all()):
        raise ValueError(f"a grid is finite, got {ts}")
    steps = ts.diff()
    if not bool((steps < 0).all() or (steps > 0).all()):
        worst = int((steps * steps.sum().sign()).argmin())
        raise ValueError(
            f"a grid is strictly monotone: node {worst} at t = {ts[worst]:.6g} is followed by t = {ts[worst + 1]:.6g}"
        )
    # A rounding apart is the same node twice: correctors and extrapolations divide by the step.
    if bool((same := steps.abs() <= 1e-12 * ts[1:].abs()).any()):
        worst = int(same.int().argmax())
        raise ValueError(f"a grid has no node twice: nodes {worst} and {worst + 1} are both t = {ts[worst]:.6g}")
    low, high = float(ts.min()), float(ts.max())
    slack = 1e-12 * max(1.0, abs(t_max))
    if low < t_min - slack or high > t_max + slack:
        raise ValueError(f"a grid lies in the path's range [{t_min:.6g}, {t_max:.6g}], got [{low:.6g}, {high:.6g}]")
    return ts
