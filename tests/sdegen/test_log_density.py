"""The probability-flow log-density of states against exact densities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from truths import PATHS, Wrong, at_clean_end, terminal

from sdegen.likelihood import (
    Exact,
    Hutchinson,
    bound,
    log_density,
    ode_log_prob,
)
from sdegen.models import VPSDE
from sdegen.oracles import MixtureOracle, oracle
from sdegen.paths import VP, GaussianPath, LinearLogSNR


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("tol", [1e-5, 1e-7])
def test_log_density_of_a_mixture_to_solver_tolerance(path: GaussianPath, tol: float) -> None:
    truth = oracle("mixture2d")
    z, exact = at_clean_end(truth, path, 12)
    found = log_density(truth.problem(path), z, tol=tol)
    assert float((terminal(truth, path, found) - exact).abs().max()) < 100 * tol


@pytest.mark.parametrize(
    ("solver", "order", "path", "variable"),
    [
        ("heun", 2, "vp-beta", "flow"),
        ("heun", 2, "ve", "t"),
        ("rk4", 4, "flow", "logsnr"),
        ("rk4", 4, "vp-logsnr", "flow"),
    ],
)
def test_log_density_converges_with_the_order_of_the_solver(solver: str, order: int, path: str, variable: str) -> None:
    truth, on = oracle("mixture2d"), PATHS[path]
    z, exact = at_clean_end(truth, on, 6)
    errors = []
    for n in (32, 64):
        found = log_density(truth.problem(on), z, solver=solver, steps=n, variable=variable, grid="logsnr")
        errors.append(float((terminal(truth, on, found) - exact).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_prior_shifts_the_density_by_its_mismatch(path: GaussianPath) -> None:
    truth = oracle("mixture2d")
    z, exact = at_clean_end(truth, path, 8)
    found = log_density(truth.problem(path), z, tol=1e-9)
    t = torch.tensor(path.t_max, dtype=torch.float64)
    scale = torch.hypot(path.alpha(t), path.sigma(t))
    normal = torch.distributions.Normal(0, scale).log_prob(found.z).sum(1)
    mismatch = normal - truth.log_prob_t(found.z, path, t)
    torch.testing.assert_close(found.log_prior, normal)
    torch.testing.assert_close(found.log_prob - exact, mismatch, rtol=0, atol=1e-6)
    assert float(mismatch.abs().max()) > 1e-6


@pytest.mark.parametrize(
    "solver", ["dopri54", "bosh32", "dopri5", "rk45", "dop853_lam", "dopri5_fixed", "torchdiffeq_rk4", "vab_4"]
)
def test_any_ode_solver_will_do(solver: str) -> None:
    truth, path = oracle("mixture2d"), PATHS["vp-beta"]
    z, exact = at_clean_end(truth, path, 5)
    chooses = solver in ("dopri54", "bosh32", "dopri5", "rk45", "dop853_lam")
    budget: dict[str, Any] = {"tol": 1e-6} if chooses else {"nfe": 300}
    found = log_density(truth.problem(path), z, solver=solver, **budget)
    assert float((terminal(truth, path, found) - exact).abs().max()) < 1e-3


def test_the_variable_of_integration_changes_the_cost_and_not_the_density() -> None:
    truth, path = oracle("mixture2d"), PATHS["vp-beta"]
    z, exact = at_clean_end(truth, path, 8)
    cost = {}
    for variable in ("logsnr", "t", "sigma", "flow"):
        found = log_density(truth.problem(path), z, variable=variable, tol=1e-5)
        assert float((terminal(truth, path, found) - exact).abs().max()) < 1e-3
        assert found.spent is not None
        cost[variable] = float(found.spent.double().mean())
    assert cost["flow"] < 0.95 * min(cost["t"], cost["logsnr"])
    assert cost["flow"] < 0.6 * cost["sigma"]


def test_the_density_of_an_event_of_any_shape() -> None:
    flat = oracle("mixture16")
    assert isinstance(flat, MixtureOracle)
    shaped = MixtureOracle(flat.weights.numpy(), flat.means.reshape(-1, 1, 4, 4).numpy(), flat.covs.numpy())
    path = PATHS["vp-logsnr"]
    z, exact = at_clean_end(shaped, path, 3)
    found = log_density(shaped.problem(path), z, solver="rk4", steps=60, grid="logsnr")
    torch.testing.assert_close(terminal(shaped, path, found), exact, rtol=0, atol=1e-4)
    assert (found.forward, found.vjp) == (240, 240 * 16)


@pytest.mark.parametrize("trace", [Exact(), Hutchinson(3, seed=1)], ids=["exact", "hutchinson"])
@pytest.mark.parametrize("budget", [{"solver": "heun", "steps": 10}, {"tol": 1e-6}], ids=["fixed", "adaptive"])
def test_a_sample_does_not_know_its_batch(trace: Any, budget: dict[str, Any]) -> None:
    truth, path, n = oracle("mixture2d"), PATHS["flow"], 6
    z, _ = at_clean_end(truth, path, n)
    problem = truth.problem(path)
    together = log_density(problem, z, trace=trace, select=lambda rows: problem, **budget)
    alone = [log_density(problem, z[i : i + 1], trace=trace, samples=[i], **budget) for i in range(n)]
    torch.testing.assert_close(torch.cat([a.log_prob for a in alone]), together.log_prob, rtol=0, atol=1e-9)
    assert together.forward == pytest.approx(sum(a.forward for a in alone) / n)  # and nobody pays for another
    assert len({a.forward for a in alone}) > 1 or "steps" in budget


def test_a_wrong_score_has_four_likelihoods() -> None:
    """kappa = 0.95: data 0.72579, reverse SDE 0.72847, probability-flow ODE 0.79341 (worse than the bound, 0.74003)."""
    x = torch.tensor([[0.5]], dtype=torch.float64)
    path = VP(LinearLogSNR(13.3, -10))
    model = VPSDE(Wrong(0.95), path)  # type: ignore[arg-type]
    ode = -float(ode_log_prob(model, x, tol=1e-9).log_prob)
    assert ode == pytest.approx(0.79341, abs=1e-5)
    elbo = bound(model, x, draws=2000, repeats=8)
    assert abs(elbo.nats - 0.74003) < 4 * elbo.estimator_se
    # the reverse SDE keeps Gaussians Gaussian: the ancestral steps' affine maps give the variance of z_0
    T = 4000
    values = []
    for steps in (T, 2 * T):
        ts = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        t, s = ts[:-1], ts[1:]
        coef_z, coef_x, std = path.posterior(s, t)
        one = torch.ones(steps, 1, dtype=torch.float64)
        slope = (coef_z + coef_x * Wrong(0.95).predict(path)(one, t).x0[:, 0]).tolist()
        variance = 1.0
        for m, noise in zip(slope, std.square().tolist(), strict=True):
            variance = m**2 * variance + noise
        values.append(0.5 * (math.log(2 * math.pi * variance) + 0.25 / variance))
    assert 2 * values[1] - values[0] == pytest.approx(0.72847, abs=1e-5)
