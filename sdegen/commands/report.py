"""``sdegen report``: one page that a browser opens, drawn from results files alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sdegen.commands import file_to_write, folder_to_fill
from sdegen.parsing import Parser, UsageError

EXAMPLES = """\
  sdegen report runs/sweep                          writes runs/sweep/report.html
  sdegen report runs/a runs/b/results.h5 --out both.html   several sweeps in one page
  sdegen report runs/sweep --figures figures        the figures too, as SVG and PNG
  sdegen report runs/sweep runs/a                   with the likelihoods that are known of a run
  sdegen report runs/demo                           the demo's page again

RESULTS is a results file, or a folder with one. Sweeps of several files are put together: the same solvers on other
targets, or parts of one sweep. The page is one file that fetches nothing: mail it, print it, keep it."""


def prepare(words: Sequence[str]) -> Callable[[], None]:
    """Read the command line and all results; give back the drawing."""
    parser = Parser("report", "RESULTS... [options]", "A page with every answer of a comparison.", EXAMPLES)
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="results file, or folder with a results.h5")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html beside the first results)")
    parser.add_argument("--figures", metavar="DIR", help="write every figure into this folder too, as SVG and PNG")
    chosen = parser.read(words)
    files = [_file(Path(name)) for name in chosen.results]
    out = file_to_write("out", chosen.out or str(files[0].parent / "report.html"))
    if chosen.figures:
        folder_to_fill("figures", chosen.figures)
    return _comparison(files, out, chosen.figures) if _compares(files) else _run(files, out, chosen.figures)


def _file(given: Path) -> Path:
    from h5py import is_hdf5

    from sdegen.runs import RESULTS
    from sdegen.sweeps import held

    file = given / RESULTS if given.is_dir() else given
    if not file.exists():
        raise UsageError(f"{given} has no {RESULTS}" if given.is_dir() else f"there is no results file {given}")
    if file.stat().st_size and not is_hdf5(file):
        raise UsageError(f"{file} is no HDF5 file: give a {RESULTS}, or the folder that has one")
    held(file)  # an error, where it cannot be read
    return file


def _compares(files: Sequence[Path]) -> bool:
    """Whether this is about sweeps, and not about the run of a demo."""
    from sdegen.comparison import GROUP
    from sdegen.sweeps import held

    return len(files) > 1 or not {"samples", "errors", "flow"} <= set(held(files[0])) - {GROUP}


def _comparison(files: Sequence[Path], out: Path, figures: str | None) -> Callable[[], None]:
    from sdegen import comparison_page
    from sdegen.comparison import GROUP
    from sdegen.likelihood.store import everything
    from sdegen.sweeps import gather, held

    scored = {file: everything(file.parent) for file in files}
    sweeps = [file for file in files if not scored[file] or GROUP in held(file)]
    found = gather(sweeps or files)
    rows = [row for known in scored.values() for row in known]
    return lambda: print(comparison_page.build(found, out, figures=figures, scored=rows))


def _run(files: Sequence[Path], out: Path, figures: str | None) -> Callable[[], None]:
    from sdegen import report
    from sdegen.files import write_bytes
    from sdegen.runs import Run

    if figures:
        raise UsageError("figures: are written of comparisons only")
    text = report.page(Run.open(files[0].parent))

    def job() -> None:
        write_bytes(out, text)
        print(out)

    return job
