"""The variational autoencoder: one learned latent, and nothing between it and the prior.

    q(z | x) = N(mean(x), std(x)^2),    p(x | z) from a decoder network,    p(z) = N(0, I) or any model.

It is the latent-variable model whose levels are empty: z_0 and z_1 are the same latent, the latent term vanishes and
the bound is the familiar -E log p(x | z) + KL(q(z | x) || p(z)). With a diffusion as its prior it is latent diffusion.

References: Kingma and Welling 2014, arXiv:1312.6114; Rezende et al. 2014, arXiv:1401.4082; Burda et al. 2016,
arXiv:1509.00519 (importance-weighted bound).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdegen.decoders import Head
from sdegen.distributions import Distribution, Gaussian
from sdegen.levels import Empty
from sdegen.models.base import (
    Encoding,
    LatentVariableModel,
    ModelPrior,
    NormalPrior,
    Prior,
    decoder_noise,
    generator_for,
)
from sdegen.networks.layers import at_least

__all__ = ["VAE", "Perceptron"]


class Perceptron(nn.Module):
    """Dense layers with SiLU and dropout, from a flattened tensor (and a class) to a vector.

    Args:
        inputs: numbers that go in, after flattening.
        outputs: numbers that come out.
        width: of the hidden layers.
        depth: number of hidden layers.
        dropout: share of hidden units that are dropped in training.
        classes: number of classes of ``cond``, 0 for none.
    """

    def __init__(
        self, inputs: int, outputs: int, *, width: int = 512, depth: int = 1, dropout: float = 0.0, classes: int = 0
    ) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.classes = nn.Embedding(classes + 1, width) if classes else None  # row 0: no class
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.last = nn.Linear(width, outputs)
        self.drop, self.act = nn.Dropout(dropout), nn.SiLU()

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """x (B, ...), cond (B,) or None -> (B, outputs), in the dtype of x; a label of -1 is no label."""
        h = self.first(x.flatten(1))
        if self.classes is not None:
            h = h + (self.classes.weight[0] if cond is None else self.classes(cond + 1))
        elif cond is not None:
            raise ValueError("this network has no classes: build it with classes=K or leave cond out")
        for layer in self.hidden:
            h = layer(self.drop(self.act(h)))
        return self.last(self.drop(self.act(h))).to(x.dtype)  # out of autocast: the bound is taken in full precision


class VAE(LatentVariableModel):
    """A variational autoencoder.

    Args:
        encoder: ``encoder(x, cond)`` -> (B, 2 K): mean and log standard deviation of the latent.
        decoder: ``decoder(z, cond)`` -> (B, prod(event_shape) * head.outputs), coordinates outermost.
        head: what the decoder's numbers mean.
        event_shape: shape of one datum.
        latent: K, the number of latent coordinates.
        prior: p(z); the standard normal by default, or any density model of data of shape (K,).

    >>> from sdegen.bins import Bins
    >>> from sdegen.decoders import CategoricalHead
    >>> vae = VAE.mlp((1, 8, 8), CategoricalHead(Bins(17)), width=32)
    >>> x = vae.sample(3)
    >>> vae.elbo(x).total.shape
    torch.Size([3])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        head: Head,
        *,
        event_shape: Sequence[int],
        latent: int,
        prior: Prior | LatentVariableModel | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = encoder, decoder, head
        self.event_shape, self.latent, self.levels = tuple(event_shape), latent, Empty()
        self.prior = ModelPrior(prior) if isinstance(prior, LatentVariableModel) else prior or NormalPrior()
        self.evaluations = 0

    @classmethod
    def mlp(
        cls,
        event_shape: Sequence[int],
        head: Head,
        *,
        latent: int = 16,
        width: int = 512,
        depth: int = 1,
        dropout: float = 0.6,
        classes: int = 0,
        log_histogram: Tensor | None = None,
        prior: Prior | LatentVariableModel | None = None,
    ) -> VAE:
        """A VAE of two perceptrons, for vectors and small images.

        Args:
            event_shape: shape of one datum.
            head: what the decoder's numbers mean.
            latent: number of latent coordinates.
            width: of the hidden layers.
            depth: number of hidden layers in each network.
            dropout: share of hidden units dropped in training; few data need much.
            classes: number of classes of ``cond``, 0 for none.
            log_histogram: (*event, V), see :meth:`sdegen.bins.Bins.log_histogram`; the decoder then starts at the
                independent-pixel model.
            prior: see the class.
        """
        at_least(1, latent=latent, width=width)
        at_least(0, depth=depth, classes=classes)
        dims = math.prod(event_shape)
        encoder = Perceptron(dims, 2 * latent, width=width, depth=depth, dropout=dropout, classes=classes)
        decoder = Perceptron(latent, dims * head.outputs, width=width, depth=depth, dropout=dropout, classes=classes)
        for network in (encoder, decoder):  # q starts at the standard normal, p(x | z) at one distribution for all z
            nn.init.zeros_(network.last.bias)
            nn.init.normal_(network.last.weight, std=1e-2 / math.sqrt(width))
        if log_histogram is not None:
            decoder.last.bias.data.copy_(log_histogram.flatten())
        return cls(encoder, decoder, head, event_shape=event_shape, latent=latent, prior=prior)

    @property
    def discrete(self) -> bool:
        return self.head.discrete

    def encode(self, x: Tensor, cond: Tensor | None = None) -> Encoding:
        """q(z | x), which is the bottom and the top latent at once."""
        mean, log_std = self.encoder(x, cond).chunk(2, dim=1)
        q = Gaussian(mean, log_std)
        return Encoding(q, q)

    def decode(self, z: Tensor, cond: Tensor | None = None) -> Distribution:
        """p(x | z)."""
        self.evaluations += len(z)
        return self.head(self.decoder(z, cond).reshape(-1, *self.event_shape, self.head.outputs))

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
        """New data: a latent from the prior, then p(x | z).

        Args:
            n: number of samples.
            cond: class labels (n,) or None.
            seed: of all noise; sample i depends on (seed, i) alone.
            first: number of the first sample.
            draw: draw from p(x | z), pixel by pixel; False takes its most likely value, which is smoother than data.
            settings: none; here so that all models are asked alike.

        Returns:
            (n, *event), model units.
        """
        if settings:
            raise ValueError(f"a VAE is sampled in one step and has no {', '.join(settings)}")
        z = self.prior.sample((n, self.latent), seed=seed, first=first, dtype=self.dtype, device=self.device)
        x = self.decode(z, cond)
        if not draw:
            return x.mode
        return x.sample(decoder_noise((n, *self.event_shape), seed, first, z))

    @torch.no_grad()
    def iwae(
        self, x: Tensor, K: int, cond: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The importance-weighted bound on -log p(x) with K latents per datum, nats, (B,), float64.

        -log [ 1/K SUM_k p(x | z_k) p(z_k) / q(z_k | x) ],   z_k ~ q(z | x)

        K = 1 is the bound of :meth:`elbo`; more latents tighten it. How far it can be trusted is said by
        :func:`sdegen.likelihood.importance`.

        Args:
            x: data (B, *event), model units.
            K: latents per datum.
            cond: class labels (B,) or None.
            generator: of the noise; fresh entropy where None.

        Reference: Burda et al. 2016, arXiv:1509.00519, eq. 8.
        """
        self.check(x)
        generator, log_w = generator_for(generator), []
        for k in range(0, K, 16):
            shape = (len(x), min(16, K - k), self.latent)
            noise = torch.randn(shape, generator=generator, dtype=x.dtype, device=generator.device)
            log_w.append(self.log_weights(x, noise.to(x.device), cond))
        return math.log(K) - torch.cat(log_w, 1).logsumexp(1)

    @torch.no_grad()
    def log_weights(self, x: Tensor, noise: Tensor, cond: Tensor | None = None) -> Tensor:
        """Log importance weights log p(x | z) p(z) / q(z | x) at z = mean + std noise, nats, (B, K), float64.

        Args:
            x: data (B, *event), model units.
            noise: standard normal numbers (B, K, latent).
            cond: class labels (B,) or None.
        """
        q, K = self.encode(x, cond).bottom, noise.shape[1]
        q = Gaussian(*(part.repeat_interleave(K, 0) for part in (q.mean, q.log_std)))
        z, labels = q.sample(noise.flatten(0, 1)), None if cond is None else cond.repeat_interleave(K, 0)
        found = self.decode(z, labels).log_prob(x.repeat_interleave(K, 0)) + self.prior.log_prob(z) - q.log_prob(z)
        return found.reshape(len(x), K)
