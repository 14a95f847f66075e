"""Sweeps in a folder: killed, stopped, shared, extended, damaged; and always the same numbers."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest
import xarray

from sdegen import results
from sdegen.cli import main
from sdegen.comparison import COLUMNS, SCHEMA, TIMINGS, Comparison, compare, sweep
from sdegen.comparison.journal import Journal
from sdegen.files import DamagedFile

SETTINGS = Comparison(
    targets=("gaussian",), solvers=("ddim", "heun", "ancestral", "rk45"), budgets=(4, 8), tols=(0.1,),
    samples=8, cloud=60, transport=0, reference_steps=16,
)  # fmt: skip
CELLS = 7
WORDS = ["compare", "gaussian", "--solvers", "ddim,heun,ancestral,rk45", "--nfe", "4,8", "--tol", "0.1"]
WORDS += ["--samples", "8", "--cloud", "60", "--transport", "0", "--reference_steps", "16"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "undisturbed"
    sweep(SETTINGS, folder)
    return folder


def assert_same(folder, other):
    one, two = folder / "results.h5", other / "results.h5"
    assert results.names(one) == results.names(two) == ["comparison", "orders", "samples/0"]
    for group in results.names(one):
        a, b = results.read(one, group), results.read(two, group)
        assert list(a.arrays) == list(b.arrays)
        for name in a.arrays:
            if name not in TIMINGS:
                np.testing.assert_array_equal(a[name], b[name], err_msg=name)  # NaN equals NaN


def lines(folder):
    return [line for file in (folder / "journal").glob("*") for line in file.read_bytes().splitlines(keepends=True)]


# --- What is written --------------------------------------------------------------------------------------------------


def test_a_sweep_is_the_comparison(undisturbed):
    found, plain = results.read(undisturbed / "results.h5", "comparison"), compare(SETTINGS)
    assert list(found.arrays) == list(COLUMNS) == list(plain.arrays)
    for name in COLUMNS:
        if name not in TIMINGS:
            np.testing.assert_array_equal(found[name], plain[name], err_msg=name)
    assert len(found["solver"]) == CELLS
    with open(undisturbed / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["error"]) for row in rows] == found["error"].tolist()
    assert json.loads(found.attributes["settings"])["solvers"] == ["ddim", "heun", "ancestral", "rk45"]
    assert {"versions", "created", "command", "schema", "targets"} <= set(found.attributes)


def test_other_programs_open_it(undisturbed):
    with xarray.open_dataset(undisturbed / "results.h5", group="comparison") as found:
        assert found.sizes == {"cell": CELLS}
        assert list(found) == list(COLUMNS)
        assert found.error.attrs["units"] == "data"
        assert found.solver.values.tolist()[:3] == ["ddim", "ddim", "heun"]
        assert found.stochastic.dtype == bool
        assert float(found.error.where(found.solver == "heun").min()) < float(found.error.max())
    with xarray.open_dataset(undisturbed / "results.h5", group="samples/0") as found:
        assert found.x.dims == ("cell", "noise", "coordinate")
        assert found.exact.shape == (2, 8, 2)


def test_pictures_are_endpoints_beside_their_exact_solution(undisturbed):
    table = results.read(undisturbed / "results.h5", "comparison")
    shown = results.read(undisturbed / "results.h5", "samples/0")
    exact = dict(zip(shown["equation"], shown["exact"], strict=True))
    for x, cell in zip(shown["x"], shown["cell"], strict=True):
        error = np.sqrt(np.mean((x - exact[table["equation"][cell]]) ** 2))
        assert error == pytest.approx(table["error"][cell], rel=1e-2)


# --- Interrupted ------------------------------------------------------------------------------------------------------


def start(folder, *more, **environment):
    command = [sys.executable, "-m", "sdegen", *WORDS, "--out", str(folder), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


def wait_for(folder, count, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "journal").exists() and len(lines(folder)) >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"it ended, or did not begin: {process.communicate()}")


def test_killed_and_started_again_it_ends_as_if_nothing_had_been(undisturbed, tmp_path):
    process = start(tmp_path / "a", "--workers", "2")
    wait_for(tmp_path / "a", 2, process)
    process.kill()
    process.communicate()
    before = lines(tmp_path / "a")
    sweep(SETTINGS, tmp_path / "a")
    after = lines(tmp_path / "a")
    assert len(after) >= CELLS
    assert [line for line in after if line in before] == before or set(before) <= set(after)
    assert_same(undisturbed, tmp_path / "a")


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(undisturbed, tmp_path, capsys):
    def press():
        while not (tmp_path / "a" / "journal").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    assert main([*WORDS, "--out", str(tmp_path / "a")]) == 130
    out, err = capsys.readouterr()
    assert "gaussian on vp-linear" in out
    assert "the same command goes on" in err.splitlines()[-1]
    done = len(lines(tmp_path / "a"))
    assert 0 < done < CELLS
    assert len(results.read(tmp_path / "a" / "results.h5", "comparison")["solver"]) == done
    sweep(SETTINGS, tmp_path / "a")
    assert len(lines(tmp_path / "a")) == CELLS
    assert_same(undisturbed, tmp_path / "a")


def test_stopped_between_two_cells_it_goes_on_there(undisturbed, tmp_path):
    stop, seen = threading.Event(), []

    def advance(what, share):
        seen.append(share)
        if share > 0.3:
            stop.set()

    sweep(SETTINGS, tmp_path / "a", progress=advance, stop=stop)
    done = len(lines(tmp_path / "a"))
    assert 0 < done < CELLS
    assert len(results.read(tmp_path / "a" / "results.h5", "comparison")["solver"]) == done
    assert seen == sorted(seen)
    assert seen[-1] < 1
    sweep(SETTINGS, tmp_path / "a", progress=advance)
    assert len(lines(tmp_path / "a")) == CELLS
    assert seen[-1] == pytest.approx(1)
    assert_same(undisturbed, tmp_path / "a")


def test_two_processes_of_torchrun_share_a_sweep(undisturbed, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sdegen"]
    done = subprocess.run([*command, *WORDS, "--out", str(tmp_path / "a")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: sdegen report") == 1
    counts = sorted(len(file.read_bytes().splitlines()) for file in (tmp_path / "a" / "journal").glob("*"))
    assert len(counts) <= 2
    assert CELLS <= sum(counts) <= CELLS + 2
    assert_same(undisturbed, tmp_path / "a")


def test_a_helper_stands_in_for_one_that_died(undisturbed, tmp_path, monkeypatch):
    """The second of two processes never comes: the first does its cells too."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    sweep(SETTINGS, tmp_path / "a")
    assert len(lines(tmp_path / "a")) == CELLS
    assert_same(undisturbed, tmp_path / "a")


# --- Changed ----------------------------------------------------------------------------------------------------------

MINE = """
from dataclasses import dataclass
from solvers import DDIM
@dataclass(frozen=True)
class Mine(DDIM):
    def step(self, problem, x, t, s, state, noise):
        return {factor} * super().step(problem, x, t, s, state, noise)[0], state
"""


@pytest.mark.parametrize("name", ["edited:Mine", "edited.py:Mine"])
def test_more_is_measured_beside_what_is_there_and_an_edited_solver_anew(tmp_path, monkeypatch, name):
    few = replace(SETTINGS, solvers=("ddim",))
    sweep(few, tmp_path / "a")
    assert len(lines(tmp_path / "a")) == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "edited.py").write_text(MINE.format(factor=1.0))
    mine = replace(SETTINGS, solvers=(name,))
    first = results.read(sweep(mine, tmp_path / "a"), "comparison")
    assert len(lines(tmp_path / "a")) == 4
    assert first["solver"].tolist() == [name] * 2 + ["ddim"] * 2  # those of before stay in the table
    np.testing.assert_array_equal(first["error"][:2], first["error"][2:])
    (tmp_path / "edited.py").write_text(MINE.format(factor=1.5))
    monkeypatch.delitem(sys.modules, "edited", raising=False)
    again = results.read(sweep(mine, tmp_path / "a"), "comparison")
    assert len(lines(tmp_path / "a")) == 6
    assert again["solver"].tolist() == first["solver"].tolist()
    assert (again["error"][:2] > first["error"][:2]).all()
    monkeypatch.delitem(sys.modules, "edited", raising=False)


def test_other_sizes_and_other_versions_are_refused_in_one_line(tmp_path, capsys):
    few = replace(SETTINGS, solvers=("ddim",))
    sweep(few, tmp_path / "a")
    with pytest.raises(ValueError, match="measured with samples 8 and not 9"):
        sweep(replace(few, samples=9), tmp_path / "a")
    with pytest.raises(ValueError, match="targets"):
        sweep(replace(few, targets=("ring",)), tmp_path / "a")
    about = tmp_path / "a" / "comparison.json"
    about.write_text(about.read_text().replace(f'"schema": {SCHEMA}', '"schema": 7'))
    with pytest.raises(ValueError, match="another version: its schema is 7"):
        sweep(few, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("x")
    assert main([*WORDS, "--out", str(tmp_path / "b")]) == 2
    err = capsys.readouterr().err
    assert "holds no comparison" in err
    assert len(err.strip().splitlines()) == 1
    assert main([*WORDS, "--out", str(tmp_path / "b"), "--overwrite"]) == 2
    assert (tmp_path / "b" / "thesis.tex").exists()


def test_a_journal_of_another_version_is_refused(tmp_path):
    journal = Journal(tmp_path)
    journal.add("key", {"error": 1.0})
    (file,) = tmp_path.glob("*.jsonl")
    line = file.read_bytes().replace(b'"schema": %d' % SCHEMA, b'"schema": 7')
    content = line.split(b" ", 1)[1].rstrip(b"\n")
    file.write_bytes(hashlib.sha256(content).hexdigest()[:16].encode() + b" " + content + b"\n")
    with pytest.raises(ValueError, match="another version"):
        Journal(tmp_path).refresh()


# --- Damaged ----------------------------------------------------------------------------------------------------------


def test_a_line_that_is_still_being_written_is_read_when_it_is_whole(tmp_path):
    Journal(tmp_path).add("key", {"error": 1.0})
    (file,) = tmp_path.glob("*.jsonl")
    line, other = file.read_bytes(), Journal(tmp_path)
    file.write_bytes(line[:30])
    other.refresh()
    assert other.rows == {}
    file.write_bytes(line)
    other.refresh()
    assert (other.row("key"), other.damaged) == ({"error": 1.0}, 0)


def test_numbers_and_pictures_come_back_bit_for_bit(tmp_path):
    row = {
        "error": 0.1 + 0.2,
        "nfe": 7,
        "tol": float("nan"),
        "kept": np.random.default_rng(0).random((2, 3), np.float32),
    }
    journal = Journal(tmp_path)
    journal.add("key", row)
    other = Journal(tmp_path)
    other.refresh()
    found = other.row("key")
    assert found["error"] == row["error"]
    assert np.isnan(found["tol"])
    np.testing.assert_array_equal(found["kept"], row["kept"])


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_a_damaged_line_is_measured_again_and_the_others_are_kept(undisturbed, tmp_path, damage):
    few = replace(SETTINGS, solvers=("ddim", "heun"))
    sweep(few, tmp_path / "a")
    (file,) = (tmp_path / "a" / "journal").glob("*")
    content = file.read_bytes()
    middle = content.index(b"\n") + 200
    file.write_bytes(content[:-50] if damage == "torn" else content[:middle] + b"?" + content[middle + 1 :])
    (tmp_path / "a" / "results.h5").unlink()
    found = results.read(sweep(few, tmp_path / "a"), "comparison")
    new = [f for f in (tmp_path / "a" / "journal").glob("*") if f != file]
    assert len(new) == 1
    assert len(new[0].read_bytes().splitlines()) == 1
    whole = results.read(undisturbed / "results.h5", "comparison")
    np.testing.assert_array_equal(found["error"], whole["error"][:4])


@pytest.mark.parametrize("kept", [0, 1, 100, 3000, 0.5, -1, None])
def test_a_damaged_results_file_is_made_again_from_the_journal(undisturbed, tmp_path, capsys, kept):
    """Cut at any length, or away altogether: every cell comes back as it was, and nothing is measured."""
    folder = shutil.copytree(undisturbed, tmp_path / "a")
    file, before = folder / "results.h5", lines(folder)
    content = file.read_bytes()
    if kept is None:
        file.unlink()
    else:
        file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert main([*WORDS, "--out", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    said = out.splitlines()[0]
    if kept is not None:
        assert said.startswith(f"{file} is truncated or damaged: ")
        assert said.endswith(f"; it is made again from the {CELLS} cells in {folder / 'journal'}")
    assert "0 cells measured in 0" in out
    assert f"{CELLS} were there before" in out
    assert lines(folder) == before
    assert_same(undisturbed, folder)


def test_a_flipped_bit_in_the_table_does_not_stay(undisturbed, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "a")
    with h5py.File(folder / "results.h5", "r") as file:
        place = file["comparison/error"].id.get_chunk_info(0).byte_offset
    content = bytearray((folder / "results.h5").read_bytes())
    content[place + 8] ^= 255
    (folder / "results.h5").write_bytes(bytes(content))
    with pytest.raises(DamagedFile):
        results.read(folder / "results.h5", "comparison")
    sweep(SETTINGS, folder)
    assert_same(undisturbed, folder)


def test_a_damaged_converged_solution_is_computed_again(undisturbed, tmp_path):
    few = replace(SETTINGS, solvers=("ddim",))
    sweep(few, tmp_path / "a")
    (kept,) = (tmp_path / "a" / "references").glob("ODE*.h5")
    kept.write_bytes(kept.read_bytes()[:1000])
    found = results.read(sweep(replace(few, solvers=("ddim", "heun")), tmp_path / "a"), "comparison")
    whole = results.read(undisturbed / "results.h5", "comparison")
    np.testing.assert_array_equal(found["error"], whole["error"][:4])


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command_says_who_is_best(tmp_path, capsys):
    words = ["compare", "gaussian", "--solvers", "ddim,heun,rk4,ancestral", "--nfe", "2,8", *WORDS[8:]]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    assert "gaussian on vp-linear" in out
    assert "nearest to its ODE" in out
    assert "needs at least 4 network calls, the budget is 2 (rk4)" in out
    assert "next: sdegen report" in out
    found = results.read(tmp_path / "a" / "results.h5", "comparison")
    at = (found["budget"] == 8) & (found["equation"] == "ODE")
    best = found["solver"][at][found["error"][at].argmin()]
    eight = next(line for line in out.splitlines() if line.strip().startswith("8 "))
    assert eight.split()[1] == best
    assert main([*words, "--out", str(tmp_path / "a"), "--overwrite"]) == 0
    assert len(lines(tmp_path / "a")) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mixtur2d"], "did you mean 'mixture2d'"),
        (["gaussian", "--solvers", "huen"], "did you mean 'heun'"),
        (["gaussian", "--solvers", "rk4", "--nfe", "3"], "rk4 needs at least 4 network calls"),
        (["gaussian", "--solvers", "dopri54", "--nfe", "10"], "chooses its own steps"),
        (["gaussian", "--nfe", "0"], "nfe: expected a list such as [8,16], each >0, not 0"),
        (["gaussian", "--device", "cuda:99"], "device: 'cuda:99' cannot be used here"),
        (["gaussian", "--grids", "karas"], "did you mean 'karras'"),
        (["gaussian", "--paths", "vp-lin"], "vp-linear"),
        (["runs/nowhere"], "no folder"),
        (["gaussian", "--nffe", "3"], "--nfe"),
    ],
)
def test_mistakes_get_one_line_and_nothing_is_written(tmp_path, capsys, words, message):
    assert main(["compare", *words, "--out", str(tmp_path / "x")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()
