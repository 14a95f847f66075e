"""From a name to a solver: ours, an installed package's, one in a module or in a file.

    "heun"                       a name in ``SOLVERS``
    "leapfrog"                   an entry point of an installed package, group ``sdegen.solvers``
    "package.module:Leapfrog"    a class or an instance in a module
    "path/to/file.py:Leapfrog"   the same in a file; without ":Leapfrog" where the file defines one solver only

A package offers its solvers in its ``pyproject.toml``, and they are then known wherever ours are:

    [project.entry-points."sdegen.solvers"]
    leapfrog = "package.module:Leapfrog"
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

from solvers.integrate import Solver

__all__ = ["GROUP", "find", "installed", "load", "resolve"]

GROUP = "sdegen.solvers"

MANY = 30
"""More names than these are not all said in a message."""

T = TypeVar("T")


def find(name: str, known: Mapping[str, T], kind: str) -> T:
    """Look ``name`` up, or say which names are near and which there are."""
    if name in known:
        return known[name]
    raise ValueError(f"unknown {kind} {name!r}; {_near(name, known)}")


def _near(name: str, known: Collection[str]) -> str:
    """Which of the known names were meant, or which there are."""
    lower = {each.lower(): each for each in known}
    near = [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.6)]
    some = sorted(known) if len(known) <= MANY else [*sorted(known)[:: len(known) // 8], f"{len(known)} in all"]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are: {', '.join(some)}"


@lru_cache(maxsize=1)
def installed() -> Mapping[str, EntryPoint]:
    """The solvers that other installed packages offer, by name; nothing is imported."""
    return {point.name: point for point in entry_points(group=GROUP)}


def resolve(solver: str | Solver[Any]) -> Solver[Any]:
    """A solver from its name (see the module's text), or itself. Our own names come before those of other packages.

    Raises:
        ValueError: the name is unknown (with the nearest names) or leads to no solver.
    """
    from solvers import SOLVERS

    if not isinstance(solver, str):
        return solver
    if ":" in solver or solver.endswith(".py"):
        return _made(solver, solver)
    known: dict[str, Solver[Any] | EntryPoint] = {**installed(), **SOLVERS}
    found = find(solver, known, "solver")
    return _made(solver, found.value.partition("[")[0].strip()) if isinstance(found, EntryPoint) else found


def _made(solver: str, place: str) -> Solver[Any]:
    """The object at a place, made into a solver."""
    made = load(place, "solver", what=_only)
    try:
        made = made() if isinstance(made, type) else made
    except (Exception, SystemExit) as error:  # whatever somebody else's code may raise
        failed = _failed(solver, "solver", error)
        if isinstance(error, TypeError) and "required" in str(error):
            failed = ValueError(f"{failed}; give it a default, or name an object in place of the class")
        raise failed from error
    if not isinstance(made, Solver):
        raise ValueError(f"{solver!r} is of type {type(made).__name__}, not a solvers.Solver")
    for name in ("order", "nfe_per_step"):
        declared: Any = getattr(cast("Solver[Any]", made), name, None)
        if not isinstance(declared, int) or declared < 0:
            said = "nothing" if declared is None else repr(declared)
            raise ValueError(f"{solver!r} declares {said} as its {name}: a whole number, 0 or more, is expected")
    return cast("Solver[Any]", made)


def load(name: str, kind: str, *, what: Callable[[ModuleType], str] | None = None) -> Any:
    """The object behind "package.module:thing" or "path/to/file.py:thing".

    Args:
        name: the place.
        kind: what it should be, for the message.
        what: chooses the thing in a file that is given without one.

    Raises:
        ValueError: it cannot be loaded, whatever the reason; one line.
    """
    where, colon, thing = (name, "", "") if name.endswith(".py") else name.rpartition(":")
    try:
        if not where or (colon and not thing):
            raise ValueError("expected package.module:name or file.py:name")
        module = _file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        thing = thing or (what(module) if what else "")
        if not hasattr(module, thing):
            own = [made for made in vars(module) if not made.startswith("_")]
            raise ValueError(f"there is no {thing} in {where}; {_near(thing, own)}")
        return getattr(module, thing)
    except (Exception, SystemExit) as error:
        raise _failed(name, kind, error) from error


def _failed(name: str, kind: str, error: BaseException) -> ValueError:
    said = "" if isinstance(error, (ImportError, OSError, ValueError)) else f"{type(error).__name__}: "
    return ValueError(f"cannot load the {kind} {name!r}: {said}{' '.join(str(error).split())}")


def _file(path: Path) -> ModuleType:
    """The module in a file; the same one as long as the file does not change."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    path = path.resolve()
    name = f"_loaded_from_{path.stem}_{abs(hash((path, path.stat().st_mtime_ns)))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _only(module: ModuleType) -> str:
    """The name of the one solver class that a module defines."""
    own = [name for name, made in vars(module).items() if _defined(made, module)]
    if len(own) != 1:
        names = (
            f"the solvers {', '.join(own)}: say which one, as in {module.__file__}:{own[0]}"
            if own
            else "no solver, a subclass of solvers.Solver"
        )
        raise ValueError(f"the file defines {names}")
    return own[0]


def _defined(made: Any, module: ModuleType) -> bool:
    return isinstance(made, type) and issubclass(made, Solver) and made.__module__ == module.__name__
