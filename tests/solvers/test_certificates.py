"""Every entry of SOLVERS holds what it declares; and the measurements themselves, on errors that are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sdegen.oracles import MixtureOracle
from solvers import (
    DDIM,
    SOLVERS,
    Ancestral,
    BrownianMotion,
    DiffusionProblem,
    DormandPrince,
    EulerMaruyama,
    Heun,
    Moments,
    Path,
    TorchSDE,
    integrate,
    table,
    trace,
)
from solvers.certify import (
    CERTIFIED_GRIDS,
    Certificate,
    Check,
    Measured,
    certify,
    gaussian,
    refined,
    starts,
    strong_order,
    uneven,
    weak_order,
)
from solvers.certify import mixture as certify_mixture
from solvers.certify.problems import MEANS, STDS
from solvers.grids import logsnr, uniform

Problems = dict[str, DiffusionProblem]


LONG = {"torchdiffeq_adaptive_heun", "torchdiffeq_explicit_adams", "torchdiffeq_implicit_adams", "radau", "bdf"}
"""Many calls and no new formula: certified on one path and grid, and in every variable by ``test_external``."""


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_holds_what_it_declares(name: str, problems: Problems, answers: dict[str, Tensor]) -> None:
    if name in LONG:
        certificate = certify(SOLVERS[name], {"vp": problems["vp"]}, answers=answers, grids=["uneven"])
    else:
        certificate = certify(SOLVERS[name], problems, answers=answers)
    assert certificate.passed, f"\n{certificate}"
    assert not any("though not declared" in check.seen for check in certificate.checks), f"\n{certificate}"


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


# --- What a certificate is --------------------------------------------------------------------------------------------


def test_a_certificate_prints_its_lines() -> None:
    good, bad = Check("shape", True, "(2, 2)"), Check("order 2", False, "slope 1.00")
    assert Certificate(Heun(), (good,)).passed
    text = str(Certificate(Heun(), (good, bad)))
    assert text.startswith("Heun() (order 2) DOES NOT HOLD")
    assert "FAIL  order 2" in text
    assert "pass  shape" in text


# --- The measurements themselves --------------------------------------------------------------------------------------


def test_slopes_are_those_of_a_power_and_leave_rounding_out() -> None:
    assert Measured((10, 20, 40), (1.0, 0.25, 0.0625)).slopes == pytest.approx((2, 2))
    assert Measured((10, 20, 40), (1.0, 0.125, 1e-15)).slope == pytest.approx(3)
    assert Measured((10, 20), (1e-15, 1e-16)).slope == math.inf
    assert str(Measured((10, 20), (1e-15, 1e-16))) == "exact: 1e-16"


def errors_of(*powers: float, limit: float = 0.0) -> Callable[[int], Tensor]:
    """Signed errors limit + SUM_p c_p N^-p, c_1, c_2, ... given."""

    def error(n: int) -> Tensor:
        return torch.tensor([limit + sum(c * n**-p for p, c in enumerate(powers, start=1))], dtype=torch.float64)

    return error


def test_refining_goes_on_until_the_slope_has_settled() -> None:
    assert refined(errors_of(0, 1), 2).steps == (20, 40, 80)
    slow = refined(errors_of(0, 1, 80), 2)  # N^-3 rules below N = 80
    assert slow.steps == (20, 40, 80, 160)
    assert slow.attains(2)
    low = refined(errors_of(0.02, 1), 2)  # N^-1 rules from N = 50 on
    assert low.steps[-1] == 2560
    assert not low.attains(2)
    crossing = refined(errors_of(0, 1, -50), 2)  # which meet at N = 50
    assert crossing.attains(2)


@pytest.mark.parametrize("order", [1, 2])
def test_a_bias_is_told_from_an_error_of_the_other_sign(order: int) -> None:
    """A hundredth, while the error of discretisation is still ten times as large."""
    terms = [0.0] * (order - 1) + [-2.0 * 10 ** (order - 1), 5.0]
    plain, biased = (refined(errors_of(*terms, limit=limit), order) for limit in (0.0, 0.01))
    assert plain.attains(order)
    assert not biased.vanishes
    assert biased.limit == pytest.approx(0.01, rel=0.2)
    assert "tending to" in str(biased)


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


def test_moments_are_those_of_the_table(vp) -> None:
    """Impulses stepped through a solver, and its coefficients; with increments that overlap, too."""
    for name in ("sra1", "sde_dpmpp_2m", "dpmpp_sde", "restart"):
        ts = uneven(vp, 10)
        table = trace(SOLVERS[name], vp, ts)
        data = Moments(MEANS.numpy(), STDS.numpy() ** 2)
        found, exact_ = table.moments(data, table.marginal(data, 0)), table.marginal(data)
        _, variance = weak_order(SOLVERS[name], vp, lambda path, n, ts=ts: ts, steps=(10,))
        expected = float(np.square(found.variance / exact_.variance - 1).mean() ** 0.5)
        assert variance.errors[0] == pytest.approx(expected, rel=1e-9), name


def test_the_mixture_is_the_oracles(mixture: MixtureOracle, path) -> None:
    mine, theirs = certify_mixture(path), mixture.problem(path)
    x = starts(mine, 8)
    for t in torch.tensor([0.3, 0.6], dtype=torch.float64).unbind():
        for a, b in zip(mine.predict(x, t), theirs.predict(x, t), strict=True):
            assert torch.allclose(a, b, atol=1e-12)
    each = torch.linspace(0.3, 0.6, 8, dtype=torch.float64)  # every sample at a time of its own
    alone = torch.cat([mine.predict(x[i : i + 1], each[i]).eps for i in range(8)])
    assert torch.allclose(mine.predict(x, each).eps, alone, atol=1e-14)


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
        assert torch.allclose(answers[name], other.x, atol=1e-13)


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
    ts = logsnr(vp, 200)
    names = ["ancestral"] + [
        name for name, s in SOLVERS.items() if s.order and getattr(s, "eta", None) == 1.0 and s.stochastic
    ]
    out = {name: integrate(SOLVERS[name], problem, x, ts, noise=BrownianMotion(x, 3)).x for name in names}
    spread = out["ancestral"].std()
    for name in names:
        assert (out[name] - out["ancestral"]).square().mean().sqrt() < 0.06 * spread, name


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
        DDIM(eta=1.0), problem, starts(problem, 1, (64,)), steps=(10, 20),
        noise=lambda x, seed: BrownianMotion(x, next(fresh)),
    )  # fmt: skip
    assert measured.slope < 0.5


def test_few_solvers_claim_no_order() -> None:
    """Whoever declares order 0 and follows no tolerance is asked for the contract only: the list is short and known."""
    exempt = {name for name, s in SOLVERS.items() if s.order == 0 and (s.nfe_per_step > 0 or s.stochastic)}
    assert exempt == {"pc_langevin", "annealed_langevin", "gotta_go_fast", "adaptive_heun"}
