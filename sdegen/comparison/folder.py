"""The folder of a sweep: what it holds, and whether a comparison can go on in it.

    results.h5, results.csv    the tables, made from the journal and made again from it whenever they are damaged
    comparison.json            what all cells have in common; another comparison needs another folder
    journal, references        cells (:mod:`sdegen.comparison.journal`), and converged solutions

A cell is known by everything that was asked for (:func:`key`), among it the source of a solver or target that is the
user's own: edit it, start the sweep again, and only its cells are measured anew. How a cell was measured is said by the
mark of the code (:mod:`sdegen.comparison.code`). An update of this program may have changed its number or not, and
nobody likes to lose a night of cells to a better error message; so where cells that are asked for have another mark, a
sweep stops and asks: *keep* them (the column ``code`` says which they are) or measure them *anew*.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sdegen import results
from sdegen.comparison.journal import Journal
from sdegen.comparison.settings import Cell, Comparison, possible
from sdegen.comparison.table import SCHEMA
from sdegen.comparison.targets import source
from sdegen.comparison.truth import Truths
from sdegen.files import DamagedFile, write_bytes

__all__ = [
    "RESULTS",
    "SETTINGS",
    "TABLE",
    "Found",
    "Stale",
    "check_folder",
    "check_replaceable",
    "forget",
    "key",
    "prepare",
]

RESULTS, TABLE, SETTINGS = "results.h5", "results.csv", "comparison.json"

Stale = Literal["ask", "keep", "anew"]
"""What to do with cells that other code has measured: refuse to go on, take them as they are, measure them again."""


def prepare(folder: Path, settings: Comparison) -> None:
    """Make a folder ready, where it is not yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / SETTINGS).exists():
        write_bytes(folder / SETTINGS, json.dumps(_common(settings), indent=2) + "\n")


class Found(NamedTuple):
    """What a folder has of a comparison.

    Attributes:
        done: cells that are measured.
        notes: what is damaged, and what will be done about it.
    """

    done: int = 0
    notes: tuple[str, ...] = ()


def check_folder(folder: Path | str, truths: Truths, stale: Stale = "ask") -> Found:
    """Ask before the work whether a comparison can go on in a folder, and what is there of it.

    Args:
        folder: of the sweep.
        truths: of the comparison.
        stale: what to do with cells that other code has measured.

    Raises:
        ValueError: it holds cells that were measured otherwise, or no comparison.
        DamagedFile: its ``comparison.json`` is truncated or altered.
    """
    folder, wanted = Path(folder), _common(truths.settings)
    if not (folder / SETTINGS).exists():
        # Hidden files may be those of another process of the team, which is writing the settings just now.
        if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise ValueError(f"{folder} exists and holds no comparison: choose another folder")
        return Found()
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        schema = found["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{folder / SETTINGS} is truncated or damaged: {error}") from None
    if schema != SCHEMA:
        raise ValueError(
            f"{folder} was written by another version: its schema is {schema}, this program has {SCHEMA}; choose "
            "another folder, or measure all again (--overwrite)"
        )
    if changed := [name for name in wanted if found.get(name) != wanted[name]]:
        said = ", ".join(f"{name} {found.get(name)} and not {wanted[name]}" for name in changed)
        raise ValueError(f"{folder} holds cells that were measured with {said}: choose another folder")
    return _held(folder, truths, stale)


def _held(folder: Path, truths: Truths, stale: Stale) -> Found:
    """The cells that are there; an error where some of them are stale and nobody has said what to do."""
    cells = possible(truths.settings)
    journal = Journal(folder / "journal", {truths.code(cell) for cell in cells})
    journal.refresh()
    keys = [key(cell, truths) for cell in cells]
    there = [k for k in keys if k in journal.rows]
    other = [k for k in there if not journal.fresh(k)]
    if other and stale == "ask":
        codes = dict.fromkeys(code for k in other for code in journal.rows[k])
        whose = " and ".join(f"{code} ({journal.makers[code]})" for code in codes)
        raise ValueError(
            f"{folder} has {len(other)} of these {len(cells)} cells from other code, {whose}, not "
            f"{' or '.join(journal.codes)}: keep them beside the new ones (--keep), measure them again (--anew), or "
            "choose another folder"
        )
    notes = []
    if journal.damaged:
        lines = "a line" if journal.damaged == 1 else f"{journal.damaged} lines"
        notes.append(f"{lines} of {journal.folder} damaged: what they held is measured again")
    if (folder / RESULTS).exists():
        try:
            results.names(folder / RESULTS)
        except DamagedFile as error:
            notes.append(f"{error}; it is made again from the {len(journal.rows)} cells in {journal.folder}")
    return Found(len(there) - len(other) * (stale == "anew"), tuple(notes))


def check_replaceable(folder: Path) -> None:
    """Ask before the work whether :func:`forget` will be allowed to empty a folder.

    Raises:
        ValueError: it holds something else than a comparison.
    """
    if folder.exists() and not (folder / SETTINGS).exists():
        raise ValueError(f"{folder} exists and holds no comparison: choose another folder")


def forget(folder: Path, settings: Comparison) -> None:
    """Remove a comparison, and make the folder ready for another.

    Raises:
        ValueError: the folder holds something else.
    """
    check_replaceable(folder)
    for name in ("journal", "references"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (RESULTS, TABLE, SETTINGS):
        (folder / name).unlink(missing_ok=True)
    prepare(folder, settings)


def _common(settings: Comparison) -> dict[str, Any]:
    """What all cells of a folder have in common."""
    return {"schema": SCHEMA, "targets": list(settings.targets), **settings.sizes}


def key(cell: Cell, truths: Truths) -> str:
    """A name for everything that was asked for: which cell, with which settings, of which target and solver."""
    target, path = truths.problem(cell)
    parts = (
        asdict(cell) | {"tol": repr(cell.tol)}, repr(cell.method), source(cell.solver), target.mark, repr(path),
        _common(truths.settings),
    )  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
