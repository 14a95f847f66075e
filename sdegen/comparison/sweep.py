"""Many cells: in memory, or in a folder that several processes fill and that survives all of them.

Of n processes the r-th takes every n-th cell, from the r-th on, the short ones first; when it has no more it helps the
others, from the end of their list. So nobody waits, nothing is locked, and a process that died is stood in for. Two
processes may by chance measure the same cell at the very end; both find the same numbers.

    torchrun --nproc-per-node 2 -m sdegen compare mixture16 --out runs/shared
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdegen import results
from sdegen.comparison.folder import RESULTS, TABLE, Stale, check_folder, key, prepare
from sdegen.comparison.journal import Journal
from sdegen.comparison.measure import measure
from sdegen.comparison.settings import Cell, Comparison, possible
from sdegen.comparison.table import COLUMNS, GROUP, identity, tables
from sdegen.comparison.truth import Truths
from sdegen.files import DamagedFile
from sdegen.files import sweep as tidy
from sdegen.provenance import provenance
from sdegen.results import Result
from sdegen.train.interrupt import cpu_threads

__all__ = ["compare", "rank", "sweep"]

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
    stale: Stale = "ask",
    progress: Progress = _silent,
    stop: threading.Event | None = None,
) -> Path:
    """Measure every cell that a folder does not have yet, and write the table.

    Args:
        settings: what to measure.
        folder: see :mod:`sdegen.comparison`; made where it is not there.
        workers: processes; under torchrun each of its processes is one, and this is left at 1.
        threads: CPU threads of each; it may change the last bits of a number.
        stale: what to do with cells that other code has measured.
        progress: called with a name and the share done, after each cell.
        stop: when it is set, the cell in hand is finished, the table is written, and that is all.

    Returns:
        Path of ``results.h5``; with what is there when it was stopped.

    Raises:
        ValueError: the settings do not fit the folder's, or an unknown target; cells are stale, and nobody said what to
            do with them.
    """
    folder = Path(folder)
    first, of = rank()
    cells, truths = possible(settings), Truths(settings, folder=folder / "references")
    check_folder(folder, truths, stale)
    prepare(folder, settings)
    if first == 0:
        tidy(folder)
    with cpu_threads(threads), _helpers(settings, folder, workers, threads, stale, stop):
        team = _Team(truths, folder, first, max(of, workers), stale, stop, progress)
        if first == 0:
            team.every = WRITTEN_EVERY
        team.work(cells)
    if first == 0:
        team.write(cells)
    return folder / RESULTS


def rank() -> tuple[int, int]:
    """Number of this process, and of how many: what torchrun says, else 0 of 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class _Team:
    """One of the processes that share a sweep.

    Args:
        truths: of the comparison.
        folder: where.
        number: of this process.
        of: so many.
        stale: what to do with cells that other code has measured.
        stop: when it is set, no further cell is begun.
        progress: called after each cell.
    """

    every = 0.0  # seconds between two writings of the table; 0 for the processes that do not write it

    def __init__(
        self, truths: Truths, folder: Path, number: int, of: int, stale: Stale, stop: Any, progress: Progress = _silent
    ) -> None:
        self.truths, self.folder, self.number, self.of = truths, folder, number, of
        self.stale, self.stop, self.progress = stale, stop, progress
        self.journal = Journal(folder / "journal", {truths.code(cell) for cell in truths.settings.cells()})
        self.journal.refresh()

    def done(self, key: str) -> bool:
        """Whether a cell need not be measured."""
        return self.journal.fresh(key) if self.stale == "anew" else key in self.journal.rows

    def work(self, cells: Sequence[Cell]) -> None:
        """Measure until nothing is left, or somebody wants to stop."""
        keys = {cell: key(cell, self.truths) for cell in cells}
        missing = [cell for cell in cells if not self.done(keys[cell])]
        exact = {name: cell for cell in reversed(missing) if (name := self.truths.wanted(cell)) is not None}
        each = self.truths.settings.reference_steps / 5  # network calls, about
        total, written = sum(cell.weight for cell in cells) + each * len(exact), time.monotonic()

        def told(what: str) -> None:
            done = sum(cell.weight for cell in cells if self.done(keys[cell]))
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
            if self.done(keys[cell]):
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
        mine = (self.journal.row(key(cell, self.truths)) for cell in cells)
        rows = [row for row in mine if row is not None]
        seen = {identity(row) for row in rows}
        every = (row for k in self.journal.rows if (row := self.journal.row(k)) is not None)
        others = {identity(row): row for row in every if identity(row) not in seen}
        rows += [others[name] for name in sorted(others, key=str)]
        if not rows:
            return
        made = provenance()
        found = {
            name: Result(one.arrays, {**one.attributes, **made})
            for name, one in tables(self.truths.settings, rows, self.truths).items()
        }
        file = self.folder / RESULTS
        try:
            for name, one in found.items():
                results.write(file, name, one)
        except DamagedFile:  # nothing is in it that the journal has not
            file.unlink()
            for name, one in found.items():
                results.write(file, name, one)
        plain = [{name: row.get(name, column.empty) for name, column in COLUMNS.items()} for row in rows]
        results.write_csv(self.folder / TABLE, plain)


@contextmanager
def _helpers(
    settings: Comparison, folder: Path, workers: int, threads: int, stale: Stale, stop: threading.Event | None
) -> Iterator[None]:
    """Further processes beside this one, each a member of the team."""
    context = multiprocessing.get_context("spawn")
    halt = context.Event()
    team = [
        context.Process(target=_help, args=(settings, folder, number, workers, threads, stale, halt), daemon=True)
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


def _help(settings: Comparison, folder: Path, number: int, of: int, threads: int, stale: Stale, halt: Any) -> None:
    """What a further process does."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everybody: the first process decides
    with cpu_threads(threads):
        team = _Team(Truths(settings, folder=folder / "references"), folder, number, of, stale, halt)
        team.work(possible(settings))
