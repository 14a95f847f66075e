"""From a page of text, or from a run's folder, to the data and the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sdegen.bins import Bins
from sdegen.config import RunConfig, source
from sdegen.data import Dataset, load
from sdegen.models import LatentVariableModel
from sdegen.parsing import UsageError
from sdegen.recipes import MODELS
from sdegen.runs import CONFIG, WEIGHTS, Run, describe
from sdegen.train import load_weights

__all__ = ["build", "restore", "usable_device"]


def build(config: RunConfig, data: Dataset | None = None) -> tuple[Dataset, LatentVariableModel]:
    """The data set and the untrained model that a configuration describes.

    Args:
        config: the configuration.
        data: in place of loading it.

    Raises:
        FileNotFoundError: a data file is missing.
        ValueError: something does not fit; the message begins with the section.
    """
    device = usable_device(config.device)
    if data is None:
        data = load(config.data.name, **config.data.options)
    if config.train.augment and len(data.event_shape) != 3:
        raise UsageError(f"train.augment distorts images, and an example of {data.name} has shape {data.event_shape}")
    parts: dict[str, Any] = {"classes": (data.classes if config.train.conditional else 0) + bool(config.train.augment)}
    if config.network is not None:
        parts["network"] = partial(source("network", config.network.name), **config.network.options)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(config.seed)
        try:
            model = MODELS[config.model.name](data, **parts, **config.model.options)
        except (RuntimeError, ArithmeticError) as error:  # torch, of a negative width and the like
            raise ValueError(f"model or network: {' '.join(str(error).split())}") from error
    return data, model.to(device)


def restore(run: Run | Path | str, *, device: str = "cpu", data: bool = True) -> tuple[Dataset, LatentVariableModel]:
    """The data set and the trained model of a run, with the averaged weights, in evaluation mode.

    Args:
        run: the run, or its folder.
        device: where the model goes; the run's own device does not matter.
        data: False for a placeholder without the data, enough to sample: the data file need not be there any more.

    Raises:
        FileNotFoundError: there are no weights yet, or the data file has gone.
        DamagedFile: the weights are not those that were written.
        ValueError: it is no run, or the data have changed since training.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    weights, card = run.verified(WEIGHTS), run.manifest["data"]
    config = replace(RunConfig.from_toml(run.config, run / CONFIG), device=device)
    dataset, model = build(config, None if data else _placeholder(card))
    if data and (found := describe(dataset))["sha256"] != card["sha256"]:
        raise ValueError(f"the data of {run.path} have changed since training: {found['description']}")
    return dataset, load_weights(weights, model).eval()


def usable_device(name: str) -> torch.device:
    """A device by its name.

    Raises:
        UsageError: there is none of that name here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device: {name!r} cannot be used here ({reason}); cpu always can") from None
    return device


def _placeholder(card: Mapping[str, Any]) -> Dataset:
    """A data set of one grey example, with the shape, levels and classes of the one on the card."""
    bins = None if card["levels"] is None else Bins(card["levels"])
    one = torch.zeros(2, *card["event_shape"]) + (0.0 if bins is None else bins.centers()[0])
    cond = torch.full((2,), card["classes"] - 1) if card["classes"] else None
    units = {"scale": card["scale"], "shift": card["shift"], "source": card["source"]}
    return Dataset(card["name"], one, one, bins, cond, cond, **units)
