"""Backbones with one interface: ``net(z, logsnr, cond=None)``, (B, C, *rest) -> (B, outputs * C, *rest).

Built as ``Net(event_shape, outputs, ...)``. The network sees z scaled to unit variance, and the output starts at zero,
so that an untrained :class:`sdegen.denoiser.Denoiser` is a sensible baseline of its parametrization.
"""

from sdegen.networks.embeddings import Conditioning
from sdegen.networks.mlp import MLP
from sdegen.networks.unet import UNet

__all__ = ["MLP", "NETWORKS", "Conditioning", "UNet"]

NETWORKS = {"mlp": MLP, "unet": UNet}
"""Names for the command line."""
