"""The experiment on objectives, very small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments import weighting
from sdegen.results import read


def test_it_writes_results_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--objectives", "elbo,sigmoid", "--seeds", "0", "--steps", "2", "--batch_size", "32", "--width", "16"]
    words += ["--depth", "1", "--bands", "4", "--nfe", "5", "--out", str(tmp_path / "w")]
    assert weighting.main(words) == 0
    found = read(tmp_path / "w" / "results.h5", "weighting")
    assert found["objective"].tolist() == ["elbo", "sigmoid"]
    assert found["error"].shape == (2, 1, 4)
    assert 2.3 < float(found["bits"][0, 0]) < 2.6  # the histogram's, nearly
    assert float(found["gap"][0, 0]) == 0.0
    assert 0 < float(found["gap_se"][1, 0]) < 0.01
    assert "w(logsnr) = sigmoid(2 - logsnr)" in str(found.attributes["weightings"])
    assert (tmp_path / "w" / "weighting.csv").read_text().count("\n") == 4
    assert "<svg" in (tmp_path / "w" / "weighting.svg").read_text()
    assert str(tmp_path / "w" / "results.h5") in capsys.readouterr().out


def test_equal_sets_are_alike_and_others_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 100, 4, generator=generator)
    same, alike, far = (weighting.likeness(x, a) for x in (a, b, b + 10))
    assert same == {"sliced_w2": 0.0, "w2": pytest.approx(0.0, abs=1e-6), "precision": 1.0, "recall": 1.0}
    assert 0 < alike["sliced_w2"] < alike["w2"]
    assert alike["precision"] > 0.6
    assert far["precision"] == far["recall"] == 0.0
    assert far["w2"] == pytest.approx(20, abs=0.5)  # ten in each of four coordinates
    narrow = weighting.likeness(0.1 * b, a)
    assert narrow["recall"] < 0.3 < 0.9 < narrow["precision"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objectives", "elbw"], "did you mean 'elbo'"),
        (["--density", "spectre"], "did you mean 'spectrum'"),
        (["--steps", "x"], "steps: expected a whole number"),
        (["--stps", "3"], "unknown option --stps"),
        (["--objectives", ""], "needs an objective"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert weighting.main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
