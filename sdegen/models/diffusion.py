"""Diffusion models: a denoiser, a Gaussian path, levels, a decoder, an objective.

The encoder is the path itself, q(z_t | x) = N(alpha(t) x, sigma(t)^2 I), with nothing to learn; all parameters are in
the denoiser. :func:`DDPM` and :func:`VPSDE` make the same class with other levels, and ``model.discretize(T)`` and
``model.continuous()`` go from one to the other with the weights shared, because the denoiser is conditioned on logsnr
and knows neither time nor T.

The prior is N(0, (alpha_1^2 + sigma_1^2) I), the marginal of data of unit variance: the standard normal on a VP path.
In these units the prior term depends on logsnr at the noise end alone and not on the curve,

    prior = 1/2 sum_d [ sigmoid(l_1) (x_d^2 - 1) + softplus(l_1) ].

Anything with ``predict(path)`` can stand in for the denoiser: the exact oracles of :mod:`sdegen.oracles` do in tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdegen.decoders import Decoder, GaussianDecoder, SoftmaxDecoder, logsnr_for
from sdegen.distributions import Distribution, Gaussian
from sdegen.levels import Continuous, Discrete, Levels, Variance, posterior
from sdegen.models.base import Encoding, LatentVariableModel, NormalPrior, decoder_noise, generator_for
from sdegen.objectives import ELBO, Objective, low_discrepancy
from sdegen.paths import VP, LinearLogSNR
from solvers import DiffusionProblem, Prediction, Trajectory, expand, solve
from solvers.grids import Grid
from solvers.problem import Path

__all__ = ["DDPM", "VPSDE", "GaussianDiffusion"]

LOOKS = 8  # one example in eight looks at z_0 while training, where the decoder asks the network


class GaussianDiffusion(LatentVariableModel):
    """A diffusion model of data of a fixed shape.

    Args:
        denoiser: a :class:`sdegen.denoiser.Denoiser`, or anything with ``predict(path[, cond])``.
        path: the Gaussian path; its ``t_min`` and ``t_max`` are the ends of the bound and of sampling.
        levels: ``Continuous()`` or ``Discrete``.
        decoder: p(x | z_0).
        objective: of :meth:`loss`; the bound is the bound, whatever a model was trained for.
        event_shape: shape of one datum; taken from the denoiser or its network where they know it.

    >>> from sdegen.denoiser import Denoiser
    >>> from sdegen.networks import MLP
    >>> model = VPSDE(Denoiser(MLP((2,), width=16, depth=1)))
    >>> model.levels, model.discretize(10).levels
    (Continuous(), Discrete(T=10, variance=Interpolated(v=0.0)))
    >>> model.sample(4, steps=5).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        denoiser: Any,
        path: Path,
        levels: Levels,
        decoder: Decoder,
        objective: Objective = ELBO,
        *,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self._path, self.levels, self.decoder, self.objective = (
            denoiser,
            path,
            levels,
            decoder,
            objective,
        )
        self.density = objective.density  # a density that learns is a part of the model, and saved with it
        self.event_shape = _event_shape(denoiser, event_shape)
        if isinstance(levels, Discrete):
            low, high = float(levels.ts[0]), float(levels.ts[-1])
            if max(abs(low - path.t_min), abs(high - path.t_max)) > 1e-9:
                raise ValueError(
                    f"levels from t = {low:.6g} to {high:.6g} do not reach the ends of the path, "
                    f"{path.t_min:.6g} and {path.t_max:.6g}"
                )
        clean, noisy = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
        self.clean = clean
        self.alpha, self.sigma = path.alpha(clean), path.sigma(clean)
        self._top = path.alpha(noisy), path.sigma(noisy)
        self.prior = NormalPrior(torch.hypot(*self._top).log())
        self.evaluations = 0

    # --- the model ---

    @property
    def path(self) -> Path:
        return self._path

    @property
    def discrete(self) -> bool:
        return self.decoder.discrete

    @property
    def logsnr_ends(self) -> tuple[float, float]:
        """logsnr at the clean and at the noisy end."""
        ends = torch.tensor([self.path.t_min, self.path.t_max], dtype=torch.float64)
        clean, noisy = self.path.logsnr(ends).tolist()
        return clean, noisy

    def encode(self, x: Tensor, cond: Tensor | None = None) -> Encoding:
        """N(alpha x, sigma^2 I) at the two ends of the path."""
        return Encoding(Gaussian(self.alpha * x, self.sigma.log()), Gaussian(self._top[0] * x, self._top[1].log()))

    def decode(self, z: Tensor, cond: Tensor | None = None) -> Distribution:
        """p(x | z_0), by the model's decoder."""
        return self.decoder(z, _AtCleanEnd(self, cond))

    def reconstruction(self, x: Tensor, q: Gaussian, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.decoder.reconstruction(x, q, noise, _AtCleanEnd(self, cond))

    def predict(self, cond: Tensor | None = None) -> Any:
        """``(z, t) -> Prediction(x0, eps)`` on the model's path, counted."""
        ask = self.denoiser.predict(self.path) if cond is None else self.denoiser.predict(self.path, cond)

        def predict(z: Tensor, t: Tensor) -> Prediction:
            self.evaluations += len(z)
            return ask(z, t)

        return predict

    def error(self, x: Tensor, t: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        z = expand(self.path.alpha(t), x) * x + expand(self.path.sigma(t), x) * noise
        return (noise - self.predict(cond)(z, t).eps).square().flatten(1).sum(1, dtype=torch.float64)

    def problem(self, cond: Tensor | None = None) -> DiffusionProblem:
        """What a solver is given: the path and the denoiser on it.

        Args:
            cond: class labels, one for each row of the state, or None.
        """
        return DiffusionProblem(self.path, self.predict(cond))

    # --- the same weights elsewhere ---

    def with_levels(self, levels: Levels) -> GaussianDiffusion:
        """This model, weights shared, with another measure of the levels."""
        other = GaussianDiffusion(
            self.denoiser, self.path, levels, self.decoder, self.objective, event_shape=self.event_shape
        )
        return other.train(self.training)

    def discretize(
        self, T: int, *, grid: str | Grid = "uniform", variance: str | Variance = posterior
    ) -> GaussianDiffusion:
        """The DDPM with T levels on this path, weights shared."""
        return self.with_levels(Discrete.on(self.path, T, grid=grid, variance=variance))

    def continuous(self) -> GaussianDiffusion:
        """The model with every noise level, weights shared."""
        return self.with_levels(Continuous())

    # --- training ---

    def loss(self, x: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """The weighted denoising error of a batch in bits per coordinate, 0-dim.

        With w = 1 the two ends of the bound are added, so that the curve reads as the bound itself. A decoder that asks
        the network sees one example in eight: z_0 is one noise level of many.

        Args:
            x: data (B, *event), model units.
            cond: class labels (B,) or None.
            generator: of noise and levels; fresh entropy where None.
        """
        generator = generator_for(generator)
        u = low_discrepancy(len(x), generator).to(x.device)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=generator.device).to(x.device)
        values = self._latent(x, cond, u, noise, self.objective)
        nats = values.mean()
        if self.training:
            nats = nats + self.density.learn(u, values, self.path)
        if self.objective.is_bound:
            rows = slice(None, None, LOOKS if self.decoder.calls else 1)
            some, labels = x[rows], None if cond is None else cond[rows]
            q = self.encode(some, labels)
            nats = nats + self.reconstruction(some, q.bottom, noise[rows], labels).mean()
            nats = nats + self.prior.divergence(q.top, noise[rows], u[rows], generator).mean()
        return nats / (self.dims * math.log(2))

    # --- sampling and likelihood ---

    def solve(
        self, n: int, cond: Tensor | None = None, *, seed: int = 0, first: int = 0, **settings: Any
    ) -> Trajectory:
        """From the prior to z_0: the trajectory, before the decoder.

        Args:
            n: number of samples.
            cond: class labels (n,) or None.
            seed: of the prior and of the solver's noise.
            first: number of the first sample, so that many can be drawn in pieces.
            settings: of :func:`solvers.solve` (solver, steps, nfe, ts, tol, grid, save, ...); what is left out follows
                from the levels: a DDPM walks its own T levels, a VP-SDE takes 20 steps of DPM-Solver++.
        """
        shape = (n, *self.event_shape)
        z = self.prior.sample(shape, seed=seed, first=first, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            return solve(self.problem(cond), z, seed=seed, first=first, **self.sampler(settings))

    def sampler(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of :func:`solvers.solve`, with what is left out filled in (see :meth:`solve`)."""
        own = self.levels.sampler() if not {"solver", "grid"} & settings.keys() else Continuous().sampler()
        if settings.keys() & {"steps", "nfe", "ts", "tol"}:
            own = {name: value for name, value in own.items() if name == "solver"}
        if "tol" in settings:
            own = {"solver": "dopri5"}
        return {**own, **settings}

    @torch.no_grad()
    def sample(
        self,
        n: int,
        cond: Tensor | None = None,
        *,
        seed: int = 0,
        first: int = 0,
        draw: bool = True,
        **settings: Any,
    ) -> Tensor:
        """New data: the prior, a solver, and the decoder of the bound.

        Args:
            n: number of samples.
            cond: class labels (n,) or None.
            seed: of all noise; sample i depends on (seed, i) alone.
            first: number of the first sample.
            draw: draw from p(x | z_0), which is what the model says; False takes its most likely value.
            settings: of :meth:`solve`: ``solver="heun", steps=20``, ``nfe=50``, ``tol=1e-4``, ...

        Returns:
            (n, *event), model units; exact grey levels with a discrete decoder.
        """
        z = self.solve(n, cond, seed=seed, first=first, **settings).x
        x = self.decode(z, cond)
        if not draw:
            return x.mode
        return x.sample(decoder_noise(z.shape, seed, first, z))

    def extra_repr(self) -> str:
        return f"path={self.path}, levels={self.levels}, decoder={self.decoder}, objective={self.objective}"


class _AtCleanEnd:
    """The denoiser at z_0, as decoders see it."""

    def __init__(self, model: GaussianDiffusion, cond: Tensor | None) -> None:
        self.model, self.cond = model, cond
        self.alpha, self.sigma = model.alpha, model.sigma

    def predict(self, z: Tensor) -> Prediction:
        return self.model.predict(self.cond)(z, self.model.clean)

    def level_logits(self, z: Tensor) -> Tensor:
        model = self.model
        model.evaluations += len(z)
        scale = torch.hypot(self.alpha, self.sigma)
        return model.denoiser.level_logits(z / scale, model.path.logsnr(model.clean), self.cond)


def _event_shape(denoiser: Any, given: Sequence[int] | None) -> tuple[int, ...]:
    for shape in (
        given,
        getattr(denoiser, "event_shape", None),
        getattr(getattr(denoiser, "net", None), "event_shape", None),
    ):
        if shape is not None:
            return tuple(shape)
    raise ValueError("the denoiser does not say the shape of its data: give event_shape=(...)")


def _default_path(denoiser: Any) -> Path:
    bins = getattr(denoiser, "bins", None)
    return VP(LinearLogSNR(*((logsnr_for(bins), -5.0) if bins is not None else (10.0, -10.0))))


def _default_decoder(denoiser: Any) -> Decoder:
    bins = getattr(denoiser, "bins", None)
    return GaussianDecoder() if bins is None else SoftmaxDecoder(bins)


def VPSDE(
    denoiser: nn.Module,
    path: Path | None = None,
    *,
    decoder: Decoder | None = None,
    objective: Objective = ELBO,
    event_shape: Sequence[int] | None = None,
) -> GaussianDiffusion:
    """The continuous-time diffusion: every noise level of the path.

    Args:
        denoiser: the shared network.
        path: VP with linear logsnr by default, from the rule of :func:`sdegen.decoders.logsnr_for` to -5 for grey
            levels and from 10 to -10 for continuous data.
        decoder: softmax over the denoiser's bins by default, a Gaussian density where it has none.
        objective: of training.
        event_shape: shape of one datum, where the denoiser does not know it.

    Reference: Song et al. 2021, arXiv:2011.13456; Kingma et al. 2021, arXiv:2107.00630.
    """
    path = path or _default_path(denoiser)
    return GaussianDiffusion(
        denoiser, path, Continuous(), decoder or _default_decoder(denoiser), objective, event_shape=event_shape
    )


def DDPM(
    denoiser: nn.Module,
    path: Path | None = None,
    *,
    T: int = 1000,
    grid: str | Grid = "uniform",
    variance: str | Variance = posterior,
    decoder: Decoder | None = None,
    objective: Objective = ELBO,
    event_shape: Sequence[int] | None = None,
) -> GaussianDiffusion:
    """The diffusion with T levels.

    Args:
        denoiser: the shared network.
        path: as for :func:`VPSDE`. Ho's own is ``Tabulated(betas)``, whose cleanest latent is z at t = 1/T: his chain
            of T betas is T - 1 transitions here, at t = i/T, and the decoder.
        T: number of transitions.
        grid: where they lie; equal steps in t by default.
        variance: of the reverse process, "posterior" or "beta" or a function.
        decoder: as for :func:`VPSDE`.
        objective: of training; ``OBJECTIVES["simple"]`` is the paper's.
        event_shape: shape of one datum, where the denoiser does not know it.

    Reference: Ho et al. 2020, arXiv:2006.11239.
    """
    return VPSDE(denoiser, path, decoder=decoder, objective=objective, event_shape=event_shape).discretize(
        T, grid=grid, variance=variance
    )
