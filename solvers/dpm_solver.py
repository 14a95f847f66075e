"""DPM-Solver and DPM-Solver++: the exponential integrators that made twenty steps enough.

Both families expand the integrand of the exact solution (:mod:`solvers.exponential`) around the start of a step; DPM-
Solver expands eps, DPM-Solver++ expands x0, and with h = lam_s - lam_t the formulas are the same but for a sign:

    DPM-Solver      x_s = (alpha_s / alpha_t) x_t - sigma_s [ (e^h - 1) eps + ... ]
    DPM-Solver++    x_s = (sigma_s / sigma_t) x_t + alpha_s [ (1 - e^-h) x0 + ... ]

so a ++ class here is its elder sister with another ``form``. *Singlestep* methods (2S, 3S) take their derivatives from
evaluations inside the step, *multistep* methods (2M, 3M) from the steps before, at one evaluation per step.

Two approximations of the authors are part of their formulas and are kept under their names. The second-order methods
multiply the difference of two predictions by half the zeroth moment, m_0 / 2, where the exact first moment m_1 stands
in the interpolation formula (both are h / 2 + O(h^2)); the exact one is the authors' "taylor" variant, called "heun"
elsewhere. The third-order multistep method puts a second *divided difference* where h^2 P'' is meant; the former is
half the latter, so half of a term of third order is missing and the method is of order 2. (Its error is the smaller
one all the same on some problems when steps are few.) The singlestep method of third order has no such term.

Reference: Lu et al. 2022, arXiv:2206.00927 (DPM-Solver) and arXiv:2211.01095 (DPM-Solver++); the multistep methods of
third order are defined by the authors' code, github.com/LuChengTHU/dpm-solver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from solvers.exponential import FORMS, ExponentialMultistep
from solvers.integrate import Solver
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, mix

__all__ = [
    "DPMSolver1",
    "DPMSolver2M",
    "DPMSolver2S",
    "DPMSolver3M",
    "DPMSolver3S",
    "DPMSolverPP1",
    "DPMSolverPP2M",
    "DPMSolverPP2S",
    "DPMSolverPP3M",
    "DPMSolverPP3S",
]

_PAPER, _PP_PAPER = "Lu et al. 2022, arXiv:2206.00927", "Lu et al. 2022, arXiv:2211.01095"


# --- Singlestep -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DPMSolver1(Solver[None]):
    """DPM-Solver-1, which is DDIM: x_s = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) eps.

    Order 1, 1 evaluation per step, noise none.

    Reference: Lu et al. 2022, arXiv:2206.00927, eq. 3.7.
    """

    form: ClassVar[str] = "eps"
    order = 1
    invariant = True
    nfe_per_step = 1
    grid = "sqrt_flow"
    reference = f"{_PAPER}, eq. 3.7"

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path, form = problem.path, FORMS[self.form]
        p0 = getattr(problem.predict(x, t), self.form)
        kept, new = form.factors(path, t, s)
        grown = form.zeroth((path.logsnr(s) - path.logsnr(t)) / 2)
        return mix((kept, x), (new * grown, p0)), state


@dataclass(frozen=True)
class DPMSolver2S(Solver[None]):
    """DPM-Solver-2, singlestep: one more evaluation, at the share r1 of the step in lam.

    u   = (alpha_1 / alpha_t) x_t - sigma_1 (e^(r1 h) - 1) eps_t,                          lam_1 = lam_t + r1 h,
    x_s = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) [ eps_t + (eps(u, t_1) - eps_t) / (2 r1) ].

    Order 2, 2 evaluations per step, noise none.

    Args:
        r1: where in the step the second evaluation is, in (0, 1).

    Reference: Lu et al. 2022, arXiv:2206.00927, algorithm 1 (r1 = 1/2) and appendix B.
    """

    r1: float = 0.5

    form: ClassVar[str] = "eps"
    order = 2
    invariant = True
    nfe_per_step = 2
    grid = "vp_quadratic"
    reference = f"{_PAPER}, algorithm 1"

    def __post_init__(self) -> None:
        if not 0 < self.r1 < 1:
            raise ValueError(f"r1 lies inside the step, in (0, 1), got {self.r1}")

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path, form, r1 = problem.path, FORMS[self.form], self.r1
        lam = path.logsnr(t) / 2
        h = path.logsnr(s) / 2 - lam
        t1 = path.time(2 * (lam + r1 * h))
        (kept1, kept), (new1, new) = form.factors(path, t, torch.stack([t1, s]))
        grown1, grown = form.zeroth(h * torch.tensor([r1, 1.0], dtype=torch.float64))

        p0 = getattr(problem.predict(x, t), self.form)
        u = mix((kept1, x), (new1 * grown1, p0))
        p1 = getattr(problem.predict(u, t1), self.form)
        half = 1 / (2 * r1)
        return mix((kept, x), (new * grown * (1 - half), p0), (new * grown * half, p1)), state


@dataclass(frozen=True)
class DPMSolver3S(Solver[None]):
    """DPM-Solver-3, singlestep: two more evaluations, at the shares r1 and r2 of the step in lam.

    u1  = (alpha_1 / alpha_t) x_t - sigma_1 (e^(r1 h) - 1) eps_t,
    u2  = (alpha_2 / alpha_t) x_t - sigma_2 [ (e^(r2 h) - 1) eps_t
                                               + (r2 / r1) ((e^(r2 h) - 1) / (r2 h) - 1) (eps(u1, t_1) - eps_t) ],
    x_s = (alpha_s / alpha_t) x_t - sigma_s [ (e^h - 1) eps_t + (1 / r2) ((e^h - 1) / h - 1) (eps(u2, t_2) - eps_t) ].

    Order 3 with r2 = 2/3 (order 2 else), 3 evaluations per step, noise none.

    Args:
        r1: where in the step the second evaluation is, in (0, 1).
        r2: where the third is, in (0, 1); a straight line through 0 and r2 integrates a quadratic right for 2/3 only.

    Reference: Lu et al. 2022, arXiv:2206.00927, algorithm 2 (r1 = 1/3, r2 = 2/3) and appendix B.
    """

    r1: float = 1 / 3
    r2: float = 2 / 3

    form: ClassVar[str] = "eps"
    nfe_per_step = 3
    invariant = True
    grid = "vp_quadratic"
    reference = f"{_PAPER}, algorithm 2"

    def __post_init__(self) -> None:
        if not (0 < self.r1 < 1 and 0 < self.r2 < 1 and self.r1 != self.r2):
            raise ValueError(f"r1 and r2 are different and lie inside the step, in (0, 1), got {self.r1} and {self.r2}")
        self.declare(order=3 if abs(self.r2 - 2 / 3) < 1e-12 else 2)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path, form, r1, r2 = problem.path, FORMS[self.form], self.r1, self.r2
        lam = path.logsnr(t) / 2
        h = (path.logsnr(s) / 2 - lam) * torch.tensor([r1, r2, 1.0], dtype=torch.float64)
        t1, t2 = path.time(2 * (lam + h[:2]))
        (kept1, kept2, kept), (new1, new2, new) = form.factors(path, t, torch.stack([t1, t2, s]))
        (grown1, _), (grown2, slope2), (grown, slope) = form.moments(h, 2)
        slope2, slope = slope2 * r2 / r1, slope / r2

        p0 = getattr(problem.predict(x, t), self.form)
        u1 = mix((kept1, x), (new1 * grown1, p0))
        p1 = getattr(problem.predict(u1, t1), self.form)
        u2 = mix((kept2, x), (new2 * (grown2 - slope2), p0), (new2 * slope2, p1))
        p2 = getattr(problem.predict(u2, t2), self.form)
        return mix((kept, x), (new * (grown - slope), p0), (new * slope, p2)), state


@dataclass(frozen=True)
class DPMSolverPP1(DPMSolver1):
    """DPM-Solver++(1S), which is DDIM once more: x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) x0.

    Order 1, 1 evaluation per step, noise none.

    Reference: Lu et al. 2022, arXiv:2211.01095, section 4.
    """

    form: ClassVar[str] = "x0"
    reference = _PP_PAPER


@dataclass(frozen=True)
class DPMSolverPP2S(DPMSolver2S):
    """DPM-Solver++(2S): :class:`DPMSolver2S` in x0-form.

    u   = (sigma_1 / sigma_t) x_t + alpha_1 (1 - e^(-r1 h)) x0_t,                          lam_1 = lam_t + r1 h,
    x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) [ (1 - 1 / (2 r1)) x0_t + x0(u, t_1) / (2 r1) ].

    Order 2, 2 evaluations per step, noise none.

    Reference: Lu et al. 2022, arXiv:2211.01095, algorithm 1.
    """

    form: ClassVar[str] = "x0"
    reference = f"{_PP_PAPER}, algorithm 1"


@dataclass(frozen=True)
class DPMSolverPP3S(DPMSolver3S):
    """DPM-Solver++(3S): :class:`DPMSolver3S` in x0-form, (e^z - 1) replaced by (1 - e^-z).

    Order 3 with r2 = 2/3 (order 2 else), 3 evaluations per step, noise none.

    Reference: Lu et al. 2022, arXiv:2211.01095; the authors' code, singlestep_dpm_solver_third_update.
    """

    form: ClassVar[str] = "x0"
    reference = f"{_PP_PAPER}, the authors' code"


# --- Multistep --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DPMSolver2M(ExponentialMultistep):
    """DPM-Solver of second order, multistep.

    x_s = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) D,
    D = (1 + 1/(2r)) eps_t - 1/(2r) eps_previous,                    r = h_previous / h.

    Order 2, 1 evaluation per step, noise none. Start: order 1, D = eps_t.

    Args:
        taylor: the exact moment of the difference, h^2 phi_2(h), in place of half the zeroth one, (e^h - 1) / 2: the
            authors' "taylor" variant, which is the exponential Adams method.

    Reference: Lu et al. 2022, the authors' code, multistep_dpm_solver_second_update.
    """

    taylor: bool = False

    form = "eps"
    memory = 2
    order = 2
    reference = f"{_PAPER}, the authors' code"

    def moments(self, h: Tensor, count: int) -> Tensor:
        m = super().moments(h, count)
        return m if self.taylor or count == 1 else _halved(m)


@dataclass(frozen=True)
class DPMSolverPP2M(DPMSolver2M):
    """DPM-Solver++(2M), the multistep method of second order in x0-form.

    x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^-h) D,
    D = (1 + 1/(2r)) x0_t - 1/(2r) x0_previous,                      r = h_previous / h.

    Order 2, 1 evaluation per step, noise none. Start: order 1, D = x0_t.

    Args:
        taylor: the exact moment of the difference, h^2 phi_2(-h), in place of half the zeroth one, (1 - e^-h) / 2: the
            authors' "taylor", others' "heun" variant, which is the exponential Adams method.

    Reference: Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """

    form = "x0"
    reference = f"{_PP_PAPER}, algorithm 2"


@dataclass(frozen=True)
class DPMSolver3M(ExponentialMultistep):
    """DPM-Solver of third order, multistep, with the coefficients that were published.

    x_s = (alpha_s / alpha_t) x_t - sigma_s [ (e^h - 1) eps_t + ((e^h - 1) / h - 1) D1
                                                + ((e^h - 1 - h) / h^2 - 1/2) D2 ],
    D1  = D' + r (D' - D'') / (r + r''),     D2 = (D' - D'') / (r + r''),     r = h_previous / h,  r'' the one before,

    with the differences D' = (eps_t - eps_previous) / r and D'' = (eps_previous - eps_before) / r''. D1 is h eps' to
    second order; D2 is h^2 eps'' / 2, while its factor is that of h^2 eps''.

    Order 2 as published, 3 when ``corrected``; 1 evaluation per step, noise none. Start: orders 1 and 2, that of
    :class:`DPMSolver2M`.

    Args:
        corrected: twice the published D2: the polynomial through three predictions, integrated exactly.

    Reference: Lu et al. 2022, the authors' code, multistep_dpm_solver_third_update.
    """

    corrected: bool = False

    form = "eps"
    memory = 3
    reference = f"{_PAPER}, the authors' code"

    def __post_init__(self) -> None:
        self.declare(order=3 if self.corrected else 2)

    def moments(self, h: Tensor, count: int) -> Tensor:
        m = super().moments(h, count)
        if count == 2:
            return _halved(m)
        return m if self.corrected else m * torch.tensor([1.0, 1.0, 0.5])[:count]


@dataclass(frozen=True)
class DPMSolverPP3M(DPMSolver3M):
    """DPM-Solver++(3M): :class:`DPMSolver3M` in x0-form, with the coefficients that were published.

    x_s = (sigma_s / sigma_t) x_t + alpha_s [ (1 - e^-h) x0_t + ((e^-h - 1) / h + 1) D1
                                                - ((e^-h - 1 + h) / h^2 - 1/2) D2 ].

    Order 2 as published, 3 when ``corrected``; 1 evaluation per step, noise none. Start: orders 1 and 2, that of
    :class:`DPMSolverPP2M`.

    Args:
        corrected: twice the published D2: the polynomial through three predictions, integrated exactly.

    Reference: Lu et al. 2022, arXiv:2211.01095; the authors' code, multistep_dpm_solver_third_update.
    """

    form = "x0"
    reference = f"{_PP_PAPER}, the authors' code"


def _halved(m: Tensor) -> Tensor:
    """Two moments, the first one replaced by half the zeroth."""
    return torch.stack([m[..., 0], m[..., 0] / 2], -1)
