"""What ``import sdegen`` gives: every name and every module, and none of the waiting."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import sdegen


@pytest.mark.parametrize("name", sdegen.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(sdegen, name) is not None
    assert sdegen._HOME[name]


@pytest.mark.parametrize("name", ["models", "data", "comparison", "train", "oracles"])
def test_modules_are_attributes(name: str) -> None:
    assert getattr(sdegen, name) is importlib.import_module(f"sdegen.{name}")
    assert name in dir(sdegen)


def test_nothing_is_loaded_before_it_is_used() -> None:
    """In a process of its own: here everything is loaded already."""
    program = (
        "import sys, sdegen\n"
        "heavy = {'torch', 'numpy', 'scipy', 'matplotlib', 'solvers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert sdegen.models.GaussianDiffusion is sdegen.GaussianDiffusion\n"
        "assert 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sdegen' has no attribute 'modles'"):
        _ = sdegen.modles
    assert not hasattr(sdegen, "__wrapped__")


def test_a_module_that_lacks_something_says_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that sdegen has no such module."""

    def without(name: str) -> None:
        raise ModuleNotFoundError("No module named 'h5py'", name="h5py")

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ModuleNotFoundError, match="h5py"):
        _ = sdegen.resultss
