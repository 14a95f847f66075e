"""Backbones with one interface: ``net(z, logsnr, cond=None)``, (B, C, *rest) -> (B, outputs * C, *rest).

Built as ``Net(event_shape, outputs, *, classes=0, ...)``; further keyword arguments, with their types, are options of
the command line. One of your own is named "package.module:Net" or "path/to/file.py:Net". The network sees z scaled to
unit variance, and the output starts at zero, so that an untrained :class:`sdegen.denoiser.Denoiser` is a sensible
baseline of its parametrization.
"""

import inspect
from collections.abc import Callable
from typing import Any

from sdegen.networks.embeddings import Conditioning
from sdegen.networks.mlp import MLP
from sdegen.networks.unet import UNet
from solvers.names import find, load

__all__ = ["MLP", "NETWORKS", "Conditioning", "UNet", "network"]

NETWORKS = {"mlp": MLP, "unet": UNet}
"""Names for the command line."""


def network(name: str) -> Callable[..., Any]:
    """The class or function behind a name: one of ours, or anybody's in a module or file.

    Raises:
        ValueError: there is none, or it cannot be called as ours are.
    """
    if ":" not in name:
        return find(name, NETWORKS, "network")
    made: Any = load(name, "network")
    try:
        inspect.signature(made).bind_partial((1,), 1, classes=0)
    except TypeError as error:
        raise ValueError(f"{name} is built as Net(event_shape, outputs, *, classes=0, ...): {error}") from error
    return made
