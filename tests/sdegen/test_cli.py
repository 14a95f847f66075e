"""The command line from end to end, and the list of things that go wrong: one clear line each, and nothing lost."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sdegen.cli import COMMANDS, main
from sdegen.results import names, read
from sdegen.runs import Run

SMALL = ("--threads", "1", "--train.eval_every=0", "--train.eval_size=32", "--train.batch_size=16")
TINY = ("--network", "mlp", "--network.width", "16", "--network.depth", "1", *SMALL)
Captured = pytest.CaptureFixture[str]


def one_line(capsys: Captured) -> str:
    """The only line on stderr."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["train", str(path), *TINY, "--train.steps", "30"]) == 0
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


# --- the way it should go ---------------------------------------------------------------------------------------------


def test_train_sample_likelihood(run: Path, capsys: Captured) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["data"]["levels"] == 17
    assert {"config.toml", "model.safetensors", "state.pt"} == set(manifest["files"])

    assert main(["sample", str(run), "--n", "6", "--solver", "euler", "--nfe", "5", "--threads=1"]) == 0
    assert "6 samples, 5 network calls each" in capsys.readouterr().out
    with np.load(run / "samples-euler-nfe5-seed0.npz") as file:
        x = file["x"]
    assert x.shape == (6, 1, 8, 8)
    assert x.dtype == np.uint8
    assert x.max() <= 16
    assert (run / "samples-euler-nfe5-seed0.png").read_bytes()[:4] == b"\x89PNG"
    kept = read(run / "results.h5", "samples/euler-nfe5-seed0")
    assert kept["x"].tolist() == x.tolist()
    assert kept.attributes["nfe"] == 5
    assert kept.attributes["config"] == Run.open(run).config

    words = ["--T", "5,50", "--n", "20", "--draws", "4", "--ode", "--tol", "0.1", "--threads=1"]
    assert main(["likelihood", str(run), *words]) == 0
    out = capsys.readouterr().out
    assert "bits/dim" in out
    assert "20 held-out examples of digits" in out
    rows = {row["title"]: row for row in _csv(run)}
    assert set(rows) == {"uniform", "histogram", "pixel histogram", "DDPM T=5", "DDPM T=50", "VP-SDE", "ODE"}
    assert float(rows["uniform"]["bits_per_dim"]) == pytest.approx(np.log2(17))
    assert float(rows["DDPM T=5"]["nats"]) > float(rows["DDPM T=50"]["nats"]) > float(rows["VP-SDE"]["nats"])
    group = next(name for name in names(run / "results.h5") if name.startswith("likelihood/VP-SDE-"))
    bound = read(run / "results.h5", group)
    assert bound["nats"].shape == (20,)
    assert bound["nats"].mean() == pytest.approx(float(rows["VP-SDE"]["nats"]))
    assert bound["mean"].sum() == pytest.approx(bound["nats"].mean())
    assert {"versions", "command", "seed", "device", "forward", "estimator_se", "data_se"} <= set(bound.attributes)
    assert "samples/euler-nfe5-seed0" in names(run / "results.h5")


def _csv(run: Path) -> list[dict[str, str]]:
    with (run / "likelihood.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_numbers_with_other_settings_are_kept_apart_and_known_ones_are_said_so(run: Path, capsys: Captured) -> None:
    words = ["likelihood", str(run), "--n=10", "--draws=2", "--methods"]
    assert main([*words, "bound(T=3), bound(draws=2, repeats=3)"]) == 0
    assert "known already" not in capsys.readouterr().out
    first = _csv(run)
    assert [row["formula"].partition("(")[0] for row in first] == ["bound", "bound"]
    assert main([*words, "bound(T=3)"]) == 0
    assert "known already, from the same weights, data and settings: bound(T=3)" in capsys.readouterr().out
    assert main([*words, "bound(T=3)", "--seed=1"]) == 0
    assert main([*words, "bound(T=3)", "--again"]) == 0
    assert "known already" not in capsys.readouterr().out
    rows = _csv(run)
    assert len(rows) == 3
    assert {row["nats"] for row in first} < {row["nats"] for row in rows}


def test_the_first_samples_of_many_are_those_of_few(run: Path) -> None:
    for n in ("3", "5"):
        assert main(["sample", str(run), "--n", n, "--steps=4", "--seed=7", "--out", str(run / f"{n}.npz")]) == 0
    with np.load(run / "3.npz") as few, np.load(run / "5.npz") as many:
        assert few["x"].tolist() == many["x"][:3].tolist()


@pytest.mark.parametrize("words", [["--model", "vae", "--model.width=16"], ["--data", "moons", "--data.size=500"]])
def test_other_models_and_data(words: list[str], tmp_path: Path, capsys: Captured) -> None:
    run = str(tmp_path / "run")
    tiny = SMALL if "vae" in words else TINY
    assert main(["train", run, *words, *tiny, "--train.steps=5"]) == 0
    assert main(["sample", run, "--n", "4"]) == 0
    extra = ["--iwae", "3"] if "vae" in words else ["--ode", "--exact", "--tol", "0.1"]
    assert main(["likelihood", run, "--n=10", "--draws=2", *extra]) == 0
    assert ("IWAE K=3" if "vae" in words else "ODE") in capsys.readouterr().out


def test_labels(tmp_path: Path, capsys: Captured) -> None:
    run = str(tmp_path / "run")
    assert main(["train", run, *TINY, "--train.steps=3", "--train.conditional", "true"]) == 0
    assert main(["sample", run, "--n", "2", "--label", "3", "--steps=2"]) == 0
    capsys.readouterr()
    assert main(["sample", run, "--label", "10"]) == 2
    assert "label: the classes are 0 to 9, not 10" in one_line(capsys)


def test_samples_need_no_data(tmp_path: Path, capsys: Captured) -> None:
    data = tmp_path / "mine.npz"
    np.savez(data, x=np.random.default_rng(0).integers(0, 4, (50, 6, 6)).astype(np.uint8))
    run = str(tmp_path / "run")
    assert main(["train", run, "--data", str(data), "--data.levels=4", *TINY, "--train.steps=3"]) == 0
    data.unlink()
    assert main(["sample", run, "--n", "2", "--steps=2"]) == 0
    capsys.readouterr()
    assert main(["likelihood", run]) == 2
    assert "there is no file" in one_line(capsys)
    np.savez(data, x=np.zeros((50, 6, 6), np.uint8))
    assert main(["likelihood", run]) == 2
    assert "the data of" in (line := one_line(capsys))
    assert "have changed since training" in line


def test_print_config_is_a_config(tmp_path: Path, capsys: Captured) -> None:
    assert main(["train", "--print_config", "--seed", "5"]) == 0
    (tmp_path / "run.toml").write_text(capsys.readouterr().out)
    assert main(["train", "--config", str(tmp_path / "run.toml"), "--print_config"]) == 0
    assert capsys.readouterr().out == (tmp_path / "run.toml").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, capsys: Captured) -> None:
    assert main([command, "--help"]) == 0
    assert f"examples:\n  sdegen {command}" in capsys.readouterr().out


def test_solvers_lists_them_all(capsys: Captured) -> None:
    from solvers import SOLVERS

    assert main(["solvers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *SOLVERS]


def test_help_is_quick_and_needs_no_torch() -> None:
    code = "import sys; from sdegen.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "sdegen", "smaple"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sdegen: unknown command smaple; did you mean sample?\n"


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--solver", "huen"], "unknown solver 'huen'; did you mean 'heun'"),
        (["--solver", "no.such:Thing"], "cannot load the solver 'no.such:Thing'"),
        (["--steps", "-3"], "steps: expected a whole number >0, not -3"),
        (["--steps", "0"], "steps: expected a whole number >0, not 0"),
        (["--solver=heun", "--nfe=1"], "needs at least 2 evaluations, the budget is nfe=1"),
        (["--steps=3", "--nfe=3"], "give one of --steps, --nfe and --tol, not --steps and --nfe"),
        (["--solver=heun", "--tol=1e-3"], "heun takes fixed steps: give --steps or --nfe, not --tol"),
        (["--solver=dopri5", "--steps=3"], "dopri5 chooses its own steps: give --tol, not --steps"),
        (["--grid", "karas"], "unknown grid 'karas'; did you mean 'karras'"),
        (["--n", "many"], "n: expected a whole number >0, not many"),
        (["--label", "3"], "was trained without labels"),
        (["--out", "samples.jpg"], "out: samples.jpg must end in .npz or .png"),
        (["--sovler", "heun"], "unknown option --sovler; did you mean --solver or"),
        (["--device", "cuda:99"], "device: 'cuda:99' cannot be used here"),
    ],
)
def test_sample_refuses(trained: Path, words: list[str], message: str, capsys: Captured) -> None:
    before = sorted(os.listdir(trained))
    assert main(["sample", str(trained), *words]) == 2
    assert message in one_line(capsys)
    assert sorted(os.listdir(trained)) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--T", "10,-1"], "T: expected a list"),
        (["--iwae", "5"], "--iwae is for a vae"),
        (["--bin_width=0.1"], "this model gives probabilities"),
        (["--ode", "--solver=heun", "--tol=0.1"], "takes fixed steps"),
        (["--methods", "bund"], "unknown method 'bund'; did you mean bound?"),
        (["--target_se=0"], "target_se: expected a number >0, not 0"),
        (["--ode", "--solver=ancestral", "--steps=3"], "draws noise"),
        (["--split", "validation"], "split"),
    ],
)
def test_likelihood_refuses(trained: Path, words: list[str], message: str, capsys: Captured) -> None:
    assert main(["likelihood", str(trained), *words]) == 2
    assert message in one_line(capsys)


def _data_files(folder: Path) -> Iterator[tuple[Path, str]]:
    good = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    nan, rank = good.copy(), good.reshape(2, 2, 2, 2, 5)
    nan[3, 1] = np.nan
    for name, array in (("nan", nan), ("rank", rank), ("good", good)):
        np.savez(folder / f"{name}.npz", x=array)
    (folder / "truncated.npz").write_bytes((folder / "good.npz").read_bytes()[:100])
    (folder / "data.txt").write_text("1 2 3")
    yield folder / "nan.npz", "holds 1 NaN or infinite values; the first is at index (3, 1)"
    yield folder / "rank.npz", "has shape (2, 2, 2, 2, 5); it must be (N, D), (N, H, W) or (N, C, H, W)"
    yield folder / "truncated.npz", "is truncated, damaged or no"
    yield folder / "missing.npz", "there is no file"
    yield folder / "data.txt", "the ending must be one of .h5, .hdf5, .npz, .npy"


def test_bad_data_files(tmp_path: Path, capsys: Captured) -> None:
    for file, message in _data_files(tmp_path):
        assert main(["train", str(tmp_path / "run"), "--data", str(file), *TINY, "--train.steps=1"]) == 2
        assert message in one_line(capsys)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["sample", "likelihood", "train --resume"])
def test_run_folders_that_are_none(command: str, run: Path, tmp_path: Path, capsys: Captured) -> None:
    words = command.split()
    assert main([*words, str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in one_line(capsys)
    assert main([*words, str(tmp_path)]) == 2
    assert "is not a run folder: it has no manifest.json" in one_line(capsys)
    Run.open(run).note(schema=77)
    assert main([*words, str(run)]) == 2
    assert "is a run of another version: its schema is 77, this program reads 1" in one_line(capsys)
    (run / "manifest.json").write_text("{")
    assert main([*words, str(run)]) == 2
    assert "manifest.json is truncated or damaged" in one_line(capsys)


@pytest.mark.parametrize(("command", "name"), [("sample", "model.safetensors"), ("train --resume", "state.pt")])
def test_damaged_weights(command: str, name: str, run: Path, capsys: Captured) -> None:
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: len(content) // 2])
    words = [*command.split(), str(run)]
    more = ["--train.steps=40"] if name == "state.pt" else []
    assert main([*words, *more]) == 2
    assert f"{name} is damaged: " in (line := one_line(capsys))
    assert "SHA-256" in line
    (run / name).unlink()
    if name == "model.safetensors":
        assert main(words) == 2
        assert "has no model.safetensors" in one_line(capsys)


def test_damaged_results_are_not_written_over(run: Path, capsys: Captured) -> None:
    (run / "results.h5").write_bytes(b"x" * 1000)
    assert main(["sample", str(run), "--n=1", "--steps=1"]) == 1
    assert "results.h5 is truncated or damaged" in one_line(capsys)
    assert (run / "results.h5").read_bytes() == b"x" * 1000


def test_a_run_is_not_overwritten(run: Path, tmp_path: Path, capsys: Captured) -> None:
    weights = (run / "model.safetensors").read_bytes()
    assert main(["train", str(run), *TINY, "--train.steps=1"]) == 2
    assert f"holds a run already: --resume {run} continues it, --overwrite replaces it" in one_line(capsys)
    assert main(["train", str(tmp_path), "--overwrite", *TINY, "--train.steps=1"]) == 2
    assert "exists and is not a run: choose another folder" in one_line(capsys)
    assert (run / "model.safetensors").read_bytes() == weights
    assert main(["train", str(run), "--overwrite", *TINY, "--train.steps=1"]) == 0
    assert (run / "model.safetensors").read_bytes() != weights


def test_resume_refuses_other_settings(run: Path, capsys: Captured) -> None:
    assert main(["train", "--resume", str(run), "--train.lr", "1"]) == 2
    assert "cannot go on with other settings: train.lr was 0.004, is 1.0" in one_line(capsys)
    assert main(["train", "--resume", str(run), "--config", "x.toml"]) == 2
    assert "leave out --config" in one_line(capsys)


def test_full_disk(run: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while training goes on: the checkpoint that is there stays, and can be resumed."""
    state, weights = (run / "state.pt").read_bytes(), (run / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        assert main(["train", "--resume", str(run), "--train.steps=35"]) == 1
    line = one_line(capsys)
    assert f"disk full: cannot write {run / 'state.pt'}: needs " in line
    assert " are free; the previous file is kept" in line
    assert (run / "state.pt").read_bytes() == state
    assert (run / "model.safetensors").read_bytes() == weights
    assert not list(run.glob(".tmp-*"))
    assert main(["train", "--resume", str(run), "--train.steps=35"]) == 0


def test_really_full_disk(run: Path, tmp_path: Path, capsys: Captured) -> None:
    """The same on a file system of 400 kB, where the system lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        assert main(["train", str(disk / "run"), *TINY, "--train.steps=1", "--network.width=64"]) == 1
        assert "disk full: cannot write" in one_line(capsys)
        assert Run.open(disk / "run").config
        assert main(["sample", str(run), "--n", "20000", "--steps=1", "--out", str(disk / "x.npz")]) == 1
        assert "x.npz" in one_line(capsys)
        assert not (disk / "x.npz").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_ctrl_c_and_resume(tmp_path: Path) -> None:
    """SIGINT in the middle: the state is saved, and the resumed run ends like one that was never stopped."""
    steps = ("--train.steps", "250")
    command = [sys.executable, "-m", "sdegen", "train"]
    stopped = tmp_path / "stopped"
    process = subprocess.Popen(
        [*command, str(stopped), *TINY, *steps, "--train.checkpoint_seconds=0.05"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (stopped / "state.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert error.startswith("sdegen train: training stopped after step ")
    assert error.endswith(f"; go on with: sdegen train --resume {stopped}\n")
    manifest = json.loads((stopped / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"

    assert main(["train", "--resume", str(stopped), "--train.checkpoint_seconds=30"]) == 0
    assert main(["train", str(tmp_path / "whole"), *TINY, *steps]) == 0
    assert json.loads((stopped / "manifest.json").read_text())["status"] == "finished"
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(one[key], two[key]) for key in two)


def test_killed_and_resumed(tmp_path: Path) -> None:
    """kill -9 at some moment: what is in the folder is whole."""
    path = tmp_path / "run"
    words = [str(path), *TINY, "--train.steps", "4000", "--train.checkpoint_seconds", "0.01"]
    process = subprocess.Popen([sys.executable, "-m", "sdegen", "train", *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (path / "model.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    process.kill()
    process.wait()
    assert main(["sample", str(path), "--n=1", "--steps=1"]) == 0
    assert main(["train", "--resume", str(path), "--train.steps=5"]) == 0
    assert not list(path.glob(".tmp-*"))


def test_demo_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    asked: dict[str, object] = {}
    monkeypatch.setattr("sdegen.demo.run", lambda out, **settings: asked.update(settings, out=out))
    assert main(["demo", "--out", str(tmp_path / "a" / "demo"), "--seconds", "3", "--seed=2", "--threads", "1"]) == 0
    assert asked == {"out": tmp_path / "a" / "demo", "seconds": 3.0, "seed": 2, "threads": 1, "fast": False}
    (tmp_path / "mine.txt").write_text("x")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "exists and is not a run: choose another folder" in one_line(capsys)
    assert main(["demo", "--seconds", "-1"]) == 2
    assert "seconds: expected a number >0, not -1" in one_line(capsys)


def test_debug_shows_the_traceback(capsys: Captured) -> None:
    assert main(["sample", "/nowhere", "--debug"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert text.splitlines()[-1] == "sdegen sample: there is no folder /nowhere"
