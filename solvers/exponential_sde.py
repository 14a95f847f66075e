"""Exponential integrators for the reverse SDE: linear part and noise exactly, only the prediction approximated.

In the clock ``lam = logsnr / 2``, with ``y = x / alpha`` and a = 1 + eta^2, the reverse family is

    dy = -a (y - x0) dlam + sqrt(2) eta exp(-lam) dW
       = -a exp(-lam) eps dlam + sqrt(2) eta exp(-lam) dW,

so every step has an exact solution up to the integral over the prediction, in either form, with h = lam_s - lam_t,

    x_s = (sigma_s / sigma_t) e^(-eta^2 h) x_t + alpha_s INT_0^h a e^(-a (h - u)) x0(lam_t + u) du
                                               + sigma_s sqrt(1 - e^(-2 eta^2 h)) z
        = (alpha_s / alpha_t) x_t - sigma_s a INT_0^h e^(h - u) eps(lam_t + u) du
                                               + eta sigma_s sqrt(e^(2h) - 1) z.

Beside the ODE (:mod:`solvers.exponential`) three things change: what is kept decays faster, there is a noise, and the
moments of the integral are those of the ODE at another step, m_k(a h) in x0-form and a m_k(h) in eps-form. So every
multistep method for the ODE has a stochastic sister (:class:`StochasticMultistep`) with the same rule for the
prediction, whatever that rule is. From data to noise (h < 0) the same formulas hold with a = 1 - eta^2 and |h| in the
noise: at eta = 1 nothing is left of the prediction, and a step is the forward process itself.

With one Gaussian per step no such method is of higher strong order than 1, nor of higher weak order than 2. On Gaussian
data the error of the variance may fall faster for a while: the eps-form's first-order term comes from the ends of the
path only. It wants short steps, though: on that data SDE-DPM-2M makes the variance four times too large in ten steps
and six hundred times in five, where SDE-DPM++(2M) is off by 8 % and 16 %.

*Variance after 20 steps*: see :mod:`solvers.ancestral`.

Reference: Lu et al. 2022, arXiv:2211.01095; Gonzalez et al. 2023, arXiv:2305.14267; Xue et al.
2023, arXiv:2309.05019.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers.dpm_solver import DPMSolver2M, DPMSolverPP2M
from solvers.exponential import FORMS, ExponentialMultistep, row_of
from solvers.integrate import Solver
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, Path, mix

__all__ = [
    "DPMSolverPPSDE",
    "ExponentialAdamsSDE",
    "Linear",
    "SDEDPMSolver1",
    "SDEDPMSolver2M",
    "SDEDPMSolverPP1",
    "SDEDPMSolverPP2M",
    "SDEDPMSolverPP3M",
    "StochasticMultistep",
    "linear",
]

Moments = Callable[[Tensor, int], Tensor]


def check_eta(eta: float) -> None:
    """Refuse a negative amount of noise.

    Raises:
        ValueError: saying what is allowed.
    """
    if not eta >= 0:
        raise ValueError(f"eta is at least 0, got {eta}")


# --- The linear part --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear(ABC):
    """The reverse family between two times, solved up to the integral over the prediction; see the module's text.

    Args:
        eta: amount of noise; 0 is the probability-flow ODE, 1 the reverse SDE.
    """

    eta: float | Tensor = 1.0

    def rate(self, h: Tensor) -> Tensor:
        """a = 1 + eta^2 towards the data (h > 0), 1 - eta^2 towards the noise."""
        return 1 + h.sign() * self.eta**2

    @abstractmethod
    def factors(self, path: Path, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(kept, new, std): factors of the state, of the integral, and of a standard normal, for a step from t to s."""

    @abstractmethod
    def moments(self, h: Tensor, count: int, of_ode: Moments | None = None) -> Tensor:
        """Moments (*h.shape, count) of the integral, made from those of the ODE (the exact ones by default)."""


class _LinearX0(Linear):
    def factors(self, path: Path, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, new = FORMS["x0"].factors(path, t, s)
        lost = self.eta**2 * (path.logsnr(s) - path.logsnr(t)).abs() / 2
        return kept * torch.exp(-lost), new, path.sigma(s) * (-torch.expm1(-2 * lost)).sqrt()

    def moments(self, h: Tensor, count: int, of_ode: Moments | None = None) -> Tensor:
        return (of_ode or FORMS["x0"].moments)(self.rate(h) * h, count)


class _LinearEps(Linear):
    def factors(self, path: Path, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept, new = FORMS["eps"].factors(path, t, s)
        return kept, new, self.eta * path.sigma(s) * torch.expm1(path.logsnr(s) - path.logsnr(t)).abs().sqrt()

    def moments(self, h: Tensor, count: int, of_ode: Moments | None = None) -> Tensor:
        return self.rate(h)[..., None] * (of_ode or FORMS["eps"].moments)(h, count)


_LINEAR: dict[str, type[Linear]] = {"x0": _LinearX0, "eps": _LinearEps}


def linear(form: str, eta: float | Tensor) -> Linear:
    """The linear part in the form "x0" or "eps"."""
    return _LINEAR[form](eta)


# --- Multistep --------------------------------------------------------------------------------------------------------


class StochasticMultistep(ExponentialMultistep):
    """x_s = kept x_t + new (w_0 P_t + w_1 P_previous + ...) + std z: the stochastic sister of a multistep method.

    Put before it among the bases of a class: ``class SDEDPMSolverPP2M(StochasticMultistep, DPMSolverPP2M)``.

    Attributes:
        eta: amount of noise.
    """

    eta: float
    grid = "logsnr"

    def declare(self, **facts: Any) -> None:
        """With noise, no order is higher than 2."""
        if "order" in facts and self.eta > 0:
            facts["order"] = min(facts["order"], 2)
        super().declare(**facts)

    def __post_init__(self) -> None:
        check_eta(self.eta)
        self.declare(stochastic=self.eta > 0)

    def moments(self, h: Tensor, count: int) -> Tensor:
        return linear(self.form, self.eta).moments(h, count, super().moments)

    def row(self, path: Path, lam: Tensor, t: Tensor, s: Tensor) -> Tensor:
        kept, new, std = linear(self.form, self.eta).factors(path, t, s)
        row = row_of(kept, new, self.weights(path, lam, path.logsnr(s) / 2))
        return torch.cat([row, std[..., None]], -1) if self.stochastic else row

    def drawn(self, path: Path, t: Tensor, s: Tensor, noise: Noise) -> tuple[Tensor, ...]:
        return (noise(path.logsnr(t) / 2, path.logsnr(s) / 2),) if self.stochastic else ()


@dataclass(frozen=True)
class SDEDPMSolver1(StochasticMultistep):
    """SDE-DPM-Solver-1.

    x_s = (alpha_s / alpha_t) x_t - 2 sigma_s (e^h - 1) eps + sigma_s sqrt(e^(2h) - 1) z        (eta = 1).

    Weak order 1, 1 evaluation per step, noise white (none for eta = 0: DDIM). It is Euler's method on the ray.
    Variance after 20 steps: +3.0 %.

    Args:
        eta: amount of noise, >= 0.

    Reference: Lu et al. 2022, arXiv:2211.01095 (SDE-DPM-Solver); SEEDS-1 of Gonzalez et al. 2023, arXiv:2305.14267.
    """

    eta: float = 1.0

    form = "eps"
    memory = 1
    order = 1
    reference = "Lu et al. 2022, arXiv:2211.01095"


@dataclass(frozen=True)
class SDEDPMSolverPP1(StochasticMultistep):
    """SDE-DPM-Solver++(1).

    x_s = (sigma_s / sigma_t) e^(-h) x_t + alpha_s (1 - e^(-2h)) x0 + sigma_s sqrt(1 - e^(-2h)) z        (eta = 1).

    Weak order 1, 1 evaluation per step, noise white (none for eta = 0: DDIM). At eta = 1 it is
    ancestral sampling with the posterior's variance. Variance after 20 steps: -31 %.

    Args:
        eta: amount of noise, >= 0.

    Reference: Lu et al. 2022, arXiv:2211.01095 (SDE-DPM-Solver).
    """

    eta: float = 1.0

    form = "x0"
    memory = 1
    order = 1
    reference = "Lu et al. 2022, arXiv:2211.01095"


@dataclass(frozen=True)
class SDEDPMSolver2M(StochasticMultistep, DPMSolver2M):
    """SDE-DPM-Solver-2M, in eps-form.

    x_s = (alpha_s / alpha_t) x_t - 2 sigma_s (e^h - 1) D + sigma_s sqrt(e^(2h) - 1) z at eta = 1,
    D = (1 + 1/(2r)) eps_t - 1/(2r) eps_previous,                    r = h_previous / h.

    Weak order 2, 1 evaluation per step, noise white (none for eta = 0: DPM-Solver-2M). Start: order 1.
    Variance after 20 steps: -2.4 %.

    Args:
        taylor: the exact first moment in place of half the zeroth one.
        eta: amount of noise, >= 0.

    Reference: Lu et al. 2022, arXiv:2211.01095 (SDE-DPM-Solver).
    """

    eta: float = 1.0

    reference = "Lu et al. 2022, arXiv:2211.01095"


@dataclass(frozen=True)
class SDEDPMSolverPP2M(StochasticMultistep, DPMSolverPP2M):
    """SDE-DPM-Solver++(2M).

    x_s = (sigma_s / sigma_t) e^(-eta^2 h) x_t + alpha_s (1 - e^(-a h)) D + sigma_s sqrt(1 - e^(-2 eta^2 h)) z,
    D = (1 + 1/(2r)) x0_t - 1/(2r) x0_previous,                      r = h_previous / h,   a = 1 + eta^2.

    Weak order 2, 1 evaluation per step, noise white (none for eta = 0: DPM-Solver++(2M)). Start: order 1.
    Variance after 20 steps: +4.6 %.

    Args:
        taylor: the exact first moment in place of half the zeroth one: the "heun" variant (variance after 20 steps:
            +12 %).
        eta: amount of noise, >= 0; its square is k-diffusion's ``eta``.

    Reference: Lu et al. 2022, arXiv:2211.01095 (SDE-DPM-Solver++); Crowson 2022, k-diffusion, sample_dpmpp_2m_sde.
    """

    eta: float = 1.0

    reference = "Lu et al. 2022, arXiv:2211.01095"


@dataclass(frozen=True)
class SDEDPMSolverPP3M(StochasticMultistep):
    """DPM++ 3M SDE as published: exponential Adams of three predictions with half of its quadratic term.

    The step of :class:`ExponentialAdamsSDE` with p = 3, but with m_2 / 2 in the place of its last moment m_2: a second
    divided difference stands where half the second derivative is meant.

    Weak order 2, 1 evaluation per step, noise white (none for eta = 0, also order 2). Start: orders 1, 2.
    Variance after 20 steps: +5.1 %.

    Args:
        eta: amount of noise, >= 0; its square is k-diffusion's ``eta``.

    Reference: Crowson 2023, github.com/crowsonkb/k-diffusion, sample_dpmpp_3m_sde.
    """

    eta: float = 1.0

    form = "x0"
    memory = 3
    order = 2
    reference = "Crowson 2023, k-diffusion, sample_dpmpp_3m_sde"

    def moments(self, h: Tensor, count: int) -> Tensor:
        halved = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
        return super().moments(h, count) * halved[:count]


@dataclass(frozen=True)
class ExponentialAdamsSDE(StochasticMultistep):
    """Exponential Adams for the reverse SDE: the polynomial through the last p predictions, integrated exactly.

    x_s = kept x_t + new SUM_j w_j P_j + std z,        SUM_j w_j r_j^k = k! (a h) phi_(k+1)(-a h)  for k = 0..p-1,
    r_j = (lam_j - lam_t) / h.

    p = 2 is the "heun" variant of SDE-DPM-Solver++(2M), p = 3 what its 3M is meant to be.

    Weak order min(p, 2) (order p for eta = 0), 1 evaluation per step, noise white. Start: orders 1, 2, ..., p.
    Variance after 20 steps: +3.2 %.

    Args:
        p: how many predictions the polynomial goes through, 1 to 8.
        form: "x0" or "eps", what is extrapolated.
        eta: amount of noise, >= 0.

    Reference: Xue et al. 2023, arXiv:2309.05019, eq. 15 (its predictor, with constant tau = eta); Hochbruck and
    Ostermann 2010, Acta Numerica 19, section 2.5.
    """

    p: int = 3
    form: str = "x0"
    eta: float = 1.0

    reference = "Xue et al. 2023, arXiv:2309.05019, eq. 15"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.p <= 8:
            raise ValueError(f"the order of an extrapolation is 1 to 8, got {self.p}")
        if self.form not in FORMS:
            raise ValueError(f"form is one of {', '.join(FORMS)}, got {self.form!r}")
        self.declare(order=self.p, memory=self.p)


# --- Two stages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DPMSolverPPSDE(Solver[None]):
    """DPM++ SDE: two ancestral steps from the same state, to the middle and, with what is seen there, to the end.

    tau(h) = eta^2 (1 - e^(-2h)),        d(h) = h - log(1 - tau(h)) / 2  (the step down in lam),
    u   = sqrt(1 - tau(rh)) (sigma_m / sigma_t) x_t + alpha_m (1 - e^(-d(rh))) x0_t + sigma_m sqrt(tau(rh)) z_tm,
    x_s = sqrt(1 - tau(h)) (sigma_s / sigma_t) x_t + alpha_s (1 - e^(-d(h))) D + sigma_s sqrt(tau(h)) z_ts,
    D   = (1 - 1/(2r)) x0_t + 1/(2r) x0(u, t_m),

    where z_tm and z_ts are the increments of one Brownian motion over [lam_t, lam_m] and [lam_t, lam_s]: correlated.

    Weak order 2, 2 evaluations per step, noise white (none for eta = 0: DPM-Solver++(2S)). Variance after 20 steps:
    -4.2 %.

    Args:
        eta: share of the posterior's standard deviation that is drawn afresh, in [0, 1] (as in ancestral sampling).
        r: where the middle is, as a share of the step in lam, in (0, 1).

    Reference: Crowson 2022, github.com/crowsonkb/k-diffusion, sample_dpmpp_sde.
    """

    eta: float = 1.0
    r: float = 0.5

    order = 2
    invariant = True
    nfe_per_step = 2
    reference = "Crowson 2022, k-diffusion, sample_dpmpp_sde"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is in [0, 1], got {self.eta}")
        if not 0 < self.r < 1:
            raise ValueError(f"r lies inside the step, in (0, 1), got {self.r}")
        self.declare(stochastic=self.eta > 0)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path = problem.path
        lam_t, lam_s = path.logsnr(t) / 2, path.logsnr(s) / 2
        lam_m = lam_t + self.r * (lam_s - lam_t)
        m, share = path.time(2 * lam_m), 1 / (2 * self.r)

        def ancestral(v: Tensor, lam_v: Tensor, *predicted: tuple[float, Tensor]) -> Tensor:
            h = lam_v - lam_t
            tau = -(self.eta**2) * torch.expm1(-2 * h.abs())
            kept = path.sigma(v) / path.sigma(t) * (1 - tau).sqrt()
            new = path.alpha(v) * -torch.expm1(torch.log1p(-tau) / 2 - h)
            fresh = [(path.sigma(v) * tau.sqrt(), noise(lam_t, lam_v))] if self.eta > 0 else []
            return mix((kept, x), *((new * c, x0) for c, x0 in predicted), *fresh)

        first = problem.predict(x, t).x0
        middle = problem.predict(ancestral(m, lam_m, (1.0, first)), m).x0
        return ancestral(s, lam_s, (1 - share, first), (share, middle)), state
