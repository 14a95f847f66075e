"""The one shared network: from a noisy state to the pair (x0, eps) at any noise level.

A :class:`Denoiser` wraps *any* network ``net(z, logsnr, cond)``. It works in the variance-preserving scaling

    z = alpha x + sigma eps,      alpha^2 = sigmoid(logsnr),   sigma^2 = sigmoid(-logsnr),

and it knows no time, no schedule and no step count: the noise level is the log signal-to-noise ratio, so that one set
of weights serves the discrete DDPM, the VP-SDE, the VE-SDE, straight-line flows and any number of steps. Every other
Gaussian path differs by a factor, z_vp = x / sqrt(alpha^2 + sigma^2), and has the same (x0, eps) at equal logsnr.

**What the network predicts** is a change of variables and nothing else. With F the output,

    =========  ==========================================  ==========================================
    predicts   x0                                          eps
    =========  ==========================================  ==========================================
    ``eps``    (z - sigma F) / alpha                       F
    ``x0``     F                                           (z - alpha F) / sigma
    ``v``      alpha z - sigma F                           sigma z + alpha F
    ``score``  (z + sigma^2 F) / alpha                     -sigma F
    ``edm``    m + alpha c^2/S (z - alpha m)               sigma/S (z - alpha m)
               + sigma c/sqrt(S) F                         - alpha c/sqrt(S) F
    ``levels`` sum_k p_k v_k                               sum_k p_k (z - alpha v_k) / sigma
    =========  ==========================================  ==========================================

where m and c are the mean and standard deviation of the data and S = alpha^2 c^2 + sigma^2 is the variance of z.
``edm`` is the best linear denoiser plus a network whose target has unit variance at every noise level; with m = 0 and c
= 1 it is ``v`` with the sign of F turned. ``eps`` is ill-conditioned for x0 in noise (it divides by alpha), ``x0`` for
eps near data (it divides by sigma); ``v``, ``edm`` and ``levels`` are well-conditioned at both ends.

**Grey levels.** A pixel with V possible values v_k should not be regressed, it should be classified. The network gives
V logits l_k per pixel, and the posterior over the levels is exact Bayes in the pixel's own noise,

    log p_k = l_k + log N(z; alpha v_k, sigma^2) + const,

because given the pixel its noise is independent of all else: the network only has to learn what the *other* pixels say.
Regressing eps must instead learn to round, and as a density model of few-level images it is worse by a factor.

Reference: Kingma et al. 2021, arXiv:2107.00630 (logsnr as the clock); Salimans and Ho 2022, arXiv:2202.00512 (v);
Karras et al. 2022, arXiv:2206.00364, table 1 (edm); Dieleman et al. 2022, arXiv:2211.15089 (x0 as a mean of
categories).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from sdegen.bins import Bins
from solvers.problem import Path, Prediction, expand

__all__ = ["PARAMETRIZATIONS", "Denoiser", "GreyLevels", "Marginal", "Parametrization"]


class Marginal(NamedTuple):
    """What is known about z before the network speaks: z has mean alpha m and variance alpha^2 c^2 + sigma^2.

    Attributes:
        alpha: signal scale, 0-dim or (B, 1, ..., 1).
        sigma: noise scale, like ``alpha``.
        mean: data mean m, 0-dim or of the event's shape.
        std: data standard deviation c, 0-dim or of the event's shape.
    """

    alpha: Tensor
    sigma: Tensor
    mean: Tensor
    std: Tensor

    @property
    def variance(self) -> Tensor:
        return (self.alpha * self.std).square() + self.sigma.square()

    def whiten(self, z: Tensor) -> Tensor:
        """(z - alpha m) / sqrt(variance): zero mean and unit variance, the network's input."""
        return (z - self.alpha * self.mean) * self.variance.rsqrt()


class Parametrization(nn.Module, ABC):
    """What the output of a network means.

    Attributes:
        outputs: output channels for every channel of the data (1, or V for grey levels).
    """

    outputs: int = 1

    @abstractmethod
    def forward(self, output: Tensor, z: Tensor, at: Marginal) -> Prediction:
        """The pair (x0, eps) that ``output`` stands for at state ``z``."""

    def target(self, pair: Prediction, at: Marginal) -> Tensor:
        """The output that would stand for the pair: the inverse of :meth:`forward` at z = alpha x0 + sigma eps."""
        raise TypeError(f"{type(self).__name__} has no single target: many outputs stand for one pair")


class Eps(Parametrization):
    """The network predicts the noise."""

    def forward(self, output: Tensor, z: Tensor, at: Marginal) -> Prediction:
        return Prediction((z - at.sigma * output) / at.alpha, output)

    def target(self, pair: Prediction, at: Marginal) -> Tensor:
        return pair.eps


class X0(Parametrization):
    """The network predicts the data."""

    def forward(self, output: Tensor, z: Tensor, at: Marginal) -> Prediction:
        return Prediction(output, (z - at.alpha * output) / at.sigma)

    def target(self, pair: Prediction, at: Marginal) -> Tensor:
        return pair.x0


class V(Parametrization):
    """The network predicts v = alpha eps - sigma x0, the velocity on the circle alpha^2 + sigma^2 = 1."""

    def forward(self, output: Tensor, z: Tensor, at: Marginal) -> Prediction:
        return Prediction(at.alpha * z - at.sigma * output, at.sigma * z + at.alpha * output)

    def target(self, pair: Prediction, at: Marginal) -> Tensor:
        return at.alpha * pair.eps - at.sigma * pair.x0


class Score(Parametrization):
    """The network predicts the score -eps / sigma of the variance-preserving marginal, which grows as 1 / sigma."""

    def forward(self, output: Tensor, z: Tensor, at: Marginal) -> Prediction:
        return Prediction((z + at.sigma.square() * output) / at.alpha, -at.sigma * output)

    def target(self, pair: Prediction, at: Marginal) -> Tensor:
        return -pair.eps / at.sigma


class EDM(Parametrization):
    """The network predicts what is left of x0 after the best linear denoiser, in units of its standard deviation."""

    def forward(self, output: Tensor, z: Tensor, at: Marginal) -> Prediction:
        u, s, scaled = z - at.alpha * at.mean, at.variance, output * at.std * at.variance.rsqrt()
        return Prediction(
            at.mean + at.alpha * at.std.square() / s * u + at.sigma * scaled, at.sigma / s * u - at.alpha * scaled
        )

    def target(self, pair: Prediction, at: Marginal) -> Tensor:
        x = (pair.x0 - at.mean) / at.std
        return (at.sigma * x - at.alpha * at.std * pair.eps) * at.variance.rsqrt()


class GreyLevels(Parametrization):
    """The network predicts V logits per pixel; x0 and eps are means over the posterior of the grey level.

    Logits are added to the logarithm of each pixel's histogram (a buffer, see :meth:`Bins.log_histogram`), so that a
    network that gives zeros is the independent-pixel model and training starts at its bound.

    Args:
        bins: the grey levels.
        log_histogram: shape (*event, V), or None for equal shares.
    """

    log_histogram: Tensor

    def __init__(self, bins: Bins, log_histogram: Tensor | None = None) -> None:
        super().__init__()
        self.bins, self.outputs = bins, bins.count
        self.register_buffer("log_histogram", torch.zeros(()))
        if log_histogram is not None:
            self.start_at(log_histogram)

    def start_at(self, log_histogram: Tensor) -> None:
        """Add this to the logits, shape (*event, V)."""
        self.log_histogram = log_histogram.detach().movedim(-1, 1).contiguous().to(self.log_histogram)

    def posterior(self, output: Tensor, z: Tensor, at: Marginal) -> tuple[Tensor, Tensor]:
        """Unnormalised log-posterior of the levels, and the residuals r_k = (z - alpha v_k) / sigma it is made of.

        The levels stay where the network puts them, beside the channels: moving them last would copy everything.

        Args:
            output: the network's, shape (B, C V, *rest), the V logits of a channel side by side.
            z: shape (B, C, *rest).

        Returns:
            Two tensors of shape (B, C, V, *rest).
        """
        level = self.bins.centers(z.dtype, z.device).reshape(-1, *(1,) * (z.ndim - 2))
        gain = at.alpha / at.sigma
        residual = (z / at.sigma).unsqueeze(2) - (gain if gain.ndim == 0 else gain.unsqueeze(2)) * level
        evidence = torch.addcmul(self.log_histogram.to(z.dtype), residual, residual, value=-0.5)
        return output.unflatten(1, (z.shape[1], self.outputs)) + evidence, residual

    def forward(self, output: Tensor, z: Tensor, at: Marginal) -> Prediction:
        logits, residual = self.posterior(output, z, at)
        p = logits.softmax(2)
        x0 = self.bins.centers(z.dtype, z.device) @ p.reshape(*p.shape[:3], -1)
        # The noise is a mean of residuals: near the data, (z - alpha x0) / sigma would be a difference of near equals.
        return Prediction(x0.reshape(z.shape), (p * residual).sum(2))


def _needs_bins(bins: Bins | None) -> Parametrization:
    if bins is None:
        raise ValueError('predicts="levels" needs bins=Bins(V), the grey levels that a pixel may take')
    return GreyLevels(bins)


PARAMETRIZATIONS: dict[str, Callable[[Bins | None], Parametrization]] = {
    "eps": lambda bins: Eps(),
    "x0": lambda bins: X0(),
    "v": lambda bins: V(),
    "score": lambda bins: Score(),
    "edm": lambda bins: EDM(),
    "levels": _needs_bins,
}
"""Names for the command line and for ``Denoiser(net, predicts=...)``."""


class Denoiser(nn.Module):
    """A network with a meaning: (z, logsnr) -> (x0, eps).

    The network sees z scaled to zero mean and unit variance, (z - alpha m) / sqrt(alpha^2 c^2 + sigma^2). Under
    autocast only the network runs in reduced precision; z, logsnr and the conversions keep the precision of ``z``.

    Args:
        net: any module ``net(z, logsnr, cond)`` with z (B, C, *rest), logsnr (B,), cond (B,) or None, that returns
            (B, k C, *rest) where k is ``parametrization.outputs`` (V for grey levels, otherwise 1).
        predicts: a name in :data:`PARAMETRIZATIONS` or a :class:`Parametrization`.
        bins: the grey levels of the data; needed by ``"levels"``.
        data_mean: m, a number or a tensor of the event's shape, model units.
        data_std: c, likewise; zero is allowed where a pixel is constant, except with ``"edm"`` targets.

    >>> from sdegen.networks import MLP
    >>> d = Denoiser(MLP((2,), width=16, depth=1), predicts="eps")
    >>> x0, eps = d(torch.randn(5, 2), torch.linspace(-9, 9, 5))
    >>> tuple(x0.shape), tuple(eps.shape)
    ((5, 2), (5, 2))
    """

    data_mean: Tensor
    data_std: Tensor

    def __init__(
        self,
        net: nn.Module,
        predicts: str | Parametrization = "v",
        bins: Bins | None = None,
        *,
        data_mean: float | Tensor = 0.0,
        data_std: float | Tensor = 1.0,
    ) -> None:
        super().__init__()
        if isinstance(predicts, str):
            if predicts not in PARAMETRIZATIONS:
                raise ValueError(f"predicts={predicts!r} is unknown; choose one of {', '.join(PARAMETRIZATIONS)}")
            predicts = PARAMETRIZATIONS[predicts](bins)
        self.net, self.parametrization, self.bins = net, predicts, bins
        self.register_buffer("data_mean", torch.as_tensor(data_mean, dtype=torch.float32).clone())
        self.register_buffer("data_std", torch.as_tensor(data_std, dtype=torch.float32).clone())

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> Denoiser:
        """Take mean (per coordinate), standard deviation (one number) and histogram from training data.

        Args:
            x: data in model units, shape (N, *event).

        Returns:
            The denoiser itself.
        """
        device = self.data_mean.device
        mean = x.double().mean(0)
        self.data_mean = mean.float().to(device)
        self.data_std = (x.double() - mean).square().mean().sqrt().float().to(device)
        if isinstance(self.parametrization, GreyLevels):
            self.parametrization.start_at(self.parametrization.bins.log_histogram(x))
        return self

    def marginal(self, z: Tensor, logsnr: Tensor) -> Marginal:
        """Scales and data moments at a noise level, ready to multiply ``z``."""
        alpha, sigma = (expand((0.5 * logsigmoid(c)).exp(), z) for c in (logsnr, -logsnr))
        return Marginal(alpha, sigma, self.data_mean.to(z.dtype), self.data_std.to(z.dtype))

    def output(self, z: Tensor, logsnr: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Marginal]:
        """The bare output of the network in the precision of ``z``, and the marginal it was asked at."""
        at = self.marginal(z, logsnr)
        dtype = next(self.net.parameters(), z).dtype
        level = logsnr.to(device=z.device, dtype=dtype).expand(z.shape[0])
        return self.net(at.whiten(z).to(dtype), level, cond).to(z.dtype), at

    def forward(self, z: Tensor, logsnr: Tensor, cond: Tensor | None = None) -> Prediction:
        """Posterior means of data and noise.

        Args:
            z: state in variance-preserving scaling, shape (B, *event).
            logsnr: log alpha^2 / sigma^2, 0-dim or (B,).
            cond: class labels (B,), int64, or None.

        Returns:
            x0 and eps, each of the shape and dtype of ``z``.
        """
        output, at = self.output(z, logsnr, cond)
        with torch.autocast(z.device.type, enabled=False):
            return self.parametrization(output, z, at)

    def level_logits(self, z: Tensor, logsnr: Tensor, cond: Tensor | None = None) -> Tensor:
        """Log-posterior of every grey level at every pixel given the noisy image; only with ``predicts="levels"``.

        Args:
            z: state in variance-preserving scaling, shape (B, *event).
            logsnr: 0-dim or (B,).
            cond: class labels (B,) or None.

        Returns:
            Normalised log-probabilities, shape (B, *event, V).
        """
        if not isinstance(self.parametrization, GreyLevels):
            raise TypeError('only a denoiser that predicts="levels" has a posterior over grey levels')
        output, at = self.output(z, logsnr, cond)
        with torch.autocast(z.device.type, enabled=False):
            return self.parametrization.posterior(output, z, at)[0].log_softmax(2).movedim(2, -1)

    def predict(self, path: Path, cond: Tensor | None = None) -> Callable[[Tensor, Tensor], Prediction]:
        """The function (x, t) -> (x0, eps) that solvers ask, on any Gaussian path.

        z_vp = x / sqrt(alpha(t)^2 + sigma(t)^2) at equal logsnr; x0 and eps are the same on every path.

        Args:
            path: where ``x`` lives; its logsnr(t) sets the noise level.
            cond: class labels (B,) or None.

        Returns:
            ``predict(x, t)`` with t a float64 tensor, 0-dim or (B,) or (B, 1, ..., 1).
        """

        def predict(x: Tensor, t: Tensor) -> Prediction:
            t = t if t.ndim == 0 else t.reshape(-1)
            scale = torch.hypot(path.alpha(t), path.sigma(t)).reciprocal()
            return self(x * expand(scale, x), path.logsnr(t), cond)

        return predict

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The moments take the shape that they were saved with: a number, or one value for every pixel.
        for name in ("data_mean", "data_std", "parametrization.log_histogram"):
            owner, _, leaf = name.rpartition(".")
            saved, module = state_dict.get(prefix + name), self.get_submodule(owner)
            if isinstance(saved, Tensor) and leaf in module._buffers:
                setattr(module, leaf, torch.empty_like(saved, device=self.data_mean.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
