"""Oracles: data whose diffusion is known exactly, to measure solvers and likelihoods against the truth.

If the data are a mixture of Gaussians, x0 ~ SUM_k w_k N(mu_k, Sigma_k), so is z = alpha x0 + sigma eps at every noise
level:

    q(z) = SUM_k w_k N(alpha mu_k, alpha^2 Sigma_k + sigma^2 I).

The eigenvectors of every covariance are those of Sigma_k and do not depend on the level, so one eigendecomposition
Sigma_k = U diag(d) U' serves all of them. With r = U'(z - alpha mu_k) and v = alpha^2 d + sigma^2, one number per axis,

    log N_k   = -1/2 SUM (r^2 / v + log 2 pi v)         p(k | z) = softmax_k (log w_k + log N_k)
    E[x0 | z, k]  = mu_k + U (alpha d / v) r            E[eps | z, k] = U (sigma / v) r
    Cov[x0 | z, k] = U diag(d sigma^2 / v) U'

and the posterior means of x0 and of eps are the averages of these under p(k | z). Both are computed from such sums and
neither from the other: x0 = (z - sigma eps) / alpha is a difference of large numbers at the noise end, and
eps = (z - alpha x0) / sigma at the data end. The score is -eps / sigma, and Tweedie's formulas tie the moments to it,

    x0 = (z + sigma^2 score) / alpha,       Cov[x0 | z] = (sigma / alpha)^2 (I + sigma^2 Hessian of log q).

A Gaussian is a mixture of one, and d = 0 is allowed: atoms are a mixture without width, whose z has a density although
x0 has none. :class:`PixelOracle` is the exact model of images whose pixels are independent and take few levels.

Everything is computed in float64 and handed back in the dtype of z. Shapes: z is (B, *event), t 0-dim or (B,).

References: Robbins 1956; Efron 2011, doi:10.1198/jasa.2011.tm11181 (Tweedie's formula).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sdegen.schedules import require
from solvers import DiffusionProblem, Path, Prediction, expand, standard_normal
from solvers.solve import find

__all__ = ["ORACLES", "GaussianOracle", "MixtureOracle", "Oracle", "PixelOracle", "oracle"]


def _normals(n: int, count: int, seed: int) -> Tensor:
    """Standard normals (n, count), one row per sample; the seed is hashed.

    Otherwise data and the noise that a solver draws from the same seed would be the same numbers.
    """
    key = np.random.SeedSequence(seed, spawn_key=(0xDA7A,)).generate_state(1, np.uint64)[0]
    return standard_normal((n, count), int(key), dtype=torch.float64)


def _levels(path: Path, t: Tensor | float) -> tuple[Tensor, Tensor]:
    time = torch.as_tensor(t, dtype=torch.float64)
    return path.alpha(time), path.sigma(time)


class Oracle(ABC):
    """Data of known distribution, diffused exactly."""

    event_shape: tuple[int, ...]

    @abstractmethod
    def sample(self, n: int, seed: int) -> Tensor:
        """Draw data.

        Args:
            n: number of samples.
            seed: whole number; sample i is a function of (seed, i) alone, whatever n is.

        Returns:
            float64 tensor of shape (n, *event).
        """

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Exact log-density (log-probability, for discrete data) of clean data in nats, float64, shape (B,)."""

    @abstractmethod
    def log_prob_t(self, z: Tensor, path: Path, t: Tensor | float) -> Tensor:
        """Exact log-density of z_t in nats, float64, shape (B,)."""

    @abstractmethod
    def posterior(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
        """Posterior means of x0 and eps given z = alpha x0 + sigma eps; alpha and sigma are 0-dim or (B,)."""

    @abstractmethod
    def posterior_cov(self, z: Tensor, path: Path, t: Tensor | float) -> Tensor:
        """Cov[x0 | z_t] over the flattened event, shape (B, D, D)."""

    def predict(self, path: Path, *, kappa: float = 1.0) -> Callable[[Tensor, Tensor], Prediction]:
        """The exact denoiser on a path, or one that is wrong by a known amount.

        Args:
            path: the Gaussian path.
            kappa: factor on the true score; x0 follows it, so that z = alpha x0 + sigma eps still holds. On Gaussian
                data the likelihoods of a model with such a score have closed forms, all different.

        Returns:
            ``predict(x, t)`` with x (B, *event) and t 0-dim or (B,).
        """

        def predict(x: Tensor, t: Tensor) -> Prediction:
            alpha, sigma = path.alpha(t), path.sigma(t)
            x0, eps = self.posterior(x, alpha, sigma)
            if kappa == 1.0:
                return Prediction(x0, eps)
            return Prediction(x0 + expand((1 - kappa) * sigma / alpha, x) * eps, kappa * eps)

        return predict

    def problem(self, path: Path, *, kappa: float = 1.0) -> DiffusionProblem:
        """The problem that solvers are measured on: this path with :meth:`predict`."""
        return DiffusionProblem(path, self.predict(path, kappa=kappa))

    def posterior_mean(self, z: Tensor, path: Path, t: Tensor | float) -> Tensor:
        """E[x0 | z_t], shape (B, *event)."""
        return self.posterior(z, *_levels(path, t)).x0

    def _checked(self, z: Tensor) -> Tensor:
        """``z`` in float64, if its shape is (B, *event)."""
        shape = ", ".join(map(str, self.event_shape))
        require(z.shape[1:] == self.event_shape, f"z must be (B, {shape}), got {tuple(z.shape)}")
        return z.double()

    def score(self, z: Tensor, path: Path, t: Tensor | float) -> Tensor:
        """Gradient of log q(z_t) = -E[eps | z_t] / sigma, shape (B, *event)."""
        alpha, sigma = _levels(path, t)
        return self.posterior(z, alpha, sigma).eps / -expand(sigma, z)


class MixtureOracle(Oracle):
    """x0 ~ SUM_k w_k N(mu_k, Sigma_k): see the module's text for what follows from it.

    Args:
        weights: (K,), positive; normalised to sum to one.
        means: (K, *event), which also says the shape of the event, D numbers in all.
        covs: (K, D, D), symmetric and positive semi-definite; (K, D) for diagonal ones.

    Raises:
        ValueError: if a shape or a value is not as said.

    >>> mixture = MixtureOracle([0.5, 0.5], [[-1.0], [1.0]], [[0.01], [0.01]])
    >>> mixture.log_prob(torch.tensor([[1.0]]))
    tensor([0.6905], dtype=torch.float64)
    """

    def __init__(self, weights: ArrayLike, means: ArrayLike, covs: ArrayLike) -> None:
        w, mu, cov = (torch.as_tensor(np.asarray(a, dtype=np.float64)) for a in (weights, means, covs))
        count, self.event_shape = w.numel(), tuple(mu.shape[1:])
        size = math.prod(self.event_shape)
        require(
            w.ndim == 1 and bool((w > 0).all() and w.isfinite().all()), "weights must be a list of positive numbers"
        )
        require(mu.ndim >= 2 and len(mu) == count, f"means must be (K, *event) with K={count}, got {tuple(mu.shape)}")
        diagonal = cov.shape == (count, size)
        cov = torch.diag_embed(cov) if diagonal else cov
        require(cov.shape == (count, size, size), f"covs must be {(count, size, size)}, got {tuple(cov.shape)}")
        require(bool(mu.isfinite().all() and cov.isfinite().all()), "means and covs must be finite")
        require(torch.allclose(cov, cov.mT, rtol=1e-10, atol=1e-12), "covs must be symmetric")
        variances, axes = torch.linalg.eigh(cov)
        require(bool((variances >= -1e-10 * cov.abs().max()).all()), "covs must be positive semi-definite")
        self.weights, self.means, self.covs = w / w.sum(), mu.reshape(count, size), cov
        self._axes, self._variances = axes, variances.clamp(min=0)
        # Sheets that are equally thin in most directions, in many dimensions: the long axes of each say all.
        thin = self._variances[:, :1]
        long = int((self._variances - thin > 1e-9 * thin).sum(1).max())
        sheets = size > 8 and 2 * long <= size and bool((thin > 1e-6 * self._variances.max()).all())
        self._long = long if sheets else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.weights)} components, event_shape={self.event_shape})"

    def sample(self, n: int, seed: int) -> Tensor:
        size = self.means.shape[1]
        normals = _normals(n, size + 1, seed)
        edges = self.weights.cumsum(0)[:-1].contiguous()
        k = torch.searchsorted(edges, torch.special.ndtr(normals[:, 0]).contiguous())
        root = self._axes * self._variances.sqrt()[:, None, :] @ self._axes.mT  # unique, whatever basis eigh chose
        x = self.means[k]
        for j in range(size):  # and not a matrix product, whose bits depend on n
            x = x + root[:, :, j][k] * normals[:, j + 1, None]
        return x.reshape(n, *self.event_shape)

    def log_prob(self, x: Tensor) -> Tensor:
        require(bool((self._variances > 0).all()), "a mixture with a singular covariance has no density at sigma = 0")
        one = torch.ones((), dtype=torch.float64)
        return self._components(x, one, 0 * one)[0].logsumexp(1)

    def log_prob_t(self, z: Tensor, path: Path, t: Tensor | float) -> Tensor:
        return self._components(z, *_levels(path, t))[0].logsumexp(1)

    def posterior(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
        if self._long is not None:
            return self._sheets(z, alpha, sigma, self._long)
        joint, r, v, a, s = self._components(z, alpha, sigma)
        p = joint.softmax(1)[:, :, None]
        x0 = (p * (self.means.to(z.device) + self._rotate(a * self._variances.to(z.device) / v * r))).sum(1)
        eps = (p * self._rotate(s / v * r)).sum(1)
        return Prediction(x0.to(z.dtype).reshape(z.shape), eps.to(z.dtype).reshape(z.shape))

    def _sheets(self, z: Tensor, alpha: Tensor, sigma: Tensor, long: int) -> Prediction:
        """:meth:`posterior` with ``long`` axes U of variances d in each component and one variance c in all others.

        U' y with y = z - alpha mu is all that has to be rotated: |y|^2 - |U' y|^2 is left for the others, and the means
        are sums of multiples of z, mu and the columns of U, two matrix products for all components together.
        """
        flat, a, s = self._checked(z).flatten(1), *(c.to(z.device).double().reshape(-1, 1) for c in (alpha, sigma))
        mu, axes = self.means.to(z.device), self._axes[:, :, -long:].to(z.device)
        d, thin = self._variances[:, -long:].to(z.device), self._variances[:, 0].to(z.device)
        count, size = mu.shape
        r = (flat @ axes.movedim(1, 0).reshape(size, -1)).reshape(-1, count, long)
        r = r - a[..., None] * torch.einsum("kd,kdr->kr", mu, axes)
        v, w = a[..., None] ** 2 * d + s[..., None] ** 2, a**2 * thin + s**2
        others = flat.square().sum(1, keepdim=True) - 2 * a * (flat @ mu.T) + a**2 * mu.square().sum(1)
        others = others - r.square().sum(2)
        joint = -0.5 * ((r**2 / v + v.log()).sum(2) + others / w + (size - long) * w.log())
        p = (self.weights.log().to(z.device) + joint).softmax(1)

        def mean(along: Tensor, across: Tensor, constant: float) -> Tensor:
            """SUM_k p_k (constant mu + across (y - U U' y) + along U U' y)."""
            rotated = (p[..., None] * (along - across[..., None]) * r).flatten(1)
            there = (p * (constant - a * across)) @ mu + rotated @ axes.movedim(2, 1).reshape(-1, size)
            return ((p * across).sum(1, keepdim=True) * flat + there).to(z.dtype).reshape(z.shape)

        return Prediction(mean(a[..., None] * d / v, a * thin / w, 1.0), mean(s[..., None] / v, s / w, 0.0))

    def component_probs(self, z: Tensor, path: Path, t: Tensor | float) -> Tensor:
        """p(k | z_t), float64, shape (B, K): which component a state belongs to."""
        return self._components(z, *_levels(path, t))[0].softmax(1)

    def posterior_cov(self, z: Tensor, path: Path, t: Tensor | float) -> Tensor:
        joint, r, v, a, s = self._components(z, *_levels(path, t))
        p, d, axes = joint.softmax(1)[:, :, None], self._variances.to(z.device), self._axes.to(z.device)
        means = self.means.to(z.device) + self._rotate(a * d / v * r)
        apart = means - (p * means).sum(1, keepdim=True)
        within = torch.einsum("bkj,kij,klj->bil", p * d * s**2 / v, axes, axes)
        return (within + torch.einsum("bki,bkl->bil", p * apart, apart)).to(z.dtype)

    def _components(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """log w_k N_k(z) (B, K); r and v of the module's text (B or 1, K, D); alpha and sigma (B or 1, 1, 1)."""
        a, s = (c.to(z.device).double().reshape(-1, 1, 1) for c in (alpha, sigma))
        r = self._rotate(self._checked(z).reshape(len(z), 1, -1) - a * self.means.to(z.device), inverse=True)
        v = a**2 * self._variances.to(z.device) + s**2
        log_normal = -0.5 * (r**2 / v + torch.log(2 * math.pi * v)).sum(-1)
        return self.weights.log().to(z.device) + log_normal, r, v, a, s

    def _rotate(self, y: Tensor, inverse: bool = False) -> Tensor:
        """U y, or U' y, for each component; y is (B, K, D)."""
        axes = self._axes.mT if inverse else self._axes
        axes = axes.to(y.device)
        if axes.shape[-1] > 8:
            return torch.einsum("kij,bkj->bki", axes, y)
        # Few dimensions: a sum of products has the same bits in every batch, and is faster than many tiny matrices.
        return sum((axes[:, :, j] * y[..., j, None] for j in range(axes.shape[-1])), torch.zeros_like(y))


def GaussianOracle(mean: ArrayLike, cov: ArrayLike) -> MixtureOracle:
    """x0 ~ N(mean, cov), a mixture of one: every solver's update is linear on it, every likelihood a closed form.

    Args:
        mean: shape (*event).
        cov: (D, D), or (D,) for a diagonal one.
    """
    return MixtureOracle([1.0], np.asarray(mean, dtype=np.float64)[None], np.asarray(cov, dtype=np.float64)[None])


class PixelOracle(Oracle):
    """Independent pixels with few levels: P(x) = PROD_d probs[d, x_d], the exact model of discrete data.

    p(level v | z_d) = softmax_v [log probs[d, v] - (z_d - alpha v)^2 / (2 sigma^2)], and x0, eps are averages under it.

    Args:
        probs: (*event, V), non-negative, each pixel's normalised to sum to one.
        values: (V,) different values in model units that the levels stand for, such as 2 (k + 1/2) / V - 1.

    Raises:
        ValueError: if a shape or a value is not as said.

    >>> coin = PixelOracle([[0.25, 0.75]], values=[-0.5, 0.5])
    >>> coin.log_prob(torch.tensor([[-0.5], [0.5], [0.1]])).exp()
    tensor([0.2500, 0.7500, 0.0000], dtype=torch.float64)
    """

    def __init__(self, probs: ArrayLike, values: ArrayLike) -> None:
        p, v = (torch.as_tensor(np.asarray(a, dtype=np.float64)) for a in (probs, values))
        require(v.ndim == 1 and bool(v.isfinite().all()), "values must be a list of finite numbers")
        require(len(v.unique()) == len(v), "values must be different from each other")
        shape = tuple(p.shape)
        require(len(shape) >= 2 and shape[-1] == len(v), f"probs must be (*event, V) with V={len(v)}, got {shape}")
        require(bool((p >= 0).all() and (p.sum(-1) > 0).all() and p.isfinite().all()), "probs must be probabilities")
        self.event_shape, self.values, self.probs = shape[:-1], v, p / p.sum(-1, keepdim=True)

    def __repr__(self) -> str:
        return f"PixelOracle({len(self.values)} levels, event_shape={self.event_shape})"

    def sample(self, n: int, seed: int) -> Tensor:
        size = math.prod(self.event_shape)
        u = torch.special.ndtr(_normals(n, size, seed)).reshape(n, *self.event_shape, 1)
        below = self.probs.cumsum(-1)[..., :-1] < u
        return self.values[below.sum(-1)]

    def log_prob(self, x: Tensor) -> Tensor:
        spacing = self.values.sort().values.diff().min() if len(self.values) > 1 else torch.tensor(1.0)
        here = (self._checked(x)[..., None] - self.values.to(x.device)).abs() < 1e-3 * spacing
        return self._logits(x.device).where(here, -math.inf).logsumexp(-1).flatten(1).sum(1)

    def log_prob_t(self, z: Tensor, path: Path, t: Tensor | float) -> Tensor:
        return self._joint(z, *_levels(path, t))[0].logsumexp(-1).flatten(1).sum(1)

    def posterior(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
        joint, noise = self._joint(z, alpha, sigma)
        p = joint.softmax(-1)
        return Prediction((p * self.values.to(z.device)).sum(-1).to(z.dtype), (p * noise).sum(-1).to(z.dtype))

    def posterior_cov(self, z: Tensor, path: Path, t: Tensor | float) -> Tensor:
        p = self._joint(z, *_levels(path, t))[0].softmax(-1)
        values = self.values.to(z.device)
        apart = values - (p * values).sum(-1, keepdim=True)
        return torch.diag_embed((p * apart**2).sum(-1).flatten(1)).to(z.dtype)

    def _logits(self, device: torch.device) -> Tensor:
        return self.probs.log().to(device)

    def _joint(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log p(v) N(z; alpha v, sigma^2) and the noise (z - alpha v) / sigma it would take, (B, *event, V)."""
        x = self._checked(z)[..., None]
        a, s = (expand(c.double(), x) for c in (alpha, sigma))
        noise = (x - a * self.values.to(z.device)) / s
        return self._logits(z.device) - 0.5 * noise**2 - torch.log(s) - 0.5 * math.log(2 * math.pi), noise


# --- Ready-made: fixed for ever, so that errors measured on them can be compared across papers ------------------------


def _rotated(angles: Sequence[float], stds: Sequence[tuple[float, float]]) -> np.ndarray:
    """Covariances (K, 2, 2) with the given standard deviations along an axis at each angle and across it."""
    turns = np.array([[[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]] for a in angles])
    return turns * np.square(stds)[:, None, :] @ turns.transpose(0, 2, 1)


def _gaussian() -> MixtureOracle:
    return GaussianOracle([0.4, -0.2], _rotated([0.5], [(0.6, 0.25)])[0])


def _mixture2d() -> MixtureOracle:
    means = [[-0.8, -0.5], [0.7, -0.7], [0.1, 0.8], [0.9, 0.5]]
    stds = [(0.3, 0.15), (0.25, 0.2), (0.3, 0.2), (0.15, 0.15)]
    return MixtureOracle([0.1, 0.2, 0.3, 0.4], means, _rotated([0.3, 1.2, -0.6, 0.0], stds))


def _ring(count: int = 8) -> MixtureOracle:
    angles = [2 * math.pi * k / count for k in range(count)]
    return MixtureOracle(
        np.ones(count), [[math.cos(a), math.sin(a)] for a in angles], _rotated(angles, [(0.05, 0.2)] * count)
    )


def _grid(side: int = 5) -> MixtureOracle:
    ticks = np.linspace(-1, 1, side)
    return MixtureOracle(np.ones(side**2), [[x, y] for x in ticks for y in ticks], np.full((side**2, 2), 0.08**2))


def _curve(size: int = 16, count: int = 32) -> MixtureOracle:
    """A closed curve in ``size`` dimensions, (cos k u, sin k u) / k^2, as a chain of thin Gaussians."""
    u, k = 2 * math.pi * np.arange(count)[:, None] / count, np.arange(1, size // 2 + 1)
    points = np.concatenate([np.cos(k * u), np.sin(k * u)], 1) / np.tile(k, 2) ** 2
    tangents = np.concatenate([-np.sin(k * u), np.cos(k * u)], 1) / np.tile(k, 2)
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    gaps = np.linalg.norm(points - np.roll(points, 1, 0), axis=1)
    along = (0.5 * gaps[:, None] * tangents)[:, :, None]
    return MixtureOracle(np.ones(count), points, along * along.transpose(0, 2, 1) + 0.02**2 * np.eye(size))


def _low_rank(size: int, count: int, rank: int) -> MixtureOracle:
    """Components that are ``rank``-dimensional sheets of standard deviation 0.1..0.5 and thickness 0.05."""
    rng = np.random.Generator(np.random.Philox(key=size))
    spans = np.linalg.qr(rng.standard_normal((count, size, rank)))[0] * rng.uniform(0.1, 0.5, (count, 1, rank))
    covs = spans @ spans.transpose(0, 2, 1) + 0.05**2 * np.eye(size)
    return MixtureOracle(rng.uniform(0.5, 1.5, count), 0.5 * rng.standard_normal((count, size)), covs)


ORACLES: dict[str, Callable[[], Oracle]] = {
    "gaussian": _gaussian,
    "mixture2d": _mixture2d,
    "ring": _ring,
    "grid": _grid,
    "curve16": _curve,
    "mixture16": lambda: _low_rank(size=16, count=8, rank=3),
    "mixture64": lambda: _low_rank(size=64, count=16, rank=6),
}


def oracle(name: str) -> Oracle:
    """A ready-made oracle by name.

    Raises:
        ValueError: if there is none of that name; the message says the nearest.

    >>> oracle("mixture2d")
    MixtureOracle(4 components, event_shape=(2,))
    """
    return find(name, ORACLES, "oracle")()
