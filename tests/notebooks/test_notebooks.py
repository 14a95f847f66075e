"""Notebooks as texts: they say where they lead, and carry no outputs. Whether what they claim is so, they check
themselves: ``make notebooks`` runs them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_a_script_that_leads_somewhere(path: Path) -> None:
    source = path.read_text()
    ast.parse(source)
    assert "name: python3" in source.split("# %%")[0], "without a kernel's name jupytext looks for one"
    assert 'os.environ.get("SDEGEN_FAST")' in source, "it runs in small, too"
    title = re.search(r"^# # (\d) · ", source, re.MULTILINE)
    assert title is not None
    assert path.name.startswith(f"0{title[1]}_")
    for name in re.findall(r"\]\((\w+)\.ipynb\)", source):
        assert (FOLDER / f"{name}.py").exists(), name


def test_a_cell_that_draws_is_folded() -> None:
    """What a reader must see is what is computed; how it is drawn is one click away."""
    for path in NOTEBOOKS:
        for cell in re.split(r"^# %%", path.read_text(), flags=re.MULTILINE)[1:]:
            if re.search(r"\bFigure\(", cell):
                assert '"hide-input"' in cell.splitlines()[0], f"{path.name}: {cell[:80]}"
