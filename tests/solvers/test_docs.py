"""What docs/solvers.md shows is what happens."""

from __future__ import annotations

import doctest
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_examples_of_solvers_md() -> None:
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testfile(str(DOCS / "solvers.md"), module_relative=False, optionflags=flags)
    assert result.attempted > 8
    assert result.failed == 0
