"""SEEDS: exponential Runge-Kutta methods for the reverse SDE, with the noise of every stage taken from one path.

A stage inside the step is a state at its own time, so it has to have the noise gathered up to that time, and the end of
the step has to contain the same noise, carried on. With the linear part of :mod:`solvers.exponential_sde`, between t
and the stage times t_1 < t_2 < ...,

    N_1 = std(t, t_1) z_1,        N_2 = kept(t_1, t_2) N_1 + std(t_1, t_2) z_2,        ...,

where z_1, z_2, ... are the increments over [lam_t, lam_1], [lam_1, lam_2], ... That is what the paper's formulas with
two and three normals per step say, and it is why their order holds: with the right variances and the wrong correlations
a stage looks at a state that the step never comes near.

The paper's methods for VP and VE extrapolate eps; "data prediction" is the other form, and the one for few steps: in
ten steps, where the measure below takes twenty, SEEDS-2 makes the variance five times too large in eps-form.

*Variance after 20 steps*: see :mod:`solvers.ancestral`.

Reference: Gonzalez et al. 2023, arXiv:2305.14267.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from solvers.exponential import FORMS
from solvers.exponential_sde import Linear, SDEDPMSolver1, check_eta, linear
from solvers.integrate import Solver
from solvers.noise import Noise
from solvers.problem import DiffusionProblem, Path, mix

__all__ = ["SEEDS1", "SEEDS2", "SEEDS3"]

Terms = list[tuple[Tensor, Tensor]]


def gathered(part: Linear, path: Path, times: Sequence[Tensor], noise: Noise) -> list[Terms]:
    """N_1, N_2, ... of the module's text at times[1], times[2], ..., as terms of a linear combination."""
    if part.eta == 0:
        return [[] for _ in times[1:]]
    stages: list[Terms] = [[]]
    for t, s in pairwise(times):
        carried, _, std = part.factors(path, t, s)
        fresh = (std, noise(path.logsnr(t) / 2, path.logsnr(s) / 2))
        stages.append([*((carried * c, z) for c, z in stages[-1]), fresh])
    return stages[1:]


@dataclass(frozen=True)
class SEEDS1(SDEDPMSolver1):
    """SEEDS-1, which is SDE-DPM-Solver-1.

    x_s = (alpha_s / alpha_t) x_t - 2 sigma_s (e^h - 1) eps + sigma_s sqrt(e^(2h) - 1) z at eta = 1.

    Weak order 1, 1 evaluation per step, noise white (none for eta = 0). Variance after 20 steps: +3.0 %.

    Reference: Gonzalez et al. 2023, arXiv:2305.14267.
    """

    reference = "Gonzalez et al. 2023, arXiv:2305.14267"


class _Staged(Solver[None]):
    """Settings common to the methods with stages."""

    form: str
    eta: float
    invariant = True
    reference = "Gonzalez et al. 2023, arXiv:2305.14267"

    def __post_init__(self) -> None:
        check_eta(self.eta)
        if self.form not in FORMS:
            raise ValueError(f"form is one of {', '.join(FORMS)}, got {self.form!r}")
        self.declare(stochastic=self.eta > 0)


@dataclass(frozen=True)
class SEEDS2(_Staged):
    """SEEDS-2: one stage in the middle of the step in lam.

    u   = (alpha_1 / alpha_t) x_t - 2 sigma_1 (e^(c h) - 1) eps_t + N_1,                     lam_1 = lam_t + c h,
    x_s = (alpha_s / alpha_t) x_t - 2 sigma_s (e^h - 1) [eps_t + (eps(u, t_1) - eps_t) / (2c)] + N_2,

    in eps-form at eta = 1; in x0-form with the other linear part and 1 - e^(-2h).

    Weak order 2, 2 evaluations per step, noise white (none for eta = 0: DPM-Solver-2). Variance after 20 steps: +2.8 %
    in eps-form, -6.4 % in x0-form.

    Args:
        c: where the stage is, as a share of the step in lam, in (0, 1).
        form: "eps" or "x0", what is extrapolated.
        eta: amount of noise, >= 0.

    Reference: Gonzalez et al. 2023, arXiv:2305.14267.
    """

    c: float = 0.5
    form: str = "eps"
    eta: float = 1.0

    order = 2
    nfe_per_step = 2

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path, part, c = problem.path, linear(self.form, self.eta), self.c
        lam_t = path.logsnr(t) / 2
        h = path.logsnr(s) / 2 - lam_t
        t1 = path.time(2 * (lam_t + c * h))
        noise_1, noise_s = gathered(part, path, (t, t1, s), noise)
        (kept1, new1, _), (kept, new, _) = part.factors(path, t, t1), part.factors(path, t, s)
        (m1,), (m,) = part.moments(c * h, 1).unbind(-1), part.moments(h, 1).unbind(-1)

        p0 = getattr(problem.predict(x, t), self.form)
        u = mix((kept1, x), (new1 * m1, p0), *noise_1)
        p1 = getattr(problem.predict(u, t1), self.form)
        half = 1 / (2 * c)
        return mix((kept, x), (new * m * (1 - half), p0), (new * m * half, p1), *noise_s), state


@dataclass(frozen=True)
class SEEDS3(_Staged):
    """SEEDS-3: two stages, at a third and at two thirds of the step in lam.

    u1  = (alpha_1 / alpha_t) x_t - 2 sigma_1 (e^(c2 h) - 1) eps_t + N_1,
    u2  = (alpha_2 / alpha_t) x_t - 2 sigma_2 [ (e^(c3 h) - 1) eps_t
                                        + (c3 / c2) ((e^(c3 h) - 1) / (c3 h) - 1) (eps(u1, t_1) - eps_t) ] + N_2,
    x_s = (alpha_s / alpha_t) x_t - 2 sigma_s [ (e^h - 1) eps_t
                                        + (1 / c3) ((e^h - 1) / h - 1) (eps(u2, t_2) - eps_t) ] + N_3,

    in eps-form at eta = 1; in x0-form with the other linear part and its moments.

    Weak order 2, 3 evaluations per step, noise white (order 3 and none for eta = 0: DPM-Solver-3). Variance after 20
    steps: +2.9 % in eps-form, +0.3 % in x0-form.

    Args:
        c2: where the first stage is, as a share of the step in lam.
        c3: where the second is, 0 < c2 < c3 < 1.
        form: "eps" or "x0", what is extrapolated.
        eta: amount of noise, >= 0.

    Reference: Gonzalez et al. 2023, arXiv:2305.14267.
    """

    c2: float = 1 / 3
    c3: float = 2 / 3
    form: str = "eps"
    eta: float = 1.0

    nfe_per_step = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.c2 < self.c3 < 1:
            raise ValueError(f"stages lie one after the other inside the step, 0 < c2 < c3 < 1, got {self}")
        self.declare(order=3 if self.eta == 0 and abs(self.c3 - 2 / 3) < 1e-12 else 2)

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        path, part, c2, c3 = problem.path, linear(self.form, self.eta), self.c2, self.c3
        lam_t = path.logsnr(t) / 2
        h = path.logsnr(s) / 2 - lam_t
        t1, t2 = path.time(2 * (lam_t + c2 * h)), path.time(2 * (lam_t + c3 * h))
        noise_1, noise_2, noise_s = gathered(part, path, (t, t1, t2, s), noise)
        (kept1, new1, _), (kept2, new2, _), (kept, new, _) = (part.factors(path, t, v) for v in (t1, t2, s))
        m1, m2, m = part.moments(c2 * h, 1), part.moments(c3 * h, 2), part.moments(h, 2)

        p0 = getattr(problem.predict(x, t), self.form)
        u1 = mix((kept1, x), (new1 * m1[0], p0), *noise_1)
        p1 = getattr(problem.predict(u1, t1), self.form)
        slope = m2[1] * c3 / c2
        u2 = mix((kept2, x), (new2 * (m2[0] - slope), p0), (new2 * slope, p1), *noise_2)
        p2 = getattr(problem.predict(u2, t2), self.form)
        slope = m[1] / c3
        return mix((kept, x), (new * (m[0] - slope), p0), (new * slope, p2), *noise_s), state
