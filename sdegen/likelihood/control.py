"""Denoisers that need no network: what a random estimate is compared with, to take the noise out of it.

An estimate f of something unknown becomes better by subtracting an h that was drawn with the *same* noise and adding
the mean of h, which must be known: f - b (h - E h) has the mean of f for every number b, and where f and h rise and
fall together it has far less variance. h is then called a *control variate*.

Here f is the squared error |eps - eps_hat(z)|^2 of a network at z = alpha x + sigma eps, and h is the squared error of
another denoiser at the same z. In units of the signal-to-noise ratio rho = exp(logsnr), and given x, it is

    eps - eps_lin   = (1 - q) e - sqrt(rho) q y                                        :class:`LinearGaussian`
    eps - eps_level = eps - SUM_k p_k r_k,   p_k ~ P_k exp(-r_k^2 / 2)                 :class:`IndependentLevels`

The first is the best linear denoiser, Wiener's, of data with mean m and covariance C = U diag(c^2) U'. With
y = U'(x - m) and e = U' eps each axis has its own q = 1 / (1 + rho c^2), the share of z that is noise, and the mean is
a closed form,

    E |eps - eps_lin|^2 = SUM_i (1 - q_i)^2 + rho q_i^2 y_i^2.

It knows how pixels hang together and nothing of their shape. The second knows the opposite: each pixel alone takes one
of V grey levels v_k with probability P_k, r_k = sqrt(rho) (x - v_k) + eps is the noise that level k would take, and the
mean of its square is a table of V numbers for each noise level, by one-dimensional quadrature. Near the data a network
that knows grey levels rounds, which no linear denoiser can; away from the data it is the correlations that count.

Neither depends on the path: only on logsnr. The Jacobian of eps_lin with respect to z is the symmetric matrix
U diag(sigma / (alpha^2 c^2 + sigma^2)) U', whose trace is known too: the same comparison for the trace in the
probability-flow ODE.

References: Wiener 1949; Glasserman 2003, Monte Carlo Methods in Financial Engineering, section 4.1 (control variates);
Schaefer and Strimmer 2005, doi:10.2202/1544-6115.1175 (shrinkage of a covariance).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sdegen.bins import Bins
from solvers.problem import Path, expand

__all__ = ["Control", "IndependentLevels", "LinearGaussian", "bands"]


class Control(ABC):
    """A denoiser whose squared error given x has a known mean."""

    @abstractmethod
    def error(self, x: Tensor, logsnr: Tensor, noise: Tensor) -> Tensor:
        """|eps - eps_hat|^2 at z = alpha x + sigma eps, summed over the event.

        Args:
            x: data (..., *event), model units.
            logsnr: (...), float64.
            noise: eps (..., *event). The leading shapes of all three broadcast: many noises for one datum.

        Returns:
            (...), float64.
        """

    @abstractmethod
    def integral(self, logsnr: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """The mean of :meth:`error` over the noise, summed over noise levels.

        Args:
            logsnr: nodes, (J,), float64.
            weight: of the nodes, (J,), or (J, K) for K sums.

        Returns:
            ``x -> SUM_j weight_j E |eps - eps_hat|^2`` for data (N, *event), (N,) or (N, K), float64.
        """


@dataclass(frozen=True, eq=False)
class LinearGaussian(Control):
    """The best linear denoiser of data with a given mean and covariance, exact for Gaussian data.

    Make one with :meth:`of` a covariance or :meth:`fit` to data.

    Args:
        mean: (*event), float64.
        variances: c^2, eigenvalues of the covariance, (D,), float64, not negative; zero for what is constant.
        axes: U, eigenvectors in columns, (D, D), float64; None where the coordinates are the axes.
        source: where they come from, for the records.

    >>> data = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, 0.0], [-1.0, 0.0]])
    >>> LinearGaussian.fit(data)
    LinearGaussian(2 coordinates, full covariance of 4 examples)
    """

    mean: Tensor
    variances: Tensor
    axes: Tensor | None = None
    source: str = "given"

    def __post_init__(self) -> None:
        size = self.mean.numel()
        if self.variances.shape != (size,) or (self.axes is not None and self.axes.shape != (size, size)):
            raise ValueError(
                f"{size} coordinates take {size} variances and axes ({size}, {size}), not "
                f"{tuple(self.variances.shape)} and {None if self.axes is None else tuple(self.axes.shape)}"
            )

    def __repr__(self) -> str:
        kind = "diagonal" if self.axes is None else "full"
        return f"{type(self).__name__}({self.mean.numel()} coordinates, {kind} covariance {self.source})"

    @classmethod
    def of(cls, mean: Tensor, cov: Tensor, source: str = "given") -> LinearGaussian:
        """From a mean (*event) and a covariance, (D, D) or, for a diagonal one, (D,).

        Raises:
            ValueError: the covariance has another shape, or is not positive semi-definite.
        """
        mean, cov = mean.double(), cov.double()
        if cov.ndim == 1:
            return cls(mean, cov, None, source)
        if cov.shape != (mean.numel(), mean.numel()):
            raise ValueError(f"the covariance of {mean.numel()} coordinates is not of shape {tuple(cov.shape)}")
        variances, axes = torch.linalg.eigh(cov)
        if bool((variances < -1e-8 * cov.abs().max()).any()):
            raise ValueError(f"a covariance has no negative eigenvalues, and {float(variances[0]):.3g} is one")
        return cls(mean, variances.clamp(min=0), axes, source)

    @classmethod
    def fit(cls, x: Tensor, *, limit: int = 4096) -> LinearGaussian:
        """Mean and covariance of data.

        Correlations are shrunk towards zero by the share of them that is sampling noise, so that few data in many
        dimensions give a usable covariance; variances are not, and a constant pixel keeps variance zero.

        Args:
            x: data (N, *event), model units. At most 2^25 numbers are looked at, evenly spread over the examples.
            limit: beyond so many coordinates the covariance is diagonal: a full one costs D^2 numbers to hold and
                D^2 operations for each noisy state.

        Reference: Schaefer and Strimmer 2005, doi:10.2202/1544-6115.1175, table 2, target D.
        """
        size = x[0].numel()
        x = x[:: max(1, math.ceil(x.numel() / 2**25))].detach().cpu().double()
        mean, n = x.mean(0), len(x)
        centred = (x - mean).flatten(1)
        source = f"of {n} examples"
        if n < 2 or size > limit:
            return cls(mean, centred.square().sum(0) / max(n - 1, 1), None, source)
        cov = centred.mT @ centred / (n - 1)
        fourth = centred.square().mT @ centred.square()
        noise = (fourth - (n - 1) ** 2 / n * cov.square()) * n / (n - 1) ** 3  # variance of each entry
        apart = ~torch.eye(size, dtype=torch.bool)
        share = float((noise[apart].sum() / cov[apart].square().sum().clamp(min=1e-300)).clamp(0, 1))
        return cls.of(mean, torch.where(apart, (1 - share) * cov, cov), source)

    # --- as a control variate ---

    def error(self, x: Tensor, logsnr: Tensor, noise: Tensor) -> Tensor:
        y, e = self._rotate(self._centred(x)), self._rotate(self._flat(noise))
        signal, share = self._shares(logsnr)
        gain = (0.5 * logsnr[..., None]).exp().to(share) * share  # sqrt(rho) q
        return (signal.to(e) * e - gain.to(e) * y).square().sum(-1, dtype=torch.float64)

    def integral(self, logsnr: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
        signal, share = self._shares(logsnr)
        constant = torch.einsum("j...,j->...", weight, signal.square().sum(1))
        slope = torch.einsum("j...,ji->i...", weight, logsnr.exp()[:, None] * share.square())

        def mean(x: Tensor) -> Tensor:
            y = self._rotate(self._centred(x.double()))
            return constant.to(y) + y.square() @ slope.to(y)

        return mean

    # --- as a denoiser ---

    def eps(self, z: Tensor, path: Path, t: Tensor) -> Tensor:
        """The noise in z as a linear denoiser sees it, sigma (alpha^2 C + sigma^2)^-1 (z - alpha m).

        Args:
            z: state (B, *event), in the path's scaling.
            path: any Gaussian path.
            t: 0-dim or (B,).
        """
        return self.jacobian_vector(z - expand(path.alpha(t), z) * self.mean.to(z), path, t)

    def jacobian_vector(self, v: Tensor, path: Path, t: Tensor) -> Tensor:
        """d eps_lin / dz times v, (B, *event); the Jacobian is symmetric and does not depend on z."""
        y = self._rotate(self._flat(v)) * self._slopes(path, t).to(v)
        return (y if self.axes is None else y @ self.axes.mT.to(v)).reshape(v.shape)

    def jacobian_trace(self, path: Path, t: Tensor) -> Tensor:
        """tr d eps_lin / dz, of the shape of t, float64."""
        return self._slopes(path, t).sum(-1)

    # --- both ---

    def _slopes(self, path: Path, t: Tensor) -> Tensor:
        """sigma / (alpha^2 c^2 + sigma^2) of every axis, (..., D) for t (...), float64."""
        return self._shares(path.logsnr(t))[1] / path.sigma(t)[..., None]

    def _shares(self, logsnr: Tensor) -> tuple[Tensor, Tensor]:
        """1 - q and q = sigma^2 / (alpha^2 c^2 + sigma^2) of every axis, (..., D), neither as a difference."""
        gain = logsnr.double()[..., None] + self.variances.to(logsnr.device).log()
        return gain.sigmoid(), (-gain).sigmoid()

    def _flat(self, x: Tensor) -> Tensor:
        """(..., *event) as (..., D)."""
        return x.reshape(*x.shape[: x.ndim - self.mean.ndim], -1)

    def _centred(self, x: Tensor) -> Tensor:
        return self._flat(x - self.mean.to(x))

    def _rotate(self, y: Tensor) -> Tensor:
        """U' y."""
        return y if self.axes is None else y @ self.axes.to(y)


@dataclass(frozen=True, eq=False)
class IndependentLevels(Control):
    """The exact denoiser of pixels that are independent of each other and share one histogram of grey levels.

    Args:
        bins: the grey levels.
        log_p: log-probabilities of the levels, (V,), float64.
        source: where they come from, for the records.

    >>> IndependentLevels.fit(torch.tensor([[0.5, -0.5], [0.5, 0.5]]), Bins(2))
    IndependentLevels(2 levels, histogram of 2 examples)
    """

    bins: Bins
    log_p: Tensor = field(repr=False)
    source: str = "given"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.bins.count} levels, histogram {self.source})"

    @classmethod
    def fit(cls, x: Tensor, bins: Bins) -> IndependentLevels:
        """The histogram of all pixels of data (N, *event), with a hundredth of a pixel added to each level."""
        counts = torch.bincount(bins.index(x).flatten().cpu(), minlength=bins.count).double() + 0.01
        return cls(bins, (counts / counts.sum()).log(), f"of {len(x)} examples")

    def error(self, x: Tensor, logsnr: Tensor, noise: Tensor) -> Tensor:
        gain = (0.5 * logsnr).exp().to(noise).reshape(*logsnr.shape, *(1,) * (noise.ndim - logsnr.ndim))
        x, gain, noise = torch.broadcast_tensors(x, gain, noise)
        event = noise.ndim - logsnr.ndim
        pieces = max(1, math.ceil(noise.numel() * self.bins.count / 2**24))  # a number for every level of every pixel
        rows = [part.flatten(0, -event - 1).chunk(pieces) for part in (x, gain, noise)]
        squares = [self._square(*piece).flatten(1).sum(1, dtype=torch.float64) for piece in zip(*rows, strict=True)]
        return torch.cat(squares).reshape(noise.shape[: noise.ndim - event])

    def integral(self, logsnr: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
        means = torch.stack([self._means(gain) for gain in (0.5 * logsnr.cpu()).exp().tolist()])
        table = torch.einsum("j...,jv->v...", weight.cpu(), means)

        def mean(x: Tensor) -> Tensor:
            level = self.bins.index(x).flatten(1)
            counts = table.new_zeros(len(x), self.bins.count, device=x.device)
            return counts.scatter_add_(1, level, torch.ones_like(counts[:, :1]).expand(level.shape)) @ table.to(
                x.device
            )

        return mean

    def _means(self, gain: float) -> Tensor:
        """E (eps - eps_hat)^2 of a pixel of each level, (V,): the trapezoidal rule, which converges geometrically.

        What is seen of a pixel is z / sigma = gain v + eps. The step in eps is a multiple or a fraction of the distance
        of two levels there, so that the nodes of all levels are points of one grid and each is looked at once.
        """
        apart, step = gain * self.bins.width, min(max(0.5 / gain, 0.125), 0.5)
        per_level, per_node = max(1, math.ceil(apart / step)), max(1, math.floor(step / apart))
        unit = apart / per_level
        reach = math.ceil(8.5 / (unit * per_node))
        j, k = torch.arange(-reach, reach + 1), torch.arange(self.bins.count)
        place = k[:, None] * per_level + j * per_node
        eps, levels = unit * per_node * j.double(), gain * self.bins.centers(torch.float64)
        if per_node < self.bins.count:  # a grid that is dense
            seen = torch.arange(int(place[0, 0]), int(place[-1, -1]) + 1)
            place = place - place[0, 0]
        else:
            seen = place.flatten()
            place = torch.arange(len(seen)).reshape(place.shape)
        z = levels[0] + unit * seen.double()
        p = torch.exp(self.log_p - 0.5 * (z[:, None] - levels).square())
        found = z - (p @ levels) / p.sum(1)
        density = torch.exp(-0.5 * eps.square()) * unit * per_node / math.sqrt(2 * math.pi)
        return (eps - found[place]).square() @ density

    def _square(self, x: Tensor, gain: Tensor, noise: Tensor) -> Tensor:
        """(eps - eps_hat)^2 of every pixel, for x, gain = sqrt(rho) and noise that broadcast."""
        residual = (gain * x + noise)[..., None] - gain[..., None] * self.bins.centers(noise.dtype, noise.device)
        p = (self.log_p.to(residual) - 0.5 * residual.square()).softmax(-1)
        return (noise - (p * residual).sum(-1)).square()


def bands(edges: Tensor, corners: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A rule for averages over bands of logsnr, for :meth:`Control.integral`: Gauss-Legendre in panels.

    Args:
        edges: of the bands, rising, (K + 1,), float64.
        corners: where the integrand is not smooth.

    Returns:
        Nodes (J,), and their weights in the average of each band, (J, K).
    """
    inside = edges[:0] if corners is None else corners[(corners > edges[0]) & (corners < edges[-1])]
    cuts = torch.cat([edges, inside]).unique()
    width, place = cuts.diff(), (torch.searchsorted(edges, cuts[:-1], right=True) - 1).clamp(max=len(edges) - 2)
    x, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(8 if float(width.max()) < 1 else 24))
    weight = torch.zeros(len(width), len(x), len(edges) - 1, dtype=torch.float64)
    weight[torch.arange(len(width)), :, place] = 0.5 * w * (width / edges.diff()[place])[:, None]
    return (cuts[:-1, None] + 0.5 * width[:, None] * (x + 1)).flatten(), weight.flatten(0, 1)
