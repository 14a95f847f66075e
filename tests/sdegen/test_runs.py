"""Run folders: whole or absent, verified, of this version, never overwritten by accident."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdegen.files import Busy, DamagedFile, DiskFull
from sdegen.runs import SCHEMA, Run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "a" / "run", "seed = 3\n", seed=3, device="cpu")
    with run.writing("model.safetensors") as temporary:
        temporary.write_bytes(b"w" * 1000)
    return run


def test_says_how_it_was_made(run: Run) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["schema"] == SCHEMA
    assert manifest["seed"] == 3
    assert {"created", "updated", "command", "versions", "platform", "cpus"} <= set(manifest)
    assert {"python", "torch", "numpy"} <= set(manifest["versions"])
    assert manifest["files"]["model.safetensors"]["bytes"] == 1000
    assert Run.open(run.path).config == "seed = 3\n"
    run.note(steps=100)
    assert run.manifest["steps"] == 100


def test_never_overwritten_by_accident(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"holds a run already: --resume .*run continues it, --overwrite"):
        Run.create(run.path, "seed = 4\n")
    assert run.config == "seed = 3\n"
    again = Run.create(run.path, "seed = 4\n", overwrite=True)
    assert again.config == "seed = 4\n"
    assert not (again / "model.safetensors").exists()

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="exists and is not a run"):
        Run.create(tmp_path / "thesis", "", overwrite=True)
    (tmp_path / "empty").mkdir()
    Run.create(tmp_path / "empty", "")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".tmp")]


def test_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create(tmp_path / "run", "seed = 3\n")
    monkeypatch.setattr("sdegen.runs.provenance", lambda: 1 / 0)
    for path in (tmp_path / "new", run.path):
        with pytest.raises(ZeroDivisionError):
            Run.create(path, "", overwrite=True)
    assert os.listdir(tmp_path) == ["run"]
    assert Run.open(run.path).config == "seed = 3\n"


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Run.open(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"is not a run folder: it has no manifest\.json"):
        Run.open(tmp_path)


def test_another_version(run: Run) -> None:
    run.note(schema=SCHEMA + 1)
    with pytest.raises(ValueError, match=f"its schema is {SCHEMA + 1}, this program reads {SCHEMA}$"):
        Run.open(run.path)


@pytest.mark.parametrize("content", ["", '{"schema": 1', "[1]", '{"schema": 1, "files": 3}'])
def test_damaged_manifest(run: Run, content: str) -> None:
    (run / "manifest.json").write_text(content)
    with pytest.raises(DamagedFile, match=r"manifest\.json is truncated or damaged"):
        Run.open(run.path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"w" * 400, r"is damaged: 400 B instead of 1\.0 kB, SHA-256 [0-9a-f]{12} instead of [0-9a-f]{12}$"),
        (b"w" * 500 + b"v" + b"w" * 499, r"is damaged: SHA-256 [0-9a-f]{12} instead of"),
    ],
)
def test_damaged_weights(run: Run, content: bytes, message: str) -> None:
    assert run.verified("model.safetensors").stat().st_size == 1000
    (run / "model.safetensors").write_bytes(content)
    with pytest.raises(DamagedFile, match=message):
        run.verified("model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no state\.pt"):
        run.verified("state.pt")


@pytest.mark.parametrize("function", ["write_bytes", "os.replace"])
def test_the_manifest_is_right_wherever_the_process_dies(
    run: Run, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies before the manifest is written, and between that and the renaming of the file."""

    def die(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(f"sdegen.runs.{function}" if function == "write_bytes" else "sdegen.files.os.replace", die)
        if function == "os.replace":  # the manifest's own renaming still works
            patch.setattr("sdegen.runs.write_bytes", lambda path, text: Path(path).write_text(text))
        with pytest.raises(SystemExit), run.writing("model.safetensors") as temporary:
            temporary.write_bytes(b"new")
    assert run.verified("model.safetensors").read_bytes() == b"w" * 1000
    with run.writing("model.safetensors") as temporary:
        temporary.write_bytes(b"newer")
    assert run.verified("model.safetensors").read_bytes() == b"newer"


def test_full_disk_keeps_the_old_weights(run: Run) -> None:
    message = r"model\.safetensors: needs .* the previous file is kept"
    with pytest.raises(DiskFull, match=message), run.writing("model.safetensors", needed=10**17):
        pytest.fail("not started")
    assert run.verified("model.safetensors").read_bytes() == b"w" * 1000


def test_one_training_at_a_time(run: Run) -> None:
    code = f"""
from sdegen.runs import Run
with Run.open({str(run.path)!r}).exclusive():
    print("in", flush=True)
    input()
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    (run / f".tmp-{child.pid}-state.pt").write_text("half")
    with pytest.raises(Busy, match="another process is writing"), run.exclusive():
        pytest.fail("the other one is still in")
    with pytest.raises(Busy):
        Run.create(run.path, "", overwrite=True)
    child.kill()
    child.communicate()
    with run.exclusive():
        assert not list(run.path.glob(".tmp-*"))
