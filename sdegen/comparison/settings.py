"""What is compared on what: the product of targets, paths, grids, solvers, budgets and seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from solvers import GRIDS, SOLVERS, Solver, resolve
from solvers.names import find, installed

__all__ = ["Cell", "Comparison", "begins", "chosen", "possible"]

FAMILIES = {
    "all": lambda solver: True,
    "ode": lambda solver: not solver.stochastic,
    "sde": lambda solver: solver.stochastic,
    "fixed": lambda solver: solver.nfe_per_step > 0,
    "adaptive": lambda solver: solver.nfe_per_step == 0,
}
"""Words that stand for several solvers."""


def chosen(words: tuple[str, ...]) -> list[str]:
    """The solvers that some words stand for: names (:mod:`solvers.names`), patterns such as "unipc*", families.

    Raises:
        ValueError: a word stands for none; the message says the nearest names.

    >>> chosen(("heun", "unic_*"))
    ['heun', 'unic_ddim', 'unic_dpmpp_2s']
    """
    known, names = [*SOLVERS, *(name for name in installed() if name not in SOLVERS)], list[str]()
    for word in words:
        if word in FAMILIES:
            found = [name for name in known if FAMILIES[word](resolve(name))]
        elif "*" in word or "?" in word:
            found = [name for name in known if fnmatchcase(name, word)]
            if not found:
                raise ValueError(f"no solver is called like {word!r}; `sdegen solvers` lists them")
        else:
            resolve(word)
            found = [word]
        names += found
    return list(dict.fromkeys(names))


def begins(method: Solver[Any]) -> int:
    """The order that a method declares for the whole where its first steps weigh."""
    return method.order if method.start_order is None else min(method.start_order, method.order)


@dataclass(frozen=True)
class Cell:
    """One solver with one budget or one tolerance on one problem.

    Args:
        target: name of an oracle, path of a run folder, or "package.module:function".
        path: a Gaussian path by name; "own" is that of a trained model.
        grid: a time grid by name; "own" is the solver's.
        solver: its name (:mod:`solvers.names`).
        seed: of noises, Brownian motion and data.
        budget: network calls; 0 where there is a tolerance.
        tol: tolerance; NaN where there is a budget.
    """

    target: str
    path: str
    grid: str
    solver: str
    seed: int
    budget: int = 0
    tol: float = math.nan

    @property
    def method(self) -> Solver[Any]:
        """The solver itself."""
        return resolve(self.solver)

    @property
    def allowance(self) -> dict[str, Any]:
        """Budget or tolerance, as :func:`solvers.solve` wants it."""
        return {"nfe": self.budget} if self.budget else {"tol": self.tol}

    @property
    def weight(self) -> float:
        """About how long it takes, in network calls: for the time left, and to do the short ones first."""
        if self.budget:
            return (20 + self.budget) * (1.5 if self.method.stochastic else 1.0)
        return (40 - 25 * math.log10(self.tol)) * (20.0 if self.method.stochastic else 1.0)

    def __str__(self) -> str:
        return f"{self.solver} {self.budget or f'{self.tol:g}'}"


@dataclass(frozen=True)
class Comparison:
    """A comparison: every combination of the first seven, measured with the others.

    Args:
        targets: names of oracles, run folders, or "package.module:function" (see :mod:`sdegen.comparison.targets`).
        solvers: names ("heun", "package.module:Class", "file.py:Class"), patterns such as "dpmpp*", or "all", "ode",
            "sde", "fixed", "adaptive".
        budgets: network calls that a solver with fixed steps may spend.
        tols: tolerances of solvers that control their own steps.
        paths: names in ``PATHS``; each target's own ("vp-linear" for an oracle) where empty.
        grids: names in ``GRIDS``; each solver's own where empty.
        seeds: of noises, Brownian motion and data.
        samples: noises of the pathwise error.
        cloud: endpoints of the distances in distribution; 0 leaves them out.
        transport: of these, how many for the exact Wasserstein and the energy distance, whose costs grow faster; 0
            leaves them out.
        reference_steps: steps of the converged solution of the SDE, even.
        device: cpu, cuda, ...

    Raises:
        ValueError: an unknown name, or a number that makes no sense.
    """

    targets: tuple[str, ...] = ("mixture2d",)
    solvers: tuple[str, ...] = ("all",)
    budgets: tuple[int, ...] = (5, 10, 20, 50, 100)
    tols: tuple[float, ...] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    paths: tuple[str, ...] = ()
    grids: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    samples: int = 128
    cloud: int = 2000
    transport: int = 1000
    reference_steps: int = 2048
    device: str = "cpu"

    def __post_init__(self) -> None:
        for grid in self.grids:
            find(grid, GRIDS, "grid")
        if not (self.targets and self.solvers and self.seeds and (self.budgets or self.tols)):
            raise ValueError("a comparison needs at least one target, solver, seed, and budget or tolerance")
        if any(budget < 1 for budget in self.budgets):
            raise ValueError(f"budgets are positive numbers of network calls, got {self.budgets}")
        if not all(0 < tol < math.inf for tol in self.tols):
            raise ValueError(f"tolerances are positive, got {self.tols}")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds are whole numbers >= 0, got {self.seeds}")
        if self.samples < 2 or self.cloud == 1 or self.transport == 1 or min(self.cloud, self.transport) < 0:
            raise ValueError(
                f"errors need at least 2 samples, got samples={self.samples}, cloud={self.cloud}, "
                f"transport={self.transport}"
            )
        if self.reference_steps < 4 or self.reference_steps % 2:
            raise ValueError(f"the reference takes an even number of steps, at least 4, not {self.reference_steps}")
        chosen(self.solvers)

    @property
    def names(self) -> list[str]:
        """The solvers, spelled out."""
        return chosen(self.solvers)

    @property
    def sizes(self) -> dict[str, Any]:
        """What all cells of a folder must have in common: the settings that are no axes of the product."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not isinstance(f.default, tuple)}

    def cells(self) -> Iterator[Cell]:
        """Every cell, in the order of the table."""
        for target in self.targets:
            for path in self.paths or ("own",):
                for grid in self.grids or ("own",):
                    for name in self.names:
                        fixed = resolve(name).nfe_per_step > 0
                        if not fixed and grid != (self.grids or ("own",))[0]:
                            continue  # it has no use for a grid
                        for seed in self.seeds:
                            where = (target, path, grid if fixed else "own", name, seed)
                            if fixed:
                                yield from (Cell(*where, budget=budget) for budget in self.budgets)
                            else:
                                yield from (Cell(*where, tol=tol) for tol in self.tols)


def possible(settings: Comparison) -> list[Cell]:
    """The cells of a comparison.

    Raises:
        ValueError: there are none, or no budget is enough for any of them, or for any of those of a solver that was
            asked for by name.
    """
    cells = list(settings.cells())
    for name in settings.names:
        if name not in settings.solvers and len(settings.names) > 1:
            continue  # one of a family
        mine = [cell for cell in cells if cell.solver == name]
        if not mine:
            chooses = resolve(name).nfe_per_step == 0
            raise ValueError(
                f"{name} "
                + ("chooses its own steps: give tolerances" if chooses else "takes fixed steps: give budgets")
            )
        method = mine[0].method
        if method.nfe_per_step and max(settings.budgets) < method.nfe(1):
            raise ValueError(
                f"{name} needs at least {method.nfe(1)} network calls, and the largest budget is "
                f"{max(settings.budgets)}"
            )
    if not cells:
        raise ValueError("no solver of this comparison has a use for its budgets or tolerances")
    return cells
