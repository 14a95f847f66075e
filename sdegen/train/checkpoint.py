"""Weights that are safe to open, and training states that hold nothing that could run.

``model.safetensors`` holds the averaged weights and numbers only; ``state.pt`` holds everything that a run needs to go
on, and is opened with ``weights_only=True``. The functions called ``write`` are bare: whoever calls them replaces the
file atomically, so that a kill or a full disk leaves the previous one.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdegen.files import DamagedFile, replacing

__all__ = ["load_module", "load_state", "load_weights", "save_weights", "size_of", "write_state", "write_weights"]

M = TypeVar("M", bound=nn.Module)
_FORMAT = 1


def save_weights(path: str | Path, model: nn.Module, **notes: object) -> None:
    """Write a model's weights and buffers atomically, with ``notes`` as text in the header.

    Raises:
        DiskFull: no room; the previous file is kept.
    """
    with replacing(path, needed=size_of(model.state_dict())) as temporary:
        write_weights(temporary, model, **notes)


def load_weights(path: str | Path, model: M) -> M:
    """Read weights into a model of the same architecture, and give it back.

    Raises:
        FileNotFoundError: no such file.
        DamagedFile: truncated, or not a safetensors file.
        ValueError: the weights are of another architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}")
    try:
        tensors = load_file(path)
    except safetensors.SafetensorError as error:
        raise DamagedFile(f"{path} is damaged or not a safetensors file ({error})") from error
    load_module(model, tensors, path)
    return model


def write_weights(path: str | Path, model: nn.Module, **notes: object) -> None:
    """What :func:`save_weights` does, not atomic by itself."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, path, metadata={name: str(value) for name, value in notes.items()})


def write_state(path: str | Path, state: dict[str, Any]) -> None:
    """Write a nest of dicts and lists of tensors, numbers and strings; not atomic by itself."""
    torch.save({"format": _FORMAT, **state}, path)


def load_state(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what :func:`write_state` wrote.

    Raises:
        FileNotFoundError: no such file.
        DamagedFile: truncated, or not such a file.
        ValueError: written by a version with another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no training state at {path}")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DamagedFile(f"{path} is damaged or not a training state ({reason})") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != _FORMAT:
        raise ValueError(f"{path} has format {found}, but this version of sdegen reads format {_FORMAT}")
    return state


def load_module(module: nn.Module, tensors: dict[str, Tensor], origin: object) -> None:
    """``load_state_dict``, strict, that says in one line what does not fit."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        detail = lines[0] if len(lines[0]) <= 160 else f"{lines[0][:160]} ..."
        raise ValueError(f"the weights in {origin} are of another architecture: {detail}") from error


def size_of(item: object) -> int:
    """About the bytes of a nest of containers: its tensors, and a little for the rest."""
    if isinstance(item, Tensor):
        return item.numel() * item.element_size() + 512
    if isinstance(item, dict):
        return sum(map(size_of, item.values()))
    return sum(map(size_of, item)) if isinstance(item, list | tuple) else 64
