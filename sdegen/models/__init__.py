"""Models: one bound (:mod:`.base`), and what fills it in."""

from __future__ import annotations

from sdegen.models.base import Elbo, Encoding, LatentVariableModel, ModelPrior, NormalPrior, Prior
from sdegen.models.baselines import (
    Autoregressive,
    Independent,
    global_histogram,
    pixel_histogram,
    uniform,
)
from sdegen.models.diffusion import DDPM, VPSDE, GaussianDiffusion
from sdegen.models.vae import VAE, Perceptron

__all__ = [
    "DDPM",
    "VAE",
    "VPSDE",
    "Autoregressive",
    "Elbo",
    "Encoding",
    "GaussianDiffusion",
    "Independent",
    "LatentVariableModel",
    "ModelPrior",
    "NormalPrior",
    "Perceptron",
    "Prior",
    "global_histogram",
    "pixel_histogram",
    "uniform",
]
