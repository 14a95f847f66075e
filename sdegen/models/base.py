"""The variational bound, written once.

A latent-variable model says how a datum x comes about from latents z_1 -> ... -> z_0 -> x, and an encoder
q(z_0, ..., z_1 | x) guesses them. For every such model

    -log p(x)  <=  reconstruction  +  latent  +  prior                                              (nats per example)

    reconstruction = E_q(z_0|x) [ -log p(x | z_0) ]         the bottom latent, through the decoder
    latent         = 1/2 E INT |eps - eps_hat|^2 dm         what lies between, on the measure of the levels
    prior          = KL( q(z_1 | x) || p(z_1) )             the top latent, against the prior

and a VAE, a DDPM and a VP-SDE differ in the measure m only (:mod:`sdegen.levels`). In a VAE the bottom latent *is* the
top latent, m = 0, and the three terms are the textbook's two. In a diffusion z_0 and z_1 are the clean and the noisy
end of a Gaussian path, and the encoder has nothing to learn.

References: Kingma and Welling 2014, arXiv:1312.6114; Sohl-Dickstein et al. 2015, arXiv:1503.03585; Ho et al. 2020,
arXiv:2006.11239; Kingma et al. 2021, arXiv:2107.00630.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sdegen.distributions import Distribution, Gaussian
from sdegen.levels import Levels
from sdegen.objectives import ELBO, Objective, low_discrepancy, stratified
from solvers import standard_normal
from solvers.noise import DECODER, fresh_seed
from solvers.problem import Path

INNER = 1 << 62  # added to a seed: a model inside another draws from seeds of its own

__all__ = [
    "Elbo",
    "Encoding",
    "LatentVariableModel",
    "ModelPrior",
    "NormalPrior",
    "Normals",
    "Prior",
    "generator_for",
]

Normals = Callable[[Tensor], Tensor]
"""Standard normals of the shape, dtype and device of a tensor, new ones at every call: what a source of noise is."""


class Elbo(NamedTuple):
    """The three terms of the bound on -log p(x), nats per example, each (B,) and float64."""

    reconstruction: Tensor
    latent: Tensor
    prior: Tensor

    @property
    def total(self) -> Tensor:
        """The bound itself, (B,)."""
        return self.reconstruction + self.latent + self.prior

    def bits_per_dim(self, event: Sequence[int] | int) -> Tensor:
        """The bound in bits per coordinate, (B,).

        Args:
            event: event shape, or the number of coordinates.
        """
        dims = event if isinstance(event, int) else math.prod(event)
        return self.total / (dims * math.log(2))


class Encoding(NamedTuple):
    """q(z | x) at the two ends of the chain of latents; one distribution twice where there is no chain."""

    bottom: Gaussian
    top: Gaussian


class Prior(ABC):
    """p(z_1), the distribution of the top latent."""

    @abstractmethod
    def divergence(self, q: Gaussian, noise: Tensor, u: Tensor, source: torch.Generator | Normals) -> Tensor:
        """KL(q || p) in nats, (B,), exact or an unbiased estimate of it.

        Args:
            q: distribution of the top latent.
            noise: standard normal numbers of the latent's shape; ``q.sample(noise)`` is the latent.
            u: (B,) uniform numbers, for priors with levels of their own.
            source: of further noise.
        """

    @abstractmethod
    def sample(
        self, shape: Sequence[int], *, seed: int, first: int = 0, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Latents number ``first`` to ``first + n - 1``, of shape (n, *latent)."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, (B,)."""


class NormalPrior(Prior):
    """N(0, s^2 I).

    Args:
        log_std: log s, 0-dim float64.
    """

    def __init__(self, log_std: Tensor | float = 0.0) -> None:
        self.log_std = torch.as_tensor(log_std, dtype=torch.float64)

    def divergence(self, q: Gaussian, noise: Tensor, u: Tensor, source: torch.Generator | Normals) -> Tensor:
        return q.kl_to_normal(self.log_std)

    def sample(
        self, shape: Sequence[int], *, seed: int, first: int = 0, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        samples = range(first, first + shape[0])
        return self.log_std.exp() * standard_normal(shape, seed, samples=samples, dtype=dtype, device=device)

    def log_prob(self, z: Tensor) -> Tensor:
        return Gaussian(torch.zeros_like(z), self.log_std).log_prob(z)

    def __repr__(self) -> str:
        return f"NormalPrior(std={float(self.log_std.exp()):.6g})"


class ModelPrior(Prior, nn.Module):
    """Any latent-variable model as the prior of another: a diffusion on a VAE's latents is latent diffusion.

    KL(q || p) <= E_q [ log q(z) + bound(z) ]: the bound of the prior model, a density model, in place of -log p.

    Reference: Vahdat et al. 2021, arXiv:2106.05931, eq. 5.
    """

    def __init__(self, model: LatentVariableModel) -> None:
        nn.Module.__init__(self)
        if model.discrete:
            raise ValueError("a prior is a density: give its model a density decoder, such as GaussianDecoder()")
        self.model = model

    def divergence(self, q: Gaussian, noise: Tensor, u: Tensor, source: torch.Generator | Normals) -> Tensor:
        z = q.sample(noise)
        return q.log_prob(z) + self.model.bound(z, None, u, source).total

    def sample(
        self, shape: Sequence[int], *, seed: int, first: int = 0, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return self.model.sample(shape[0], seed=seed + INNER, first=first).to(device=device, dtype=dtype)

    def log_prob(self, z: Tensor) -> Tensor:
        raise TypeError("log p(z) of a model prior is known by a bound only; use its elbo")


class LatentVariableModel(nn.Module, ABC):
    """Anything with the bound: a VAE, a diffusion, a baseline.

    Attributes:
        event_shape: shape of one datum, without the batch.
        levels: the measure of the latent term.
        prior: distribution of the top latent.
        exact: whether the bound is the likelihood itself.
        evaluations: network calls since construction, counted per example (a batch of 64 counts 64).
    """

    event_shape: tuple[int, ...]
    levels: Levels
    prior: Prior
    exact: ClassVar[bool] = False
    evaluations: int = 0

    # --- what a model says about itself ---

    @abstractmethod
    def encode(self, x: Tensor, cond: Tensor | None = None) -> Encoding:
        """q(z_0 | x) and q(z_1 | x) for data (B, *event) in model units."""

    @abstractmethod
    def decode(self, z: Tensor, cond: Tensor | None = None) -> Distribution:
        """p(x | z_0)."""

    @property
    @abstractmethod
    def discrete(self) -> bool:
        """Whether p(x | z_0) is a probability of grey levels (else a density)."""

    @property
    def path(self) -> Path | None:
        """Where the levels lie; None where there are none."""
        return None

    def reconstruction(self, x: Tensor, q: Gaussian, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """-log p(x | z_0) at z_0 = ``q.sample(noise)``, or anything of the same expectation; nats, (B,)."""
        return -self.decode(q.sample(noise), cond).log_prob(x)

    def error(self, x: Tensor, t: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """Squared error |eps - eps_hat(z_t)|^2 of the noise at times t (B,), summed over the event, (B,), float64."""
        raise TypeError(f"{type(self).__name__} has no levels between its latents")

    @abstractmethod
    def sample(self, n: int, cond: Tensor | None = None, *, seed: int = 0, first: int = 0, **settings: Any) -> Tensor:
        """``n`` new data in model units, numbered from ``first``; number i depends on (seed, i) alone."""

    # --- what follows for all ---

    @property
    def dims(self) -> int:
        """Number of coordinates of one datum."""
        return math.prod(self.event_shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters; float64 for a model without any."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float64)

    @property
    def device(self) -> torch.device:
        """Of the parameters; the CPU for a model without any."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def bound(
        self,
        x: Tensor,
        cond: Tensor | None,
        u: Tensor,
        source: torch.Generator | Normals,
        *,
        objective: Objective = ELBO,
    ) -> Elbo:
        """One draw of the bound for each datum. Everything else that speaks of the bound asks this function.

        Args:
            x: data (B, *event), model units.
            cond: class labels (B,) or None.
            u: (B,) uniform numbers that choose the levels, float64.
            source: of the noise: a generator, which draws in sequence, or a function of one's own.
            objective: weighting and sampling density of the levels; w = 1 is the bound.

        Returns:
            The three terms, (B,) each; their expectations add up to the bound (where w = 1).
        """
        u = u.to(x.device)
        q = self.encode(x, cond)
        normal = _normals(source) if isinstance(source, torch.Generator) else source
        ends, between = normal(q.bottom.mean), normal(x)
        reconstruction = self.reconstruction(x, q.bottom, ends, cond)
        latent = self._latent(x, cond, u, between, objective)
        prior = self.prior.divergence(q.top, ends, u, normal)
        return Elbo(reconstruction, latent, prior)

    def _latent(self, x: Tensor, cond: Tensor | None, u: Tensor, noise: Tensor, objective: Objective) -> Tensor:
        if self.path is None:
            return torch.zeros_like(u)
        between = self.levels.integral(
            self.path, u, lambda t: self.error(x, t, noise, cond), objective.density, objective.weighting
        )
        return between + self.dims * self.levels.constant(self.path)

    def elbo(
        self, x: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None, draws: int = 1
    ) -> Elbo:
        """The bound on -log p(x) for each datum, averaged over ``draws``.

        Args:
            x: data (B, *event), model units.
            cond: class labels (B,) or None.
            generator: of noise and levels; fresh entropy where None.
            draws: draws per datum; the levels are stratified over them.

        Returns:
            Reconstruction, latent and prior in nats, (B,), float64.

        Raises:
            ValueError: the data have another shape than the model's, or are not finite.
        """
        self.check(x)
        if draws < 1:
            raise ValueError(f"draws is at least 1, not {draws}")
        generator = generator_for(generator)
        u = stratified(len(x), draws, generator)
        rows = x.repeat_interleave(draws, 0)
        labels = None if cond is None else cond.repeat_interleave(draws, 0)
        terms = self.bound(rows, labels, u, generator)
        return Elbo(*(term.reshape(len(x), draws).mean(1) for term in terms))

    def loss(self, x: Tensor, cond: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """What training minimises: the mean bound of a batch in bits per coordinate, 0-dim.

        Args:
            x: data (B, *event), model units.
            cond: class labels (B,) or None.
            generator: of noise and levels; fresh entropy where None.
        """
        generator = generator_for(generator)
        u = low_discrepancy(len(x), generator)
        return self.bound(x, cond, u, generator).bits_per_dim(self.dims).mean()

    def bits_per_dim(
        self,
        x: Tensor,
        cond: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        draws: int = 1,
        bin_width: float | None = None,
    ) -> Tensor:
        """The bound on the code length of discrete data, bits per coordinate, (B,).

        Args:
            x: data (B, *event), model units.
            cond: class labels (B,) or None.
            generator: of noise and levels; fresh entropy where None.
            draws: draws per datum.
            bin_width: for a density decoder: width in model units of the bins that ``x`` was dequantised over.

        Raises:
            ValueError: the model has a density decoder and no bin width is given.
        """
        offset = self.bits_offset(bin_width)
        return self.elbo(x, cond, generator=generator, draws=draws).bits_per_dim(self.dims) + offset

    def bits_offset(self, bin_width: float | None = None) -> float:
        """-log2(bin width) for a density, 0 for a probability: what turns nats/(D log 2) into bits of discrete data.

        Raises:
            ValueError: the width is missing, not positive, or given to a model of probabilities.
        """
        if self.discrete:
            if bin_width is not None:
                raise ValueError("this model gives probabilities of grey levels: bin_width is for density decoders")
            return 0.0
        if bin_width is None or not bin_width > 0:
            raise ValueError(
                "bits/dim count discrete data and this model's decoder is a density: use a discrete decoder, or say "
                "bin_width=... of the bins that the data were dequantised over"
            )
        return -math.log2(bin_width)

    def check(self, x: Tensor) -> None:
        """Refuse data that are not this model's: wrong type, shape or batch, or not finite."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"data are a floating tensor in model units, not {kind}")
        if not len(x):
            raise ValueError("there are no data: the batch is empty")
        if tuple(x.shape[1:]) != self.event_shape:
            raise ValueError(f"an example of this model has shape {self.event_shape}, not {tuple(x.shape[1:])}")
        if not bool(x.isfinite().all()):
            bad = int((~x.isfinite()).flatten(1).any(1).int().argmax())
            raise ValueError(f"example {bad} is not finite")


def generator_for(generator: torch.Generator | None) -> torch.Generator:
    """The generator itself, or one seeded with fresh entropy; the global random state is not touched."""
    return generator if generator is not None else torch.Generator().manual_seed(fresh_seed())


def decoder_noise(shape: Sequence[int], seed: int, first: int, like: Tensor) -> Tensor:
    """Standard normals that draw from p(x | z) where ``seed`` drew z: the same sample numbers, another stream."""
    samples = range(first, first + shape[0])
    return standard_normal(shape, seed, samples=samples, stream=DECODER, dtype=like.dtype, device=like.device)


def _normals(generator: torch.Generator) -> Normals:
    """Noise in sequence, drawn where the generator lives."""

    def normal(like: Tensor) -> Tensor:
        noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device)
        return noise.to(like.device)

    return normal
