"""Which code measures: a mark of everything in this program that may change a number of a cell.

Two cells of one table should come from one method of measurement. So every cell carries the mark of the code that
measured it, and a sweep that finds cells with another mark asks what to do with them (:mod:`sdegen.comparison.sweep`).

The mark is a checksum of sources: the solvers, the measurement, the data's exact distributions and paths, and of the
networks too where there is one. Comments, docstrings and layout do not count, and neither does what only carries
numbers about (tables, files, commands, pages). What is the user's own, a solver in a file, a model in a module, has a
checksum of its own (:func:`sdegen.comparison.targets.source`).
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import sdegen
import solvers
from sdegen.provenance import commit, versions

__all__ = ["maker", "mark"]

SOLVERS = ("*.py",)  # and not solvers/certify, which measures solvers in another way
MEASUREMENT = (
    *(f"comparison/{name}.py" for name in ("distances", "measure", "targets", "truth")),
    *("oracles.py", "paths.py", "schedules.py", "splines.py"),
)
NETWORKS = (
    *("bins.py", "building.py", "decoders.py", "denoiser.py", "levels.py", "recipes.py"),
    *("models/*.py", "networks/*.py"),
)


@cache
def mark(*, networks: bool = False) -> str:
    """Eight digits that change with the code behind a number.

    Args:
        networks: where a network is asked, and not an exact distribution.
    """
    digest = hashlib.sha256()
    for name, file in sorted(_files(networks)):
        digest.update(f"{name}\n{essence(file.read_text(encoding='utf-8'))}\n".encode())
    return digest.hexdigest()[:8]


@cache
def maker() -> str:
    """This program in words, for people who ask what a mark stands for."""
    made_by = commit()
    return f"sdegen {versions().get('sdegen', '?')}" + (f", commit {made_by[:12]}{made_by[40:]}" if made_by else "")


def _files(networks: bool) -> Iterator[tuple[str, Path]]:
    asked = [(solvers, pattern) for pattern in SOLVERS]
    asked += [(sdegen, pattern) for pattern in MEASUREMENT + NETWORKS * networks]
    for package, pattern in asked:
        root = Path(str(package.__file__)).parent
        for file in root.glob(pattern):
            yield f"{package.__name__}/{file.relative_to(root).as_posix()}", file


def essence(source: str) -> str:
    """A source without what changes no number: comments, docstrings, layout.

    >>> essence("x = 1  # one") == essence("'Numbers.'; x = (1)"), essence("x = 1") == essence("x = 2")
    (True, False)
    """
    return ast.dump(_Bare().visit(ast.parse(source)))


class _Bare(ast.NodeTransformer):
    """Strings that stand alone say something to people only."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else self.generic_visit(node)
