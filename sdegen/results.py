"""Results that can be read a year later: named arrays with named axes and the story of how they were made, in HDF5.

One file holds the results of one run; each result is a group such as ``likelihood/bound``. In a group every array names
its axes, an axis may have a coordinate (the values of T, the solver's names), and attributes carry units, the
configuration, versions, commit, seed, device and the counted NFE. Axes are HDF5 dimension scales, the convention of
netCDF 4, so other tools read the file unchanged:

    xarray.open_dataset("runs/demo/results.h5", group="likelihood/bound")

Arrays are compressed and carry a Fletcher checksum per chunk; HDF5 by itself reads a flipped bit without a word. A file
is never changed in place: a new one, with the other results copied into it, replaces it.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import h5py
import numpy as np

from sdegen.files import FULL, DamagedFile, locked, replacing, write_bytes

__all__ = ["Array", "Result", "names", "read", "write", "write_csv"]

_NO_COORDINATE = "This is a netCDF dimension but not a netCDF variable."
_HIDDEN = {"CLASS", "NAME", "REFERENCE_LIST", "DIMENSION_LIST", "_Netcdf4Dimid", "_Netcdf4Coordinates"}


class Array(NamedTuple):
    """Values, the name of each of their axes, and attributes such as the unit."""

    axes: tuple[str, ...]
    values: Any
    attributes: Mapping[str, Any] = {}


@dataclass(frozen=True, init=False)
class Result:
    """Named arrays with named axes. An array with the name of its own axis is that axis's coordinate.

    Args:
        arrays: name -> (axes, values) or (axes, values, attributes); kept as :class:`Array` of NumPy arrays.
        attributes: about the whole: numbers, strings, or anything that JSON can hold.

    Raises:
        ValueError: when axes and shapes do not fit together.

    >>> result = Result(
    ...     {"T": (("T",), [10, 100]), "bits": (("T", "example"), np.ones((2, 3)), {"unit": "bit"})}, {"seed": 0}
    ... )
    >>> result["bits"].shape, result["T"].tolist(), result.arrays["bits"].attributes
    ((2, 3), [10, 100], {'unit': 'bit'})
    """

    arrays: Mapping[str, Array]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __init__(self, arrays: Mapping[str, tuple[Any, ...]], attributes: Mapping[str, Any] | None = None) -> None:
        normal = {name: Array(tuple(axes), np.asarray(values), *rest) for name, (axes, values, *rest) in arrays.items()}
        object.__setattr__(self, "arrays", normal)
        object.__setattr__(self, "attributes", attributes or {})
        lengths: dict[str, int] = {}
        for name, array in normal.items():
            if len(array.axes) != array.values.ndim:
                raise ValueError(f"array {name!r} of shape {array.values.shape} needs as many axes, not {array.axes}")
            for axis, length in zip(array.axes, array.values.shape, strict=True):
                if axis in normal and normal[axis].axes != (axis,):
                    raise ValueError(
                        f"{axis!r} is an axis and an array: rename one, or let the array have that one axis"
                    )
                if lengths.setdefault(axis, length) != length:
                    raise ValueError(f"axis {axis!r} has length {lengths[axis]}, but {length} in array {name!r}")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name].values

    @property
    def lengths(self) -> dict[str, int]:
        """Length of every axis."""
        return {
            axis: n for array in self.arrays.values() for axis, n in zip(array.axes, array.values.shape, strict=True)
        }


def write(path: Path | str, name: str, result: Result) -> None:
    """Put a result into a file, in place of one of the same name; the file's other results stay.

    Whatever happens, the file is the old one or the new one. Two processes may write to one file; they take turns.

    Args:
        path: the HDF5 file; made when it is not there.
        name: the group, such as ``likelihood/bound``.

    Raises:
        DamagedFile: when the file that is there cannot be read.
        DiskFull: when the disk has no room; the old file stays.
    """
    path = Path(path)
    with locked(path, wait=60), replacing(path) as temporary:
        if path.exists():
            shutil.copyfile(path, temporary)
        with _open(temporary, "r+" if path.exists() else "w", path) as file:
            if name in file:
                del file[name]
            _fill(file.create_group(name, track_order=True), result)


def read(path: Path | str, name: str) -> Result:
    """Read a result, checksums verified.

    Raises:
        FileNotFoundError: when the file is not there.
        DamagedFile: when it is truncated or altered.
        KeyError: when it has no such result; the message lists those it has.
    """
    with _open(Path(path)) as file:
        if name not in _groups(file):
            raise KeyError(f"{path} has no result {name!r}, only {', '.join(_groups(file)) or 'none at all'}")
        arrays: dict[str, Any] = {}
        for key, dataset in cast(h5py.Group, file[name]).items():
            if not isinstance(dataset, h5py.Dataset) or dataset.attrs.get("NAME", b"").startswith(
                _NO_COORDINATE.encode()
            ):
                continue
            attributes = _attributes(dataset)
            values = np.asarray(dataset.asstr()[()] if h5py.check_string_dtype(dataset.dtype) else dataset[()])
            if attributes.pop("dtype", None) == "bool":
                values = values.astype(bool)
            axes = (key,) if dataset.is_scale else tuple(str(axis[0].name).rpartition("/")[2] for axis in dataset.dims)
            arrays[key] = (axes, values, attributes)
        return Result(arrays, _attributes(cast(h5py.Group, file[name])))


def names(path: Path | str) -> list[str]:
    """The results in a file, oldest first; none when there is no file.

    Raises:
        DamagedFile: when it is truncated or altered.
    """
    if not Path(path).exists():
        return []
    with _open(Path(path)) as file:
        return _groups(file)


def write_csv(path: Path | str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table for people and spreadsheets, atomically; the columns are the keys, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_bytes(path, text.getvalue())


def _fill(group: h5py.Group, result: Result) -> None:
    for axis, length in result.lengths.items():
        if axis in result.arrays:
            _dataset(group, axis, result.arrays[axis]).make_scale(axis)
        else:  # what netCDF does with an axis that has a length and no values
            group.create_dataset(axis, (length,), ">f4").make_scale(f"{_NO_COORDINATE}{length:10d}")
    for name, array in result.arrays.items():
        if name not in array.axes:
            dataset = _dataset(group, name, array)
            for index, axis in enumerate(array.axes):
                dataset.dims[index].attach_scale(group[axis])
    _describe(group, result.attributes)


def _dataset(group: h5py.Group, name: str, array: Array) -> h5py.Dataset:
    values = array.values
    if values.dtype.kind in "UO":
        dataset = group.create_dataset(name, data=values.astype(object), dtype=h5py.string_dtype())
    elif values.dtype.kind in "biufc":
        filters = {"compression": "gzip", "shuffle": True, "fletcher32": True} if values.size and values.ndim else {}
        stored = values.astype(np.int8) if values.dtype == bool else values  # netCDF has no booleans
        dataset = group.create_dataset(name, data=stored, **filters)
    else:
        raise TypeError(f"array {name!r} of type {values.dtype} cannot be stored: only numbers, booleans and strings")
    _describe(dataset, array.attributes)
    if values.dtype == bool:
        dataset.attrs["dtype"] = "bool"  # xarray reads this
    return dataset


def _describe(owner: h5py.Group | h5py.Dataset, attributes: Mapping[str, Any]) -> None:
    """Numbers, strings and lists of numbers as they are, None not at all, everything else as JSON."""
    for key, value in attributes.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float, str, np.integer, np.floating)):
            plain = np.asarray(value) if isinstance(value, (list, tuple, np.ndarray)) else None
            value = plain if plain is not None and plain.dtype.kind in "iuf" and plain.size else json.dumps(value)
        owner.attrs[key] = value


def _attributes(owner: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    found = {key: value for key, value in owner.attrs.items() if key not in _HIDDEN}
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in found.items()}


def _groups(file: h5py.File) -> list[str]:
    """Names of the groups that hold arrays."""
    found: list[str] = []

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Dataset) and (group := name.rpartition("/")[0]) not in found:
            found.append(group)

    file.visititems(visit)
    return found


@contextmanager
def _open(file: Path, mode: Literal["r", "r+", "w"] = "r", name: Path | None = None) -> Iterator[h5py.File]:
    """Open a file, with HDF5's several ways to say that it is damaged turned into one."""
    if mode == "r" and not file.exists():
        raise FileNotFoundError(f"no results file {file}")
    if mode != "w" and not file.stat().st_size:  # HDF5 would take it for a new file
        raise DamagedFile(f"{name or file} is truncated or damaged: it is empty")
    # A deleted group's room is remembered (fs_persist) and used again.
    options: dict[str, Any] = {"fs_strategy": "fsm", "fs_persist": True, "track_order": True} if mode == "w" else {}
    try:
        with h5py.File(file, mode, **options) as opened:
            yield opened
    except (OSError, RuntimeError) as error:
        if mode == "w" or getattr(error, "errno", None) in FULL:
            raise
        raise DamagedFile(f"{name or file} is truncated or damaged: {' '.join(str(error).split())}") from error
