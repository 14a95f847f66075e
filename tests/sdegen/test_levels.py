"""The measure of the latent term: its atoms are KL divergences, its limit is continuous, its estimates unbiased."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdegen.adaptive import LearnedClock, SecondMoment
from sdegen.densities import (
    Density,
    Hyperbolic,
    Logistic,
    Normal,
    Shares,
    Spectrum,
    UniformLogSNR,
    UniformTime,
    stratified,
)
from sdegen.levels import Continuous, Discrete, Empty, Interpolated, Levels, Optimal, beta, given, posterior
from sdegen.models import VPSDE
from sdegen.objectives import Bound, Simple
from sdegen.oracles import oracle
from sdegen.paths import VE, VP, Cosine, Flow, GaussianPath, LinearBeta, LinearLogSNR
from solvers.analytic import AnalyticDPM, GaussianMSE, MeasuredMSE
from solvers.ancestral import Ancestral

PATHS = {
    "linear-logsnr": VP(LinearLogSNR(8, -6)),
    "linear-beta": VP(LinearBeta(), t_min=1e-3),
    "cosine": VP(Cosine(), t_min=0.01, t_max=0.99),
    "ve": VE(0.01, 20),
    "flow": Flow(t_min=0.01, t_max=0.99),
}


def _learned() -> LearnedClock:
    clock = LearnedClock(knots=7)
    clock.theta.data = torch.linspace(-0.4, 0.3, 7, dtype=torch.float64)[torch.tensor([3, 0, 5, 1, 6, 2, 4])]
    return clock


def _second_moment() -> SecondMoment:
    resampler = SecondMoment(bands=5)
    resampler.counts += 100
    resampler.moments += torch.tensor([1.0, 9.0, 4.0, 0.0, 25.0], dtype=torch.float64)
    return resampler


DENSITIES: list[Density] = [
    *(UniformLogSNR(), UniformTime(), Hyperbolic(), Logistic(), Normal()),
    *(Spectrum(), Spectrum((4.0, 0.2, 1e-3)), Shares((1, 5, 2, 0.1)), _learned(), _second_moment()),
]
NAMES = [str(density).partition("\n")[0] for density in DENSITIES]


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


def test_a_measured_error_serves_levels_and_solvers_alike() -> None:
    path, mse = PATHS["cosine"], GaussianMSE(0.3)
    ends = [float(path.logsnr(t)) for t in (path.t_max, path.t_min)]
    logsnr = torch.linspace(*ends, 200, dtype=torch.float64)
    measured = MeasuredMSE(tuple(logsnr.tolist()), tuple(mse(logsnr).tolist()))
    levels = [Discrete.on(path, 12, variance=Optimal(error)) for error in (mse, measured)]
    torch.testing.assert_close(levels[1].mass(path), levels[0].mass(path), rtol=1e-3, atol=0)
    assert float(measured(logsnr[70])) == pytest.approx(float(mse(logsnr[70])))


def _cost(path: GaussianPath, levels: Discrete, mse: GaussianMSE) -> Tensor:
    """The latent term per coordinate, for a measured error."""
    t = levels.ts[1:]
    error = path.logsnr(t).exp() * mse(path.logsnr(t))
    return 0.5 * (levels.mass(path) * error).sum() + levels.constant(path)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("T", [1, 2, 7, 100, 1000])
def test_with_the_optimal_variance_every_T_has_the_continuous_bound_of_gaussian_data(
    path: GaussianPath, T: int
) -> None:
    mse = GaussianMSE(0.5)
    low, high = (math.log1p(0.25 * math.exp(float(path.logsnr(t)))) for t in (path.t_max, path.t_min))
    found = _cost(path, Discrete.on(path, T, variance=Optimal(mse)), mse)
    torch.testing.assert_close(float(found), 0.5 * (high - low), rtol=1e-12, atol=0)


def test_the_optimal_variance_is_the_best_of_all() -> None:
    path, mse = PATHS["cosine"], GaussianMSE(0.3)
    ts = torch.linspace(path.t_min, path.t_max, 9, dtype=torch.float64)
    s, t = ts[:-1], ts[1:]
    best = path.posterior(s, t)[2].square() / Optimal(mse)(path, s, t)
    least = _cost(path, Discrete(ts, Optimal(mse)), mse)
    torch.testing.assert_close(_cost(path, Discrete(ts, given(best)), mse), least, rtol=1e-12, atol=0)
    for factor in (0.99, 1.01):
        for i in range(8):
            moved = best.clone()
            moved[i] *= factor
            assert float(_cost(path, Discrete(ts, given(moved)), mse)) > float(least)


@pytest.mark.parametrize("std", [0.05, 0.3, 1.0, 3.0])
def test_variances_that_are_fitted_inside_the_range_are_the_best_there(std: float) -> None:
    path, mse = PATHS["linear-beta"], GaussianMSE(std)
    ts = torch.linspace(path.t_min, path.t_max, 9, dtype=torch.float64)
    fitted = Interpolated.fit(path, ts, mse)
    assert isinstance(fitted.v, tuple)
    assert all(0 <= v <= 1 for v in fitted.v)
    least = float(_cost(path, Discrete(ts, fitted), mse))
    for i in range(8):
        for v in (0.0, 0.5, 1.0, min(1.0, fitted.v[i] + 0.02), max(0.0, fitted.v[i] - 0.02)):
            other = Interpolated((*fitted.v[:i], v, *fitted.v[i + 1 :]))
            assert float(_cost(path, Discrete(ts, other), mse)) >= least - 1e-12
    optimal = float(_cost(path, Discrete(ts, Optimal(mse)), mse))
    assert least >= optimal - 1e-12
    if std <= 1:  # between a point and N(0, I) the best variance lies between the posterior's and beta
        assert least == pytest.approx(optimal, rel=1e-9)


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
@pytest.mark.parametrize("density", DENSITIES, ids=NAMES)
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


@pytest.mark.parametrize("density", DENSITIES, ids=NAMES)
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
    assert Discrete.on(PATHS["cosine"], 12, variance=Optimal(GaussianMSE())).sampler()["solver"] == AnalyticDPM()
    with pytest.raises(ValueError, match="choose a solver"):
        Discrete.on(PATHS["cosine"], 12, variance=given(torch.ones(12))).sampler()


def test_a_share_for_each_level_samples_like_one_share_where_they_are_equal() -> None:
    model = VPSDE(oracle("mixture2d"), PATHS["cosine"])
    one, many = (model.discretize(8, variance=Interpolated(v)).sample(16) for v in (0.4, (0.4,) * 8))
    torch.testing.assert_close(many, one, rtol=0, atol=1e-12)
    other = model.discretize(8, variance=Interpolated((0.4,) * 7 + (0.9,))).sample(16)
    assert float((other - one).abs().max()) > 1e-3


def test_bad_levels_are_refused_in_one_line() -> None:
    path = PATHS["cosine"]
    for make, words in (
        (lambda: Discrete.on(path, 0), "at least one level"),
        (lambda: Discrete.on(path, 4, grid="unifrom"), "did you mean 'uniform'"),
        (lambda: Discrete.on(path, 4, variance="bta"), "did you mean 'beta'"),
        (lambda: Discrete(torch.tensor([0.5, 0.1])), "rising"),
        (lambda: Discrete.on(path, 4, variance=given(torch.ones(3))).mass(path), "do not fit"),
        (lambda: Discrete.on(path, 4, variance=Interpolated((0.1, 0.2))).mass(path), "do not fit"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)
