"""From names to a model: what the words of a configuration mean.

A recipe takes a data set, a network and plain options, and puts the parts together as one would by hand:

    denoiser = Denoiser(UNet(data.event_shape, outputs=17), "levels", data.bins).calibrate(data.train)
    model = VPSDE(denoiser)

Its keyword options, with their types, defaults and meaning as written here, *are* the keys of the ``[model]`` section
of a configuration and the options ``--model.KEY`` of the command line. Every name that a recipe looks up (a path, a
decoder, an objective) is a key of a dictionary in the module that owns the thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from sdegen.bins import Bins
from sdegen.data import Dataset
from sdegen.decoders import (
    HEADS,
    Decoder,
    GaussianDecoder,
    PosteriorDecoder,
    RoundingDecoder,
    SoftmaxDecoder,
    TweedieDecoder,
)
from sdegen.denoiser import PARAMETRIZATIONS, Denoiser
from sdegen.models import VAE, VPSDE, GaussianDiffusion, LatentVariableModel
from sdegen.objectives import DENSITIES, OBJECTIVES, Objective
from sdegen.paths import PATHS
from solvers.problem import Path
from solvers.solve import find

__all__ = ["DECODERS", "MODELS", "Network", "ddpm", "vae", "vpsde"]

Network = Callable[..., nn.Module]
"""``network(event_shape, outputs)``: a backbone with all its other options set."""

DECODERS: dict[str, Callable[[Bins | None], Decoder]] = {
    "softmax": lambda bins: SoftmaxDecoder(_grey(bins, "softmax")),
    "posterior": lambda bins: PosteriorDecoder(_grey(bins, "posterior")),
    "rounding": lambda bins: RoundingDecoder(_grey(bins, "rounding")),
    "gaussian": lambda bins: GaussianDecoder(),
    "tweedie": lambda bins: TweedieDecoder(),
}


def vpsde(
    data: Dataset,
    network: Network,
    classes: int = 0,
    *,
    predicts: str = "auto",
    path: str = "auto",
    decoder: str = "auto",
    objective: str = "elbo",
    density: str = "auto",
) -> GaussianDiffusion:
    """The continuous-time diffusion.

    Args:
        data: what it will be trained on; its moments and histogram calibrate the denoiser.
        network: the backbone.
        classes: number of classes to condition on, 0 for none.
        predicts: levels, edm, v, eps, x0 or score; auto is levels for grey levels and edm for real numbers.
        path: vp-logsnr, vp-linear, vp-cosine, vp-sigmoid, sub-vp, ve, flow or ddpm; auto is VP with linear logsnr
            between ends that suit the data.
        decoder: softmax, posterior, rounding (grey levels), gaussian or tweedie (densities); auto is softmax or
            gaussian.
        objective: elbo for likelihoods; simple, v-mse, min-snr, p2, edm or sigmoid for looks.
        density: where noise levels are drawn, logsnr, time, hyperbolic, logistic, normal, importance, spectrum,
            second-moment or learned; auto is the one that goes with the objective.
    """
    denoiser, chosen = _denoiser(data, network, classes, predicts), _path(path)
    ends = None if decoder == "auto" else find(decoder, DECODERS, "decoder")(data.bins)
    aim = _objective(objective, density, data)
    return VPSDE(denoiser, chosen, decoder=ends, objective=aim, event_shape=data.event_shape)


def ddpm(
    data: Dataset,
    network: Network,
    classes: int = 0,
    *,
    T: int = 1000,
    variance: Literal["posterior", "beta"] = "posterior",
    predicts: str = "auto",
    path: str = "auto",
    decoder: str = "auto",
    objective: str = "elbo",
    density: str = "auto",
) -> GaussianDiffusion:
    """The diffusion with T levels; T can be changed later, with the same weights.

    Args:
        data: what it will be trained on; its moments and histogram calibrate the denoiser.
        network: the backbone.
        classes: number of classes to condition on, 0 for none.
        T: number of levels.
        variance: of the reverse process.
        predicts: levels, edm, v, eps, x0 or score; auto is levels for grey levels and edm for real numbers.
        path: vp-logsnr, vp-linear, vp-cosine, vp-sigmoid, sub-vp, ve, flow or ddpm (Ho's table); auto is VP with linear
            logsnr between ends that suit the data.
        decoder: softmax, posterior, rounding (grey levels), gaussian or tweedie (densities); auto is softmax or
            gaussian.
        objective: elbo for likelihoods; simple, v-mse, min-snr, p2, edm or sigmoid for looks.
        density: where noise levels are drawn, logsnr, time, hyperbolic, logistic, normal, importance, spectrum,
            second-moment or learned; auto is the one that goes with the objective.
    """
    if T < 1:
        raise ValueError(f"T must be at least 1, not {T}")
    same = {"predicts": predicts, "path": path, "decoder": decoder, "objective": objective, "density": density}
    return vpsde(data, network, classes, **same).discretize(T, variance=variance)


def vae(
    data: Dataset,
    classes: int = 0,
    *,
    latent: int = 16,
    width: int = 512,
    depth: int = 1,
    dropout: float = 0.6,
    head: str = "auto",
) -> VAE:
    """The variational autoencoder of two perceptrons.

    Args:
        data: what it will be trained on; its histogram starts the decoder.
        classes: number of classes to condition on, 0 for none.
        latent: number of latent coordinates.
        width: of the hidden layers.
        depth: number of hidden layers in each network.
        dropout: share of hidden units dropped in training.
        head: categorical, discretised-gaussian, discretised-logistic, bernoulli (grey levels) or gaussian (a density);
            auto is categorical or gaussian.
    """
    name = ("gaussian" if data.bins is None else "categorical") if head == "auto" else head
    kind: Any = find(name, HEADS, "head")
    made = kind() if name == "gaussian" else kind(_grey(data.bins, name))
    start = data.bins.log_histogram(data.train) if data.bins is not None and name == "categorical" else None
    return VAE.mlp(
        data.event_shape,
        made,
        latent=latent,
        width=width,
        depth=depth,
        dropout=dropout,
        classes=classes,
        log_histogram=start,
    )


MODELS: dict[str, Callable[..., LatentVariableModel]] = {"vpsde": vpsde, "ddpm": ddpm, "vae": vae}
"""The recipes by name."""


def _denoiser(data: Dataset, network: Network, classes: int, predicts: str) -> Denoiser:
    name = ("edm" if data.bins is None else "levels") if predicts == "auto" else predicts
    outputs = find(name, PARAMETRIZATIONS, "prediction")(data.bins).outputs
    net = network(data.event_shape, outputs, classes=classes)
    return Denoiser(net, name, data.bins).calibrate(data.train)


def _path(name: str) -> Path | None:
    return None if name == "auto" else find(name, PATHS, "path")()


def _objective(name: str, density: str, data: Dataset) -> Objective:
    aim = find(name, OBJECTIVES, "objective")
    return aim if density == "auto" else replace(aim, density=find(density, DENSITIES, "density")(data.train))


def _grey(bins: Bins | None, what: str) -> Bins:
    if bins is None:
        raise ValueError(f"{what} is for grey levels, and these data are real numbers")
    return bins
