"""Pseudo numerical methods: the classical constants of equal steps, on steps that are not equal.

With y = x / alpha and rho = sigma / alpha the probability-flow ODE is dy/drho = eps, and the step "DDIM with another
eps" that this family calls the *transfer*,

    x_s = phi(x_t, e, t, s) = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) e,        h = lam_s - lam_t,

is Euler's step y_s = y_t + (rho_s - rho_t) e. PNDM puts in the place of e what the fourth-order methods of Adams and of
Runge and Kutta put there,

    e = (55 eps_0 - 59 eps_1 + 37 eps_2 - 9 eps_3) / 24            (newest first),

whose numbers are those of equal steps *in rho*. Steps that are equal in t or in logsnr are not equal in rho; on a
smooth grid their lengths differ from those of their neighbours by O(h), the constants then miss the first moment of the
polynomial by as much, and the method is of order 2. On grids whose neighbouring steps differ by factors it is of order
1. It is a method of order 4 on grids that are uniform in rho, on which nobody samples. What members differ in is their
start, and how many of the differences they use:

    IPNDM   orders 1, 2, ..., p
    PLMS    one step of Heun's method, then 2, 3, 4
    PNDM    three steps of ("pseudo") Runge and Kutta's
    IPNDMv  orders 1, 2, ..., p, with weights for the steps as they are

Reference: Liu, Ren, Lin and Zhao 2022, arXiv:2202.09778; Zhang and Chen 2022, arXiv:2204.13902, appendix H.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers.combine import OnPath, Warmup
from solvers.curves import EDM
from solvers.deis import DEISrhoAB
from solvers.exponential import FORMS, ExponentialMultistep
from solvers.integrate import Solver
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, Path, mix
from solvers.runge_kutta import Heun

__all__ = ["IPNDM", "PLMS", "PNDM", "IPNDMv", "PseudoRungeKutta"]

_PAPER = "Liu et al. 2022, arXiv:2202.09778"

_CONSTANTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


_HEUN_IN_RHO = OnPath(Heun(), EDM)


def _check(p: int) -> None:
    if not 1 <= p <= 4:
        raise ValueError(f"the pseudo linear multistep methods use 1 to 4 predictions, got {p}")


@dataclass(frozen=True)
class IPNDM(ExponentialMultistep):
    """iPNDM: Adams-Bashforth with the constants of equal steps, from the first step on.

    x_s = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) SUM_{j=0}^{q-1} b_qj eps_j,        q = min(steps so far, p).

    Order 1 on any grid, 2 on smooth ones and p on those that are uniform in sigma / alpha; 1 evaluation per step, noise
    none. Start: q = 1, 2, ..., p.

    Args:
        p: how many predictions it uses, 1 to 4.

    Reference: Zhang and Chen 2022, arXiv:2204.13902, appendix H.2 ("improved PNDM").
    """

    p: int = 4

    form = "eps"
    order = 1
    reference = "Zhang, Chen 2022, arXiv:2204.13902, appendix H.2"

    def __post_init__(self) -> None:
        _check(self.p)
        self.declare(memory=self.p)

    def weights(self, path: Path, lam: Tensor, lam_s: Tensor) -> Tensor:
        zeroth = FORMS[self.form].zeroth(lam_s - lam[..., 0])
        return zeroth[..., None] * torch.tensor(_CONSTANTS[lam.shape[-1] - 1], dtype=torch.float64)


@dataclass(frozen=True)
class IPNDMv(DEISrhoAB):
    """iPNDM-v: the weights of Adams and Bashforth for the steps as they are.

    Newton's form, in steps h_n = rho_s - rho_t, h_(n-1), ... and divided differences eps[...] of the predictions:

        y_s = y_t + h_n [ eps_0 + h_n / 2 eps[0, 1] + I_2 eps[0, 1, 2] + I_3 eps[0, 1, 2, 3] ],
        I_2 = h_n (h_n + h_(n-1)) / 2 (1 - h_n / (3 (h_n + h_(n-1)))).

    Order 2 as published: the authors' code multiplies a part of I_2 only by what belongs to all of it (a parenthesis
    closes too late; on equal steps that is no difference). ``corrected`` is what was meant, variable-step
    Adams-Bashforth of order r + 1, and there the same as :class:`solvers.deis.DEISrhoAB`. 1 evaluation per step, noise
    none. Start: degrees 0, 1, ..., r.

    Args:
        r: degree of the polynomial, 0 to 3.
        corrected: with the parenthesis in its place.

    Reference: Zhou, Chen, Wang and Chen 2024, arXiv:2312.00094, and its code, github.com/zju-pi/diff-sampler.
    """

    r: int = 3
    corrected: bool = False

    reference = "Zhou et al. 2024, arXiv:2312.00094 (diff-sampler)"

    def __post_init__(self) -> None:
        _check(self.r + 1)
        super().__post_init__()
        self.declare(order=self.r + 1 if self.corrected else min(self.r + 1, 2))

    def weights(self, path: Path, lam: Tensor, lam_s: Tensor) -> Tensor:
        meant = super().weights(path, lam, lam_s)
        if self.corrected or lam.shape[-1] < 3:
            return meant
        rho = (-torch.cat([lam_s[..., None], lam[..., :3]], -1)).exp()
        h, h1, h2 = (rho[..., :-1] - rho[..., 1:]).unbind(-1)
        part, all_of_it = h / (3 * (h + h1)), h * (h + h1) / (h1 * (h1 + h2))
        excess = ((1 - part * all_of_it) - (1 - part) * all_of_it) / 2
        # of the second difference, whose coefficients these are
        change = torch.stack([torch.ones_like(h), -(1 + h1 / h2), h1 / h2], -1) * excess[..., None]
        zeroth = FORMS[self.form].zeroth(lam_s - lam[..., 0])
        return meant + zeroth[..., None] * torch.nn.functional.pad(change, (0, lam.shape[-1] - 3))


@dataclass(frozen=True)
class PseudoRungeKutta(Solver[None]):
    """The classical Runge-Kutta method with the transfer in the place of its steps.

    e_1 = eps(x_t, t),        x_1 = phi(x_t, e_1, t, m),        m = (t + s) / 2,
    e_2 = eps(x_1, m),        x_2 = phi(x_t, e_2, t, m),
    e_3 = eps(x_2, m),        x_3 = phi(x_t, e_3, t, s),
    e_4 = eps(x_3, s),        x_s = phi(x_t, (e_1 + 2 e_2 + 2 e_3 + e_4) / 6, t, s).

    The middle is that of t, and not of rho, where the weights would have it: order 2, 4 evaluations per step, noise
    none. (``OnPath(RK4(), EDM)`` has it there, and is of order 4.)

    Reference: Liu et al. 2022, arXiv:2202.09778, section 3.3 ("PRK").
    """

    order = 2
    nfe_per_step = 4
    reference = _PAPER

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path, middle = problem.path, (t + s) / 2

        def phi(e: tuple[tuple[float, Tensor], ...], to: Tensor) -> Tensor:
            kept, new = FORMS["eps"].factors(path, t, to)
            grown = new * FORMS["eps"].zeroth((path.logsnr(to) - path.logsnr(t)) / 2)
            return mix((kept, x), *((grown * share, each) for share, each in e))

        e1 = problem.predict(x, t).eps
        e2 = problem.predict(phi(((1.0, e1),), middle), middle).eps
        e3 = problem.predict(phi(((1.0, e2),), middle), middle).eps
        e4 = problem.predict(phi(((1.0, e3),), s), s).eps
        return phi(((1 / 6, e1), (1 / 3, e2), (1 / 3, e3), (1 / 6, e4)), s), state


@dataclass(frozen=True)
class PNDM(Warmup):
    """PNDM (the authors' F-PNDM): three pseudo Runge-Kutta steps, then pseudo linear multistep steps.

    x_s = phi(x_t, (55 eps_0 - 59 eps_1 + 37 eps_2 - 9 eps_3) / 24, t, s).

    Order 1 on any grid and 2 on smooth ones; 1 evaluation per step and 9 more, noise none.

    Reference: Liu et al. 2022, arXiv:2202.09778, algorithm 2.
    """

    start: Solver[Any] = PseudoRungeKutta()
    solver: Solver[Any] = IPNDM(4)
    steps: int = 3

    reference = f"{_PAPER}, algorithm 2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.declare(reference=type(self).reference)


@dataclass(frozen=True)
class PLMS(PNDM):
    """PLMS: one step of Heun's method in rho, then Adams-Bashforth constants of orders 2, 3 and 4.

    Order 1 on any grid and 2 on smooth ones; 1 evaluation per step and 1 more, noise none.

    Reference: Liu et al. 2022, arXiv:2202.09778 ("S-PNDM" starts so), as in Rombach et al. 2022, arXiv:2112.10752.
    """

    start: Solver[Any] = _HEUN_IN_RHO
    steps: int = 1

    reference = f"{_PAPER} (S-PNDM's start); Rombach et al. 2022, arXiv:2112.10752"
