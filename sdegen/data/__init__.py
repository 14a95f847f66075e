"""Data sets in model units: digits, two-dimensional densities, and the user's own files.

>>> from sdegen.data import load
>>> load("digits").bins
Bins(count=17)
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from sdegen.data.dataset import Dataset
from sdegen.data.digits import digits
from sdegen.data.files import from_arrays, from_file
from sdegen.data.toys import TOYS, toy

__all__ = ["TOYS", "Dataset", "digits", "from_arrays", "from_file", "load", "names", "toy"]


def names() -> list[str]:
    """The data sets that go by a name."""
    from sdegen.oracles import ORACLES

    return ["digits", *TOYS, *ORACLES]


def load(name: str, **options: Any) -> Dataset:
    """A data set by name or by file.

    Args:
        name: one of :func:`names`, or the path of an HDF5, NPZ or NPY file.
        **options: of :func:`digits`, :func:`toy` or :func:`from_file`.

    Raises:
        ValueError: neither a known name nor a file.
    """
    if name == "digits":
        return digits(**options)
    if name in names():
        return toy(name, **options)
    if Path(name).suffix or "/" in name:
        return from_file(name, **options)
    near = difflib.get_close_matches(name, names(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names())}"
    raise ValueError(f"unknown data set {name!r}: {hint} A file is given by its path (.h5, .npz, .npy).")
