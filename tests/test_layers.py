"""The dependency rule: experiments, notebooks -> sdegen -> solvers -> {torch, numpy, scipy, torchdiffeq, torchsde}."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
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


def test_the_rule_can_be_broken() -> None:
    assert broken("def f():\n    import sdegen.paths", {"torch", "solvers"}) == ["sdegen.paths"]
    assert broken("from matplotlib import pyplot", {"torch", "solvers"}) == ["matplotlib.pyplot"]
    assert broken('import importlib\nimportlib.import_module("sdegen")', {"solvers"}) == ["sdegen"]
    assert broken("import math\nfrom torch import Tensor", {"torch"}) == []
    assert "torch.nn" in list(imports("from torch import nn"))
