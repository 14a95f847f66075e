"""Many cells: in memory, or in a folder that several processes fill and that survives all of them.

Of n processes the r-th takes every n-th cell, from the r-th on, the short ones first; when it has no more it helps the
others, from the end of their list. So nobody waits, nothing is locked, and a process that died is stood in for. Two
processes may by chance measure the same cell at the very end; both find the same numbers.

    torchrun --nproc-per-node 2 -m sdegen compare mixture16 --out runs/shared

A cell is known by everything that its numbers depend on (:func:`key`), among them the source of a solver or target that
is the user's own: edit it, start the sweep again, and only its cells are measured anew.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdegen import results
from sdegen.comparison.journal import Journal
from sdegen.comparison.measure import measure
from sdegen.comparison.settings import Cell, Comparison
from sdegen.comparison.table import COLUMNS, GROUP, SCHEMA, identity, tables
from sdegen.comparison.targets import source
from sdegen.comparison.truth import Truths
from sdegen.files import DamagedFile, write_bytes
from sdegen.files import sweep as tidy
from sdegen.provenance import provenance, versions
from sdegen.results import Result
from sdegen.train.interrupt import cpu_threads
from solvers import resolve

__all__ = ["RESULTS", "check_folder", "compare", "forget", "possible", "rank", "sweep"]

RESULTS, TABLE, SETTINGS = "results.h5", "results.csv", "comparison.json"
WRITTEN_EVERY = 30.0  # seconds between two writings of results.h5 while the sweep goes on

Progress = Callable[[str, float], None]


def _silent(what: str, share: float) -> None:
    pass


def compare(settings: Comparison, progress: Progress = _silent, *, known: Mapping[str, Any] | None = None) -> Result:
    """Measure every cell, in memory.

    Args:
        settings: what to measure.
        progress: called with a name and the share done, after each cell.
        known: targets that are objects, by the names that ``settings.targets`` has: a model, an oracle, or
            ``(DiffusionProblem, event_shape)``.

    Returns:
        The table, over the axis ``cell``; see :mod:`sdegen.comparison`.

    Raises:
        ValueError: an unknown target or path, or no cell that any budget is enough for.
    """
    truths = Truths(settings, known)
    cells = possible(settings)
    total, done, rows = sum(cell.weight for cell in cells), 0.0, []
    for cell in cells:
        progress(str(cell), done / total)
        rows.append(measure(cell, truths))
        done += cell.weight
        progress(str(cell), done / total)
    return tables(settings, rows, truths)[GROUP]


def sweep(
    settings: Comparison,
    folder: Path | str,
    *,
    workers: int = 1,
    threads: int = 1,
    progress: Progress = _silent,
    stop: threading.Event | None = None,
) -> Path:
    """Measure every cell that a folder does not have yet, and write the table.

    Args:
        settings: what to measure.
        folder: see :mod:`sdegen.comparison`; made where it is not there.
        workers: processes; under torchrun each of its processes is one, and this is left at 1.
        threads: CPU threads of each; it may change the last bits of a number.
        progress: called with a name and the share done, after each cell.
        stop: when it is set, the cell in hand is finished, the table is written, and that is all.

    Returns:
        Path of ``results.h5``; with what is there when it was stopped.

    Raises:
        ValueError: the settings do not fit the folder's, or an unknown target.
        DamagedFile: ``results.h5`` cannot be read.
    """
    folder = Path(folder)
    first, of = rank()
    check_folder(folder, settings)
    cells, truths = possible(settings), Truths(settings, folder=folder / "references")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / SETTINGS).exists():
        write_bytes(folder / SETTINGS, json.dumps(_common(settings), indent=2) + "\n")
    if first == 0:
        tidy(folder)
    with cpu_threads(threads), _helpers(settings, folder, workers, threads, stop):
        team = _Team(truths, folder, first, max(of, workers), stop, progress)
        if first == 0:
            team.every = WRITTEN_EVERY
        team.work(cells)
    if first == 0:
        team.write(cells)
    return folder / RESULTS


def possible(settings: Comparison) -> list[Cell]:
    """The cells of a comparison.

    Raises:
        ValueError: there are none, or no budget is enough for any of them, or for any of those of a solver that was
            asked for by name.
    """
    cells = list(settings.cells())
    for name in settings.names:
        if name not in settings.solvers and len(settings.names) > 1:
            continue  # one of a family
        mine = [cell for cell in cells if cell.solver == name]
        if not mine:
            chooses = resolve(name).nfe_per_step == 0
            raise ValueError(
                f"{name} "
                + ("chooses its own steps: give tolerances" if chooses else "takes fixed steps: give budgets")
            )
        method = mine[0].method
        if method.nfe_per_step and max(settings.budgets) < method.nfe(1):
            raise ValueError(
                f"{name} needs at least {method.nfe(1)} network calls, and the largest budget is "
                f"{max(settings.budgets)}"
            )
    if not cells:
        raise ValueError("no solver of this comparison has a use for its budgets or tolerances")
    return cells


def rank() -> tuple[int, int]:
    """Number of this process, and of how many: what torchrun says, else 0 of 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def check_folder(folder: Path | str, settings: Comparison) -> None:
    """Ask before the work whether a comparison can go on in a folder.

    Raises:
        ValueError: it holds cells that were measured otherwise, or by another version, or no comparison.
        DamagedFile: its ``results.h5`` is truncated or altered.
    """
    folder, wanted = Path(folder), _common(settings)
    if not (folder / SETTINGS).exists():
        # Hidden files may be those of another process of the team, which is writing the settings just now.
        if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise ValueError(f"{folder} exists and holds no comparison: choose another folder")
        return
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        schema = found["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{folder / SETTINGS} is truncated or damaged: {error}") from None
    if schema != SCHEMA:
        raise ValueError(f"{folder} was written by another version: its schema is {schema}, this program has {SCHEMA}")
    if changed := [name for name in wanted if found.get(name) != wanted[name]]:
        said = ", ".join(f"{name} {found.get(name)} and not {wanted[name]}" for name in changed)
        raise ValueError(f"{folder} holds cells that were measured with {said}: choose another folder")
    if (folder / RESULTS).exists():
        try:
            results.names(folder / RESULTS)
        except DamagedFile as error:
            raise DamagedFile(
                f"{error}; the cells are safe in {folder / 'journal'}: remove that file, and go on"
            ) from None


def forget(folder: Path | str, settings: Comparison) -> None:
    """Remove a comparison, and make the folder ready for another.

    Raises:
        ValueError: the folder holds something else.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not (folder / SETTINGS).exists():
        raise ValueError(f"{folder} exists and holds no comparison: choose another folder")
    for name in ("journal", "references"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (RESULTS, TABLE):
        (folder / name).unlink(missing_ok=True)
    write_bytes(folder / SETTINGS, json.dumps(_common(settings), indent=2) + "\n")


def _common(settings: Comparison) -> dict[str, Any]:
    """What all cells of a folder have in common."""
    plain = json.loads(json.dumps({"targets": list(settings.targets), **settings.sizes}))
    return {"schema": SCHEMA, "sdegen": versions().get("sdegen", ""), **plain}


def key(cell: Cell, truths: Truths) -> str:
    """A name for everything that the numbers of a cell depend on."""
    target, path = truths.problem(cell)
    parts = (
        asdict(cell) | {"tol": repr(cell.tol)}, repr(cell.method), source(cell.solver), target.mark, repr(path),
        _common(truths.settings),
    )  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class _Team:
    """One of the processes that share a sweep.

    Args:
        truths: of the comparison.
        folder: where.
        number: of this process.
        of: so many.
        stop: when it is set, no further cell is begun.
        progress: called after each cell.
    """

    every = 0.0  # seconds between two writings of the table; 0 for the processes that do not write it

    def __init__(
        self, truths: Truths, folder: Path, number: int, of: int, stop: Any, progress: Progress = _silent
    ) -> None:
        self.truths, self.folder, self.number, self.of = truths, folder, number, of
        self.stop, self.progress = stop, progress
        self.journal = Journal(folder / "journal")
        self.journal.refresh()

    def work(self, cells: Sequence[Cell]) -> None:
        """Measure until nothing is left, or somebody wants to stop."""
        keys = {cell: key(cell, self.truths) for cell in cells}
        missing = [cell for cell in cells if keys[cell] not in self.journal.rows]
        exact = {name: cell for cell in reversed(missing) if (name := self.truths.wanted(cell)) is not None}
        each = self.truths.settings.reference_steps / 5  # network calls, about
        total, written = sum(cell.weight for cell in cells) + each * len(exact), time.monotonic()

        def told(what: str) -> None:
            done = sum(cell.weight for cell in cells if keys[cell] in self.journal.rows)
            self.progress(what, (done + each * sum(map(self.truths.solved, exact))) / total)

        told("")
        # The converged solutions first, each by another process: cells would wait for them.
        for name, cell in list(exact.items())[self.number :: self.of]:
            if self.stopped():
                return
            if not self.truths.solved(name):
                told(f"exact solution for {cell.solver}")
            self.truths.reference(cell)
        for cell in self._turns(cells):
            self.journal.refresh()
            if keys[cell] in self.journal.rows:
                continue
            if self.stopped():
                return
            told(str(cell))
            self.journal.add(keys[cell], measure(cell, self.truths))
            told(str(cell))
            if self.every and time.monotonic() - written > self.every:
                self.write(cells)
                written = time.monotonic()

    def stopped(self) -> bool:
        """Somebody wants to stop, or the process that started this one has gone."""
        parent = multiprocessing.parent_process()
        return (self.stop is not None and self.stop.is_set()) or (parent is not None and not parent.is_alive())

    def _turns(self, cells: Sequence[Cell]) -> Iterator[Cell]:
        """Our own cells, the short ones first; then those of the others, from the end."""
        ordered = sorted(cells, key=lambda cell: cell.weight)
        mine = ordered[self.number :: self.of]
        yield from mine
        yield from (cell for cell in reversed(ordered) if cell not in mine)

    def write(self, cells: Sequence[Cell]) -> None:
        """The table of all cells of the folder: those of these settings, and then what else was measured."""
        self.journal.refresh()
        rows = [self.journal.rows[k] for cell in cells if (k := key(cell, self.truths)) in self.journal.rows]
        seen = {identity(row) for row in rows}
        others = {identity(row): row for row in self.journal.rows.values() if identity(row) not in seen}
        rows += [others[name] for name in sorted(others, key=str)]
        if not rows:
            return
        made = provenance()
        for name, found in tables(self.truths.settings, rows, self.truths).items():
            results.write(self.folder / RESULTS, name, Result(found.arrays, {**found.attributes, **made}))
        plain = [{name: row.get(name, column.empty) for name, column in COLUMNS.items()} for row in rows]
        results.write_csv(self.folder / TABLE, plain)


@contextmanager
def _helpers(
    settings: Comparison, folder: Path, workers: int, threads: int, stop: threading.Event | None
) -> Iterator[None]:
    """Further processes beside this one, each a member of the team."""
    context = multiprocessing.get_context("spawn")
    halt = context.Event()
    team = [
        context.Process(target=_help, args=(settings, folder, number, workers, threads, halt), daemon=True)
        for number in range(1, workers)
    ]
    for one in team:
        one.start()
    try:
        yield
    finally:
        if stop is not None and stop.is_set():
            halt.set()
        for one in team:
            one.join(None if halt.is_set() else 1.0)
            if one.is_alive():  # it measures what is measured already
                one.terminate()
                one.join()


def _help(settings: Comparison, folder: Path, number: int, of: int, threads: int, halt: Any) -> None:
    """What a further process does."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everybody: the first process decides
    with cpu_threads(threads):
        team = _Team(Truths(settings, folder=folder / "references"), folder, number, of, halt)
        team.work(possible(settings))
