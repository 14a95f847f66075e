"""Runge-Kutta methods on dx/dt = velocity(x, t), written as their tableaux.

A step of size ``h = s - t`` looks at the slope in a few places and averages:

    k_i = velocity(x + h SUM_{j<i} a_ij k_j,  t + c_i h),        x_s = x + h SUM_i b_i k_i,        c_i = SUM_j a_ij.

They need nothing but a velocity, so they run on the probability-flow ODE of any path and on any other :class:`ODE`.
They do see the curve and the clock in which they are run; :class:`solvers.combine.OnPath` chooses another.

Reference: Hairer, Noersett and Wanner 1993, Solving Ordinary Differential Equations I, chapter II.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from solvers.integrate import Solver
from solvers.linear import number
from solvers.noise import Noise
from solvers.problem import Problem

__all__ = [
    "RK4",
    "BogackiShampine",
    "DormandPrince",
    "Euler",
    "Heun",
    "Midpoint",
    "Ralston",
    "RungeKutta",
    "Tableau",
]


@dataclass(frozen=True)
class Tableau:
    """An explicit Butcher tableau; ``a`` has one row for each stage after the first."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    @cached_property
    def c(self) -> tuple[float, ...]:
        """Where in the step each stage looks: the row sums of ``a``."""
        return (0.0, *(sum(row) for row in self.a))


class RungeKutta(Solver[None]):
    """An explicit Runge-Kutta method; subclasses say their tableau and its order."""

    tableau: ClassVar[Tableau]
    combines = True
    grid = "vp_quadratic"

    def __init_subclass__(cls) -> None:
        cls.nfe_per_step = len(cls.tableau.b)

    def step(self, problem: Problem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise) -> tuple[Tensor, None]:
        h, here = number(s) - number(t), problem.terms(x, t)
        slopes = [problem.slope(x, t)]
        for row, c in zip(self.tableau.a, self.tableau.c[1:], strict=True):
            u = s if abs(c - 1) < 1e-12 else t + c * h
            stage = problem.state(u, (1.0, here), *((h * a, k) for a, k in zip(row, slopes, strict=True) if a))
            slopes.append(problem.slope(stage, u))
        weighted = ((h * b, k) for b, k in zip(self.tableau.b, slopes, strict=True) if b)
        return problem.state(s, (1.0, here), *weighted), state


@dataclass(frozen=True)
class Euler(RungeKutta):
    """x_s = x + h k_1. Order 1, 1 evaluation per step, noise none. Reference: Euler 1768."""

    tableau = Tableau(a=(), b=(1.0,))
    order = 1
    reference = "Euler 1768; Song et al. 2021, arXiv:2011.13456"


@dataclass(frozen=True)
class Midpoint(RungeKutta):
    """One slope, from the middle of the step. Order 2, 2 evaluations per step, noise none. Reference: Runge 1895."""

    tableau = Tableau(a=((1 / 2,),), b=(0.0, 1.0))
    order = 2
    reference = "Runge 1895"


@dataclass(frozen=True)
class Heun(RungeKutta):
    """The mean of the slopes at both ends. Order 2, 2 evaluations per step, noise none.

    Reference: Heun 1900; Karras et al. 2022, arXiv:2206.00364, algorithm 1 (with ``OnPath(Heun(), EDM)``).
    """

    tableau = Tableau(a=((1.0,),), b=(1 / 2, 1 / 2))
    order = 2
    reference = "Heun 1900; Karras et al. 2022, arXiv:2206.00364"


@dataclass(frozen=True)
class Ralston(RungeKutta):
    """The two-stage method of least error bound. Order 2, 2 evaluations per step, noise none.

    Reference: Ralston 1962, doi:10.1090/S0025-5718-1962-0150954-0.
    """

    tableau = Tableau(a=((2 / 3,),), b=(1 / 4, 3 / 4))
    order = 2
    reference = "Ralston 1962, doi:10.1090/S0025-5718-1962-0150954-0"


@dataclass(frozen=True)
class BogackiShampine(RungeKutta):
    """The third-order method of the pair 3(2). Order 3, 3 evaluations per step, noise none.

    Reference: Bogacki and Shampine 1989, doi:10.1016/0893-9659(89)90079-7.
    """

    tableau = Tableau(a=((1 / 2,), (0.0, 3 / 4)), b=(2 / 9, 1 / 3, 4 / 9))
    order = 3
    reference = "Bogacki, Shampine 1989, doi:10.1016/0893-9659(89)90079-7"


@dataclass(frozen=True)
class RK4(RungeKutta):
    """The classical method. Order 4, 4 evaluations per step, noise none. Reference: Kutta 1901."""

    tableau = Tableau(a=((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6))
    order = 4
    reference = "Kutta 1901"


@dataclass(frozen=True)
class DormandPrince(RungeKutta):
    """The fifth-order method of the pair 5(4), with fixed steps. Order 5, 6 evaluations per step, noise none.

    Reference: Dormand and Prince 1980, doi:10.1016/0771-050X(80)90013-3.
    """

    tableau = Tableau(
        a=(
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    )
    order = 5
    reference = "Dormand, Prince 1980, doi:10.1016/0771-050X(80)90013-3"
