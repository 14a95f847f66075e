"""Every command asks before the work whether its results can be written: one line, exit code 2, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import stochasticity
from sdegen import results
from sdegen.cli import main
from sdegen.files import require_folder

COMMANDS = {
    "compare": ["compare", "gaussian", "--solvers", "ddim", "--nfe", "4", "--out"],
    "demo": ["demo", "--fast", "--out"],
    "train": ["train", "--config", "smoke"],
    "report": ["report", "sweep.h5", "--out"],
    "figures": ["report", "sweep.h5", "--figures"],
    "verify": ["verify", "ddim", "--out"],
    "sample": ["sample", "nowhere", "--out"],
}


@pytest.mark.parametrize("place", ["thesis.tex/x", "/proc/x"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_cannot_be_written_is_a_mistake(command, place, sweep, tmp_path, monkeypatch, capsys):
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis.tex").write_text("text")
    results.write("sweep.h5", "comparison", sweep([{"solver": "heun", "budget": 10, "error": 0.1}]))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main([*COMMANDS[command], place]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert ("thesis.tex" if place.startswith("thesis") else "/proc") in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_experiment_asks_before_it_computes(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.tex").write_text("text")
    assert stochasticity.main(["--out", str(tmp_path / "thesis.tex" / "x")]) == 2
    assert "expected a folder, and" in capsys.readouterr().err


def test_a_folder_that_is_there_or_can_be_made(tmp_path):
    require_folder(tmp_path)
    require_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    require_folder("runs/none/yet")  # relative: the present folder is asked


def test_a_read_only_file_system_says_so(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system", str(tmp_path / "tmpx"))

    monkeypatch.setattr("sdegen.files.tempfile.TemporaryFile", refuse)
    with pytest.raises(PermissionError, match=f"nothing can be written in {tmp_path}: Read-only file system"):
        require_folder(tmp_path / "a")
