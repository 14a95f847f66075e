"""The stochastic solvers: formulas, identities, exact laws, and what their docstrings say of coarse steps.

Orders are measured for everything in SOLVERS by the certificates; here is what they cannot see.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdegen.oracles import MixtureOracle
from sdegen.paths import GaussianPath
from solvers import (
    DDIM,
    EDM,
    ERSDE,
    RK4,
    SEEDS1,
    SEEDS2,
    SEEDS3,
    SOLVERS,
    SRA1,
    VP_LAM,
    AnalyticDPM,
    Ancestral,
    AnnealedLangevin,
    BrownianMotion,
    Churn,
    DiffusionProblem,
    DPM2Ancestral,
    DPMPP2SAncestral,
    DPMSolverPPSDE,
    EulerAncestral,
    EulerMaruyama,
    ExponentialAdamsSDE,
    GaussianMSE,
    Heun,
    Langevin,
    LearnedVariance,
    MeasuredMSE,
    OnPath,
    PowerScale,
    PredictorCorrector,
    Restart,
    RestartInterval,
    ReverseDiffusion,
    SASolver,
    Scale5,
    SDEDPMSolver1,
    SDEDPMSolver2M,
    SDEDPMSolverPP1,
    SDEDPMSolverPP2M,
    SDEDPMSolverPP3M,
    SNRLangevin,
    Solver,
    StochasticHeun,
    UniC,
    UniPC,
    Window,
    integrate,
    prior,
    trace,
)
from solvers.certify import gaussian, measured_order, starts, strong_order, uneven, weak_order
from solvers.dpm_solver import DPMSolver2M, DPMSolver2S, DPMSolver3S, DPMSolverPP2M, DPMSolverPP2S, DPMSolverPP3S
from solvers.exponential import ExponentialAdams
from solvers.grids import logsnr, uniform
from solvers.noise import elsewhere
from solvers.tables import Moments

Problems = dict[str, DiffusionProblem]


def run(solver: Solver[Any], problem: DiffusionProblem, ts: Tensor, batch: int = 4) -> Tensor:
    x = prior(problem.path, (batch, 2), seed=0, dtype=torch.float64)
    return integrate(solver, problem, x, ts, noise=BrownianMotion(x, seed=1)).x


def silent(a: Tensor, b: Tensor) -> Tensor:
    raise AssertionError("noise was drawn")


def moments(solver: Solver[Any], path: GaussianPath, ts: Tensor, mean: float, std: float) -> tuple[float, float]:
    """Errors of mean (in standard deviations) and variance (relative) on data N(mean, std^2), by the solver's table."""
    data, table = Moments(mean, std**2), trace(solver, path, ts)  # type: ignore[arg-type]
    found, exact = table.moments(data, start=table.marginal(data, 0)), table.marginal(data)
    return float((found.mean - exact.mean) / exact.variance**0.5), float(found.variance / exact.variance - 1)


# --- One method under two names ---------------------------------------------------------------------------------------

SAME: dict[str, tuple[Solver[Any], Solver[Any]]] = {
    "Euler-a is DDIM(1)": (EulerAncestral(), DDIM(eta=1.0)),
    "DDIM(1) is DDPM": (DDIM(eta=1.0), Ancestral()),
    "SDE-DPM++(1) is DDPM at eta = 1": (SDEDPMSolverPP1(), Ancestral()),
    "SEEDS-1 is SDE-DPM-1": (SEEDS1(), SDEDPMSolver1()),
    "2M heun is exponential Adams": (SDEDPMSolverPP2M(taylor=True), ExponentialAdamsSDE(2)),
    "SA-Solver without corrector is exponential Adams": (SASolver(3, 0, tau=0.7), ExponentialAdamsSDE(3, eta=0.7)),
    "ER-SDE-1 with f = sh^2 is DDPM": (ERSDE(1, PowerScale(1.0)), Ancestral()),
    "ER-SDE-1 with f = sh^(1 + eta^2) is SDE-DPM++(1)": (ERSDE(1, PowerScale(0.6)), SDEDPMSolverPP1(0.6)),
    "analytic DPM for atoms is DDPM": (AnalyticDPM(GaussianMSE(1e-9)), Ancestral()),
    "ODE: SDE-DPM++(1)": (SDEDPMSolverPP1(0.0), DDIM()),
    "ODE: SDE-DPM(1)": (SDEDPMSolver1(0.0), DDIM()),
    "ODE: SDE-DPM 2M": (SDEDPMSolver2M(eta=0.0), DPMSolver2M()),
    "ODE: SDE-DPM++ 2M": (SDEDPMSolverPP2M(eta=0.0), DPMSolverPP2M()),
    "ODE: Adams": (ExponentialAdamsSDE(4, "eps", 0.0), ExponentialAdams(4, "eps")),
    "ODE: DPM++ SDE": (DPMSolverPPSDE(0.0), DPMSolverPP2S()),
    "ODE: DPM2-a": (DPM2Ancestral(0.0), DPMSolver2S()),
    "ODE: DPM++2S-a": (DPMPP2SAncestral(0.0), DPMSolverPP2S()),
    "ODE: SEEDS-2": (SEEDS2(eta=0.0), DPMSolver2S()),
    "ODE: SEEDS-2 in x0": (SEEDS2(form="x0", eta=0.0), DPMSolverPP2S()),
    "ODE: SEEDS-3": (SEEDS3(eta=0.0), DPMSolver3S()),
    "ODE: SEEDS-3 in x0": (SEEDS3(form="x0", eta=0.0), DPMSolverPP3S()),
    "ODE: SA-Solver": (SASolver(3, 0, tau=0.0), ExponentialAdams(3)),
    "ODE: ER-SDE-1": (ERSDE(1, PowerScale(0.0)), DDIM()),
}


@pytest.mark.parametrize("what", SAME)
def test_one_method_under_two_names(what: str, problems: Problems) -> None:
    one, other = SAME[what]
    for problem in problems.values():
        ts = uneven(problem.path, 7)
        assert torch.allclose(run(one, problem, ts), run(other, problem, ts), rtol=1e-9, atol=1e-9), what


QUIET = [solver for what, pair in SAME.items() if what.startswith("ODE") for solver in pair]
QUIET += [Churn(Heun(), s_churn=0.0), SASolver(tau=0.0), Churn(Heun(), s_min=2.0, s_max=3.0), Restart(Heun(), ())]


@pytest.mark.parametrize("solver", QUIET, ids=repr)
def test_no_noise_is_drawn_where_none_is_used(solver: Solver[Any], problems: Problems) -> None:
    problem = problems["vp"]
    x = prior(problem.path, (2, 2), seed=0, dtype=torch.float64)
    ts = problem.path.time(torch.tensor([-6.0, -3.0, 1.0, 4.0]).double())  # sigma / alpha = 20, 4.5, 0.6, 0.14
    assert integrate(solver, problem, x, ts, noise=silent).x.isfinite().all()


def test_methods_that_know_the_linear_part_do_not_see_the_curve(mixture: MixtureOracle) -> None:
    from tests.solvers.conftest import PATHS

    lam = torch.linspace(-3.9, 3.9, 12, dtype=torch.float64)
    names = ["euler_a", "dpm2_a", "dpmpp_2s_a", "analytic_dpm", "dpmpp_sde", "sa_solver", "er_sde_3", "sra1"]
    names += [name for name in SOLVERS if name.startswith(("sde_dpm", "seeds"))]
    for name in [*names, "edm_churn", "restart", "annealed_langevin"]:
        results = []
        for path in PATHS.values():
            ts = path.time(2 * lam)
            x = path.alpha(ts[0]) * torch.tensor([[30.0, -40.0], [10.0, 5.0]], dtype=torch.float64)
            out = integrate(SOLVERS[name], mixture.problem(path), x, ts, noise=BrownianMotion(x, seed=1)).x
            results.append(out / path.alpha(ts[-1]))
        for result in results[1:]:
            assert torch.allclose(results[0], result, rtol=1e-8, atol=1e-8), name


# --- The papers' formulas, written out in y = x / alpha and sh = sigma / alpha ----------------------------------------


class Ray:
    """What k-diffusion works with: y, sigma, and a denoiser."""

    def __init__(self, problem: DiffusionProblem, ts: Tensor) -> None:
        self.problem, self.path = problem, problem.path
        self.lams = (self.path.logsnr(ts) / 2).tolist()
        x = prior(self.path, (4, 2), seed=0, dtype=torch.float64)
        self.start = x / self.path.alpha(ts[0])
        self.noise = BrownianMotion(x, seed=1)
        self.end = self.path.alpha(ts[-1])

    def x0(self, y: Tensor, lam: float) -> Tensor:
        t = self.path.time(torch.tensor(2 * lam, dtype=torch.float64))
        return self.problem.predict(self.path.alpha(t) * y, t).x0

    def z(self, a: float, b: float) -> Tensor:
        return self.noise(*torch.tensor([a, b], dtype=torch.float64))


def sde_multistep(order: int, ray: Ray, heun: bool = False) -> Tensor:
    y, seen = ray.start, []
    for lam, nxt in pairwise(ray.lams):
        h = nxt - lam
        seen = [(lam, ray.x0(y, lam)), *seen][:3]
        D = seen[0][1]
        out = math.exp(-2 * h) * y - math.expm1(-2 * h) * D
        if order == 2 and len(seen) > 1:
            r = (lam - seen[1][0]) / h
            weight = (math.expm1(-2 * h) / (2 * h) + 1) if heun else -0.5 * math.expm1(-2 * h)
            out = out + weight / r * (D - seen[1][1])
        elif order == 3 and len(seen) > 1:
            r0 = (lam - seen[1][0]) / h
            d = (D - seen[1][1]) / r0
            phi2 = math.expm1(-2 * h) / (2 * h) + 1
            if len(seen) > 2:
                r1 = (seen[1][0] - seen[2][0]) / h
                e = (seen[1][1] - seen[2][1]) / r1
                d, dd = d + (d - e) * r0 / (r0 + r1), (d - e) / (r0 + r1)
                out = out - (phi2 / (2 * h) - 0.5) * dd
            out = out + phi2 * d
        y = out + math.exp(-nxt) * math.sqrt(-math.expm1(-2 * h)) * ray.z(lam, nxt)
    return ray.end * y


def split(lam: float, nxt: float, eta: float) -> tuple[float, float]:
    """get_ancestral_step: (sigma_down, sigma_up)."""
    a, b = math.exp(-lam), math.exp(-nxt)
    up = min(b, eta * math.sqrt(b**2 * (a**2 - b**2) / a**2))
    return math.sqrt(b**2 - up**2), up


def ancestral(kind: str, eta: float, ray: Ray) -> Tensor:
    y = ray.start
    for lam, nxt in pairwise(ray.lams):
        sigma, (down, up) = math.exp(-lam), split(lam, nxt, eta)
        z, D = ray.z(lam, nxt), ray.x0(y, lam)
        middle = (lam - math.log(down)) / 2
        if kind == "euler":
            y = y + (y - D) / sigma * (down - sigma) + up * z
        elif kind == "dpm2":
            half = math.exp(-middle)
            u = y + (y - D) / sigma * (half - sigma)
            y = y + (u - ray.x0(u, middle)) / half * (down - sigma) + up * z
        elif kind == "2s":
            h = -math.log(down) - lam
            u = math.exp(-h / 2) * y - math.expm1(-h / 2) * D
            y = math.exp(-h) * y - math.expm1(-h) * ray.x0(u, middle) + up * z
        else:  # dpm++ sde with r = 1/2
            middle = (lam + nxt) / 2
            low, raised = split(lam, middle, eta)
            u = low / sigma * y + (1 - low / sigma) * D + raised * ray.z(lam, middle)
            y = down / sigma * y + (1 - down / sigma) * ray.x0(u, middle) + up * z
    return ray.end * y


def seeds_2(ray: Ray) -> Tensor:
    y = ray.start
    for lam, nxt in pairwise(ray.lams):
        h, m, sigma, middle, end = nxt - lam, (lam + nxt) / 2, *(math.exp(-v) for v in (lam, (lam + nxt) / 2, nxt))
        z1, z2 = ray.z(lam, m), ray.z(m, nxt)
        eps = (y - ray.x0(y, lam)) / sigma
        u = y - 2 * middle * math.expm1(h / 2) * eps + middle * math.sqrt(math.expm1(h)) * z1
        eps_u = (u - ray.x0(u, m)) / middle
        both = math.sqrt(math.exp(2 * h) - math.exp(h)) * z1 + math.sqrt(math.expm1(h)) * z2
        y = y - 2 * end * math.expm1(h) * eps - 2 * end * math.expm1(h) * (eps_u - eps) + end * both
    return ray.end * y


def er_sde(order: int, ray: Ray, f: Callable[[float], float]) -> Tensor:
    y, seen = ray.start, []
    for lam, nxt in pairwise(ray.lams):
        sigma, end = math.exp(-lam), math.exp(-nxt)
        D = ray.x0(y, lam)
        seen = [(sigma, D, None), *seen]
        r = f(end) / f(sigma)
        out = r * y + (1 - r) * D + math.sqrt(end**2 - sigma**2 * r**2) * ray.z(lam, nxt)
        n = 20000  # Simpson's rule, where the authors take a left sum of 100
        points = [end + i / n * (sigma - end) for i in range(n + 1)]
        w = [(sigma - end) / n / 3 * (1 if i in (0, n) else 4 if i % 2 else 2) for i in range(n + 1)]
        if order > 1 and len(seen) > 1:
            d = (D - seen[1][1]) / (sigma - seen[1][0])
            seen[0] = (sigma, D, d)
            s_int = sum(a / f(p) for a, p in zip(w, points, strict=True))
            out = out + (end - sigma + s_int * f(end)) * d
            if order > 2 and len(seen) > 2:
                dd = 2 * (d - seen[1][2]) / (sigma - seen[2][0])
                s_d_int = sum(a * (p - sigma) / f(p) for a, p in zip(w, points, strict=True))
                out = out + ((end - sigma) ** 2 / 2 + s_d_int * f(end)) * dd
        y = out
    return ray.end * y


def sa_simple(ray: Ray) -> Tensor:
    """SA-Solver with two predictions in predictor and corrector, and the coefficients of the appendix, tau = 1."""
    y, before = ray.start, None
    for lam, nxt in pairwise(ray.lams):
        D = ray.x0(y, lam)
        if before is not None:
            kept, last, D_last = before
            h = lam - last
            y = kept + h * D + (-math.expm1(-2 * h) - h) * D_last  # 0.5 (1 + tau^2) h
        h = nxt - lam
        kept = math.exp(-2 * h) * y + math.exp(-nxt) * math.sqrt(-math.expm1(-2 * h)) * ray.z(lam, nxt)
        if before is None:
            moved = kept - math.expm1(-2 * h) * D
        else:
            b = h**2 / (before[1] - lam)  # 0.5 (1 + tau^2) h^2 / (lam_prev - lam)
            moved = kept + (-math.expm1(-2 * h) - b) * D + b * before[2]
        before = (kept, lam, D)
        y = moved
    return ray.end * y


PAPERS: dict[str, tuple[Solver[Any], Callable[[Ray], Tensor]]] = {
    "2M SDE": (SDEDPMSolverPP2M(), lambda ray: sde_multistep(2, ray)),
    "2M SDE heun": (SDEDPMSolverPP2M(taylor=True), lambda ray: sde_multistep(2, ray, heun=True)),
    "3M SDE": (SDEDPMSolverPP3M(), lambda ray: sde_multistep(3, ray)),
    "Euler-a": (EulerAncestral(0.8), lambda ray: ancestral("euler", 0.8, ray)),
    "DPM2-a": (DPM2Ancestral(0.8), lambda ray: ancestral("dpm2", 0.8, ray)),
    "DPM2-a, eta = 1": (DPM2Ancestral(), lambda ray: ancestral("dpm2", 1.0, ray)),
    "DPM++ 2S a": (DPMPP2SAncestral(0.8), lambda ray: ancestral("2s", 0.8, ray)),
    "DPM++ 2S a, eta = 1": (DPMPP2SAncestral(), lambda ray: ancestral("2s", 1.0, ray)),
    "DPM++ SDE": (DPMSolverPPSDE(), lambda ray: ancestral("sde", 1.0, ray)),
    "DPM++ SDE, eta = 0.7": (DPMSolverPPSDE(0.7), lambda ray: ancestral("sde", 0.7, ray)),
    "SEEDS-2": (SEEDS2(), seeds_2),
    "ER-SDE-2": (ERSDE(2), lambda ray: er_sde(2, ray, lambda v: v * (math.exp(v**0.3) + 10))),
    "ER-SDE-3": (ERSDE(3), lambda ray: er_sde(3, ray, lambda v: v * (math.exp(v**0.3) + 10))),
    "SA-Solver, simple": (SASolver(2, 2, simple=True), sa_simple),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_formulas_are_the_papers(name: str, problems: Problems) -> None:
    solver, formula = PAPERS[name]
    for problem in problems.values():
        ts = uneven(problem.path, 7)
        assert torch.allclose(run(solver, problem, ts), formula(Ray(problem, ts)), rtol=1e-9, atol=1e-9)


def test_the_reverse_diffusion_of_a_vp_chain(problems: Problems) -> None:
    """(2 - sqrt(1 - beta)) x + beta score + sqrt(beta) z."""
    problem = problems["vp"]
    path, ts = problem.path, uneven(problem.path, 7)
    x = prior(path, (4, 2), seed=0, dtype=torch.float64)
    noise, y = BrownianMotion(x, seed=1), x
    for t, s in pairwise(ts.unbind()):
        beta = 1 - (path.alpha(t) / path.alpha(s)) ** 2
        z = noise(path.logsnr(t) / 2, path.logsnr(s) / 2)
        y = (2 - (1 - beta).sqrt()) * y + beta * problem.score(y, t) + beta.sqrt() * z
    assert torch.allclose(run(ReverseDiffusion(), problem, ts), y, rtol=1e-11)


# --- Variances --------------------------------------------------------------------------------------------------------


def test_analytic_dpm_is_exact_on_gaussians_whatever_the_step(path: GaussianPath) -> None:
    for n in (1, 3):
        for eta in (0.0, 0.6, 1.0):
            mean, variance = moments(AnalyticDPM(GaussianMSE(0.5), eta), path, logsnr(path, n), 0.3, 0.5)
            assert abs(mean) < 1e-12
            assert abs(variance) < 1e-12
    assert abs(moments(Ancestral(), path, logsnr(path, 3), 0.3, 0.5)[1]) > 0.3


def test_a_measured_error_is_the_error(path: GaussianPath, vp: GaussianPath) -> None:
    data = 0.3 + 0.5 * prior(vp, (4000, 2), seed=5, dtype=torch.float64) / float(vp.sigma(torch.tensor(1.0).double()))
    measured = MeasuredMSE.of(gaussian(path), data, levels=20)
    exact = GaussianMSE(0.5)
    for level in torch.linspace(-7.5, 7.5, 13).double():
        assert float(measured(level)) == pytest.approx(float(exact(level)), rel=0.06)
    assert float(measured(torch.tensor(99.0).double())) == pytest.approx(measured.mse[-1])
    assert abs(moments(AnalyticDPM(measured), path, logsnr(path, 5), 0.3, 0.5)[1]) < 0.05
    with pytest.raises(ValueError, match="rising levels"):
        MeasuredMSE((1.0, 0.0), (1.0, 1.0))


def test_a_learned_variance_is_between_the_two(problems: Problems) -> None:
    for problem in problems.values():
        ts = uneven(problem.path, 7)
        low, high, mid = (run(Ancestral(v), problem, ts[:2]) for v in (0.0, 1.0, 0.5))
        half = torch.tensor([0.0, 1.0]).double()
        mixed = run(LearnedVariance(lambda x, t, half=half: half.expand_as(x)), problem, ts[:2])
        assert torch.allclose(mixed, torch.stack([low[:, 0], high[:, 1]], 1), rtol=1e-9)
        even = run(LearnedVariance(lambda x, t: torch.full((), 0.5)), problem, ts[:2])
        assert torch.allclose(even, mid, rtol=1e-9)
    assert not LearnedVariance(lambda x, t: x).linear


# --- Orders that the certificates do not ask for ----------------------------------------------------------------------


def test_sra1_has_strong_order_one_and_a_half(problems: Problems) -> None:
    """On a nonlinear problem, with Heun's method, of strong order 1, beside it."""
    problem = problems["vp"]
    x = starts(problem, 64)
    coarse = {"steps": (10, 20, 40)}
    sra1 = strong_order(OnPath(SRA1(), VP_LAM), problem, x, logsnr, **coarse)
    heun = strong_order(OnPath(StochasticHeun(), VP_LAM), problem, x, logsnr, **coarse)
    assert heun.slope < 1.5 < 1.7 < sra1.slope
    assert sra1.errors[-1] < 0.3 * heun.errors[-1]


def test_weak_order_of_a_noisy_ode_solver_is_the_solvers(vp: GaussianPath) -> None:
    """No stochastic integral is approximated: order 4 with RK4, in mean and variance."""
    for solver in (Churn(OnPath(RK4(), VP_LAM), s_churn=4.0), Restart(OnPath(RK4(), VP_LAM))):
        assert solver.order == 4
        for measured in weak_order(solver, vp, logsnr):
            assert measured.slope > 3.7
    restart = strong_order(Restart(OnPath(RK4(), VP_LAM)), gaussian(vp), starts(gaussian(vp), 1, (16,)), logsnr)
    assert restart.slope > 3.7


@pytest.mark.parametrize(
    "solver", [DPMSolverPP2M(), SASolver(2, 2, tau=0.0), UniC(DDIM(), 1), SOLVERS["lms_4"]], ids=repr
)
def test_churn_costs_a_multistep_method_its_order(solver: Solver[Any], vp: GaussianPath) -> None:
    """Its differences are of predictions between which noise was added. Restarts begin its memory anew."""
    churn = Churn(solver, s_churn=2.0)
    assert churn.order == 1
    assert Churn(solver, s_churn=0.0).order == Restart(solver).order == solver.order
    mean, variance = weak_order(churn, vp, logsnr, steps=(160, 320, 640))
    assert mean.attains(1)
    assert variance.attains(1)
    assert variance.slope < 1.2


def test_inflated_noise_leaves_a_bias(vp: GaussianPath) -> None:
    loud, plain = (Churn(OnPath(Heun(), EDM), s_noise=s) for s in (1.007, 1.0))
    errors = [[abs(moments(solver, vp, logsnr(vp, n), 0.3, 0.5)[1]) for n in (80, 160)] for solver in (loud, plain)]
    assert errors[0][1] > 0.01
    assert errors[0][1] > 0.7 * errors[0][0]
    assert errors[1][1] < 0.3 * errors[1][0]
    assert (loud.order, plain.order) == (0, 2)


def test_the_third_order_of_er_sde_is_the_corrected_ones(problems: Problems, answers: dict[str, Tensor]) -> None:
    for name, problem in problems.items():
        x = starts(problem)
        for grid in (uniform, uneven):
            slopes = [
                measured_order(ERSDE(3, PowerScale(0.0), fixed), problem, x, grid, answer=answers[name]).slope
                for fixed in (False, True)
            ]
            assert slopes == pytest.approx([2, 3], abs=0.25)


def test_sa_solver_without_noise_is_of_high_order(problems: Problems, answers: dict[str, Tensor]) -> None:
    problem = problems["vp"]
    for p, c, order in ((3, 0, 3), (2, 3, 3), (3, 4, 4)):
        solver = SASolver(p, c, tau=0.0)
        assert solver.order == order
        assert not solver.stochastic
        assert measured_order(solver, problem, starts(problem), uniform, answer=answers["vp"]).slope > order - 0.2
    assert SASolver(3, 4).order == 2
    assert SASolver(3, 4, tau=Window(1.0, 0.05, 1.0)).stochastic


def test_a_window_of_noise_is_asked_at_the_start_of_each_step(vp: GaussianPath) -> None:
    ts = vp.time(-2 * torch.tensor([4.0, 2.0, 0.8, 0.3, 0.1], dtype=torch.float64).log())
    table = trace(SASolver(tau=Window(0.7, low=0.2, high=1.0)), vp, ts)
    assert np.exp(-table.intervals).tolist() == [pytest.approx([0.8, 0.3]), pytest.approx([0.3, 0.1])]


LOCAL = [
    (ERSDE(2, PowerScale(0.0)), 2),
    (ERSDE(3, PowerScale(0.0)), 2),
    (ERSDE(3, PowerScale(0.0), corrected=True), 3),
    (SASolver(3, 0, tau=0.0), 3),
]


@pytest.mark.parametrize(("solver", "order"), LOCAL, ids=repr)
def test_local_truncation_with_exact_history(solver: Solver[Any], order: int, vp: GaussianPath) -> None:
    """From exact predictions on the curve of the solution, one step is wrong by h^(p + 1)."""
    problem, std, mean = gaussian(vp, 0.3, 0.5), 0.5, 0.3

    def on_the_curve(t: Tensor) -> Tensor:
        return (vp.alpha(t) * mean + ((vp.alpha(t) * std) ** 2 + vp.sigma(t) ** 2).sqrt()).reshape(1, 1)

    def error(h: float) -> float:
        lams = 0.7 + h * torch.tensor([-2.3, -0.8, 0.0, 1.0], dtype=torch.float64)  # unequal steps
        ts = vp.time(2 * lams)
        state = solver.init(problem, on_the_curve(ts[2]), ts[2:])
        for t in ts[:2].unbind():
            state = solver.observe(state, vp.logsnr(t) / 2, problem.predict(on_the_curve(t), t))
        x, _ = solver.step(problem, on_the_curve(ts[2]), ts[2], ts[3], state, silent)
        return float((x - on_the_curve(ts[3])).abs())

    slope = math.log2(error(0.02) / error(0.01))
    assert slope == pytest.approx(order + 1, abs=0.15)


# --- What the docstrings say of coarse steps --------------------------------------------------------------------------

COARSE: list[Solver[Any]] = [
    DPM2Ancestral(), DPMPP2SAncestral(), ReverseDiffusion(), EulerMaruyama(), StochasticHeun(),
    SDEDPMSolver1(), SDEDPMSolverPP1(), SDEDPMSolver2M(), SDEDPMSolverPP2M(), SDEDPMSolverPP3M(),
    ExponentialAdamsSDE(), DPMSolverPPSDE(), SEEDS1(), SEEDS2(), SEEDS3(), SASolver(), Churn(OnPath(Heun(), EDM)),
]  # fmt: skip


@pytest.mark.parametrize("solver", COARSE, ids=lambda solver: type(solver).__name__)
def test_the_variance_after_20_steps_is_what_the_docstring_says(solver: Solver[Any], vp: GaussianPath) -> None:
    said = re.search(r"Variance after\s+20\s+steps:\s+([+-][\d.]+) %", type(solver).__doc__ or "")
    assert said
    digits = len(said[1].partition(".")[2])
    found = 100 * moments(solver, vp, logsnr(vp, 20), 0.3, 0.5)[1]
    assert abs(found - float(said[1])) <= 0.5001 * 10**-digits


# --- Churn and restarts -----------------------------------------------------------------------------------------------


def test_churn_is_the_algorithm_of_the_paper(problems: Problems) -> None:
    """EDM's algorithm 2, line by line; here every raised level lies inside the range but for the first."""
    problem = problems["ve"]
    path, ts = problem.path, logsnr(problem.path, 6)
    x = prior(path, (4, 2), seed=0, dtype=torch.float64)
    noise, y = BrownianMotion(x, seed=1), x
    sigmas = path.sigma(ts)

    def slope(y: Tensor, sigma: Tensor) -> Tensor:
        return (y - problem.predict(y, path.time(-2 * sigma.log())).x0) / sigma

    for i, (sigma, following) in enumerate(pairwise(sigmas.unbind())):
        gamma = min(2.0 / 6, 2**0.5 - 1) if 0.1 <= sigma <= 30 and i > 0 else 0.0
        raised = (1 + gamma) * sigma
        z = noise(-sigma.log(), -following.log())
        y = y + (raised**2 - sigma**2).sqrt() * 1.003 * z
        d = slope(y, raised)
        euler = y + (following - raised) * d
        y = y + (following - raised) * (d + slope(euler, following)) / 2
    churn = Churn(OnPath(Heun(), EDM), s_churn=2.0, s_min=0.1, s_max=30.0, s_noise=1.003)
    assert torch.allclose(run(churn, problem, ts), y, rtol=1e-10, atol=1e-10)


def test_restart_is_the_algorithm_of_the_paper(problems: Problems) -> None:
    problem = problems["ve"]
    path = problem.path
    ts = path.time(-2 * torch.tensor([20.0, 5.0, 1.0, 0.2, 0.05], dtype=torch.float64).log())
    x = prior(path, (4, 2), seed=0, dtype=torch.float64)
    noise = BrownianMotion(x, seed=1)
    down = path.time(-2 * torch.tensor([0.8, 0.2], dtype=torch.float64).log())
    y = integrate(DDIM(), problem, x, ts[:4]).x
    for k in (1, 2):
        z = elsewhere(noise, k)(path.logsnr(down[1]) / 2, path.logsnr(down[0]) / 2)
        y = integrate(DDIM(), problem, y + math.sqrt(0.8**2 - 0.2**2) * z, down).x
    y = integrate(DDIM(), problem, y, ts[3:]).x
    # 0.2 is a node of the grid: no step is cut in two.
    interval = RestartInterval(0.2, 0.8, repeats=2, share=0.25)
    done = integrate(Restart(DDIM(), (interval,)), problem, x, ts, noise=BrownianMotion(x, seed=1))
    assert torch.allclose(done.x, y, rtol=1e-9, atol=1e-9)
    assert done.nfe == 4 + 2
    assert Restart(DDIM(), (RestartInterval(0.3, 0.8, 2, 0.5),)).nfe(4) == 5 + 2 * 2


def test_restarts_need_their_interval_on_the_way_down(problems: Problems) -> None:
    problem = problems["vp"]
    x = prior(problem.path, (2, 2), seed=0, dtype=torch.float64)
    for ts in (logsnr(problem.path, 4).flip(0), logsnr(problem.path, 8)[:3]):
        with pytest.raises(ValueError, match="does not lie on the way down"):
            integrate(Restart(Heun()), problem, x, ts, noise=BrownianMotion(x, 0))


def test_restarts_forget_errors(vp: GaussianPath) -> None:
    """A predictor is exact, a start is not: what is wrong with it gets smaller by the same factor at every restart."""
    data, wrong = Moments(0.3, 0.25), Moments(3.0, 2000.0)  # type: ignore[arg-type]
    errors = []
    for repeats in (1, 2, 3):
        solver = Restart(OnPath(RK4(), VP_LAM), (RestartInterval(0.3, 3.0, repeats, 0.5),))
        table = trace(solver, vp, logsnr(vp, 40))
        errors.append(float(table.moments(data, start=wrong).mean - table.marginal(data).mean))
    contraction = math.sqrt((0.25 + 0.3**2) / (0.25 + 3.0**2))
    assert errors[1] / errors[0] == pytest.approx(contraction, rel=0.01)
    assert errors[2] / errors[1] == pytest.approx(contraction, rel=0.01)


# --- Langevin dynamics ------------------------------------------------------------------------------------------------


def test_annealed_langevin_settles_where_it_says(path: GaussianPath) -> None:
    """With enough steps, u / (1 - delta / 2u) with u = alpha^2 v + sigma^2, exactly."""
    t = path.time(torch.tensor([2.0, 1.5, 1.0]).double()).flip(0)
    data, size = Moments(0.3, 0.04), 0.3  # type: ignore[arg-type]
    table = trace(AnnealedLangevin(size=size, steps=60), path, t)
    found = table.moments(data, start=Moments(5.0, 7.0))  # type: ignore[arg-type]
    exact = table.marginal(data)
    delta = size * float(path.sigma(t[-1])) ** 2
    assert float(found.mean) == pytest.approx(float(exact.mean), rel=1e-6)
    widened = 1 / (1 - delta / (2 * float(exact.variance)))
    assert float(found.variance / exact.variance) == pytest.approx(widened, rel=1e-6)


def test_a_corrector_tuned_to_the_sample_settles_where_it_should(vp: GaussianPath) -> None:
    """On a Gaussian with many coordinates |z| / |score| is the standard deviation s of the law, so that delta is

    2 snr^2 s^2, in the mean, and the chain settles at s^2 / (1 - delta / (2 u)), which solves for s.
    """
    snr, t = 0.3, vp.time(torch.tensor(0.5).double())
    u = float((vp.alpha(t) * 0.5) ** 2 + vp.sigma(t) ** 2)
    problem, corrector = gaussian(vp, 0.3, 0.5), SNRLangevin(snr)
    x = torch.zeros(32, 400, dtype=torch.float64)
    noise = torch.Generator().manual_seed(0)
    for _ in range(120):
        x = corrector.correct(problem, x, t, t, torch.randn(x.shape, generator=noise, dtype=torch.float64))
    variance = u  # score = -(x - m) / u: |z| / |score| = u / s
    for _ in range(50):
        delta = 2 * snr**2 * u**2 / variance
        variance = u / (1 - delta / (2 * u))
    assert float(x.mean()) == pytest.approx(0.3 * float(vp.alpha(t)), abs=0.02)
    assert float(x.var()) == pytest.approx(variance, rel=0.04)
    assert abs(variance / u - 1) > 0.05


def test_a_corrector_tuned_to_the_sample_is_the_papers(path: GaussianPath) -> None:
    """delta = 2 alpha_i (r |z| / |score|)^2, alpha_i = 1 - beta_i of the step that led here, forth and back."""
    problem, ts = gaussian(path), path.time(torch.tensor([0.5, 1.5]).double())
    x, z = (prior(path, (3, 5), seed=seed, dtype=torch.float64) for seed in (0, 1))
    t, s = ts.unbind()
    score, share = problem.score(x, s), (path.alpha(t) / path.alpha(s)) ** 2
    delta = 2 * share * (0.2 * z.norm(dim=1, keepdim=True) / score.norm(dim=1, keepdim=True)) ** 2
    found = SNRLangevin(0.2).correct(problem, x, t, s, z)
    assert torch.allclose(found, x + delta * score + (2 * delta).sqrt() * z, rtol=1e-12)
    score = problem.score(x, t)
    delta = 2 * share * (0.2 * z.norm(dim=1, keepdim=True) / score.norm(dim=1, keepdim=True)) ** 2
    back = SNRLangevin(0.2).correct(problem, x, s, t, z)
    assert torch.allclose(back, x + delta * score + (2 * delta).sqrt() * z, rtol=1e-12)


def test_norms_are_those_of_each_sample(problems: Problems) -> None:
    problem = problems["vp"]
    ts = logsnr(problem.path, 5)
    solver = PredictorCorrector(ReverseDiffusion(), SNRLangevin(), steps=2)
    x = prior(problem.path, (6, 2), seed=0, dtype=torch.float64)
    whole = integrate(solver, gaussian(problem.path), x, ts, noise=BrownianMotion(x, 1)).x
    alone = integrate(solver, gaussian(problem.path), x[4:5], ts, noise=BrownianMotion(x[4:5], 1, samples=[4])).x
    assert torch.equal(whole[4:5], alone)
    assert integrate(solver, problem, x, ts, noise=BrownianMotion(x, 1)).nfe == solver.nfe(5) == 15


def test_what_looks_at_the_sample_says_so_and_has_no_table(vp: GaussianPath) -> None:
    nonlinear = [name for name, solver in SOLVERS.items() if solver.nfe_per_step and not solver.linear]
    assert nonlinear == ["pc_langevin"]  # of those with fixed steps
    assert SOLVERS["pc_langevin"].order == SOLVERS["annealed_langevin"].order == 0
    with pytest.raises(ValueError, match="linear"):
        trace("pc_langevin", vp, logsnr(vp, 3))


def test_ode_and_langevin_steps_split_the_reverse_sde(vp: GaussianPath) -> None:
    """The limit is the SDE with eta^2 = rate, on other noises: right in law, with an error that falls with the step."""
    solver = PredictorCorrector(DDIM(), Langevin(rate=1.0))
    errors = [moments(solver, vp, logsnr(vp, n), 0.3, 0.5)[1] for n in (40, 80, 160)]
    assert errors[0] > 1.8 * errors[1] > 3.2 * errors[2] > 0


def test_corrections_draw_noises_of_their_own(vp: GaussianPath) -> None:
    table = trace(PredictorCorrector(Ancestral(), Langevin(0.5), steps=3), vp, logsnr(vp, 4))
    assert table.draws == 4 * 4
    assert torch.equal(torch.as_tensor(table.noise_covariance), torch.eye(16).double())


@pytest.mark.parametrize(
    "predictor",
    [SASolver(), SASolver(2, 2, tau=0.0), UniC(DDIM(), 1), OnPath(UniC(DDIM(), 1), VP_LAM), UniPC(2), DPMSolverPP2M()],
    ids=repr,
)
def test_what_a_corrector_did_is_kept_by_methods_that_correct_themselves(
    predictor: Solver[Any], vp: GaussianPath
) -> None:
    """They take the step before once more, from where it began: what happened to the state since is theirs to add."""
    solver = PredictorCorrector(predictor, Langevin(rate=0.5))
    table = trace(solver, vp, logsnr(vp, 6))
    corrections = table.result()[1 + table.nfe :][np.abs(table.intervals[:, 0]) > 32]
    assert len(corrections) == 6
    assert bool((np.abs(corrections) > 1e-9).all())
    for measured in weak_order(solver, vp, logsnr, steps=(40, 80, 160)):
        assert measured.attains(1), measured


@pytest.mark.parametrize(
    "predictor",
    [Restart(DDIM()), PredictorCorrector(Ancestral(), Langevin(0.5), steps=2), AnnealedLangevin(steps=3),
     OnPath(PredictorCorrector(Ancestral(), Langevin(0.5)), VP_LAM)],
    ids=repr,
)  # fmt: skip
def test_correctors_share_no_noise_with_what_draws_some_elsewhere_too(predictor: Solver[Any], vp: GaussianPath) -> None:
    table = trace(PredictorCorrector(predictor, Langevin(0.5), steps=2), vp, logsnr(vp, 4))
    apart = table.noise_covariance - np.eye(table.draws)
    assert np.abs(apart).max() < 1e-12


def test_a_corrector_of_samples_that_are_numbers(vp: GaussianPath) -> None:
    solver, x = PredictorCorrector(ReverseDiffusion(), SNRLangevin()), prior(vp, (3, 1), seed=0, dtype=torch.float64)
    noise, ts = BrownianMotion(x, 1), logsnr(vp, 4)
    column = integrate(solver, gaussian(vp), x, ts, noise=noise).x
    numbers = integrate(solver, gaussian(vp), x[:, 0], ts, noise=lambda a, b: noise(a, b)[:, 0]).x
    assert torch.equal(numbers, column[:, 0])


# --- Encoding, settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sde_dpm_2m", "sde_dpmpp_2m", "sde_adams_3", "sa_solver", "er_sde_2", "seeds_3",
                                  "dpm2_a", "dpmpp_sde", "sra1", "reverse_diffusion"])  # fmt: skip
def test_encoding_ends_in_the_right_law(name: str, vp: GaussianPath) -> None:
    """From data to noise the same methods solve the forward equation, or one with the same marginals."""
    mean, variance = moments(SOLVERS[name], vp, logsnr(vp, 80).flip(0), 0.3, 0.5)
    assert abs(mean) < 0.02
    assert abs(variance) < 0.03


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Ancestral(1.5), "variance is in"),
        (lambda: DPM2Ancestral(1.1), "eta is in"),
        (lambda: StochasticHeun(0.0), "eta is positive"),
        (lambda: SRA1(parts=1), "at least 2 parts"),
        (lambda: SDEDPMSolverPP2M(eta=-1.0), "eta is at least 0"),
        (lambda: ExponentialAdamsSDE(9), "1 to 8"),
        (lambda: ExponentialAdamsSDE(2, "v"), "form is one of"),
        (lambda: DPMSolverPPSDE(r=1.0), "inside the step"),
        (lambda: SEEDS3(c2=0.7), "0 < c2 < c3 < 1"),
        (lambda: SASolver(0), "1 to 8 predictions"),
        (lambda: ERSDE(4), "1 to 3"),
        (lambda: Churn(Ancestral()), "for ODE solvers"),
        (lambda: Churn(Heun(), s_churn=-1.0), "s_churn >= 0"),
        (lambda: Restart(DDIM(0.5)), "for ODE solvers"),
        (lambda: RestartInterval(0.3, 0.1), "low < high"),
        (lambda: Langevin(0.0), "rate of a corrector"),
        (lambda: SNRLangevin(0.0), "signal-to-noise"),
        (lambda: PredictorCorrector(DDIM(), steps=0), "1 to 63"),
        (lambda: AnnealedLangevin(size=1.0), "size < 1"),
    ],
)
def test_bad_settings_are_refused_in_one_line(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_scale_that_falls_is_refused(problems: Problems) -> None:
    class Falling(Scale5):
        def __call__(self, level: Tensor) -> Tensor:
            return level**0.5

    with pytest.raises(ValueError, match="f / sh must not fall"):
        run(ERSDE(1, Falling()), problems["vp"], logsnr(problems["vp"].path, 3))
