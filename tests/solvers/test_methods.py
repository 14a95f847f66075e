"""The methods themselves, against their papers' formulas and against the libraries they adapt."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sdegen.paths import Tabulated
from solvers import (
    DDIM,
    ODE,
    SOLVERS,
    Ancestral,
    BrownianMotion,
    DiffusionProblem,
    EulerMaruyama,
    ScipyODE,
    TorchDiffEq,
    TorchSDE,
    integrate,
    solve,
)
from solvers.certify import gaussian, starts
from solvers.grids import logsnr
from solvers.runge_kutta import RK4, BogackiShampine, DormandPrince, Euler, Heun, Midpoint, Ralston

# --- Runge-Kutta ------------------------------------------------------------------------------------------------------

TABLEAUX = (Euler, Midpoint, Heun, Ralston, BogackiShampine, RK4, DormandPrince)


@pytest.mark.parametrize("method", TABLEAUX)
def test_tableaux_satisfy_the_order_conditions(method: type) -> None:
    """Quadrature SUM b c^k = 1/(k+1), and the tree conditions of order 3 and 4 (Hairer et al. 1993, II.2)."""
    b, c = np.array(method.tableau.b), np.array(method.tableau.c)
    a = np.zeros((len(b), len(b)))
    for i, row in enumerate(method.tableau.a, start=1):
        a[i, : len(row)] = row
    for k in range(method.order):
        assert b @ c**k == pytest.approx(1 / (k + 1), abs=1e-14)
    if method.order >= 3:
        assert b @ a @ c == pytest.approx(1 / 6, abs=1e-14)
    if method.order >= 4:
        assert (b * c) @ a @ c == pytest.approx(1 / 8, abs=1e-14)
        assert b @ a @ c**2 == pytest.approx(1 / 12, abs=1e-14)
        assert b @ a @ a @ c == pytest.approx(1 / 24, abs=1e-14)


def test_on_the_exponential_a_step_is_its_taylor_polynomial() -> None:
    grows = ODE(lambda x, t: x)
    x = torch.ones(1, 1, dtype=torch.float64)
    for method in (Euler, Heun, BogackiShampine, RK4):
        done = integrate(method(), grows, x, torch.tensor([0.0, 0.3]))
        h = float(done.ts[1] - done.ts[0])
        assert float(done.x) == pytest.approx(sum(h**k / math.factorial(k) for k in range(method.order + 1)), abs=1e-15)


# --- Ancestral --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [0.0, 0.4, 1.0])
def test_a_ddpm_step_in_hos_own_notation(variance: float) -> None:
    """Ho et al. 2020, algorithm 2: x_{t-1} = (x_t - beta_t / sqrt(1 - abar_t) eps) / sqrt(1 - beta_t) + sigma_t z."""
    betas = np.linspace(1e-4, 0.02, 1000)
    path = Tabulated(betas=betas)
    abar = np.cumprod(1 - betas)
    problem = gaussian(path)
    i = 400  # x_i -> x_{i-1}, counted from 1
    ts = torch.tensor([i / 1000, (i - 1) / 1000], dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64)
    eps = problem.predict(x, ts[0]).eps
    z = torch.randn(3, 2, dtype=torch.float64)
    done = integrate(Ancestral(variance), problem, x, ts, noise=lambda a, b: z).x
    beta = betas[i - 1]
    tilde = beta * (1 - abar[i - 2]) / (1 - abar[i - 1])
    std = math.exp(0.5 * (variance * math.log(beta) + (1 - variance) * math.log(tilde)))
    expected = (x - beta / math.sqrt(1 - abar[i - 1]) * eps) / math.sqrt(1 - beta) + std * z
    assert torch.allclose(done, expected, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_ddim_step_in_songs_own_notation(eta: float, vp) -> None:
    """Song et al. 2021, eq. 12, with their alpha = our alpha^2."""
    problem = gaussian(vp)
    ts = torch.tensor([0.6, 0.45], dtype=torch.float64)
    a_t, a_s = (vp.alpha(ts) ** 2).tolist()
    x, z = torch.randn(2, 3, 2, dtype=torch.float64)
    eps = problem.predict(x, ts[0]).eps
    std = eta * math.sqrt((1 - a_s) / (1 - a_t)) * math.sqrt(1 - a_t / a_s)
    x0 = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    expected = math.sqrt(a_s) * x0 + math.sqrt(1 - a_s - std**2) * eps + std * z
    done = integrate(DDIM(eta), problem, x, ts, noise=lambda a, b: z).x
    assert torch.allclose(done, expected, atol=1e-12)


def test_ddpm_is_ddim_with_eta_one(path) -> None:
    problem = gaussian(path)
    x, ts = starts(problem), logsnr(path, 12)
    a, b = (integrate(s, problem, x, ts, noise=BrownianMotion(x, 0)).x for s in (Ancestral(), DDIM(eta=1.0)))
    assert torch.allclose(a, b, atol=1e-12)


def test_settings_that_make_no_sense_are_refused() -> None:
    for make, words in (
        (lambda: DDIM(eta=1.5), "eta is in"),
        (lambda: DDIM(eta=-0.1), "eta is in"),
        (lambda: Ancestral(variance=2.0), "variance is in"),
        (lambda: EulerMaruyama(eta=0.0), "eta is positive"),
        (lambda: TorchDiffEq("dopri6"), "no method 'dopri6'; there are: adaptive_heun, bosh3"),
        (lambda: ScipyODE("RK46"), "no method 'RK46'"),
        (lambda: ScipyODE(rtol=0.0), "tolerances are positive"),
        (lambda: TorchSDE("srk2"), "no method 'srk2'"),
        (lambda: TorchSDE(eta=0.0), "eta is positive"),
    ):
        with pytest.raises(ValueError, match=words):
            make()


def test_methods_without_noise_draw_none(vp) -> None:
    problem = gaussian(vp)
    x = starts(problem)

    def loud(a: Tensor, b: Tensor) -> Tensor:
        raise AssertionError("noise was drawn")

    for name, solver in SOLVERS.items():
        if not solver.stochastic:
            assert integrate(solver, problem, x, logsnr(vp, 3), noise=loud).x.shape == x.shape, name


# --- Black boxes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [TorchDiffEq(m) for m in ("dopri5", "bosh3", "dopri8", "rk4", "heun3")], ids=repr)
@pytest.mark.parametrize("encode", [False, True])
def test_torchdiffeq_asks_nothing_outside_a_step(solver, encode: bool) -> None:
    asked: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.float64
        assert t.ndim == 0
        asked.append(float(t))
        return 5 * torch.cos(9 * t) * x

    ts = torch.tensor([0.013, 0.7], dtype=torch.float64)
    ts = ts if encode else ts.flip(0)
    done = integrate(solver, ODE(velocity, 0.0, 1.0), torch.ones(2, 1), ts)
    assert min(asked) >= 0.013
    assert max(asked) <= 0.7
    assert done.nfe == len(asked)
    assert done.x.dtype == torch.float32


def test_a_float32_state_near_zero_time_has_all_digits_of_its_time() -> None:
    """In torchdiffeq a float32 state makes float32 times; at t = 1e-5 + 1e-12 that is another time."""
    asked: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return torch.zeros_like(x)

    start, end = 1e-5, 1e-5 + 3e-12
    integrate(TorchDiffEq("rk4"), ODE(velocity), torch.ones(1, 1), torch.tensor([end, start], dtype=torch.float64))
    assert asked[0] == end
    assert start <= min(asked) < end


def test_an_adaptive_step_over_the_whole_middle_is_not_taken(vp) -> None:
    """Nothing moves at either end of a VP path; at tolerance 1e-2 an unguarded dopri5 jumps over all that does."""
    problem = gaussian(vp, std=0.05)
    x = starts(problem)
    exact = solve(problem, x, solver="dop853_lam", tol=1e-12).x
    for name in ("dopri5", "rk45", "dopri5_lam", "rk45_lam"):
        assert (solve(problem, x, solver=name, tol=1e-2).x - exact).abs().max() < 0.02, name


def test_torchdiffeq_is_differentiable() -> None:
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    done = integrate(
        TorchDiffEq("dopri5", 1e-9, 1e-9),
        ODE(lambda x, t: rate * x),
        torch.ones(1, 1).double(),
        torch.tensor([0.0, 1.0]),
    )
    done.x.sum().backward()
    assert float(rate.grad) == pytest.approx(math.exp(0.7), rel=1e-6)


def test_scipy_says_when_it_gives_up() -> None:
    explodes = ODE(lambda x, t: x**2)
    with pytest.raises(ValueError, match=r"^rk45 gave up between t = 0 and 1"):
        integrate(ScipyODE("RK45"), explodes, 2 * torch.ones(1, 1).double(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("solver", [ScipyODE("RK45", 1e-9, 1e-9), TorchDiffEq("dopri5", 1e-9, 1e-9)], ids=repr)
def test_no_black_box_asks_for_ever(solver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("solvers.external.PATIENCE", 500)
    shakes = ODE(lambda x, t: torch.cos(5000 * t) * x)
    with pytest.raises(ValueError, match="no end after 500 evaluations between t = 0 and 1"):
        integrate(solver, shakes, torch.ones(1, 1).double(), torch.tensor([0.0, 1.0]))


def test_torchsde_euler_is_euler_maruyama_in_lam() -> None:
    """On a VP path that is linear in logsnr, t and lam differ by a factor: the two are the same numbers."""
    from sdegen.paths import VP, LinearLogSNR

    path = VP(LinearLogSNR(8, -8))
    problem = gaussian(path)
    x, ts = starts(problem, 3, (2, 2, 2)), logsnr(path, 15)
    ours, theirs = (
        integrate(s, problem, x, ts, noise=BrownianMotion(x, 2)).x for s in (EulerMaruyama(), TorchSDE("euler"))
    )
    assert torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("method", TorchSDE.METHODS)
def test_every_torchsde_method_spends_what_it_declares(method: str, path) -> None:
    problem: DiffusionProblem = gaussian(path)
    x = starts(problem, 3)
    solver = TorchSDE(method)
    before = torch.random.get_rng_state()
    done = integrate(solver, problem, x, logsnr(path, 4), noise=BrownianMotion(x, 0))
    assert done.nfe == 4 * solver.nfe_per_step
    assert torch.equal(before, torch.random.get_rng_state())
