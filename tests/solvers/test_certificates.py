"""Every entry of SOLVERS holds what it declares, and what is broken on purpose does not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from solvers import (
    DDIM,
    RK4,
    SOLVERS,
    Ancestral,
    BrownianMotion,
    DiffusionProblem,
    DormandPrince,
    EulerMaruyama,
    Heun,
    Noise,
    Path,
    Solver,
    Tableau,
    TorchSDE,
    integrate,
    mix,
    table,
)
from solvers.certify import (
    CERTIFIED_GRIDS,
    Certificate,
    Check,
    Measured,
    certify,
    contract,
    gaussian,
    measured_order,
    starts,
    strong_order,
    uneven,
    weak_order,
)
from solvers.grids import logsnr, uniform
from solvers.runge_kutta import RungeKutta

Problems = dict[str, DiffusionProblem]


# Where the usual steps are coarse: the first step or the ends of the path weigh much, or terms of several orders meet.
_FINE, _FINEST = (20, 40, 80, 160, 320), (40, 80, 160, 320, 640)
FINER: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("dpmpp_2s_a", "sde_heun", "sde_dpm_2m", "sde_dpmpp_2m", "seeds_2"), _FINE),
    **dict.fromkeys(("sa_solver", "er_sde_2", "er_sde_3"), _FINE),
    **dict.fromkeys(("sde_dpmpp_3m", "seeds_3", "lms_4"), _FINEST),
}

# In rho = sigma / alpha a step of a grid that is uniform in flow time is half of the way: no order shows in 640 steps.
SMOOTH_IN_RHO = ("logsnr", "karras", "uneven")
IN_RHO: dict[str, tuple[str, ...]] = dict.fromkeys(("lms_4", "ipndm_v_corrected"), SMOOTH_IN_RHO)
# On that grid a transient of order 5 and the error of order 2 have opposite signs and meet at N = 200.
IN_RHO["sde_adams_3"] = ("logsnr", "uneven")


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_holds_what_it_declares(name: str, problems: Problems, answers: dict[str, Tensor]) -> None:
    solver = SOLVERS[name]
    steps, grids = FINER.get(name, (20, 40, 80, 160)), IN_RHO.get(name, ("uniform", "uneven"))
    certificate = certify(solver, problems, answers=answers, steps=steps, grids=grids)
    assert certificate.passed, f"\n{certificate}"


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_says_who_it_is(name: str) -> None:
    solver = SOLVERS[name]
    assert solver.reference
    assert type(solver).__doc__
    with pytest.raises(AttributeError):
        solver.nothing = 1  # frozen
    assert (
        eval(repr(solver), vars(__import__("solvers")) | vars(__import__("solvers.curves", fromlist=["x"]))) == solver
    )


def test_the_table_has_a_line_for_every_solver() -> None:
    rows = {row.name: row for row in table()}
    assert list(rows) == list(SOLVERS)
    assert rows["heun"][1:4] == ("2", "2", "none")
    assert rows["euler_maruyama"].noise == "white"
    assert rows["dopri5"].order == "adaptive"


# --- What is wrong is found -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrookedHeun(RungeKutta):
    """One coefficient off by one per cent."""

    tableau = Tableau(a=((1.0,),), b=(0.5 * 1.01, 0.5))
    order = 2
    reference = "nobody"


@dataclass(frozen=True)
class CrookedRK4(RungeKutta):
    """Right weights, one stage in the wrong place: consistent, of too low an order."""

    tableau = Tableau(a=((1 / 2,), (0.0, 1 / 2 * 1.01), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6))
    order = 4
    reference = "nobody"


@dataclass(frozen=True)
class Loud(Solver[None]):
    """DDPM with one per cent too much noise."""

    order = 1
    nfe_per_step = 1
    stochastic = True

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        return Ancestral().step(problem, x, t, s, state, lambda a, b: 1.01 * noise(a, b))


@dataclass(frozen=True)
class Biased(Solver[None]):
    """Euler-Maruyama with the drift of the probability-flow ODE: the noise is not paid for."""

    order = 1
    nfe_per_step = 1
    stochastic = True

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        z = noise(problem.path.logsnr(t) / 2, problem.path.logsnr(s) / 2)
        g = problem.path.g2(t).sqrt()
        return mix((1.0, x), (s - t, problem.velocity(x, t)), (g * (t - s).abs().sqrt(), z)), state


@dataclass(frozen=True)
class EqualSteps2M(Solver[Tensor | None]):
    """DPM-Solver++(2M) that takes every step for as long as the last one: right on uniform grids only."""

    order = 2
    nfe_per_step = 1

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: Tensor | None, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        path = problem.path
        h = (path.logsnr(s) - path.logsnr(t)) / 2
        x0 = problem.predict(x, t).x0
        extrapolated = x0 if state is None else 1.5 * x0 - 0.5 * state
        return mix((path.sigma(s) / path.sigma(t), x), (-path.alpha(s) * torch.expm1(-h), extrapolated)), x0


@dataclass(frozen=True)
class BatchNoise(Solver[None]):
    """Draws from the global random state, so that a sample depends on its batch and a seed on nothing."""

    order = 1
    nfe_per_step = 1
    stochastic = True

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        return Ancestral().step(problem, x, t, s, state, lambda a, b: torch.randn_like(x))


@dataclass(frozen=True)
class Spendthrift(Solver[None]):
    """Two calls, one declared; a float64 result whatever it was given; and a look beyond the end."""

    order = 1
    nfe_per_step = 1

    def step(
        self, problem: DiffusionProblem, x: Tensor, t: Tensor, s: Tensor, state: None, noise: Noise
    ) -> tuple[Tensor, None]:
        problem.predict(x, s - 1e-3)
        return DDIM().step(problem, x, t, s, state, noise)[0].double(), state


def failures(certificate: Certificate) -> str:
    return " | ".join(check.what for check in certificate.checks if not check.passed)


@pytest.mark.parametrize("solver", [CrookedHeun(), CrookedRK4()], ids=repr)
def test_a_coefficient_off_by_a_hundredth_fails(solver: Solver, problems: Problems, answers: dict[str, Tensor]) -> None:
    failed = failures(certify(solver, problems, answers=answers))
    assert all(f"order {solver.order}, {name}, uniform grid" in failed for name in problems), failed


@pytest.mark.parametrize("solver", [Loud(), Biased()], ids=repr)
def test_a_wrong_amount_of_noise_fails(solver: Solver, problems: Problems) -> None:
    failed = failures(certify(solver, problems))
    assert all(f"weak order 1 of the variance, {name}, uniform grid" in failed for name in problems), failed


def test_a_method_for_equal_steps_fails_on_uneven_grids_only(problems: Problems, answers: dict[str, Tensor]) -> None:
    failed = failures(certify(EqualSteps2M(), {"vp": problems["vp"]}, answers=answers))
    assert "order 2, vp, uneven grid" in failed
    assert "order 2, vp, uniform grid" not in failed


def test_an_order_declared_too_low_fails(problems: Problems, answers: dict[str, Tensor]) -> None:
    class Modest(RK4):
        order = 3

    assert failures(certify(Modest(), problems, answers=answers)) == "the order is not declared too low"


def test_global_noise_fails(vp) -> None:
    failed = " | ".join(check.what for check in contract(BatchNoise(), vp) if not check.passed)
    for what in ("same seed", "batch", "global random state"):
        assert what in failed, failed


def test_wrong_counts_dtypes_and_times_fail(vp) -> None:
    failed = " | ".join(check.what for check in contract(Spendthrift(), vp) if not check.passed)
    for what in ("counted calls", "dtype", "outside"):
        assert what in failed, failed


def test_a_certificate_prints_its_lines() -> None:
    good, bad = Check("shape", True, "(2, 2)"), Check("order 2", False, "slope 1.00")
    assert Certificate(Heun(), (good,)).passed
    text = str(Certificate(Heun(), (good, bad)))
    assert "DOES NOT HOLD" in text
    assert "FAIL  order 2" in text
    assert "pass  shape" in text


# --- The measurements themselves --------------------------------------------------------------------------------------


def test_slopes_are_those_of_a_power_and_leave_rounding_out() -> None:
    assert Measured((10, 20, 40), (1.0, 0.25, 0.0625)).slopes == pytest.approx((2, 2))
    assert Measured((10, 20, 40), (1.0, 0.125, 1e-15)).slope == pytest.approx(3)
    assert Measured((10, 20), (1e-15, 1e-16)).slope == math.inf


def test_the_exact_gaussian_denoiser_is_the_posterior_mean(path) -> None:
    problem, t = gaussian(path, mean=0.3, std=0.5), torch.tensor(0.4, dtype=torch.float64)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    alpha, sigma = path.alpha(t), path.sigma(t)
    x0, eps = problem.predict(x, t)
    assert torch.allclose(alpha * x0 + sigma * eps, x, atol=1e-14)
    # by quadrature of p(x0) p(x | x0)
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    weight = torch.exp(-0.5 * ((grid - 0.3) / 0.5) ** 2 - 0.5 * ((x - alpha * grid) / sigma) ** 2)
    assert torch.allclose(x0, (weight * grid).sum(1, keepdim=True) / weight.sum(1, keepdim=True), atol=1e-9)


def test_moments_of_one_ancestral_step_in_closed_form(vp) -> None:
    """One step from t_max to t_min: x = alpha x0(x_T) + sigma sqrt(1-tau) eps(x_T) + sigma sqrt(tau) z, by hand."""
    ends = torch.tensor([vp.t_max, vp.t_min], dtype=torch.float64)
    alpha, sigma, lam = vp.alpha(ends), vp.sigma(ends), vp.logsnr(ends) / 2
    tau = 1 - torch.exp(-2 * (lam[1] - lam[0]))
    errors = []
    for std in (0.2, 0.5, 0.8):
        before, after = (alpha * std) ** 2 + sigma**2
        gain = (alpha[1] * alpha[0] * std**2 + sigma[1] * (1 - tau).sqrt() * sigma[0]) / before
        errors.append(float((gain**2 * before + sigma[1] ** 2 * tau) / after - 1))
    mean, variance = weak_order(Ancestral(), vp, uniform, steps=(1,))
    assert variance.errors[0] == pytest.approx((sum(e**2 for e in errors) / 3) ** 0.5, rel=1e-12)
    assert mean.errors[0] < 1e-14


def test_uneven_steps_stay_uneven(path) -> None:
    for n in (20, 160):
        steps = path.logsnr(uneven(path, n)).diff()
        ratios = steps[1:] / steps[:-1]
        assert steps.min() > 0
        assert ratios.max() > 2
        assert ratios.min() < 0.5
        assert ratios.max() < 4.1


def test_the_reference_agrees_with_another_method(problems: Problems, answers: dict[str, Tensor]) -> None:
    for name, problem in problems.items():
        other = integrate(DormandPrince(), problem, starts(problem), logsnr(problem.path, 400))
        assert torch.allclose(answers[name], other.x, atol=1e-10)


def test_deterministic_methods_do_not_see_the_curve(mixture, paths) -> None:
    """DDIM, DPM-Solver++ and ancestral sampling are the same numbers on VP, VE and flow, given one grid in logsnr."""
    start = starts(mixture.problem(paths["vp"]))
    lam = torch.linspace(-3.9, 3.9, 12, dtype=torch.float64)
    for name in ("ddim", "ddim_0.5", "ancestral", "dpmpp_2m"):
        results = []
        for path in paths.values():
            ts = path.time(2 * lam)
            x = path.alpha(ts[0]) / paths["vp"].alpha(paths["vp"].time(2 * lam[0])) * start
            noise = BrownianMotion(x, seed=1)
            out = integrate(SOLVERS[name], mixture.problem(path), x, ts, noise=noise).x
            results.append(out / path.alpha(ts[-1]))
        assert torch.allclose(results[0], results[1], atol=1e-12), name
        assert torch.allclose(results[0], results[2], atol=1e-12), name


def test_stochastic_solvers_converge_to_one_sample(vp) -> None:
    """Different methods, one Brownian motion: the same sample in the limit."""
    problem = gaussian(vp)
    x = starts(problem, 1, (64,))
    ts = logsnr(vp, 500)
    names = ["ancestral"] + [
        name for name, s in SOLVERS.items() if s.order and getattr(s, "eta", None) == 1.0 and s.stochastic
    ]
    out = {name: integrate(SOLVERS[name], problem, x, ts, noise=BrownianMotion(x, 3)).x for name in names}
    spread = out["ancestral"].std()
    for name in names:
        assert (out[name] - out["ancestral"]).square().mean().sqrt() < 0.03 * spread, name


def test_encoding_with_noise_is_the_forward_process(path) -> None:
    """From data to noise the family has other drifts: at eta = 1 it is q(z_t | z_s) itself, in DDIM's form exactly."""

    def backwards(path: Path, n: int) -> Tensor:
        return logsnr(path, n).flip(0)

    mean, variance = weak_order(DDIM(eta=1.0), path, backwards, steps=(5, 10, 20))
    assert max(*mean.errors, *variance.errors) < 1e-12
    for solver in (EulerMaruyama(), EulerMaruyama(eta=0.5), DDIM(eta=0.5), TorchSDE("euler"), TorchSDE("heun")):
        mean, variance = weak_order(solver, path, backwards, steps=(40, 80, 160))
        assert mean.attains(solver.order), f"{solver}: mean {mean}"
        assert variance.attains(solver.order), f"{solver}: variance {variance}"


def test_all_grids_of_the_certificate_are_grids(path) -> None:
    for make in CERTIFIED_GRIDS.values():
        ts = make(path, 20)
        assert len(ts) == 21
        assert bool((ts.diff() < 0).all())


def test_strong_order_of_a_deterministic_shift_is_seen(vp) -> None:
    """A solver whose noise does not come from the path that it was given has no strong order."""
    problem = gaussian(vp)
    fresh = iter(range(10**6))
    measured = strong_order(
        DDIM(eta=1.0), problem, starts(problem, 1, (64,)), steps=(10, 20), finest=40,
        noise=lambda x, seed: BrownianMotion(x, next(fresh)),
    )  # fmt: skip
    assert measured.slope < 0.5


def test_order_is_lost_by_replacing_a_stage(problems: Problems, answers: dict[str, Tensor]) -> None:
    problem = problems["vp"]
    x = starts(problem)
    right = measured_order(Heun(), problem, x, steps=(80, 160), answer=answers["vp"])
    wrong = measured_order(CrookedHeun(), problem, x, steps=(80, 160), answer=answers["vp"])
    assert right.slope > 1.8 > 0.5 > wrong.slope
    assert replace(right, errors=(1.0, 0.25)).slope == pytest.approx(2)


def test_few_solvers_claim_no_order() -> None:
    """Whoever declares order 0 and follows no tolerance is asked for the contract only: the list is short and known."""
    exempt = {name for name, s in SOLVERS.items() if s.order == 0 and (s.nfe_per_step > 0 or s.stochastic)}
    assert exempt == {"pc_langevin", "annealed_langevin", "gotta_go_fast", "adaptive_heun"}
