"""The table is whole, is not computed twice, and bad input is one line."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from experiments import likelihood_table
from sdegen.results import read

TRAIN = "[train]\nsteps = 3\neval_every = 0\neval_size = 8\nbatch_size = 8\n"
DIFFUSION = '[network]\nname = "mlp"\nwidth = 16\ndepth = 1\n' + TRAIN
VAE = '[model]\nname = "vae"\nwidth = 16\n' + TRAIN


def _config(folder: Path, **settings: object) -> likelihood_table.Config:
    for name, text in (("a", DIFFUSION), ("b", VAE)):
        (folder / f"{name}.toml").write_text(text)
    given = {
        "T": (3, 6),
        "K": 4,
        "n": 6,
        "target_se": 0.2,
        "max_nfe": 300,
        "tol": 0.3,
        "out": folder / "out",
        **settings,
    }
    baselines = ("uniform", "autoregressive(width=8, steps=2)")
    return likelihood_table.Config(str(folder / "a.toml"), str(folder / "b.toml"), baselines, **given)  # type: ignore[arg-type]


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = likelihood_table.run(_config(tmp_path))
    titles = [
        "uniform", "autoregressive(width=8, steps=2)", "VAE", "VAE, IWAE K = 4",
        "DDPM, T = 3", "DDPM, T = 3, best grid and variance", "DDPM, T = 6", "VP-SDE", "ODE",
    ]  # fmt: skip
    found = read(path, "likelihood_table")
    assert found["title"].tolist() == titles
    assert found["gap"][titles.index("VP-SDE")] == 0
    bits = dict(zip(titles, found["bits_per_dim"], strict=True))
    assert bits["DDPM, T = 3, best grid and variance"] < bits["DDPM, T = 3"]
    assert bits["DDPM, T = 6"] < bits["DDPM, T = 3"]
    files = {file.name for file in path.parent.iterdir() if not file.name.startswith(".")}
    assert files == {"results.h5", "diffusion", "vae", *(f"likelihood_table.{end}" for end in ("csv", "md", "svg"))}
    with (path.parent / "likelihood_table.csv").open(newline="") as file:
        assert [float(row["bits_per_dim"]) for row in csv.DictReader(file)] == found["bits_per_dim"].tolist()
    table = (path.parent / "likelihood_table.md").read_text()
    assert table.count("\n") == 2 + len(titles)
    assert "known already" not in capsys.readouterr().out
    again = read(likelihood_table.run(_config(tmp_path)), "likelihood_table")
    assert again["bits_per_dim"].tolist() == found["bits_per_dim"].tolist()
    (tmp_path / "c.toml").write_text(DIFFUSION + "lr = 1e-4\n")
    with pytest.raises(ValueError, match=r"was trained with other settings \(train.lr was"):
        likelihood_table.trained(str(tmp_path / "c.toml"), tmp_path / "out" / "diffusion")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--diffusion", "digits-lnog"], "unknown configuration 'digits-lnog'; did you mean 'digits-long'"),
        (["--T", "0"], "T are numbers of levels"),
        (["--n", "many"], "n: expected a whole number"),
    ],
)
def test_bad_input(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert likelihood_table.main([*words, "--out", str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()
