"""The libraries that ours are held against, as far as they need more than an import."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest


@pytest.fixture(scope="session")
def k_diffusion() -> Any:
    """k_diffusion.sampling, without the parts of the package that want more packages."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        pytest.skip("k-diffusion is not installed")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(found.submodule_search_locations)
    hidden = {"k_diffusion": package}
    if importlib.util.find_spec("torchvision") is None:
        hidden |= {name: types.ModuleType(name) for name in ("torchvision", "torchvision.transforms")}
        hidden["torchvision.transforms"].functional = None  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name, module in hidden.items():
            patch.setitem(sys.modules, name, module)
        return importlib.import_module("k_diffusion.sampling")
