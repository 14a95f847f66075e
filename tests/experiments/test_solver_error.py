"""The experiment writes what it measured, twice the same, and refuses bad input in one line."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from experiments import solver_error
from sdegen.comparison import Comparison
from sdegen.results import read

SMALL = Comparison(solvers=("ddim", "heun", "ancestral"), samples=8, cloud=50, budgets=(4, 8), reference_steps=32)


def test_results_table_and_figure(tmp_path):
    path = solver_error.run(solver_error.Config(SMALL, tmp_path / "a"))
    found = read(path, "errors")
    assert {p.name for p in path.parent.iterdir() if not p.name.startswith(".")} == {
        "results.h5", "errors.csv", "errors.svg",
    }  # fmt: skip
    assert found.attributes["versions"]
    with open(tmp_path / "a" / "errors.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["error"]) for row in rows] == found["error"].tolist()
    assert [row["solver"] for row in rows] == list(found["solver"])
    again = read(solver_error.run(solver_error.Config(SMALL, tmp_path / "b")), "errors")
    np.testing.assert_array_equal(found["error"], again["error"])
    np.testing.assert_array_equal(found["distance"], again["distance"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--solvers", "huen"], "did you mean 'heun'"),
        (["--oracle", "mixtur2d"], "mixture2d"),
        (["--budgets", "0"], "budgets are positive"),
        (["--budgets", "ten"], "ten"),
    ],
)
def test_bad_input(tmp_path, capsys, words, message):
    assert solver_error.main([*words, "--out", str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()
