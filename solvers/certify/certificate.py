"""The certificate: everything that a solver declares, measured, line by line, and what is wrong in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from solvers.certify.contract import Check
from solvers.certify.examination import Examination
from solvers.integrate import Solver
from solvers.problem import DiffusionProblem

__all__ = ["Certificate", "certify"]


@dataclass(frozen=True)
class Certificate:
    """All checks of one solver; printed line by line.

    Attributes:
        solver: what was certified.
        checks: the lines.
        findings: what is wrong, in words.
    """

    solver: Solver[Any]
    checks: tuple[Check, ...]
    findings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def claim(self) -> str:
        """What the solver declares, in a few words."""
        if not self.solver.order:
            return "no order" if self.solver.nfe_per_step or self.solver.stochastic else "adaptive"
        return f"{'weak ' if self.solver.stochastic else ''}order {self.solver.order}"

    @property
    def verdict(self) -> str:
        holds = "holds what it declares" if self.passed else "DOES NOT HOLD WHAT IT DECLARES"
        return f"{self.solver!r} ({self.claim}) {holds}"

    def __str__(self) -> str:
        findings = [f"  {finding}" for finding in self.findings]
        return "\n".join([self.verdict, *findings, *(f"  {check}" for check in self.checks)])


def certify(
    solver: Solver[Any],
    problems: Mapping[str, DiffusionProblem],
    *,
    grids: Sequence[str] = ("uniform", "karras", "uneven"),
    batch: int = 16,
    event: Sequence[int] = (2,),
    answers: Mapping[str, Tensor] | None = None,
    say: Callable[[Check], None] | None = None,
) -> Certificate:
    """Measure everything a solver declares.

    The order must be reached, within 0.2, on every problem and grid, and with exact history in the middle of the path;
    somewhere it must not be exceeded, or it is declared too low.

    Args:
        solver: the method.
        problems: smooth problems by name, the same data on several paths; their paths serve for the rest as well.
        grids: names in ``CERTIFIED_GRIDS``.
        batch: samples that are followed.
        event: shape of a sample of these problems.
        answers: exact solutions from :func:`starts`, where they are known already.
        say: told of every line as soon as it is known.
    """
    examination = Examination(solver, problems, grids, batch, tuple(event), dict(answers or {}))
    checks: list[Check] = []
    for check in examination.checks():
        checks.append(check)
        if say is not None:
            say(check)
    failed = any(not check.passed for check in checks)
    return Certificate(solver, tuple(checks), tuple(examination.findings()) if failed else ())
