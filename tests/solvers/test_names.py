"""From a name to a solver: modules, files, other packages; and what is wrong in one line."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from solvers import SOLVERS, Heun, names, resolve

MINE = '''
from __future__ import annotations
from dataclasses import dataclass
from solvers import DDIM, Solver

@dataclass(frozen=True)
class Mine(Solver[None]):
    """DDIM again."""

    gain: float = 1.0
    order = 1
    nfe_per_step = 1

    def step(self, problem, x, t, s, state, noise):
        return DDIM().step(problem, x, t, s, state, noise)

HALF = Mine(gain=0.5)
'''


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def test_a_module_and_a_class_or_an_instance() -> None:
    assert resolve("heun") is SOLVERS["heun"]
    assert resolve(Heun()) == Heun()
    assert resolve("solvers.runge_kutta:Heun") == Heun()


def test_a_file(mine: Path) -> None:
    found = resolve(f"{mine}:Mine")
    assert repr(found) == "Mine(gain=1.0)"
    assert repr(resolve(f"{mine}:HALF")) == "Mine(gain=0.5)"
    assert resolve(f"{mine}") == found  # the only one there, and the same class again
    mine.write_text(MINE.replace("gain: float = 1.0", "gain: float = 2.0") + "\n" * 9)
    assert repr(resolve(f"{mine}:Mine")) == "Mine(gain=2.0)"


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    points = [
        EntryPoint("leapfrog", "solvers.runge_kutta:Midpoint", names.GROUP),
        EntryPoint("heun", "solvers.runge_kutta:Midpoint", names.GROUP),
        EntryPoint("missing", "nowhere.at_all:Heun", names.GROUP),
    ]
    monkeypatch.setattr(names, "entry_points", lambda group: points if group == "sdegen.solvers" else [])
    names.installed.cache_clear()
    yield
    names.installed.cache_clear()


@pytest.mark.usefixtures("offered")
def test_other_packages_offer_solvers() -> None:
    assert resolve("leapfrog").nfe_per_step == 2
    assert resolve("heun") == Heun()  # ours come first
    with pytest.raises(ValueError, match="did you mean 'leapfrog'"):
        resolve("leapfrok")
    with pytest.raises(ValueError, match=r"cannot load the solver 'nowhere.at_all:Heun': No module named 'nowhere'"):
        resolve("missing")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:Heun", "cannot load the solver 'nowhere:Heun': No module named 'nowhere'"),
        ("solvers:Nobody", "cannot load the solver 'solvers:Nobody': there is no Nobody in solvers; there are: "),
        ("solvers:heun", "there is no heun in solvers; did you mean 'Heun'"),
        ("math:pi", "'math:pi' is of type float, not a solvers.Solver"),
        ("solvers:Solver", "cannot load the solver 'solvers:Solver': TypeError"),
        ("nowhere.py:Heun", "there is no file nowhere.py"),
        ("{mine}:Yours", "mine.py; there are: DDIM, HALF, Mine, Solver, annotations, dataclass"),
        ("{mine}:mine", "mine.py; did you mean 'Mine'"),
        ("{broken}:Mine", "SyntaxError"),
        ("{none}", "the file defines no solver"),
        ("{two}", "the file defines the solvers Mine, Other: say which one, as in"),
    ],
)
def test_what_leads_to_no_solver_is_one_line(name: str, words: str, mine: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("class Mine(:")
    (tmp_path / "none.py").write_text("from solvers import Heun")
    (tmp_path / "two.py").write_text(MINE + "\nclass Other(Mine):\n    pass\n")
    files = {path.stem: path for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r".") as error:
        resolve(name.format(**files))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
