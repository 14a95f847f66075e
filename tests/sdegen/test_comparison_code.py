"""Cells of other code are never mixed in silently: which code counts, and what a sweep does with what it finds."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from sdegen import results
from sdegen.cli import main
from sdegen.comparison import COLUMNS, SCHEMA, Comparison, code, sweep, truth

FEW = Comparison(
    targets=("gaussian",), solvers=("ddim", "heun"), budgets=(4, 8), tols=(), samples=4, cloud=0, reference_steps=8
)
WORDS = ["compare", "gaussian", "--solvers", "ddim,heun", "--nfe", "4,8", "--samples", "4", "--cloud", "0"]
WORDS += ["--reference_steps", "8", "--out"]


# --- The mark ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A program of one file, and its mark."""
    file = tmp_path / "method.py"
    monkeypatch.setattr(code, "_files", lambda networks: iter([("solvers/method.py", file)]))

    def mark(text: str) -> str:
        file.write_text(text)
        return code.mark.__wrapped__()

    return mark


def test_words_are_no_code(sources):
    plain = sources("def step(x):\n    return 2 * x\n")
    assert len(plain) == 8
    told = '"""A method."""\n\n# As in the paper.\ndef step(x):\n    """Twice."""\n    return (\n        2 * x\n    )\n'
    assert sources(told) == plain
    assert sources("def step(x):\n    return 2.01 * x\n") != plain


def test_a_network_counts_where_one_is_asked():
    exact, asked = ({name for name, _ in code._files(networks)} for networks in (False, True))
    assert {"solvers/noise.py", "sdegen/oracles.py", "sdegen/comparison/truth.py"} <= exact < asked
    assert {"sdegen/denoiser.py", "sdegen/networks/unet.py"} <= asked - exact
    assert not [name for name in asked if "certify" in name or name.endswith(("sweep.py", "table.py"))]


CARRIES = {"sdegen", "sdegen.comparison.code", "sdegen.comparison.settings", "sdegen.files", "sdegen.results"}
"""Modules below the measurement that only carry numbers about."""


def imported(module: str) -> set[str]:
    """Modules of ours that a module imports when it is loaded."""
    spec = importlib.util.find_spec(module)
    body = ast.parse(Path(spec.origin).read_text()).body
    found = [node for node in body if isinstance(node, ast.ImportFrom)]
    names = {f"{node.module}.{alias.name}" for node in found for alias in node.names} | {node.module for node in found}
    return {name for name in names if name.split(".")[0] in ("sdegen", "solvers") and is_module(name)}


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_all_that_measures_an_exact_law_counts():
    """What a measurement rests on is in the mark, or is known to change no number: a new module has to be put there."""
    marked = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name, _ in code._files(False)}
    seen, ahead = set(), ["sdegen.comparison.measure"]
    while ahead:
        if (module := ahead.pop()) not in seen:
            seen.add(module)
            ahead += imported(module) - CARRIES
    assert {"sdegen.splines", "sdegen.comparison.distances", "solvers.ancestral"} <= seen
    assert seen - marked == set()


def test_a_column_more_is_another_schema():
    """Whoever changes the columns changes SCHEMA too, and then this line."""
    kinds = " ".join(f"{name}:{type(column.empty).__name__}" for name, column in COLUMNS.items())
    assert (SCHEMA, hashlib.sha256(kinds.encode()).hexdigest()[:8]) == (2, "e1f5bb44")


# --- What a sweep does ------------------------------------------------------------------------------------------------


@pytest.fixture
def written_by(monkeypatch):
    """Lets the program have another mark."""
    return lambda name: monkeypatch.setattr(truth, "mark", lambda *, networks=False: name)


def journal(folder):
    return [line for file in sorted((folder / "journal").glob("*")) for line in file.read_bytes().splitlines()]


def codes(folder):
    found = results.read(folder / "results.h5", "comparison")
    return dict(zip(zip(found["solver"], found["budget"].tolist(), strict=True), found["code"], strict=True))


def test_other_code_is_asked_about_in_one_line_and_nothing_is_touched(written_by, tmp_path, capsys):
    written_by("aaaaaaaa")
    sweep(replace(FEW, solvers=("ddim",)), tmp_path / "a")
    written_by("bbbbbbbb")
    before = {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()}
    assert main([*WORDS, str(tmp_path / "a")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "has 2 of these 4 cells from other code, aaaaaaaa (sdegen " in err
    assert "not bbbbbbbb: keep them beside the new ones (--keep), measure them again (--anew), or" in err
    assert {file: file.read_bytes() for file in (tmp_path / "a").rglob("*") if file.is_file()} == before


def test_kept_cells_say_by_which_code_they_are(written_by, tmp_path, capsys):
    written_by("aaaaaaaa")
    sweep(replace(FEW, solvers=("ddim",)), tmp_path / "a")
    before = journal(tmp_path / "a")
    written_by("bbbbbbbb")
    assert main([*WORDS, str(tmp_path / "a"), "--keep"]) == 0
    assert "2 cells measured in" in capsys.readouterr().out
    assert len(journal(tmp_path / "a")) == 4
    assert set(before) < set(journal(tmp_path / "a"))
    assert set(codes(tmp_path / "a").items()) == {
        (("ddim", 4), "aaaaaaaa"), (("ddim", 8), "aaaaaaaa"), (("heun", 4), "bbbbbbbb"), (("heun", 8), "bbbbbbbb"),
    }  # fmt: skip


def test_measured_anew_the_old_cells_give_way_and_what_was_stopped_goes_on(written_by, tmp_path):
    written_by("aaaaaaaa")
    sweep(FEW, tmp_path / "a")
    written_by("bbbbbbbb")
    sweep(replace(FEW, solvers=("ddim",)), tmp_path / "a", stale="anew")
    assert len(journal(tmp_path / "a")) == 6
    assert set(codes(tmp_path / "a").values()) == {"aaaaaaaa", "bbbbbbbb"}
    sweep(FEW, tmp_path / "a", stale="anew")  # those of ddim are not measured a third time
    assert len(journal(tmp_path / "a")) == 8
    assert set(codes(tmp_path / "a").values()) == {"bbbbbbbb"}
    sweep(FEW, tmp_path / "a")  # and now there is nothing to ask
    assert len(journal(tmp_path / "a")) == 8


def test_cells_that_nobody_asked_for_are_in_nobodys_way(written_by, tmp_path):
    written_by("aaaaaaaa")
    sweep(replace(FEW, solvers=("ddim",)), tmp_path / "a")
    written_by("bbbbbbbb")
    sweep(replace(FEW, solvers=("heun",)), tmp_path / "a")
    assert set(codes(tmp_path / "a").values()) == {"aaaaaaaa", "bbbbbbbb"}


def test_a_cell_is_never_measured_against_a_solution_of_other_code(written_by, tmp_path):
    written_by("aaaaaaaa")
    sweep(replace(FEW, solvers=("ddim",)), tmp_path / "a")
    (first,) = (tmp_path / "a" / "references").glob("ODE*.h5")
    written_by("bbbbbbbb")
    sweep(replace(FEW, solvers=("heun",)), tmp_path / "a")
    assert len([*(tmp_path / "a" / "references").glob("ODE*.h5")]) == 2
    assert first.exists()


def test_one_decision_at_a_time(tmp_path, capsys):
    assert main([*WORDS, str(tmp_path / "a"), "--keep", "--anew"]) == 2
    assert "give one of --keep, --anew and --overwrite" in capsys.readouterr().err


def test_the_page_warns_of_mixed_cells(sweep, tmp_path, parsed):
    rows = [{"solver": name, "budget": 10, "error": 0.1, "code": mark} for name, mark in
            {"heun": "aaaaaaaa", "ddim": "bbbbbbbb", "rk4": "bbbbbbbb"}.items()]  # fmt: skip
    results.write(tmp_path / "results.h5", "comparison", sweep(rows))
    assert main(["report", str(tmp_path)]) == 0
    text = " ".join("".join(parsed(tmp_path / "report.html").text).split())
    assert "cells were measured by different code: aaaaaaaa (heun), bbbbbbbb (ddim, rk4)" in text
