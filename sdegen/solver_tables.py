"""Solver tables on disk: one group of a results file for each table.

The arrays are those of :meth:`solvers.Table.arrays`, with their axes named, so that other tools can read them too; what
comes back is the same table bit for bit, and replays the same sample.
"""

from __future__ import annotations

from pathlib import Path

from sdegen import results
from solvers import Table

__all__ = ["read_table", "write_table"]

AXES: dict[str, tuple[str, ...]] = {
    "kind": ("row",),
    "time": ("column",),
    "alpha": ("column",),
    "sigma": ("column",),
    "first": ("bound",),
    "columns": ("entry",),
    "coefficients": ("entry",),
    "intervals": ("draw", "end"),
}


def write_table(path: Path | str, name: str, table: Table) -> None:
    """Put a table into a results file, in place of one of the same name.

    Args:
        path: the HDF5 file.
        name: the group, such as ``solvers/dpmpp_2m``.
        table: the solver on its grid.
    """
    arrays = table.arrays()
    said = {"solver": table.name, "output": table.output, "nfe": table.nfe, "steps": table.steps}
    results.write(path, name, results.Result({key: (axes, arrays[key]) for key, axes in AXES.items()}, said))


def read_table(path: Path | str, name: str) -> Table:
    """Read a table back.

    Raises:
        FileNotFoundError: when the file is not there.
        DamagedFile: when it is truncated or altered.
        KeyError: when it has no such group.
        ValueError: when the group holds no table.
    """
    found = results.read(path, name)
    arrays = {key: array.values for key, array in found.arrays.items() if key in AXES}
    said = {
        ours: found.attributes[key]
        for key, ours in (("solver", "name"), ("output", "output"))
        if key in found.attributes
    }
    try:
        return Table.from_arrays({**arrays, **said})
    except ValueError as error:
        raise ValueError(f"{path} holds no solver table under {name!r}: {error}") from error
