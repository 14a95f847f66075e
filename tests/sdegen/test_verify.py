"""``sdegen verify``: lines, verdicts, files, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sdegen.cli import main
from sdegen.commands.verify import _Page
from sdegen.results import names, read
from solvers.certify import Check

QUICK = ["--paths", "vp", "--grids", "uniform"]

MINE = '''
from __future__ import annotations
from dataclasses import dataclass
from solvers import Solver, mix

@dataclass(frozen=True)
class Mine(Solver[None]):
    """DDIM, with so much of the predicted noise."""

    share: float = 1.0
    order = 1
    nfe_per_step = 1
    invariant = True

    def step(self, problem, x, t, s, state, noise):
        x0, eps = problem.predict(x, t)
        return mix((problem.path.alpha(s), x0), (self.share * problem.path.sigma(s), eps)), state

LESS = Mine(share=0.99)
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_a_solver_in_a_file_has_its_certificate(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"{mine}:Mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Mine(share=1.0), order 1"
    assert "\x1b" not in "".join(lines)  # no terminal here
    marks = [line.split()[0] for line in lines[3:-2]]
    assert set(marks) == {"pass"}
    whats = [line[8:52].rstrip() for line in lines[3:-2]]
    for what in ("the same sample on vp, ve, flow", "order 1, vp/ve/flow, uneven", "float64 is float64 inside"):
        assert what in whats
    assert lines[-1].startswith(f"holds what it declares: {len(marks)} checks, ")


def test_what_is_wrong_is_named_and_the_exit_code_is_1(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"{mine}:LESS", *QUICK]) == 1
    out = capsys.readouterr().out
    assert "  FAIL  order 1, vp, uniform" in out
    assert "its coefficients do not add up to the step" in out
    assert "DOES NOT HOLD what it declares: 5 of" in out


def test_several_are_a_table_and_the_lines_of_those_that_fail(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "ddim", "dpmpp_1?", f"{mine}:LESS", *QUICK]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["ddim", "dpmpp_1s", f"{mine}:LESS"]
    assert lines[0].endswith("holds")
    assert "FAILS 5 of" in lines[2]
    assert lines[-1] == "2 of 3 solvers hold what they declare"
    assert not any("pass" in line.split()[:1] for line in lines)


@pytest.mark.parametrize("suffix", ["json", "h5"])
def test_certificates_are_kept(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"found.{suffix}"
    assert main(["verify", "ancestral", *QUICK, "--out", str(out)]) == 0
    assert f"written: {out}" in capsys.readouterr().out
    if suffix == "json":
        record = json.loads(out.read_text())["ancestral"]
        assert record["passed"] is True
        assert record["claim"] == "weak order 1"
        (variance,) = (check for check in record["checks"] if check["what"].startswith("weak order 1, variance"))
        assert len(variance["steps"]) == len(variance["errors"])
        return
    assert names(out) == ["verify/ancestral"]
    result = read(out, "verify/ancestral")
    row = result["check"].tolist().index("weak order 1, variance, vp, uniform")
    assert result["passed"].all()
    assert result["slope"][row] == pytest.approx(1, abs=0.2)
    kept = np.isfinite(result["error"][row])
    assert kept.sum() >= 3
    assert (result["steps"][row][kept][:3] == [20, 40, 80]).all()
    assert result.attributes["claim"] == "weak order 1"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["huen"], "unknown solver 'huen'; did you mean 'heun'"),
        (["nowhere.py:Mine"], "nowhere.py"),
        (["heun", "--grids", "karas"], "unknown grid 'karas'; did you mean 'karras'?"),
        (["heun", "--paths", "sub"], "unknown path 'sub'; there are: flow, ve, vp"),
        (["heun", "--paths", ","], "paths: give at least one of vp, ve, flow"),
        (["heun", "--out", "found.csv"], "out: found.csv is neither .json nor .h5"),
        (["heun", "--out", "nowhere/found.json"], "out: expected a file in a folder that is there"),
        ([], "required: solver"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_a_narrow_terminal_has_what_was_seen_below(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _Page().line(Check("order 2, vp, uniform", True, "slope 2.00   1e-1 1e-2 1e-3 at 20..80 steps"), more=False)
    out = capsys.readouterr().out
    assert "\x1b[32mpass\x1b[0m" in out
    assert out.count("\n") == 2
    monkeypatch.setenv("NO_COLOR", "1")
    _Page().line(Check("order 2, vp, uniform", False, "short"), more=False)
    assert capsys.readouterr().out.endswith("  FAIL  order 2, vp, uniform                         short\n")


# --- Files that are wrong ---------------------------------------------------------------------------------------------

HEAD = "from dataclasses import dataclass\nfrom solvers import Solver, mix\n"
RIGHT = MINE.partition("@dataclass")[1] + MINE.partition("@dataclass")[2].partition("LESS")[0]


def written(folder: Path, *changes: tuple[str, str], head: str = HEAD) -> str:
    """The solver of :data:`MINE` in a file, with some of its text changed."""
    text = RIGHT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "mine.py").write_text(head + text)
    return str(folder / "mine.py")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((", state\n", "\n"), "a step returns a pair, the state at s and what to remember; got Tensor"),
        (("return mix", "_ = mix"), "a step returns a pair, the state at s and what to remember; got nothing"),
        ((", state\n", ", state, 1\n"), "the state at s and what to remember; got 3 things"),
        (("return mix", "return [x], state\n        return mix"), "is the state, a tensor; got list"),
        (("predict(x, t)", "predikt(x, t)"), "object has no attribute 'predikt' (mine.py, line 1"),
        (("predict(x, t)", "predict(x)"), "TypeError: predict() missing 1 required positional argument: 't' (mine.py"),
        (("x, t, s, state, noise", "x, t"), "TypeError: Mine.step() takes 4 positional arguments but 7 were given"),
        (("self.share *", "float('nan') *"), "FloatingPointError: Mine(share=1.0): the state after step 1"),
        (("return mix", "x0 = x0[:1]\n        return mix"), "(mine.py, line 1"),
    ],
)
def test_a_step_that_cannot_be_taken_is_a_line_of_the_certificate(
    change: tuple[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", written(tmp_path, change), *QUICK]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    (line,) = (line for line in out.splitlines() if "FAIL" in line)
    assert said in line
    assert "<locals>" not in out
    assert "_loaded" not in out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("    order = 1\n", ""), "declares nothing as its order: a whole number, 0 or more, is expected"),
        (("    nfe_per_step = 1\n", ""), "declares nothing as its nfe_per_step"),
        (("order = 1", "order = 'one'"), "declares 'one' as its order"),
        (("share: float = 1.0", "share: float"), "argument: 'share'; give it a default, or name an object in place of"),
        (("def step", "def stride"), "Can't instantiate abstract class Mine"),
        (("(Solver[None])", ""), "the file defines no solver, a subclass of solvers.Solver"),
        (("order = 1", "order = = 1"), "SyntaxError: invalid syntax (mine.py, line"),
        (("@dataclass", "import sys\nsys.exit(3)\n@dataclass"), "SystemExit: 3"),
        (("@dataclass", "raise RuntimeError('no licence')\n@dataclass"), "RuntimeError: no licence"),
        (("@dataclass", "import no_such_package\n@dataclass"), "No module named 'no_such_package'"),
    ],
)
def test_a_file_that_leads_to_no_solver_is_one_line(
    change: tuple[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", written(tmp_path, change), *QUICK]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err
    assert "_loaded" not in err


def test_a_solver_that_is_no_dataclass_is_called_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And always the same: a sweep knows its cells by it."""
    plain = (("@dataclass(frozen=True)\n", ""), ("    share: float = 1.0\n", "    share = 1.0\n"))
    name = written(tmp_path, *plain)
    assert main(["verify", name, *QUICK]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "Mine(), order 1"


@pytest.mark.parametrize("name", ["solvers:", ":Mine", "heun:"])
def test_half_a_name_is_told_the_whole_form(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", name]) == 2
    assert "expected package.module:name or file.py:name" in capsys.readouterr().err
