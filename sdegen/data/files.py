"""Data from the user's own file: HDF5, NPZ or NPY with an array of shape (N, *event).

Everything that could be wrong with a file is said in one line before anything is trained on it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdegen.bins import Bins
from sdegen.data.dataset import Dataset

__all__ = ["axes", "from_arrays", "from_file"]


def from_file(
    path: str | Path,
    key: str | None = None,
    *,
    labels: str | None = None,
    test_key: str | None = None,
    test_labels: str | None = None,
    levels: int | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Read a data set from one array in a file.

    Bytes are taken as 256 grey levels and booleans as two. Other numbers are real-valued and get zero mean and unit
    variance (one shift and one scale for the whole set, recorded in it), unless ``levels`` says that they are integers
    0..levels-1. An array of shape (N, H, W) gets a channel axis.

    Args:
        path: ``.h5``, ``.hdf5``, ``.npz`` or ``.npy``.
        key: the array's name inside an HDF5 or NPZ file; may be left out when there is only one.
        labels: name of the class labels (N,) in the same file.
        test_key: name of a held-out array; without it, ``test_fraction`` of ``key`` is held out.
        test_labels: name of the labels of ``test_key``.
        levels: number of grey levels V.
        test_fraction: share that is held out, between 0 and 1.
        seed: of the random split.

    Raises:
        FileNotFoundError: no such file.
        ValueError: everything else that is wrong with it, in one line.
    """
    path = Path(path)
    read = _open(path)
    images = read(key)
    return from_arrays(
        images,
        labels=None if labels is None else read(labels),
        test=None if test_key is None else read(test_key),
        test_labels=None if test_labels is None else read(test_labels),
        levels=levels,
        test_fraction=test_fraction,
        seed=seed,
        name=path.name,
        source=f"{path}{f' [{key}]' if key else ''}, seed {seed}",
    )


def from_arrays(
    x: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    test: np.ndarray | None = None,
    test_labels: np.ndarray | None = None,
    levels: int | None = None,
    test_fraction: float = 0.1,
    seed: int = 0,
    name: str = "arrays",
    source: str = "",
) -> Dataset:
    """A data set from numpy arrays in memory, with the checks and rules of :func:`from_file`.

    >>> from_arrays(np.arange(40, dtype=np.uint8).reshape(10, 2, 2)).describe()
    'arrays: 9 training and 1 held-out examples of 1x2x2, 256 grey levels'
    """
    x = _checked(np.asarray(x), name)
    cond = None if labels is None else _labels(np.asarray(labels), len(x), name)
    if test is None:
        if not 0 < test_fraction < 1:
            raise ValueError(f"test_fraction must lie between 0 and 1, not {test_fraction}")
        if len(x) < 2:
            raise ValueError(f"{name} holds one example: at least two are needed, one of them to be held out")
        order = np.random.default_rng(seed).permutation(len(x))
        held = order[: min(max(1, round(test_fraction * len(x))), len(x) - 1)]
        kept = np.sort(order[len(held) :])
        x, held_x = x[kept], x[np.sort(held)]
        cond, held_cond = (None, None) if cond is None else (cond[kept], cond[np.sort(held)])
    else:
        held_x = _checked(np.asarray(test), f"{name} (held out)")
        held_cond = None if test_labels is None else _labels(np.asarray(test_labels), len(held_x), name)

    if levels is None and x.dtype in (np.uint8, np.bool_):
        levels = 256 if x.dtype == np.uint8 else 2
    if levels is not None:
        bins = Bins(levels)
        parts, scale, shift = [_levels(a, bins, name) for a in (x, held_x)], bins.width, 1 / levels - 1
    else:
        bins, mean, std = None, float(x.mean(dtype=np.float64)), float(x.std(dtype=np.float64))
        if std == 0:
            raise ValueError(f"every value of {name} is {mean:g}: there is nothing to learn")
        scale, shift = 1 / std, -mean / std
        parts = [torch.from_numpy((scale * a.astype(np.float64) + shift).astype(np.float32)) for a in (x, held_x)]
    return Dataset(name, parts[0], parts[1], bins, cond, held_cond, scale, shift, source=source)


def axes(path: str | Path, key: str | None = None) -> int | None:
    """How many axes the array in a file has, its values unread; None where there is no such array."""
    try:
        return _open(Path(path))(key, np.ndim)
    except (OSError, ValueError):
        return None


class _Unusable(ValueError):
    """Our own complaint about what a file holds, as opposed to a library's about how it is written."""


def _open(path: Path) -> Callable[..., Any]:
    """``read(key)``, the array in the file, or ``read(key, take)``, something else that its header tells."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    readers = {".h5": _read_hdf5, ".hdf5": _read_hdf5, ".npz": _read_numpy, ".npy": _read_numpy}
    if path.suffix not in readers:
        raise ValueError(f"{path.name}: the ending must be one of {', '.join(readers)}")

    def read(key: str | None, take: Callable[[Any], Any] = np.array) -> Any:
        try:
            return readers[path.suffix](path, key, take)
        except _Unusable:
            raise
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path} is truncated, damaged or no {path.suffix} file of numbers ({reason})") from error

    return read


def _read_hdf5(path: Path, key: str | None, take: Callable[[Any], Any]) -> Any:
    import h5py

    with h5py.File(path, "r") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        item: Any = file[_key(key, names, path)]
        if item.dtype.kind not in "biuf":
            raise _Unusable(f"{path} [{item.name}] holds {item.dtype}, not numbers")
        return take(item)


def _read_numpy(path: Path, key: str | None, take: Callable[[Any], Any]) -> Any:
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)  # with pickles, opening a file could run code
    if isinstance(loaded, np.ndarray):
        if key is not None:
            raise _Unusable(f"{path.name} holds one array without a name: leave out the key {key!r}")
        return take(loaded)
    with loaded:
        return take(loaded[_key(key, loaded.files, path)])


def _key(key: str | None, names: list[str], path: Path) -> str:
    """The name to read, checked against what is there."""
    if key is None and len(names) == 1:
        return names[0]
    have = ", ".join(names) or "nothing"
    if key is None:
        raise _Unusable(f"{path.name} holds several arrays: say which by key=, one of {have}")
    if key.strip("/") not in names:
        raise _Unusable(f"{path.name} has no array {key!r}; it holds {have}")
    return key.strip("/")


def _checked(x: np.ndarray, name: str) -> np.ndarray:
    """Numbers, of a shape that makes sense, all finite; with a channel axis."""
    if x.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {x.dtype}, not numbers")
    if not 2 <= x.ndim <= 4:
        raise ValueError(f"{name} has shape {x.shape}; it must be (N, D), (N, H, W) or (N, C, H, W)")
    if not x.size:
        raise ValueError(f"{name} is empty: its shape is {x.shape}")
    if x.ndim == 4 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 2, 3, 4) and x.shape[2] > 4:
        raise ValueError(f"{name} has shape {x.shape}, which looks like (N, H, W, C); it must be (N, C, H, W)")
    if x.dtype.kind == "f":
        bad = ~np.isfinite(x)
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(f"{name} holds {int(bad.sum())} NaN or infinite values; the first is at index {first}")
    return x[:, None] if x.ndim == 3 else x


def _levels(x: np.ndarray, bins: Bins, name: str) -> Tensor:
    k = x.astype(np.int64)
    if (k != x).any() or k.min() < 0 or k.max() >= bins.count:
        bad = x[(k != x) | (k < 0) | (k >= bins.count)]
        raise ValueError(
            f"{name} is to have grey levels 0..{bins.count - 1}, but {bad.size} values are none; the first is {bad[0]}"
        )
    return bins.value(torch.from_numpy(k))


def _labels(labels: np.ndarray, count: int, name: str) -> Tensor:
    if labels.shape != (count,):
        raise ValueError(f"{name}: labels have shape {labels.shape}, but there are {count} examples")
    if labels.dtype.kind not in "biu" or labels.min() < 0:
        raise ValueError(f"{name}: labels must be integers from 0 upwards, not {labels.dtype} from {labels.min()}")
    return torch.from_numpy(labels.astype(np.int64))
