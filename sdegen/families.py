"""Kinds of solvers, as people speak of them: a hundred names are nine families.

A family is read off the module that a solver's class lives in, whatever scaling or start-up it is wrapped in; solvers
of the same name follow the ODE or the SDE, never both.
"""

from __future__ import annotations

from typing import Any

from solvers import SOLVERS, Solver

__all__ = ["FAMILIES", "family"]

FAMILIES = {
    "Runge-Kutta": ("runge_kutta", "external"),
    "Adams": ("multistep", "pndm"),
    "DDIM and DPM-Solver": ("ancestral", "dpm_solver"),
    "DEIS and UniPC": ("deis", "unipc", "exponential"),
    "Adaptive": ("adaptive",),
    "Ancestral": ("ancestral", "analytic"),
    "SDE Runge-Kutta": ("sde", "external"),
    "SDE exponential": ("exponential_sde", "seeds", "sa_solver", "er_sde"),
    "Churn and Langevin": ("churn", "langevin", "adaptive_sde"),
}
"""Kinds of solvers -> the modules they live in; the first five follow the ODE, the others the SDE."""


def family(solver: str) -> str:
    """The kind of a solver by its name: a key of :data:`FAMILIES`, or "Others" where it is not one of ours.

    >>> family("unipc_2"), family("edm_heun"), family("ancestral"), family("mine.code:Leapfrog")
    ('DEIS and UniPC', 'Runge-Kutta', 'Ancestral', 'Others')
    """
    method: Any = SOLVERS.get(solver)
    if method is None:
        return "Others"
    if method.nfe_per_step == 0 and not method.stochastic:
        return "Adaptive"
    while type(method).__module__ == "solvers.combine" and isinstance(inner := getattr(method, "solver", None), Solver):
        method = inner
    module = type(method).__module__.rpartition(".")[2]
    names = list(FAMILIES)
    kinds = names[5:] if SOLVERS[solver].stochastic else names[:5]
    return next((name for name in kinds if module in FAMILIES[name]), "Others")
