"""The dependency rule: experiments, notebooks -> sdegen -> solvers -> {torch, numpy, scipy, torchdiffeq, torchsde}."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW_SOLVERS = {"torch", "numpy", "scipy", "torchdiffeq", "torchsde", "h5py"}


def imports(source: str) -> Iterator[str]:
    """Every module that a source imports anywhere, inside functions too, and by name through importlib."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "_library"):
                yield str(node.args[0].value)


def broken(source: str, allowed: set[str]) -> list[str]:
    return [name for name in imports(source) if name.split(".")[0] not in allowed | set(sys.stdlib_module_names)]


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", files("solvers"), ids=lambda p: p.name)
def test_solvers_knows_nothing_above_it(path: Path) -> None:
    source = path.read_text()
    assert broken(source, {*BELOW_SOLVERS, "solvers"}) == []
    assert [name for name in imports(source) if name.startswith("torch.nn")] == [], "solvers know no network"


@pytest.mark.parametrize("path", files("sdegen"), ids=lambda p: str(p.relative_to(ROOT)))
def test_sdegen_knows_nothing_above_it(path: Path) -> None:
    above = [name for name in imports(path.read_text()) if name.split(".")[0] in ("experiments", "notebooks", "tests")]
    assert above == []


def needs(package: str, sources: dict[str, str]) -> dict[str, set[str]]:
    """Which module of a package imports which; ``from package import name`` is the module of that name, if any."""
    found = {}
    for module, source in sources.items():
        named = {name if name in sources else name.rpartition(".")[0] for name in imports(source)}
        found[module] = {name for name in named if name in sources and name not in (module, package)}
    return found


@pytest.mark.parametrize("package", ["solvers", "sdegen", "experiments"])
def test_imports_run_in_one_direction(package: str) -> None:
    """A module that two others need stands below both, and none is reached from itself, inside functions either."""
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files(package)}
    TopologicalSorter(
        needs(package, {name.removesuffix(".__init__"): path.read_text() for path, name in names.items()})
    ).prepare()


def test_a_circle_of_imports_is_found() -> None:
    circle = {"p.a": "def f():\n    from p.b import g", "p.b": "from p import a", "p": "from p.a import f"}
    with pytest.raises(CycleError):
        TopologicalSorter(needs("p", circle)).prepare()


def test_the_rule_can_be_broken() -> None:
    assert broken("def f():\n    import sdegen.paths", {"torch", "solvers"}) == ["sdegen.paths"]
    assert broken("from matplotlib import pyplot", {"torch", "solvers"}) == ["matplotlib.pyplot"]
    assert broken('import importlib\nimportlib.import_module("sdegen")', {"solvers"}) == ["sdegen"]
    assert broken("import math\nfrom torch import Tensor", {"torch"}) == []
    assert "torch.nn" in list(imports("from torch import nn"))
