"""A workbench for score-based generative models: one Gaussian path, one bound, one shared network, proven solvers.

    import sdegen, solvers

    data = sdegen.load("digits")
    net = sdegen.MLP(data.event_shape, outputs=data.bins.count)
    model = sdegen.VPSDE(sdegen.Denoiser(net, "levels", data.bins).calibrate(data.train))
    sdegen.fit(model, data, sdegen.TrainConfig(steps=1000))
    model.sample(16, solver="dpmpp_2m", nfe=20, seed=0)
    sdegen.bound(model, data.test).bits_per_dim

The names below, and modules such as ``sdegen.models``, are loaded when they are first used, so that ``sdegen --help``
need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdegen.bins import Bins
    from sdegen.building import restore
    from sdegen.data import Dataset, from_arrays, from_file, load
    from sdegen.denoiser import Denoiser
    from sdegen.likelihood import (
        Evaluation,
        LikelihoodReport,
        audit,
        bound,
        denoising_profile,
        evaluate,
        importance,
        ode_likelihood,
        ode_log_prob,
    )
    from sdegen.models import DDPM, VAE, VPSDE, Elbo, GaussianDiffusion, LatentVariableModel
    from sdegen.networks import MLP, UNet
    from sdegen.objectives import OBJECTIVES, Objective
    from sdegen.oracles import GaussianOracle, MixtureOracle, oracle
    from sdegen.paths import PATHS, VE, VP, Flow, GaussianPath, SubVP, Tabulated
    from sdegen.train import TrainConfig, fit

_HOMES = {
    "bins": ("Bins",),
    "building": ("restore",),
    "data": ("Dataset", "from_arrays", "from_file", "load"),
    "denoiser": ("Denoiser",),
    "likelihood": (
        "Evaluation",
        "LikelihoodReport",
        "audit",
        "bound",
        "denoising_profile",
        "evaluate",
        "importance",
        "ode_likelihood",
        "ode_log_prob",
    ),
    "models": ("DDPM", "VAE", "VPSDE", "Elbo", "GaussianDiffusion", "LatentVariableModel"),
    "networks": ("MLP", "UNet"),
    "objectives": ("OBJECTIVES", "Objective"),
    "oracles": ("GaussianOracle", "MixtureOracle", "oracle"),
    "paths": ("PATHS", "VE", "VP", "Flow", "GaussianPath", "SubVP", "Tabulated"),
    "train": ("TrainConfig", "fit"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "DDPM",
    "MLP",
    "OBJECTIVES",
    "PATHS",
    "VAE",
    "VE",
    "VP",
    "VPSDE",
    "Bins",
    "Dataset",
    "Denoiser",
    "Elbo",
    "Evaluation",
    "Flow",
    "GaussianDiffusion",
    "GaussianOracle",
    "GaussianPath",
    "LatentVariableModel",
    "LikelihoodReport",
    "MixtureOracle",
    "Objective",
    "SubVP",
    "Tabulated",
    "TrainConfig",
    "UNet",
    "audit",
    "bound",
    "denoising_profile",
    "evaluate",
    "fit",
    "from_arrays",
    "from_file",
    "importance",
    "load",
    "ode_likelihood",
    "ode_log_prob",
    "oracle",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"sdegen.{_HOME[name]}"), name)
    module = f"sdegen.{name}"
    try:
        if not name.startswith("_"):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # it is there, and something that it needs is not
            raise
    raise AttributeError(f"module 'sdegen' has no attribute {name!r}")


def __dir__() -> list[str]:
    from pkgutil import iter_modules

    return [*__all__, *(module.name for module in iter_modules(__path__) if not module.name.startswith("_"))]
