"""``sdegen verify``: the certificate of a solver."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdegen.commands import file_to_write
from sdegen.parsing import Parser, UsageError

if TYPE_CHECKING:
    from solvers import Solver
    from solvers.certify import Certificate, Check

EXAMPLES = """\
  sdegen verify heun                                 one of ours
  sdegen verify mine.py:Leapfrog                     one of yours, in a file
  sdegen verify mypackage.solvers:Leapfrog           in a module; or its name, where a package offers it
  sdegen verify ddim heun 'unipc*' mine.py           several: a table, and the lines of those that fail
  sdegen verify all --out certificates.h5            every solver there is; minutes

Measured against exact answers: the order on VP, VE and straight-line paths and on uniform, Karras and uneven grids; the
order of its own steps and of its start; the size of its noise; weak and strong order; and the contract. Exit code 0 if
it holds what it declares, 1 if not. docs/solvers.md says how to read a certificate, and how to write a solver."""


def prepare(words: Sequence[str]) -> Callable[[], int]:
    """Read the command line; load the solvers; give back the work."""
    parser = Parser("verify", "SOLVER... [options]", "Measure what a solver declares, line by line.", EXAMPLES)
    parser.add_argument(
        "solver", nargs="+", metavar="SOLVER", help="name, pattern, file.py:Class, package.module:Class, or all"
    )
    parser.add_argument("--grids", default="uniform,karras,uneven", help="time grids; logsnr is another one")
    parser.add_argument("--paths", default="vp,ve,flow", help="Gaussian paths")
    parser.add_argument("--out", help="write the certificates to this file too, .json or .h5")
    chosen = parser.read(words)

    from sdegen.certificates import problems
    from solvers.certify import CERTIFIED_GRIDS

    every = problems()
    paths, grids = _listed(chosen.paths, every, "path"), _listed(chosen.grids, CERTIFIED_GRIDS, "grid")
    out = None if chosen.out is None else file_to_write("out", chosen.out)
    if out is not None and out.suffix not in (".json", ".h5"):
        raise UsageError(f"out: {out} is neither .json nor .h5")
    solvers = _solvers(chosen.solver)
    return lambda: _verify(solvers, {name: every[name] for name in paths}, grids, out)


def _listed(text: str, known: Any, kind: str) -> list[str]:
    from solvers.names import find

    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for name in names:
        find(name, known, kind)
    if not names:
        raise UsageError(f"{kind}s: give at least one of {', '.join(known)}")
    return names


def _solvers(words: Sequence[str]) -> dict[str, Solver[Any]]:
    """Name -> solver, with patterns written out."""
    from fnmatch import fnmatch

    from solvers import SOLVERS, resolve
    from solvers.names import installed

    known = [*SOLVERS, *(name for name in installed() if name not in SOLVERS)]
    names: dict[str, None] = {}
    for word in words:
        pattern = "*" if word == "all" else word
        names |= dict.fromkeys([name for name in known if fnmatch(name, pattern)] or [word])
    return {name: resolve(name) for name in names}


def _verify(solvers: dict[str, Solver[Any]], problems: Any, grids: Sequence[str], out: Path | None) -> int:
    from sdegen.certificates import save
    from sdegen.train.interrupt import cpu_threads

    with cpu_threads(1):  # small tensors are faster so
        found = (_one if len(solvers) == 1 else _table)(solvers, problems, grids)
    if out is not None:
        save(found, out)
        print(f"\nwritten: {out}")
    return 0 if all(certificate.passed for certificate in found.values()) else 1


def _one(solvers: dict[str, Solver[Any]], problems: Any, grids: Sequence[str]) -> dict[str, Certificate]:
    """Every line as soon as it is known, then the verdict."""
    from solvers.certify import Certificate, certify

    ((name, solver),) = solvers.items()
    page, began = _Page(), time.perf_counter()
    print(f"{page.bold(repr(solver))}, {Certificate(solver, ()).claim}")
    print(page.dim(f"{solver.reference or 'no reference'}\n"))
    page.waiting()
    certificate = certify(solver, problems, grids=grids, say=page.line)
    page.verdict(certificate, time.perf_counter() - began)
    return {name: certificate}


def _table(solvers: dict[str, Solver[Any]], problems: Any, grids: Sequence[str]) -> dict[str, Certificate]:
    """A row for each, then the lines of those that fail."""
    from tqdm import tqdm

    from solvers.certify import certify, exact, starts

    page, width = _Page(), max(map(len, solvers))
    answers = {name: exact(problem, starts(problem)) for name, problem in problems.items()}
    found: dict[str, Certificate] = {}
    with tqdm(total=len(solvers), unit="solver", disable=None, leave=False) as bar:
        for name, solver in solvers.items():
            bar.set_postfix_str(name)
            found[name] = one = certify(solver, problems, grids=grids, answers=answers)
            wrong = sum(not check.passed for check in one.checks)
            verdict = page.good("holds") if one.passed else page.bad(f"FAILS {wrong} of {len(one.checks)}")
            bar.write(f"{name:<{width}}  {one.claim:<14} {verdict}", file=sys.stdout)
            bar.update()
    for name, one in found.items():
        if not one.passed:
            print(f"\n{page.bold(name)}  {one.solver!r}")
            for finding in one.findings:
                print(f"  {page.bad(finding)}")
            for check in one.checks:
                if not check.passed:
                    page.line(check, more=False)
    wrong = sum(not one.passed for one in found.values())
    kept = f"{len(found) - wrong} of {len(found)} solvers hold what they declare"
    print(f"\n{page.bad(kept) if wrong else page.good(kept)}")
    return found


class _Page:
    """Lines for people: colours and wrapping in a terminal, plain and whole in a pipe."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.coloured = self.terminal and "NO_COLOR" not in os.environ
        self.width = shutil.get_terminal_size((100, 24)).columns if self.terminal else 10_000

    def _in(self, code: int, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.coloured and text else text

    def good(self, text: str) -> str:
        return self._in(32, text)

    def bad(self, text: str) -> str:
        return self._in(31, text)

    def bold(self, text: str) -> str:
        return self._in(1, text)

    def dim(self, text: str) -> str:
        return self._in(2, text)

    def waiting(self) -> None:
        """Something is being measured; the next line goes over it."""
        if self.terminal:
            print(self.dim("  ...   measuring"), end="\r", flush=True)

    def line(self, check: Check, *, more: bool = True) -> None:
        """One check: what, and what was seen, below it where the terminal is too narrow."""
        mark = self.good("pass") if check.passed else self.bad("FAIL")
        what = check.what if check.passed else self.bad(check.what)
        if 8 + 44 + len(check.seen) < self.width:
            text = f"  {mark}  {what}{' ' * max(44 - len(check.what), 0)} {self.dim(check.seen)}"
        else:
            below = textwrap.wrap(check.seen, max(self.width - 10, 30))
            text = "\n".join([f"  {mark}  {what}", *(f"        {self.dim(part)}" for part in below)])
        print(f"\x1b[K{text.rstrip()}" if self.terminal else text.rstrip(), flush=True)
        if more:
            self.waiting()

    def verdict(self, certificate: Certificate, seconds: float) -> None:
        if self.terminal:
            print("\x1b[K", end="")
        wrong = sum(not check.passed for check in certificate.checks)
        print()
        for finding in certificate.findings:
            print("\n".join(textwrap.wrap(finding, self.width - 1, initial_indent="  ", subsequent_indent="  ")))
        held = f"holds what it declares: {len(certificate.checks)} checks, {seconds:.1f} s"
        failed = f"DOES NOT HOLD what it declares: {wrong} of {len(certificate.checks)} checks fail, {seconds:.1f} s"
        print(self.bad(failed) if wrong else self.good(held))
