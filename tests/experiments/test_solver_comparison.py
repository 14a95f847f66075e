"""The experiment is a sweep and a picture of it: it goes on where it was, and refuses nonsense in one line."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import solver_comparison
from sdegen.results import read
from sdegen.sweeps import gather

SMALL = solver_comparison.Config(
    ("ddim", "heun", "rk4", "ancestral"), ("gaussian", "ring"), (3, 8), 8, samples=8, cloud=0, reference_steps=16,
    workers=1,
)  # fmt: skip


def test_it_measures_draws_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(SMALL, out=tmp_path / "a")
    file = solver_comparison.run(config)
    said = capsys.readouterr().out
    found = read(file, "comparison")
    assert set(found["target"]) == {"gaussian", "ring"}
    assert {"results.h5", "results.csv", "report.html", "solver_comparison.svg"} <= {
        f.name for f in file.parent.iterdir()
    }
    losses = solver_comparison.losses(gather([file]).problems, 8, stochastic=False)
    assert set(losses) == {"ddim", "heun", "rk4"}
    assert min(float(loss.min()) for loss in losses.values()) == 0
    at = (found["budget"] == 8) & (found["target"] == "ring") & (found["stochastic"] == 0)
    error = dict(zip(found["solver"][at], found["error_median"][at], strict=True))
    assert math.exp(losses["rk4"][1]) == pytest.approx(error["rk4"] / min(error.values()))
    three = next(line for line in said.splitlines() if line.strip().startswith("3 ") and "ODE" in line)
    assert "rk4" not in three  # which needs four calls
    before = {f.name: f.stat().st_mtime_ns for f in (file.parent / "journal").iterdir()}
    solver_comparison.run(config)
    assert {f.name: f.stat().st_mtime_ns for f in (file.parent / "journal").iterdir()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--solvers", "huen"], "did you mean 'heun'"),
        (["--targets", "rnig"], "did you mean 'ring'"),
        (["--shown", "7"], "the picture shows one of"),
        (["--budgets", "[0]"], "budgets"),
    ],
)
def test_nonsense_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert solver_comparison.main([*words, "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not (tmp_path / "x").exists()
