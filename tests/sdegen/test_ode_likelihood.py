"""The probability-flow log-density against exact densities; its noise, its solver's error, and what it says of data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sdegen.bins import Bins
from sdegen.decoders import PosteriorDecoder, SoftmaxDecoder, TweedieDecoder
from sdegen.denoiser import Denoiser
from sdegen.levels import Continuous
from sdegen.likelihood import (
    Exact,
    Hutchinson,
    LogDensity,
    bound,
    log_density,
    ode_likelihood,
    ode_log_prob,
)
from sdegen.likelihood.control import LinearGaussian
from sdegen.models import VPSDE, GaussianDiffusion
from sdegen.networks import MLP, UNet
from sdegen.oracles import GaussianOracle, MixtureOracle, Oracle, PixelOracle, oracle
from sdegen.paths import VE, VP, Flow, GaussianPath, LinearBeta, LinearLogSNR
from solvers import Prediction, standard_normal
from solvers.noise import DECODER, ENCODER, PRIOR, PROBES

PATHS = {
    "vp-logsnr": VP(LinearLogSNR(8, -8)),
    "vp-beta": VP(LinearBeta(), t_min=1e-3),
    "ve": VE(0.02, 30),
    "flow": Flow(t_min=0.02, t_max=0.98),
}
COV = torch.tensor([[1.0, 0.4, -0.2], [0.4, 0.6, 0.3], [-0.2, 0.3, 0.8]], dtype=torch.float64)
COV = COV @ COV


def _terminal(truth: Oracle, path: GaussianPath, found: LogDensity) -> Tensor:
    """The log-density with the true terminal density in place of the prior."""
    t = torch.tensor(path.t_max, dtype=torch.float64)
    return truth.log_prob_t(found.z, path, t) + found.log_det


def _at_clean_end(truth: Oracle, path: GaussianPath, n: int) -> tuple[Tensor, Tensor]:
    t = torch.tensor(path.t_min, dtype=torch.float64)
    z = path.alpha(t) * truth.sample(n, seed=2)
    return z, truth.log_prob_t(z, path, t)


def _model() -> GaussianDiffusion:
    bins = Bins(5)
    return VPSDE(Denoiser(MLP((1, 3, 3), 5, width=8, depth=1), "levels", bins))


def _grey(n: int) -> Tensor:
    return Bins(5).value(torch.randint(5, (n, 1, 3, 3), generator=torch.Generator().manual_seed(0)))


# What a number must come with before anybody can believe it.
FIELDS = {
    "nats", "bits_per_dim", "kind", "of", "parts", "estimator_se", "data_se", "solver_error", "forward", "vjp", "jvp",
    "seconds", "dequantizer", "bin_width", "logsnr", "tolerance", "solver", "seed", "settings",
}  # fmt: skip


# --- the ODE against exact densities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("tol", [1e-5, 1e-7])
def test_log_density_of_a_mixture_to_solver_tolerance(path: GaussianPath, tol: float) -> None:
    truth = oracle("mixture2d")
    z, exact = _at_clean_end(truth, path, 12)
    found = log_density(truth.problem(path), z, tol=tol)
    assert float((_terminal(truth, path, found) - exact).abs().max()) < 100 * tol


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
    z, exact = _at_clean_end(truth, on, 6)
    errors = []
    for n in (32, 64):
        found = log_density(truth.problem(on), z, solver=solver, steps=n, variable=variable, grid="logsnr")
        errors.append(float((_terminal(truth, on, found) - exact).norm()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_prior_shifts_the_density_by_its_mismatch(path: GaussianPath) -> None:
    truth = oracle("mixture2d")
    z, exact = _at_clean_end(truth, path, 8)
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
    z, exact = _at_clean_end(truth, path, 5)
    chooses = solver in ("dopri54", "bosh32", "dopri5", "rk45", "dop853_lam")
    budget: dict[str, Any] = {"tol": 1e-6} if chooses else {"nfe": 300}
    found = log_density(truth.problem(path), z, solver=solver, **budget)
    assert float((_terminal(truth, path, found) - exact).abs().max()) < 1e-3


def test_the_variable_of_integration_changes_the_cost_and_not_the_density() -> None:
    truth, path = oracle("mixture2d"), PATHS["vp-beta"]
    z, exact = _at_clean_end(truth, path, 8)
    cost = {}
    for variable in ("logsnr", "t", "sigma", "flow"):
        found = log_density(truth.problem(path), z, variable=variable, tol=1e-5)
        assert float((_terminal(truth, path, found) - exact).abs().max()) < 1e-3
        assert found.spent is not None
        cost[variable] = float(found.spent.double().mean())
    assert cost["flow"] < 0.95 * min(cost["t"], cost["logsnr"])
    assert cost["flow"] < 0.6 * cost["sigma"]


def test_the_density_of_an_event_of_any_shape() -> None:
    flat = oracle("mixture16")
    assert isinstance(flat, MixtureOracle)
    shaped = MixtureOracle(flat.weights.numpy(), flat.means.reshape(-1, 1, 4, 4).numpy(), flat.covs.numpy())
    path = PATHS["vp-logsnr"]
    z, exact = _at_clean_end(shaped, path, 3)
    found = log_density(shaped.problem(path), z, solver="rk4", steps=60, grid="logsnr")
    torch.testing.assert_close(_terminal(shaped, path, found), exact, rtol=0, atol=1e-4)
    assert (found.forward, found.vjp) == (240, 240 * 16)


@pytest.mark.parametrize("trace", [Exact(), Hutchinson(3, seed=1)], ids=["exact", "hutchinson"])
@pytest.mark.parametrize("budget", [{"solver": "heun", "steps": 10}, {"tol": 1e-4}], ids=["fixed", "adaptive"])
def test_a_sample_does_not_know_its_batch(trace: Any, budget: dict[str, Any]) -> None:
    truth, path, n = oracle("mixture2d"), PATHS["flow"], 6
    z, _ = _at_clean_end(truth, path, n)
    problem = truth.problem(path)
    together = log_density(problem, z, trace=trace, select=lambda rows: problem, **budget)
    alone = [log_density(problem, z[i : i + 1], trace=trace, samples=[i], **budget) for i in range(n)]
    torch.testing.assert_close(torch.cat([a.log_prob for a in alone]), together.log_prob, rtol=0, atol=1e-9)
    assert together.forward == pytest.approx(sum(a.forward for a in alone) / n)  # and nobody pays for another
    assert len({a.forward for a in alone}) > 1 or "steps" in budget


class _Wrong:
    """The exact denoiser of N(0, 1/4) with its score multiplied by kappa."""

    event_shape = (1,)

    def __init__(self, kappa: float) -> None:
        self.truth, self.kappa = GaussianOracle([0.0], [0.25]), kappa

    def predict(self, path: GaussianPath) -> Callable[[Tensor, Tensor], Prediction]:
        return self.truth.predict(path, kappa=self.kappa)


def test_a_wrong_score_has_four_likelihoods() -> None:
    """kappa = 0.95: data 0.72579, reverse SDE 0.72847, probability-flow ODE 0.79341 (worse than the bound, 0.74003)."""
    x = torch.tensor([[0.5]], dtype=torch.float64)
    path = VP(LinearLogSNR(13.3, -10))
    model = VPSDE(_Wrong(0.95), path)  # type: ignore[arg-type]
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
        slope = (coef_z + coef_x * _Wrong(0.95).predict(path)(one, t).x0[:, 0]).tolist()
        variance = 1.0
        for m, noise in zip(slope, std.square().tolist(), strict=True):
            variance = m**2 * variance + noise
        values.append(0.5 * (math.log(2 * math.pi * variance) + 0.25 / variance))
    assert 2 * values[1] - values[0] == pytest.approx(0.72847, abs=1e-5)


# --- noise of the trace -----------------------------------------------------------------------------------------------


def _gaussian() -> tuple[GaussianOracle, GaussianPath, Tensor, Tensor]:
    """A Gaussian, a path, a datum, and M = INT g^2 / 2 (alpha^2 S + sigma^2)^-1 dt, the Jacobian's integral."""
    truth, path = GaussianOracle([0.0, 0.0, 0.0], COV.numpy()), PATHS["vp-logsnr"]
    at = Continuous().nodes(path, 128)
    alpha2, sigma2 = path.alpha(at.t).square(), path.sigma(at.t).square()
    values, vectors = torch.linalg.eigh(COV)
    m = vectors @ torch.diag((0.5 * at.weight * sigma2 / (alpha2 * values[:, None] + sigma2)).sum(1)) @ vectors.T
    return truth, path, torch.tensor([[0.3, -0.5, 0.9]], dtype=torch.float64), m


@pytest.mark.parametrize("budget", [{"steps": 24}, {"tol": 1e-5}], ids=["fixed", "adaptive"])
def test_probes_that_stay_have_the_mean_and_variance_of_theory(budget: dict[str, Any]) -> None:
    """For a Gaussian the integrated Jacobian M is known: Rademacher probes have variance 2 SUM_{i != j} M_ij^2."""
    truth, path, z, m = _gaussian()
    probes = 2000
    found = log_density(truth.problem(path), z, trace=Hutchinson(probes, redraw=False), **budget)
    exact = log_density(truth.problem(path), z, **budget)
    theory = 2 * float((m - m.diag().diag()).square().sum())
    assert float(found.spread) == pytest.approx(math.sqrt(theory / probes), rel=0.075)
    assert abs(float(found.log_prob - exact.log_prob)) < 4 * float(found.spread)
    assert float(exact.spread) == 0


@pytest.mark.parametrize("solver", ["rk4", "heun", "ab_2"])
def test_fresh_probes_are_unbiased_and_know_their_noise(solver: str) -> None:
    """Whatever the weights of a method are, and also where they reach over several steps."""
    truth, path, z, m = _gaussian()
    rows = 2000
    budget = {"solver": solver, "nfe": 40}
    exact = log_density(truth.problem(path), z, **budget)
    found = log_density(truth.problem(path), z.expand(rows, 3), trace=Hutchinson(2), **budget)
    error = found.log_prob - exact.log_prob
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(rows)
    assert float(found.spread.square().mean().sqrt()) == pytest.approx(float(error.std()), rel=0.08)
    assert 0.85 < float((error / found.spread).std()) < 1.15  # of a single datum
    stays = math.sqrt(float((m - m.diag().diag()).square().sum()))
    assert float(error.std()) < stays / 2


def test_a_control_variate_takes_all_noise_from_a_gaussian_and_some_from_a_mixture() -> None:
    truth, path, z, _ = _gaussian()
    control = LinearGaussian.of(torch.zeros(3), COV)
    for budget in ({"steps": 20}, {"tol": 1e-5}):
        exact = log_density(truth.problem(path), z, **budget)
        found = log_density(truth.problem(path), z, trace=Hutchinson(1, control=control), **budget)
        assert float(found.log_prob - exact.log_prob) == pytest.approx(0, abs=1e-4)
    apart = torch.linspace(0.2, 0.5, 6, dtype=torch.float64)
    cov = torch.exp(-(apart[:, None] - apart).abs() / 0.2)
    mixture = MixtureOracle([0.5, 0.5], [apart.numpy(), -apart.numpy()], [cov.numpy(), 0.5 * cov.numpy()])
    linear = LinearGaussian.fit(mixture.sample(1000, seed=0))
    z, _ = _at_clean_end(mixture, path, 4)
    z = z.repeat_interleave(50, 0)
    noise = []
    for trace in (Hutchinson(redraw=False), Hutchinson(), Hutchinson(control=linear), Hutchinson(hold=4)):
        found = log_density(mixture.problem(path), z, trace=trace, nfe=48).log_prob.reshape(4, 50)
        noise.append(float(found.var(1).mean().sqrt()))
    assert noise[1] < noise[0] / 3
    assert noise[2] < noise[1] / 2
    assert noise[1] < 0.7 * noise[3] < 0.7 * noise[0]  # a probe for a step is more than one for the solve, and no more


def test_probes_belong_to_sample_and_evaluation() -> None:
    truth, path, z, _ = _gaussian()
    ask = {"trace": Hutchinson(2, seed=5), "steps": 5}
    both = log_density(truth.problem(path), z.expand(2, 3), samples=[7, 8], **ask).log_prob
    one = log_density(truth.problem(path), z, samples=[8], **ask).log_prob
    assert float(both[1]) == float(one)
    assert float(both[0]) != float(both[1])


def test_fresh_probes_are_refused_where_steps_depend_on_what_is_seen() -> None:
    truth, path, z, _ = _gaussian()
    for solver in ("dopri54", "dopri5", "rk45"):
        with pytest.raises(ValueError, match=r"discontinuous.*rk4, or redraw=False"):
            log_density(truth.problem(path), z, trace=Hutchinson(redraw=True), solver=solver, tol=1e-3)


def test_the_standard_error_of_a_report_is_calibrated() -> None:
    """Over 200 seeds the distance from the exact trace, in standard errors, has a standard deviation of one."""
    truth = oracle("mixture2d")
    model = VPSDE(truth, PATHS["vp-logsnr"])
    x, budget = truth.sample(24, seed=3), {"solver": "euler", "steps": 8, "check": 0}
    exact = ode_likelihood(model, x, trace=Exact(), **budget)
    assert exact.estimator_se == 0
    reports = [ode_likelihood(model, x, trace=Hutchinson(2, seed), seed=seed, **budget) for seed in range(200)]
    z = torch.tensor([(report.nats - exact.nats) / report.estimator_se for report in reports])
    assert abs(float(z.mean())) < 4 / math.sqrt(200)
    assert 0.85 < float(z.std()) < 1.15


def test_the_standard_error_counts_what_is_drawn_of_grey_levels() -> None:
    truth = PixelOracle([[0.5, 0.25, 0.2, 0.05], [0.1, 0.2, 0.3, 0.4]], Bins(4).centers(torch.float64).numpy())
    model = GaussianDiffusion(truth, VP(LinearLogSNR(3, -8)), Continuous(), SoftmaxDecoder(Bins(4)))
    x, budget = truth.sample(32, seed=3), {"solver": "heun", "steps": 3, "check": 0}
    reports = [ode_likelihood(model, x, seed=seed, **budget) for seed in range(100)]
    nats = torch.tensor([report.nats for report in reports])
    z = (nats - nats.mean()) / torch.tensor([report.estimator_se for report in reports])
    assert 0.8 < float(z.std()) < 1.2


# --- effort -----------------------------------------------------------------------------------------------------------


def test_probes_are_added_until_the_target_is_met() -> None:
    truth = oracle("mixture16")
    model, x = VPSDE(truth, PATHS["vp-logsnr"]), truth.sample(8, seed=1)
    common: dict[str, Any] = {"trace": Hutchinson(2), "steps": 6, "check": 0}
    first = ode_likelihood(model, x, **common)
    target = first.estimator_se / 4
    found = ode_likelihood(model, x, target_se=target, **common)
    exact = ode_likelihood(model, x, trace=Exact(), steps=6, check=0)
    assert found.estimator_se <= target
    assert found.forward < 16 * first.forward  # a probe is cheaper than a solve
    assert found.vjp > 10 * first.vjp
    assert abs(found.nats - exact.nats) < 4 * found.estimator_se
    assert sum(found.parts.values()) == pytest.approx(found.nats, rel=1e-9)


@pytest.mark.parametrize("probes", [1, 2])
def test_a_budget_ends_what_a_target_asks_for(probes: int) -> None:
    truth = oracle("mixture16")
    model, x = VPSDE(truth, PATHS["vp-logsnr"]), truth.sample(8, seed=1)
    common: dict[str, Any] = {"trace": Hutchinson(probes), "steps": 6, "check": 1}
    found = ode_likelihood(model, x, target_se=1e-4, max_nfe=200, **common)
    assert found.forward <= 200
    assert "not reached" in found.note
    spent = ode_likelihood(model, x, max_nfe=200, **common)
    assert 150 < spent.forward <= 200
    with pytest.raises(ValueError, match=r"one solve takes 24 .* max_nfe=20 is not enough"):
        ode_likelihood(model, x, max_nfe=20, **common)


def test_draws_are_added_for_grey_levels() -> None:
    model, x = _model(), _grey(6)
    common: dict[str, Any] = {"steps": 3, "check": 0, "seed": 1}
    first = ode_likelihood(model, x, **common)
    seen: list[tuple[int, int]] = []
    found = ode_likelihood(model, x, target_se=first.estimator_se / 3, progress=lambda *p: seen.append(p), **common)
    assert found.estimator_se <= first.estimator_se / 3
    assert found.settings["draws"] > 10
    assert seen[-1][0] == seen[-1][1] > 6
    assert sum(found.parts.values()) == pytest.approx(found.nats, rel=1e-6)


@pytest.mark.parametrize(("budget", "settled"), [({"tol": 1e-5}, True), ({"steps": 5}, False), ({"steps": 30}, True)])
def test_the_error_of_the_solver_is_measured(budget: dict[str, Any], settled: bool) -> None:
    truth, path = oracle("mixture2d"), PATHS["flow"]
    model, x = VPSDE(truth, path), truth.sample(64, seed=0)  # of which eight are solved again
    report = ode_likelihood(model, x, **budget)
    best = ode_likelihood(model, x, tol=1e-8, check=0)
    off = (report.values - best.values)[::8]
    assert report.settings["solver_error_of"] == 8
    assert report.solver_error == pytest.approx(float(off.square().mean().sqrt()), rel=0.2)
    assert report.settings["solver_error_max"] == pytest.approx(float(off.abs().max()), rel=0.2)
    assert report.kind == ("exact" if settled else "estimate")
    assert ("solver's error" in report.note) == (not settled)
    assert best.kind == "estimate"  # nobody has looked
    assert best.solver_error is None


def test_the_calls_that_measure_the_solver_s_error_are_counted() -> None:
    truth = oracle("mixture2d")
    model, x = VPSDE(truth, PATHS["flow"]), truth.sample(16, seed=0)
    alone = ode_likelihood(model, x, solver="rk4", steps=3, check=0)
    assert (alone.forward, alone.vjp) == (12, 24)
    found = ode_likelihood(model, x, solver="rk4", steps=3, check=4)
    assert found.forward == alone.forward + 4 / 16 * (12 + 24)  # as it is, and with steps half as long
    assert found.vjp == 2 * found.forward


# --- what it says of data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [None, TweedieDecoder()], ids=repr)
def test_the_density_of_data_is_that_of_the_scaled_clean_state(decoder: TweedieDecoder | None) -> None:
    truth, path = oracle("mixture2d"), VP(LinearLogSNR(3, -12))
    x = truth.sample(8, seed=4)
    model = VPSDE(truth, path, decoder=decoder)
    found = ode_log_prob(model, x, tol=1e-8)
    t0, t1 = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
    exact = truth.log_prob_t(path.alpha(t0) * x, path, t0) + 2 * path.alpha(t0).log()
    corrected = found.log_prob - found.log_prior + truth.log_prob_t(found.z, path, t1)
    torch.testing.assert_close(corrected, exact, rtol=0, atol=1e-6)
    assert set(found.parts) == {"scale"}


def test_with_a_clean_end_the_density_of_data_is_the_datas_own() -> None:
    truth = oracle("mixture2d")
    x = truth.sample(8, seed=4)
    found = ode_log_prob(VPSDE(truth, VP(LinearLogSNR(16, -12))), x, tol=1e-7).log_prob
    assert float((found - truth.log_prob(x)).abs().max()) < 5e-3


def test_the_cutoff_costs_what_is_predicted() -> None:
    """At logsnr_0 the scaled datum is off by s^2 p'' / 2 p, with s = sigma_0 / alpha_0; with z_0 drawn, by a second
    such term, s^2 (log p)'' / 2; fed as it is, unscaled, by another density altogether."""
    truth = MixtureOracle([0.4, 0.6], [[-0.6], [0.5]], [[0.09], [0.04]])
    path = VP(LinearLogSNR(10, -14))
    t0, t1 = torch.tensor([path.t_min, path.t_max], dtype=torch.float64)
    alpha, sigma = path.alpha(t0), path.sigma(t0)
    s2 = float((sigma / alpha).square())
    x = torch.tensor([[-0.7], [0.2], [1.0]], dtype=torch.float64)

    def ode(z: Tensor) -> Tensor:
        """log p(z_0), the true density at the noisy end."""
        found = log_density(truth.problem(path), z, tol=1e-9)
        return found.log_det + truth.log_prob_t(found.z, path, t1)

    at = x[:, 0].clone().requires_grad_()
    log_p = truth.log_prob(at[:, None])
    (first,) = torch.autograd.grad(log_p.sum(), at, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), at)
    log_p, first = log_p.detach(), first.detach()

    scaled = ode(alpha * x) + alpha.log() - log_p
    predicted = 0.5 * s2 * (second + first.square())
    torch.testing.assert_close(scaled, predicted, rtol=0.01, atol=0)

    nodes, weights = (torch.as_tensor(a) for a in _hermite(8))
    z = (alpha * x + sigma * nodes).reshape(-1, 1)  # E log p(x | z_0) - log q(z_0 | x) + log p(z_0), a plain decoder
    drawn = (ode(z) + alpha.log()).reshape(3, 8) @ weights - log_p
    torch.testing.assert_close(drawn, predicted + 0.5 * s2 * second, rtol=0.01, atol=0)

    unscaled = ode(x) - log_p
    shift = truth.log_prob(x / alpha) - alpha.log() - log_p  # the density of alpha_0 x, in place of that of x
    torch.testing.assert_close(unscaled, shift + predicted, rtol=0.01, atol=1e-8)


def _hermite(n: int) -> tuple[Any, Any]:
    """Nodes and weights for expectations under a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return nodes, weights / math.sqrt(2 * math.pi)


class _Labelled:
    """Data that depend on the label: a denoiser for each class."""

    event_shape = (2,)
    classes = (GaussianOracle([0.5, 0.5], [0.04, 0.09]), GaussianOracle([-0.5, 0.0], [0.25, 0.01]))

    def predict(self, path: GaussianPath, cond: Tensor | None = None) -> Callable[[Tensor, Tensor], Prediction]:
        every = [one.predict(path) for one in self.classes]

        def predict(z: Tensor, t: Tensor) -> Prediction:
            assert cond is not None, "the labels were dropped"
            assert len(cond) == len(z)
            eps = torch.stack([one(z, t).eps for one in every])
            x0 = torch.stack([one(z, t).x0 for one in every])
            rows = torch.arange(len(z))
            return Prediction(x0[cond, rows], eps[cond, rows])

        return predict


@pytest.mark.parametrize(
    "budget",
    [{"tol": 1e-5}, {"trace": Exact(), "steps": 24}, {"trace": Hutchinson(2)}, {"solver": "rk45", "tol": 1e-5}],
    ids=["adaptive", "fixed", "hutchinson", "scipy"],
)
def test_labels_reach_the_denoiser_with_their_rows(budget: dict[str, Any]) -> None:
    model = VPSDE(_Labelled(), VP(LinearLogSNR(12, -12)))  # type: ignore[arg-type]
    cond = torch.tensor([0, 1, 1, 0, 1])
    x = torch.stack([_Labelled.classes[int(c)].sample(1, seed=i)[0] for i, c in enumerate(cond)])
    exact = torch.stack([_Labelled.classes[int(c)].log_prob(x[i : i + 1])[0] for i, c in enumerate(cond)])
    report = ode_likelihood(model, x, cond, batch=3, check=1, **budget)
    torch.testing.assert_close(-report.values, exact, rtol=0, atol=2e-2)
    with pytest.raises(AssertionError, match="labels were dropped"):
        ode_likelihood(model, x, **budget)


class _Posterior(PixelOracle):
    def level_logits(self, z: Tensor, logsnr: Tensor, cond: Tensor | None = None) -> Tensor:
        return self._joint(z, logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt())[0].log_softmax(-1)


@pytest.mark.parametrize("softmax", [True, False])
def test_of_grey_levels_the_ode_gives_a_bound_on_the_probability(softmax: bool) -> None:
    """With the exact score and posterior, log p(x|z) - log q(z|x) + log p(z) = log P(x) for every z."""
    bins = Bins(4)
    probs = [[0.5, 0.25, 0.2, 0.05], [0.1, 0.2, 0.3, 0.4]]
    truth = _Posterior(probs, bins.centers(torch.float64).numpy())
    decoder = SoftmaxDecoder(bins) if softmax else PosteriorDecoder(bins)
    model = GaussianDiffusion(truth, VP(LinearLogSNR(3, -14)), Continuous(), decoder)
    x = truth.sample(16, seed=0)
    found = ode_log_prob(model, x, draws=2, solver="rk4", steps=60)
    gap = truth.log_prob(x) - found.log_prob
    assert set(found.parts) == {"reconstruction", "entropy"}
    if softmax:
        assert float(gap.mean()) > 0.05
    else:
        assert float(gap.abs().max()) < 3e-3
        weighted = ode_log_prob(model, x, K=5, solver="rk4", steps=60)  # log K is taken off: equal weights gain nothing
        assert float((truth.log_prob(x) - weighted.log_prob).abs().max()) < 3e-3


def test_of_an_untrained_network_the_ode_agrees_with_the_bound() -> None:
    bins = Bins(5)
    x = bins.value(torch.randint(5, (64, 1, 3, 3), generator=torch.Generator().manual_seed(0)))
    denoiser = Denoiser(MLP((1, 3, 3), 5, width=8, depth=1), "levels", bins).calibrate(x)
    model = VPSDE(denoiser, VP(LinearLogSNR(6, -8)), decoder=PosteriorDecoder(bins))
    a = bound(model, x, draws=32)
    b = ode_likelihood(model, x, trace=Hutchinson(2))
    assert (a.kind, b.kind) == ("upper bound", "upper bound")
    assert abs(a.nats - b.nats) < 4 * math.hypot(a.estimator_se, b.estimator_se) + 0.02
    exact = ode_likelihood(model, x, nfe=96, trace=Exact(), check=0)
    assert abs(exact.nats - b.nats) < 4 * math.hypot(exact.estimator_se, b.estimator_se)


def test_traces_of_a_convolutional_network_agree() -> None:
    torch.manual_seed(0)
    bins = Bins(5)
    net = UNet((1, 4, 4), 5, channels=(8, 8), blocks=1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model = VPSDE(Denoiser(net, "levels", bins)).double().eval()
    z = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    exact = log_density(model.problem(), z, solver="heun", steps=4)
    many = log_density(model.problem(), z, solver="heun", steps=4, trace=Hutchinson(200))
    assert float(((many.log_prob - exact.log_prob) / many.spread).abs().max()) < 4.5


def test_draws_of_different_meaning_are_independent_at_one_seed() -> None:
    """A model's own samples must not be scored with the noise that made them."""
    streams = [standard_normal((500, 4), 0, stream=stream) for stream in (PRIOR, DECODER, ENCODER, PROBES)]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert abs(float((a * b).mean())) < 0.1
    truth = PixelOracle(torch.full((1, 2, 2, 5), 0.2), Bins(5).centers(torch.float64))
    model = VPSDE(truth, VP(LinearLogSNR(3, -8)), decoder=SoftmaxDecoder(Bins(5)), event_shape=(1, 2, 2))
    x = model.sample(1000, seed=0, steps=10)
    own, other = (ode_likelihood(model, x, solver="heun", steps=10, draws=1, seed=seed).nats for seed in (0, 1))
    assert own == pytest.approx(other, abs=0.03)
    assert own != other
