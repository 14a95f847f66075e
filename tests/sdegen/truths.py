"""Ground truths that tests of likelihoods share: exact models, and expectations by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sdegen.bins import Bins
from sdegen.denoiser import Denoiser
from sdegen.likelihood import LogDensity
from sdegen.models import VPSDE, GaussianDiffusion
from sdegen.networks import MLP
from sdegen.oracles import GaussianOracle, MixtureOracle, Oracle, PixelOracle
from sdegen.paths import VE, VP, Flow, GaussianPath, LinearBeta, LinearLogSNR
from solvers import Prediction, expand

C2 = 0.25
"""Variance of the one-dimensional Gaussian data."""
X = torch.tensor([[-1.2], [0.0], [0.5], [0.8]], dtype=torch.float64)
MIXTURE = MixtureOracle([0.3, 0.7], [[-0.6], [0.5]], [[0.01], [0.04]])
POINTS = torch.tensor([[-0.65], [-0.1], [0.5]], dtype=torch.float64)
PATHS = {
    "vp-logsnr": VP(LinearLogSNR(8, -8)),
    "vp-beta": VP(LinearBeta(), t_min=1e-3),
    "ve": VE(0.02, 30),
    "flow": Flow(t_min=0.02, t_max=0.98),
}


# --- models that are known exactly ------------------------------------------------------------------------------------


class Wrong:
    """The exact denoiser of N(0, c^2) with its score multiplied by kappa."""

    event_shape = (1,)

    def __init__(self, kappa: float) -> None:
        self.truth, self.kappa = GaussianOracle([0.0], [C2]), kappa

    def predict(self, path: GaussianPath) -> Callable[[Tensor, Tensor], Prediction]:
        return self.truth.predict(path, kappa=self.kappa)


class Posterior(PixelOracle):
    """The exact denoiser of independent pixels, which also tells its posterior over the levels."""

    def level_logits(self, z: Tensor, logsnr: Tensor, cond: Tensor | None = None) -> Tensor:
        alpha, sigma = logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()
        return self._joint(z, alpha, sigma)[0].log_softmax(-1)


class OfAClass:
    """Class k has data N(k, 1/4); without a class, an even mixture of two."""

    event_shape = (1,)

    def predict(self, path: GaussianPath, cond: Tensor | None = None) -> Callable[[Tensor, Tensor], Prediction]:
        if cond is None:
            return MixtureOracle([0.5, 0.5], [[0.0], [1.0]], [[C2], [C2]]).predict(path)
        centred, mean = GaussianOracle([0.0], [C2]).predict(path), cond.double()[:, None]

        def predict(z: Tensor, t: Tensor) -> Prediction:
            assert len(z) == len(cond), "a label for every row"
            x0, eps = centred(z - expand(path.alpha(t), z) * mean, t)
            return Prediction(x0 + mean, eps)

        return predict


def grey_model(std: float | None = None) -> GaussianDiffusion:
    """A network on five grey levels, untrained or with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = MLP((1, 3, 3), 5, width=8, depth=1)
        for p in net.parameters() if std is not None else ():
            torch.nn.init.normal_(p, std=std)
    return VPSDE(Denoiser(net, "levels", Bins(5)))


def grey(n: int) -> Tensor:
    """Data for it."""
    return Bins(5).value(torch.randint(5, (n, 1, 3, 3), generator=torch.Generator().manual_seed(0)))


# --- expectations -----------------------------------------------------------------------------------------------------


def hermite(order: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E f(e), e ~ N(0, 1)."""
    e, w = np.polynomial.hermite_e.hermegauss(order)
    return torch.from_numpy(e), torch.from_numpy(w) / math.sqrt(2 * math.pi)


def trapezoid(count: int, reach: float = 9.0) -> tuple[Tensor, Tensor]:
    """The same by the trapezoidal rule, which converges geometrically and does not mind sharp corners."""
    e = torch.linspace(-reach, reach, count, dtype=torch.float64)
    return e, torch.exp(-0.5 * e.square()) / math.sqrt(2 * math.pi) * (e[1] - e[0])


def mse(model: GaussianDiffusion, x: Tensor, t: Tensor, rule: tuple[Tensor, Tensor]) -> Tensor:
    """E |eps - eps_hat|^2 for each x (N, 1) and t (L,): (N, L)."""
    e, w = rule
    n, l, k = len(x), len(t), len(e)
    rows = x.reshape(n, 1, 1, 1).expand(n, l, k, 1).reshape(-1, 1)
    times, noise = t.reshape(1, l, 1).expand(n, l, k).reshape(-1), e.reshape(1, 1, k).expand(n, l, k).reshape(-1, 1)
    return (model.error(rows, times, noise).reshape(n, l, k) * w).sum(-1)


def latent(model: GaussianDiffusion, x: Tensor, rule: tuple[Tensor, Tensor], nodes: int = 256) -> Tensor:
    """The latent term of each x, by quadrature."""
    at = model.levels.nodes(model.path, nodes)
    return 0.5 * (mse(model, x, at.t, rule) * at.weight).sum(1) + model.levels.constant(model.path)


def nelbo(model: GaussianDiffusion, x: Tensor, rule: tuple[Tensor, Tensor], nodes: int = 256) -> Tensor:
    """The whole bound of each x, by quadrature."""
    e, w = rule
    q = model.encode(x)
    reconstruction = sum(
        float(b) * model.reconstruction(x, q.bottom, a.reshape(1, 1).expand_as(x)) for a, b in zip(e, w, strict=True)
    )
    prior = q.top.kl_to_normal(model.prior.log_std)  # type: ignore[attr-defined]
    return reconstruction + latent(model, x, rule, nodes) + prior


# --- ends of a path ---------------------------------------------------------------------------------------------------


def terminal(truth: Oracle, path: GaussianPath, found: LogDensity) -> Tensor:
    """The log-density with the true terminal density in place of the prior."""
    t = torch.tensor(path.t_max, dtype=torch.float64)
    return truth.log_prob_t(found.z, path, t) + found.log_det


def at_clean_end(truth: Oracle, path: GaussianPath, n: int) -> tuple[Tensor, Tensor]:
    t = torch.tensor(path.t_min, dtype=torch.float64)
    z = path.alpha(t) * truth.sample(n, seed=2)
    return z, truth.log_prob_t(z, path, t)
