"""The measure of the latent term: its atoms are KL divergences, its limit is continuous, its estimates unbiased."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdegen.levels import Continuous, Discrete, Empty, Interpolated, Levels, beta, given, posterior
from sdegen.objectives import (
    Bound,
    Density,
    Hyperbolic,
    Logistic,
    Normal,
    Simple,
    UniformLogSNR,
    UniformTime,
    stratified,
)
from sdegen.paths import VE, VP, Cosine, Flow, GaussianPath, LinearBeta, LinearLogSNR
from solvers.ancestral import Ancestral

PATHS = {
    "linear-logsnr": VP(LinearLogSNR(8, -6)),
    "linear-beta": VP(LinearBeta(), t_min=1e-3),
    "cosine": VP(Cosine(), t_min=0.01, t_max=0.99),
    "ve": VE(0.01, 20),
    "flow": Flow(t_min=0.01, t_max=0.99),
}
DENSITIES: list[Density] = [UniformLogSNR(), UniformTime(), Hyperbolic(), Logistic(), Normal()]


def _f(logsnr: Tensor) -> Tensor:
    return torch.exp(-0.1 * (logsnr - 1).square())


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("variance", [posterior, beta, Interpolated(0.3), "given"], ids=str)
def test_atoms_are_the_divergences_of_the_transitions(path: GaussianPath, variance: object) -> None:
    ts = torch.linspace(path.t_min, path.t_max, 8, dtype=torch.float64)
    s, t = ts[:-1], ts[1:]
    if variance == "given":
        variances = torch.linspace(0.5, 2.0, 7).double() * path.transition(s, t)[1].square()
        variance = given(variances)
    levels = Discrete(ts, variance)  # type: ignore[arg-type]

    x, guess, dims = 0.7, -0.2, 3
    _, coef, std_q = path.posterior(s, t)
    var_p = std_q.square() / levels.variance(path, s, t)
    kl = 0.5 * dims * (std_q.square() / var_p - 1 - (std_q.square() / var_p).log())
    kl = kl + dims * (coef * (x - guess)).square() / (2 * var_p)

    error = dims * (path.alpha(t) / path.sigma(t) * (x - guess)).square()  # |eps - eps_hat|^2
    ours = 0.5 * levels.mass(path) * error
    torch.testing.assert_close(ours.sum() + dims * levels.constant(path), kl.sum(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_beta_is_the_variance_of_the_forward_step(path: GaussianPath) -> None:
    ts = torch.linspace(path.t_min, path.t_max, 6, dtype=torch.float64)
    s, t = ts[:-1], ts[1:]
    ratio = path.posterior(s, t)[2].square() / path.transition(s, t)[1].square()
    torch.testing.assert_close(beta(path, s, t), ratio, rtol=1e-10, atol=0)
    torch.testing.assert_close(Interpolated(0.5)(path, s, t), ratio.sqrt(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_atoms_become_the_continuous_measure_from_above_at_rate_one_over_T(path: GaussianPath) -> None:
    def integral(levels: Levels) -> float:
        at = levels.nodes(path, 256)
        return float((at.weight * _f(path.logsnr(at.t))).sum())

    limit = integral(Continuous())
    gaps = [integral(Discrete.on(path, T, grid="logsnr")) - limit for T in (400, 800)]
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(1.0, abs=0.05)
    ends = path.logsnr(torch.tensor([path.t_min, path.t_max], dtype=torch.float64))
    assert float(Discrete.on(path, 10**5).mass(path).sum()) >= float(ends[0] - ends[1])


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_continuous_nodes_integrate_in_logsnr(path: GaussianPath) -> None:
    at = Continuous().nodes(path, 64)
    low, high = (float(path.logsnr(t)) for t in (path.t_max, path.t_min))
    cubic = (at.weight * path.logsnr(at.t) ** 3).sum()
    torch.testing.assert_close(float(cubic), (high**4 - low**4) / 4, rtol=1e-9, atol=1e-9)
    assert len(at.t) >= 64
    assert bool((at.t >= path.t_min).all() and (at.t <= path.t_max).all())


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("density", DENSITIES, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("weighting", [Bound(), Simple()], ids=lambda w: type(w).__name__)
def test_the_sampling_density_never_changes_the_expectation(
    path: GaussianPath, density: Density, weighting: Bound | Simple
) -> None:
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for levels in (Continuous(), Discrete.on(path, 25)):
        nodes = levels.nodes(path, 256)
        logsnr = path.logsnr(nodes.t)
        exact = 0.5 * (weighting(logsnr, nodes.own) * nodes.weight * _f(logsnr)).sum()
        drawn = levels.integral(path, u, lambda t: _f(path.logsnr(t)), density, weighting).mean()
        torch.testing.assert_close(drawn, exact, rtol=5e-4, atol=0)


@pytest.mark.parametrize("density", DENSITIES, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_density_is_the_derivative_of_its_distribution_function(density: Density, path: GaussianPath) -> None:
    u = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    t = density.time(u, path)
    torch.testing.assert_close(density.cdf(t, path), u, rtol=0, atol=1e-9)
    h = 1e-4
    higher, lower = (density.cdf(path.time(path.logsnr(t) + d), path) for d in (h, -h))
    torch.testing.assert_close((lower - higher) / (2 * h), density.pdf(t, path), rtol=1e-5, atol=1e-8)
    ends = density.time(torch.tensor([0.0, 1.0]).double(), path)
    torch.testing.assert_close(ends, torch.tensor([path.t_min, path.t_max], dtype=torch.float64), rtol=0, atol=1e-9)


def test_as_many_strata_as_atoms_visit_each_atom_once() -> None:
    path, levels = PATHS["linear-beta"], Discrete.on(PATHS["linear-beta"], 40)
    u = stratified(1, 40, torch.Generator().manual_seed(3))
    at = levels.draw(path, u, UniformTime())
    torch.testing.assert_close(at.t, levels.ts[1:])
    torch.testing.assert_close(at.weight / 40, levels.mass(path))


def test_simple_on_atoms_is_the_plain_mean_over_the_levels() -> None:
    path, levels = PATHS["linear-beta"], Discrete.on(PATHS["linear-beta"], 17)
    at = levels.nodes(path)
    torch.testing.assert_close(at.own * at.weight, torch.full((17,), 1 / 17).double())


def test_no_levels_ask_nothing() -> None:
    def error(t: Tensor) -> Tensor:
        raise AssertionError("a VAE has no denoising error")

    u = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert Empty().integral(PATHS["flow"], u, error, UniformTime(), Bound()).tolist() == [0.0] * 5
    assert len(Empty().nodes(PATHS["flow"], 8).t) == 0
    assert Empty().constant(PATHS["flow"]) == 0.0


def test_a_model_samples_with_the_variance_that_its_bound_scores() -> None:
    settings = Discrete.on(PATHS["cosine"], 12, variance="beta").sampler()
    assert settings["solver"] == Ancestral(variance=1.0)
    assert settings["ts"][0] == PATHS["cosine"].t_max
    with pytest.raises(ValueError, match="choose a solver"):
        Discrete.on(PATHS["cosine"], 12, variance=given(torch.ones(12))).sampler()


def test_bad_levels_are_refused_in_one_line() -> None:
    path = PATHS["cosine"]
    for make, words in (
        (lambda: Discrete.on(path, 0), "at least one level"),
        (lambda: Discrete.on(path, 4, grid="unifrom"), "did you mean 'uniform'"),
        (lambda: Discrete.on(path, 4, variance="bta"), "did you mean 'beta'"),
        (lambda: Discrete(torch.tensor([0.5, 0.1])), "rising"),
        (lambda: Discrete.on(path, 4, variance=given(torch.ones(3))).mass(path), "do not fit"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)
