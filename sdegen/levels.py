"""Levels: the one thing in which a VAE, a DDPM and a VP-SDE differ.

The bound of all three is reconstruction + latent + prior, and its middle term is an integral of the denoising error
against a measure on the noise levels,

    latent = 1/2 E INT |x - x0_hat(z)|^2 d(-SNR) = 1/2 E INT |eps - eps_hat(z)|^2 dm.

=====================  ==========================================================================================
:class:`Empty`         m = 0: z_0 and z_1 are one latent and nothing lies between (VAE)
:class:`Discrete`      atoms: m = r_i expm1(l_s - l_t) at t = t_i, s = t_{i-1}, i = 1..T (DDPM with T levels)
:class:`Continuous`    m = d logsnr between the ends of the path (VP-SDE)
=====================  ==========================================================================================

The atoms are the Kullback-Leibler divergences of the Gaussian transitions. With c = 1 - exp(l_t - l_s), posterior
variance sigma_Q^2 = sigma_s^2 c and a reverse process of variance sigma_p^2, put r = sigma_Q^2 / sigma_p^2:

    KL( q(z_s | z_t, x) || p(z_s | z_t) ) = D/2 (r - 1 - log r) + r/2 expm1(l_s - l_t) |eps - eps_hat|^2,

so that r = 1 is Kingma's form, and any other variance pays a constant and a factor: it is scored as the model that it
is. The variances have one form, r as a function of a transition: the posterior's, Ho's beta, anything between in
log-variance (:class:`Interpolated`), the best one for an error that was measured (:class:`Optimal`), any numbers
(:class:`Given`). As T grows the atoms become the continuous measure, from above, at the rate 1/T.

Integrals are estimated from uniform numbers u in [0, 1): a *sampling density* carries u to a noise level and the
measure is divided by it, E_u [dm/dp f] = INT f dm, for every density. Stratified u give stratified levels, and with as
many strata as atoms every atom is visited once.

References: Ho et al. 2020, arXiv:2006.11239, eqs. 5-12; Kingma et al. 2021, arXiv:2107.00630, eqs. 12-18 and appendix
E; Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdegen.objectives import Density, UniformTime, Weighting
from solvers.analytic import AnalyticDPM, LearnedVariance
from solvers.ancestral import Ancestral
from solvers.grids import GRIDS, Grid
from solvers.integrate import Solver
from solvers.problem import Path
from solvers.solve import find

__all__ = [
    "VARIANCES",
    "Continuous",
    "Discrete",
    "Draw",
    "Empty",
    "Given",
    "Interpolated",
    "Levels",
    "Optimal",
    "Variance",
    "beta",
    "given",
    "posterior",
]

_CLOCK = UniformTime()

MSE = Callable[[Tensor], Tensor]
"""logsnr -> E|x - x0_hat|^2 / D, of the shape of logsnr: the squared error per coordinate of the predicted data."""


class Draw(NamedTuple):
    """Noise levels with what each stands for.

    Attributes:
        t: times, (n,), float64.
        weight: from :meth:`Levels.draw`, dm/dp, so that the mean of ``weight * f(t)`` over u is INT f dm; from
            :meth:`Levels.nodes`, quadrature weights, so that the sum is.
        own: density of the path's own uniform time relative to m: what "every time counts alike" would weigh.
    """

    t: Tensor
    weight: Tensor
    own: Tensor


class Variance(ABC):
    """The variance sigma_p^2 of the reverse process."""

    @abstractmethod
    def __call__(self, path: Path, s: Tensor, t: Tensor) -> Tensor:
        """r = sigma_Q^2 / sigma_p^2 of the transitions from t to s, each (T,), float64."""

    def solver(self, ts: Tensor) -> Solver[Any]:
        """What samples with this variance on the levels ``ts``."""
        raise ValueError(f"there is no sampler for the reverse variance {self}: choose a solver")


@dataclass(frozen=True)
class Interpolated(Variance):
    """log sigma_p^2 = v log beta + (1 - v) log sigma_Q^2, with beta the variance of q(z_t | z_s).

    r = (sigma_s / sigma_t)^(2 v). v = 0 is the posterior's variance ("fixedsmall"), v = 1 is beta ("fixedlarge"), and
    between lies the range of learned variances: one v for each transition, as :meth:`fit` finds them.

    Args:
        v: one number, or one for each transition from the data to the noise.

    Reference: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15.
    """

    v: float | tuple[float, ...]

    def __call__(self, path: Path, s: Tensor, t: Tensor) -> Tensor:
        v = torch.tensor(self.v, dtype=torch.float64).to(t)
        if v.ndim and len(v) != len(t):
            raise ValueError(f"{len(v)} shares of the range do not fit {len(t)} transitions")
        return (path.sigma(s) / path.sigma(t)) ** (2 * v)

    @classmethod
    def fit(cls, path: Path, ts: Tensor, mse: MSE) -> Interpolated:
        """The v of every transition that minimise the bound: the best variance, held inside the range.

        The bound is convex in r, so that the best r inside a range is the best of all, or the end next to it.

        Args:
            path: the path.
            ts: rising times, (T + 1,).
            mse: E|x - x0_hat|^2 / D at a level.
        """
        s, t = ts[:-1], ts[1:]
        whole = 2 * (path.sigma(s) / path.sigma(t)).log()
        v = Optimal(mse)(path, s, t).log() / whole
        return cls(tuple(v.clamp(0, 1).tolist()))

    def solver(self, ts: Tensor) -> Solver[Any]:
        if isinstance(self.v, float | int):
            return Ancestral(self.v)
        shares = torch.tensor(self.v, dtype=torch.float64)

        def share(x: Tensor, t: Tensor) -> Tensor:
            return shares[torch.searchsorted(ts[1:].contiguous(), t.cpu() - 1e-12).clamp(max=len(shares) - 1)]

        return LearnedVariance(share)

    def __repr__(self) -> str:
        v = f"{len(self.v)} shares" if isinstance(self.v, tuple) else f"v={self.v}"
        return f"Interpolated({v})"


@dataclass(frozen=True, eq=False)
class Optimal(Variance):
    """The variance that minimises the bound: the posterior's, and what is not known of x on top.

    sigma_p^2 = sigma_Q^2 + (alpha_s c)^2 m,    1 / r = 1 + (exp l_s - exp l_t) m,    m = E|x - x0_hat(z_t)|^2 / D

    makes the expected divergence D/2 log(1 / r) = D/2 log(1 + (exp l_s - exp l_t) m): of isotropic Gaussian data these
    terms telescope, and one level is as good as a thousand.

    Args:
        mse: m as a function of logsnr, of any shape; of a trained model ``profile.mse``, of data with one variance
            :class:`solvers.analytic.GaussianMSE`. Measure it on other data than those whose bound is reported.

    Reference: Bao et al. 2022, arXiv:2201.06503, theorem 1.
    """

    mse: MSE

    def __call__(self, path: Path, s: Tensor, t: Tensor) -> Tensor:
        before, after = path.logsnr(s), path.logsnr(t)
        return 1 / (1 + before.exp() * -torch.expm1(after - before) * self.mse(after))

    def solver(self, ts: Tensor) -> Solver[Any]:
        return AnalyticDPM(self.mse)

    def __repr__(self) -> str:
        return f"Optimal({self.mse})"


@dataclass(frozen=True, eq=False)
class Given(Variance):
    """Any sigma_p^2.

    Args:
        variances: one for each transition from the data to the noise, (T,).
    """

    variances: Tensor

    def __call__(self, path: Path, s: Tensor, t: Tensor) -> Tensor:
        if self.variances.shape != t.shape:
            raise ValueError(f"{tuple(self.variances.shape)} variances do not fit {len(t)} transitions")
        kept = -torch.expm1(path.logsnr(t) - path.logsnr(s))
        return path.sigma(s).square() * kept / self.variances.to(t)

    def __repr__(self) -> str:
        return f"Given({len(self.variances)} variances)"


posterior, beta, given = Interpolated(0.0), Interpolated(1.0), Given


VARIANCES: dict[str, Variance] = {"posterior": posterior, "beta": beta}
"""Reverse variances by name."""


class Levels(ABC):
    """A measure m on the noise levels of a path."""

    @abstractmethod
    def draw(self, path: Path, u: Tensor, density: Density) -> Draw:
        """The levels that uniform numbers are carried to.

        Args:
            path: between whose ends the levels lie.
            u: uniform numbers in [0, 1), (n,), float64.
            density: how densely levels are sampled; changes the variance of an estimate and never its mean.
        """

    @abstractmethod
    def nodes(self, path: Path, n: int) -> Draw:
        """A quadrature rule: the sum of ``weight * f(t)`` is INT f dm, exact for atoms (which ignore ``n``)."""

    def constant(self, path: Path) -> float:
        """What the latent term holds beside the denoising error, nats per coordinate: D/2 (r - 1 - log r), summed."""
        return 0.0

    def sampler(self) -> dict[str, Any]:
        """The model's own way from noise to data, as settings of :func:`solvers.solve`."""
        return {"solver": "dpmpp_2m", "steps": 20}

    def integral(
        self, path: Path, u: Tensor, error: Callable[[Tensor], Tensor], density: Density, weighting: Weighting
    ) -> Tensor:
        """One estimate of 1/2 INT w |eps - eps_hat|^2 dm per uniform number.

        Args:
            path: the path.
            u: (n,), float64.
            error: t (n,) -> |eps - eps_hat|^2, (n,).
            density: sampling density.
            weighting: w; one for the bound.

        Returns:
            (n,), float64, nats where w is one.
        """
        at = self.draw(path, u, density)
        w = weighting(path.logsnr(at.t), at.own)
        return 0.5 * w * at.weight * error(at.t)


@dataclass(frozen=True)
class Empty(Levels):
    """No level between the first latent and the last: a VAE."""

    def draw(self, path: Path, u: Tensor, density: Density) -> Draw:
        none = u.new_empty(0)
        return Draw(none, none, none)

    def nodes(self, path: Path, n: int) -> Draw:
        none = torch.empty(0, dtype=torch.float64)
        return Draw(none, none, none)

    def integral(
        self, path: Path, u: Tensor, error: Callable[[Tensor], Tensor], density: Density, weighting: Weighting
    ) -> Tensor:
        return torch.zeros_like(u)


@dataclass(frozen=True)
class Continuous(Levels):
    """Every noise level between the ends of the path: m = d logsnr. The bound depends on the two ends alone."""

    def draw(self, path: Path, u: Tensor, density: Density) -> Draw:
        t = density.time(u, path)
        return Draw(t, 1 / density.pdf(t, path), _CLOCK.pdf(t, path))

    def nodes(self, path: Path, n: int) -> Draw:
        """Gauss-Legendre in logsnr: ``n`` nodes, spread over equal panels of at most 16."""
        low, high = (float(path.logsnr(torch.tensor(t, dtype=torch.float64))) for t in (path.t_max, path.t_min))
        panels = -(-n // 16)
        x, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(-(-n // panels)))
        width = (high - low) / panels
        left = low + width * torch.arange(panels, dtype=torch.float64)
        logsnr = (left[:, None] + 0.5 * width * (x + 1)).flatten()
        t = path.time(logsnr).clamp(path.t_min, path.t_max)
        return Draw(t, (0.5 * width * w).repeat(panels), _CLOCK.pdf(t, path))


@dataclass(frozen=True, eq=False)
class Discrete(Levels):
    """T atoms, one for each transition between neighbouring times of a grid.

    Args:
        ts: T + 1 times from the cleanest to the noisiest, float64, CPU. The first and the last are the path's ends.
        variance: of the reverse process.

    >>> from sdegen.paths import VP, Cosine
    >>> Discrete.on(VP(Cosine()), 1000)
    Discrete(T=1000, variance=Interpolated(v=0.0))
    """

    ts: Tensor = field(repr=False)
    variance: Variance = posterior

    def __post_init__(self) -> None:
        ts = torch.as_tensor(self.ts).detach().to("cpu", torch.float64)
        if ts.ndim != 1 or len(ts) < 2 or not bool((ts.diff() > 0).all()):
            raise ValueError(f"levels are at least two rising times, not a tensor of shape {tuple(ts.shape)}")
        object.__setattr__(self, "ts", ts)

    @classmethod
    def on(cls, path: Path, T: int, *, grid: str | Grid = "uniform", variance: str | Variance = posterior) -> Discrete:
        """T levels on a grid of :data:`solvers.GRIDS`: equal steps in t, as DDPM, by default."""
        if T < 1:
            raise ValueError(f"a discrete model has at least one level, not T={T}")
        make = find(grid, GRIDS, "grid") if isinstance(grid, str) else grid
        made = find(variance, VARIANCES, "variance") if isinstance(variance, str) else variance
        return cls(make(path, T).flip(0), made)

    @property
    def T(self) -> int:
        """The number of transitions."""
        return len(self.ts) - 1

    def __repr__(self) -> str:
        return f"Discrete(T={self.T}, variance={self.variance})"

    def mass(self, path: Path) -> Tensor:
        """m of every atom, r expm1(logsnr_s - logsnr_t), shape (T,), from the data to the noise."""
        s, t = self.ts[:-1], self.ts[1:]
        return self.variance(path, s, t) * torch.expm1(path.logsnr(s) - path.logsnr(t))

    def constant(self, path: Path) -> float:
        r = self.variance(path, self.ts[:-1], self.ts[1:])
        return 0.5 * float((r - 1 - r.log()).sum())

    def sampler(self) -> dict[str, Any]:
        """Ancestral sampling on the levels themselves, with the variance that the bound scores."""
        return {"solver": self.variance.solver(self.ts), "ts": self.ts.flip(0)}

    def draw(self, path: Path, u: Tensor, density: Density) -> Draw:
        """Carry u to a time, and the time up to the next atom: an atom is drawn as often as the interval below it."""
        ts, mass = self.ts.to(u.device), self.mass(path).to(u.device)
        i = torch.searchsorted(ts, density.time(u, path)).clamp(1, self.T) - 1
        chance = density.cdf(ts, path).diff()
        return Draw(ts[i + 1], (mass / chance)[i], self._own(mass)[i])

    def nodes(self, path: Path, n: int = 0) -> Draw:
        mass = self.mass(path)
        return Draw(self.ts[1:], mass, self._own(mass))

    def _own(self, mass: Tensor) -> Tensor:
        share = self.ts.diff() / (self.ts[-1] - self.ts[0])
        return share.to(mass) / mass
