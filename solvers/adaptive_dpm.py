"""DPM-Solver with steps of its own for every sample; see :mod:`solvers.adaptive`.

A singlestep method of order p contains one of order p - 1: leave out the last evaluation, and the difference of the two
results is an estimate of the lower one's error, at no further call of the network.

Reference: Lu et al. 2022, arXiv:2206.00927, appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from solvers.adaptive import Adaptive, Attempt
from solvers.exponential import FORMS
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, mix

__all__ = ["DPMSolver12", "DPMSolver23"]


@dataclass(frozen=True)
class DPMSolver12(Adaptive):
    """DPM-Solver-12: DPM-Solver-2, with DPM-Solver-1 as its judge.

    u   = (alpha_1 / alpha_t) x_t - sigma_1 (e^(h/2) - 1) eps_t,                           lam_1 = lam_t + h / 2,
    x_s = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) eps(u, t_1),
    error =                       - sigma_s (e^h - 1) (eps(u, t_1) - eps_t).

    The formulas do not see curve or clock; steps are chosen in the clock of the problem, which the paper has as lam:
    ``OnPath(DPMSolver12(), VP_LAM)``. Tolerances add where the paper takes the larger, and its controller looks at one
    error only.

    Adaptive: order and evaluations per step 0 (1 for a step that is tried, 1 for one that is accepted); noise none.

    Reference: Lu et al. 2022, arXiv:2206.00927, appendix C, algorithm 3.
    """

    exponent = 2
    stages = 1
    reference = "Lu et al. 2022, arXiv:2206.00927, appendix C"

    def first(self, problem: DiffusionProblem, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return (problem.predict(x, t).eps,)

    def attempt(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, first: tuple[Tensor, ...], noise: Noise
    ) -> Attempt:
        path, form, (p0,) = problem.path, FORMS["eps"], first
        lam = path.logsnr(t) / 2
        h = path.logsnr(s) / 2 - lam
        t1 = path.time(2 * (lam + h / 2))
        (kept1, new1), (kept, new) = form.factors(path, t, t1), form.factors(path, t, s)

        u = mix((kept1, x), (new1 * form.zeroth(h / 2), p0))
        p1 = problem.predict(u, t1).eps
        grown = new * form.zeroth(h)
        return Attempt(mix((kept, x), (grown, p1)), mix((grown, p1), (-grown, p0)))


@dataclass(frozen=True)
class DPMSolver23(DPMSolver12):
    """DPM-Solver-23: DPM-Solver-3, with DPM-Solver-2 (r1 = 1/3) as its judge, which shares two evaluations.

    u1  = (alpha_1 / alpha_t) x_t - sigma_1 (e^(h/3) - 1) eps_t,                           D1 = eps(u1, t_1) - eps_t,
    u2  = (alpha_2 / alpha_t) x_t - sigma_2 [ (e^(2h/3) - 1) eps_t + 2 ((e^(2h/3) - 1) / (2h/3) - 1) D1 ],
    x_s = (alpha_s / alpha_t) x_t - sigma_s [ (e^h - 1) eps_t + 3/2 ((e^h - 1) / h - 1) (eps(u2, t_2) - eps_t) ],
    lower result                              - sigma_s [ (e^h - 1) eps_t + 3/2 (e^h - 1) D1 ].

    As :class:`DPMSolver12` in all else. Adaptive: order and evaluations per step 0 (2 for a step that is tried, 1 for
    one that is accepted); noise none.

    Reference: Lu et al. 2022, arXiv:2206.00927, appendix C, algorithm 3.
    """

    exponent = 3
    stages = 2

    def attempt(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, first: tuple[Tensor, ...], noise: Noise
    ) -> Attempt:
        path, form, (p0,) = problem.path, FORMS["eps"], first
        lam = path.logsnr(t) / 2
        h = path.logsnr(s) / 2 - lam
        t1, t2 = path.time(2 * (lam + h / 3)), path.time(2 * (lam + 2 * h / 3))
        (kept1, new1), (kept2, new2), (kept, new) = (form.factors(path, t, to) for to in (t1, t2, s))
        grown2, slope2 = form.moments(2 * h / 3, 2).unbind(-1)
        grown, slope = form.moments(h, 2).unbind(-1)
        slope2, slope = 2 * slope2, 1.5 * slope

        u1 = mix((kept1, x), (new1 * form.zeroth(h / 3), p0))
        p1 = problem.predict(u1, t1).eps
        u2 = mix((kept2, x), (new2 * (grown2 - slope2), p0), (new2 * slope2, p1))
        p2 = problem.predict(u2, t2).eps
        result = mix((kept, x), (new * (grown - slope), p0), (new * slope, p2))
        half = 1.5 * grown
        return Attempt(result, mix((new * slope, p2), (new * (half - slope), p0), (-new * half, p1)))
